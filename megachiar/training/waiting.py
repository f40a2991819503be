"""Tell from a thread's stack whether it waits for other ranks, and in which communication.

The innermost frame in ``torch.distributed`` names the collective, and the first frame outside that is known here says
what it is for: a rank that waits in ``all_reduce`` below DeepSpeed's gradient reduction "waits in the gradient
all-reduce". Where no frame is known the collective alone is named.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import PurePath
from types import FrameType

_COLLECTIVES_FILE = "torch/distributed/distributed_c10d.py"
_COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_coalesced": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_object": "all-gather",
    "all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "all_to_all": "all-to-all",
    "all_to_all_single": "all-to-all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast",
    "gather": "gather",
    "init_process_group": "rendezvous",
    "monitored_barrier": "barrier",
    "new_group": "set-up of a process group",
    "recv": "receive",
    "reduce": "reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "scatter": "scatter",
    "send": "send",
}
_PURPOSES = (  # end of the file's path, functions (empty: any), what the collective is for; the first that fits counts
    ("deepspeed/runtime/pipe/p2p.py", (), "pipeline"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", ("scaled_global_norm", "get_grad_norm_direct"), "gradient norm's"),
    ("deepspeed/runtime/zero/stage3.py", ("scaled_global_norm", "get_grad_norm_direct"), "gradient norm's"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", ("step", "_optimizer_step"), "parameter"),
    ("deepspeed/runtime/zero/partition_parameters.py", (), "parameter"),
    ("deepspeed/runtime/zero/partitioned_param_coordinator.py", (), "parameter"),
    (
        "deepspeed/runtime/engine.py",
        ("allreduce_gradients", "allreduce_bucket", "buffered_allreduce_fallback"),
        "gradient",
    ),
    ("deepspeed/runtime/zero/stage_1_and_2.py", ("average_tensor", "reduce_gradients", "reduce_ipg_grads"), "gradient"),
    ("deepspeed/runtime/zero/stage3.py", (), "gradient"),
    ("deepspeed/runtime/zero/stage_1_and_2.py", ("has_overflow", "check_overflow"), "overflow check's"),
    ("deepspeed/runtime/pipe/engine.py", (), "pipeline"),
    ("megachiar/parallel/collectives.py", (), "tensor-parallel"),
    ("megachiar/training/evaluation.py", (), "evaluation's"),
    ("megachiar/checkpoint/saver.py", (), "checkpoint's"),
    ("megachiar/checkpoint/snapshot.py", (), "checkpoint's"),
    ("megachiar/engine/gathered_state.py", (), "checkpoint's"),
    ("megachiar/checkpoint/resume.py", (), "checkpoint's"),
    ("megachiar/training/start.py", (), "start's"),
    ("megachiar/topology.py", (), "start's"),
    ("megachiar/training/watch.py", ("__exit__",), "last"),
    ("megachiar/engine/engine.py", ("mean_over_world",), "step metrics'"),
)


def describe_wait() -> str | None:
    """Return where this process waits for other ranks, such as "gradient all-reduce"; None if it does not.

    The main thread counts, and threads that Python did not start: backward passes on GPUs run in such.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    ours = {thread.ident for thread in threading.enumerate()} - {main}
    for ident in sorted(frames.keys() - ours, key=lambda ident: ident != main):
        if (wait := wait_of(frames[ident])) is not None:
            return wait
    return None


def wait_of(frame: FrameType) -> str | None:
    """Return the collective in which the thread with this innermost frame waits, with its purpose; None if in none."""
    collective = None
    for code in _codes(frame):
        path = PurePath(code.co_filename).as_posix()
        if collective is None:
            if path.endswith(_COLLECTIVES_FILE):
                collective = _COLLECTIVES.get(code.co_name)
            continue
        for file, functions, purpose in _PURPOSES:
            if path.endswith(file) and (not functions or code.co_name in functions):
                return f"{purpose} {collective}"
    return collective


def main_thread_line() -> str:
    """Return which line the main thread of this process is at: file, line and function."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    code = frame.f_code
    return f"{'/'.join(PurePath(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"


def _codes(frame: FrameType | None) -> Iterator:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
