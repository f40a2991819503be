"""Who holds the others up is told from what the ranks say of themselves, and where they wait from their stacks."""

from __future__ import annotations

import sys
import time
from types import FrameType

import pytest
import torch.distributed as dist

from megachiar.activity import Activity, Stage
from megachiar.topology import Topology
from megachiar.training.communication_time import COMMUNICATING, measure_communication
from megachiar.training.heartbeat import FailedCollective, Heartbeat
from megachiar.training.stalls import describe_others, describe_stall, find_culprits, find_stalled
from megachiar.training.step_times import LINE_EVERY_S, StepTimes, StragglerLog
from megachiar.training.waiting import describe_wait, wait_of

WAITS = {"wait": "gradient all-reduce", "doing": "computes micro-batch 2", "place": (812, 1, 5)}
READS = {"doing": "reads sample 8123", "place": (812, 1, 2), "line": "sampling/loader.py:88 __next__"}
COMPUTES = {"doing": "computes micro-batch 2", "place": (812, 1, 5)}


def beats(*kinds: dict) -> dict[int, Heartbeat]:
    return {rank: Heartbeat(host=f"n{rank}", pid=100 + rank, **kind) for rank, kind in enumerate(kinds)}


@pytest.mark.parametrize(
    ("ranks", "still", "stalled"),
    [
        ([WAITS, WAITS, WAITS, READS], [9, 9, 9, 9], [3]),
        ([WAITS, WAITS, WAITS, READS], [9, 9, 9, 1], []),  # it goes on
        ([WAITS, WAITS, WAITS, READS], [1, 1, 1, 9], [3]),  # on its way for long, and behind the others
        ([COMPUTES, COMPUTES], [99, 99], []),  # all compile, or evaluate: nobody waits
        ([READS, READS], [99, 99], []),
        ([COMPUTES, COMPUTES, READS], [9, 9, 9], [2]),  # on GPUs the wait does not show
        ([COMPUTES, COMPUTES, READS], [9, 9, 2], []),
        ([WAITS, COMPUTES, COMPUTES], [9, 9, 9], [1, 2]),
        ([WAITS, WAITS], [9, 9], [0, 1]),  # a message was lost
        ([WAITS, {**WAITS, "place": (811, 4, 0), "wait": "checkpoint's barrier"}], [9, 9], [1]),
        ([WAITS, WAITS], [9, 1], []),
    ],
)
def test_the_first_rank_behind_is_the_culprit(ranks, still, stalled):
    assert find_stalled(beats(*ranks), dict(enumerate(still)), 5) == stalled


def test_after_a_failed_collective_the_one_that_did_not_wait_is_the_culprit():
    assert find_culprits(beats({**WAITS, "failed": "timed out"}, READS)) == [1]
    assert find_culprits(beats({**WAITS, "failed": "timed out"}, WAITS)) == []
    assert find_culprits(beats(READS, READS)) == []


def test_the_message_says_who_waits_where():
    found = beats(WAITS, WAITS, WAITS, READS, {**WAITS, "wait": None, "failed": "x"}, COMPUTES)
    assert describe_stall(3, found[3], 7.2) == (
        "rank 3 (n3, process 103) reads sample 8123, step 812, at sampling/loader.py:88 __next__, "
        "without progress for 7 s"
    )
    assert describe_others(found, [3]) == (
        "ranks 0-2 wait in the gradient all-reduce, step 812; rank 4 gave up waiting, step 812; "
        "rank 5: computes micro-batch 2, step 812"
    )
    saves = {"doing": "saves step 812", "place": (812, 4, 0)}
    assert describe_others(beats(saves, saves), []) == "ranks 0-1: saves step 812"
    assert describe_others(beats(WAITS, saves, saves), [1, 2]) == "rank 0 waits in the gradient all-reduce, step 812"


def frame_of(*calls: tuple[str, str]) -> FrameType:
    """The innermost frame of functions of these files and names that call each other, the outermost first."""
    found: list[FrameType] = []
    inner = lambda: found.append(sys._getframe(1))  # noqa: E731
    for file, name in reversed(calls):
        scope: dict = {"inner": inner}
        exec(compile(f"def {name}():\n    inner()\n", file, "exec"), scope)
        inner = scope[name]
    inner()
    return found[0]


TORCH = "/site-packages/torch/distributed/distributed_c10d.py"
DEEPSPEED = "/site-packages/deepspeed/runtime/"


@pytest.mark.parametrize(
    ("calls", "wait"),
    [
        ([("a.py", "read")], None),
        ([("a.py", "f"), (TORCH, "all_reduce")], "all-reduce"),
        ([("a.py", "f"), (TORCH, "all_reduce"), ("torch/cuda.py", "wait")], "all-reduce"),
        ([(DEEPSPEED + "engine.py", "allreduce_gradients"), (TORCH, "all_reduce")], "gradient all-reduce"),
        ([(DEEPSPEED + "zero/stage3.py", "step"), (TORCH, "reduce_scatter_tensor")], "gradient reduce-scatter"),
        ([(DEEPSPEED + "pipe/p2p.py", "recv"), (TORCH, "recv")], "pipeline receive"),
        ([("/megachiar/checkpoint/snapshot.py", "take_snapshot"), (TORCH, "all_gather")], "checkpoint's all-gather"),
        ([(TORCH, "all_gather_object"), (TORCH, "all_gather")], "all-gather"),
    ],
)
def test_a_wait_is_named_from_the_stack(calls, wait):
    assert wait_of(frame_of(*calls)) == wait


def test_a_thread_that_waits_for_nobody_says_so():
    assert describe_wait() is None


def test_an_error_tells_the_collective_that_raised_it():
    scope: dict = {}
    exec(compile("def barrier():\n    raise RuntimeError('timed out\\nmore')\n", TORCH, "exec"), scope)
    with pytest.raises(RuntimeError) as raised:
        scope["barrier"]()
    assert FailedCollective.of(raised.value) == FailedCollective("timed out", "barrier")


def test_a_heartbeat_survives_the_way():
    activity = Activity()
    activity.begin("reads sample 5", Stage.TRAIN, step=3, item=2)
    beat = Heartbeat.current(activity, number=7, end="disk: is full")
    assert Heartbeat.from_json(beat.to_json()) == beat
    assert beat.place == (3, 1, 2) and beat.step == 3 and beat.count == 1
    assert Heartbeat.from_json("") == Heartbeat()


def test_the_time_in_communication_is_measured_and_nothing_is_left_behind(monkeypatch):
    def slow_barrier() -> str:
        time.sleep(0.05)
        return "met"

    monkeypatch.setattr(dist, "barrier", slow_barrier)
    originals = {name: getattr(dist, name) for name in COMMUNICATING}
    activity = Activity()
    with measure_communication(activity):
        dist.barrier()
        activity.begin_step()
        assert dist.barrier() == "met"
        activity.end_step(1.0)
        dist.barrier()
    assert {name: getattr(dist, name) for name in COMMUNICATING} == originals
    assert 0.05 <= activity.waited_seconds < 0.5 and (activity.steps, activity.step_seconds) == (1, 1.0)
    assert activity.count == 3


def topology(ranks: int, stages: int = 1) -> Topology:
    return Topology(0, ranks, 0, data_rank=0, data_size=ranks // stages, pipeline_size=stages)


def after(steps: int, *own: float, step: float = 1.0) -> dict[int, Heartbeat]:
    """Heartbeats of ranks that need so many seconds of their own for each step."""
    return {
        rank: Heartbeat(
            host=f"n{rank}",
            pid=1,
            steps=steps,
            step_seconds=steps * step,
            waited_seconds=steps * (step - seconds),
        )
        for rank, seconds in enumerate(own)
    }


def test_a_straggler_is_named_with_its_share_of_the_time():
    times = StepTimes(topology(4))
    assert times.straggler(after(3, 0.2, 0.2, 0.2, 0.2)) is None  # begins to measure
    assert times.straggler(after(6, 0.2, 0.2, 0.2, 0.2)) is None  # too few steps
    first = times.straggler(after(13, 0.2, 0.3, 1.0, 0.25))
    assert first is not None and first.rank == 2
    assert first.own_s == pytest.approx(1.24) and first.median_s == pytest.approx(0.265)  # since step 3
    assert str(first).startswith("rank 2 (n2, process 1) is slow: 1.240 s of its own a step, the median is 0.265 s;")
    assert StepTimes(topology(1)).straggler(after(9, 1.0)) is None


def test_a_rank_is_compared_with_those_of_its_stage():
    times = StepTimes(topology(4, stages=2))
    times.straggler(after(5, 0.1, 0.1, 0.8, 0.8))
    found = times.straggler(after(15, 0.1, 0.3, 0.8, 0.8))
    assert found is not None and found.rank == 1 and found.lost_share == pytest.approx(0.3)


def test_the_log_names_a_straggler_now_and_then(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log, times = StragglerLog(), StepTimes(topology(2))
    times.straggler(after(5, 0.1, 0.1))
    slow = times.straggler(after(15, 0.1, 0.6))
    assert "rank 1" in (log.line(slow) or "")
    assert log.line(slow) is None
    assert "rank 0" in (log.line(times.straggler(after(40, 0.9, 0.4))) or "")
    now += LINE_EVERY_S + 1
    assert "rank 1" in (log.line(slow) or "")
    assert log.line(None) is None
