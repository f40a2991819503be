"""All private names of DeepSpeed that this package uses: those that its documentation does not promise.

Each entry says why we need the name and how to see that the entry can go. It also says since which release DeepSpeed
has the name, which was read in the sources of releases 0.12.6 to 0.19.8. ``PRIVATE_NAMES``, ``PRIVATE_PARAMETERS`` and
``PRIVATE_ATTRIBUTES`` list all names. The contract test fails when the installed DeepSpeed lacks one, or when another
file of the package uses one.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.distributed import distributed_c10d

from megachiar.errors import UserError

KNOWN_VERSIONS = "0.19.8"
"""The DeepSpeed release that every entry was tried with."""

PRIVATE_NAMES = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.compiler": ("compile",),
    "deepspeed.accelerator.cpu_accelerator:CPU_Accelerator": ("is_fp16_supported", "supported_dtypes"),
    "deepspeed.runtime.engine:DeepSpeedEngine": ("clip_fp32_gradients",),
    "deepspeed.runtime.pipe.topology": ("PipeModelDataParallelTopology",),
    "deepspeed.runtime.pipe.module:PipelineModule": (
        "_partition_layers",
        "_set_bounds",
        "get_tied_weights_and_groups",
    ),
    "deepspeed.utils.tensor_fragment:tensor_fragment": ("set_optim_state_fragment",),
}
"""Names by the module, or the ``module:Class``, that has them."""

PRIVATE_PARAMETERS = {
    "deepspeed.runtime.pipe.engine:PipelineEngine.eval_batch": ("bcast_loss", "num_micro_batches"),
}
"""Parameters by the function, as ``module:Class.function``, that takes them."""

PRIVATE_ATTRIBUTES = {
    "engine": ("enable_backward_allreduce",),
    "pipeline": ("_topo", "global_rank", "parts", "tied_modules"),
    "pipeline engine": ("micro_batches", "total_loss"),
    "ZeRO 1 and 2 optimizer": ("optimizer", "_global_grad_norm"),
    "ZeRO 3 optimizer": ("fp32_partitioned_groups_flat", "optimizer", "_global_grad_norm"),
    "fp16 optimizer": ("cur_scale", "loss_scaler"),
    "fp16 loss scaler": (
        "dynamic",
        "cur_scale",
        "cur_iter",
        "last_overflow_iter",
        "cur_hysteresis",
        "min_scale",
        "raise_error_at_min_scale",
    ),
    "ZeRO 1 and 2 parameter": ("_hp_mapping",),
    "ZeRO 1 and 2 mapping": ("param_group_index", "hp_fragment_address", "lp_fragment_address"),
    "ZeRO 3 parameter": ("ds_id", "ds_numel", "ds_tensor"),
}
"""Attributes by the kind of object that has them once DeepSpeed has set it up; only a running engine shows them."""


def missing_names() -> Iterator[str]:
    """Yield each private name and parameter that the installed DeepSpeed lacks, as ``module:Class.name``."""
    for owner, names in PRIVATE_NAMES.items():
        holder = _find(owner)
        yield from (f"{owner}.{name}" for name in names if not hasattr(holder, name))
    for function, names in PRIVATE_PARAMETERS.items():
        found = _find(function)
        taken = inspect.signature(found).parameters if callable(found) else {}
        yield from (f"{function}({name}=)" for name in names if name not in taken)


def _find(path: str) -> Any:
    """Return what ``module:Class.name`` names in the installed DeepSpeed; None if it is not there."""
    module, _, inside = path.partition(":")
    try:
        holder: Any = importlib.import_module(module)
        return functools.reduce(getattr, filter(None, inside.split(".")), holder)
    except (ImportError, AttributeError):
        return None


def check_deepspeed_version() -> None:
    """Check, before an engine starts, that the installed DeepSpeed has every private name that we use.

    Raises:
        UserError: names are missing; the message lists them and names a release that has them.
    """
    missing = list(missing_names())
    if missing:
        raise UserError(
            f"deepspeed {deepspeed.__version__}",
            f"lacks names that this program relies on: {', '.join(missing)}",
            f"pip install deepspeed=={KNOWN_VERSIONS}",
        )


# Before an engine starts


def skip_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU.

    Why: compiling takes a minute and needs a C++ compiler, and only inference uses these collectives. Since: 0.15.
    It can go when ``init_distributed("gloo")`` starts in seconds on a machine without g++.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer without compiling its kernels.

    Why: DeepSpeed asks of any optimizer whether it is Muon, and for that it imports Muon. The import compiles Muon's
    kernels, for which torch loads its whole compiler. That is a fifth of the time in which a small run starts, and no
    run here uses DeepSpeed's Muon. Since: 0.18.
    It can go when ``deepspeed.initialize`` no longer imports ``torch._dynamo``.
    """
    from deepspeed.runtime import compiler

    compile_function, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # a DeepSpeed without Muon
        pass
    finally:
        compiler.compile = compile_function


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed run fp16 on a CPU without fp16 instructions.

    Why: such a run is slow, but a config can be tried before the GPUs are there. Since: 0.12 or before.
    It can go when DeepSpeed warns instead of refusing.
    """
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]


def limit_group_timeouts(timeout: datetime.timedelta) -> None:
    """Give every process group that is made from now on this timeout, unless its maker names another one.

    Why: DeepSpeed makes groups without naming a timeout, and torch would give them 10 or 30 minutes. Since: torch 2.1.
    It can go when ``deepspeed.initialize`` takes a timeout for its groups.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


# The engine


def replace_gradient_clipping(engine: deepspeed.DeepSpeedEngine, clip: Callable[[], None]) -> None:
    """Let ZeRO 0 clip gradients by ``clip`` instead of its own function.

    Why: its own function computes the gradient norm a second time, parameter by parameter. Since: 0.12 or before.
    It can go when ``get_global_grad_norm`` returns the norm under ZeRO 0 before clipping.
    """
    engine.clip_fp32_gradients = clip


def skip_gradient_reduction(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keep DeepSpeed from reducing gradients under ZeRO 0 with one data-parallel rank.

    Why: there is no other rank to reduce with, and DeepSpeed would copy all gradients into a buffer and back.
    Since: 0.12 or before. It can go when DeepSpeed skips the reduction over a group of one rank.
    """
    engine.enable_backward_allreduce = False


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | float:
    """Return the norm of the gradients that ZeRO is about to step with, or has stepped with; -1 or inf if not finite.

    It is where DeepSpeed has it, as a scalar on the device or as a number of the host: nothing waits for it here.

    Why: ``get_global_grad_norm`` knows the norm only after the weights have changed. Since: 0.12 or before.
    It can go when the engine tells the norm before the optimizer's step.
    """
    norm = engine.optimizer._global_grad_norm
    return 0.0 if norm is None else norm


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the factor that losses are scaled by in fp16, and 1 in other precisions.

    Why: a pipeline scales the loss itself, but not a regulariser whose gradient starts in an inner stage.
    Since: 0.12 or before. It can go when a pipeline passes the scale to its loss function.
    """
    return float(getattr(engine.optimizer, "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0


def keep_running_at_least_loss_scale(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keep DeepSpeed from raising a bare ``Exception`` when gradients overflow at the least loss scale of fp16.

    Why: the run ends with a message of ours instead, see ``is_at_least_loss_scale``. Since: 0.15.
    It can go when DeepSpeed raises an error of its own type.
    """
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def is_at_least_loss_scale(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return whether the loss scale of fp16 cannot be lowered after another overflow; False in other precisions.

    Why: no documented call tells the least scale. Since: 0.12 or before. It can go with ``loss_scale_state``.
    """
    scaler = _dynamic_scaler(engine)
    return scaler is not None and scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis <= 1


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale, with its position in its window; None in a run without one.

    Why: a checkpoint of ours can be loaded under every layout, and one of DeepSpeed's cannot. Since: 0.12 or before.
    It can go when the loss scaler has a documented ``state_dict``.
    """
    scaler = _dynamic_scaler(engine)
    return None if scaler is None else {key: getattr(scaler, key) for key in _SCALER_KEYS}


def set_loss_scale_state(engine: deepspeed.DeepSpeedEngine, state: dict[str, float]) -> None:
    """Set the state that ``loss_scale_state`` returned; a run without a dynamic loss scale ignores it."""
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        for key in _SCALER_KEYS:
            setattr(scaler, key, state[key] if key == "cur_scale" else int(state[key]))


def _dynamic_scaler(engine: deepspeed.DeepSpeedEngine) -> Any | None:
    """Return DeepSpeed's dynamic loss scaler; None in a run without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if engine.fp16_enabled() and getattr(scaler, "dynamic", False) else None


# A pipeline


def pipeline_topology(pipeline_size: int, tensor_size: int, data_size: int) -> Any:
    """Return DeepSpeed's topology of ranks in our order: pipeline stages outermost, tensor-parallel ranks innermost.

    Why: ``PipelineModule`` makes its process groups from this topology. Since: 0.12 or before.
    It can go when a pipeline takes process groups.
    """
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(pipeline_size, tensor_size, data_size)


class BoundedPipeline(PipelineModule):
    """A pipeline whose stages are given by their bounds.

    Why: DeepSpeed balances parameters or layers. We balance FLOPs, which differ between DCT and attention layers.
    Since: 0.12 or before. It can go when ``partition_method`` takes bounds.

    Attributes:
        bounds: index of each stage's first part, followed by the number of parts.
    """

    def __init__(self, parts: list, bounds: list[int], topology: Any, loss_fn: Callable):
        self.bounds = bounds
        super().__init__(parts, topology=topology, loss_fn=loss_fn)

    def _partition_layers(self, method: str = "") -> None:
        """Set the parts of this rank's stage, whatever ``method`` DeepSpeed passes."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[stage], stop=self.bounds[stage + 1])

    def get_tied_weights_and_groups(self) -> list[tuple]:
        """Return each tied weight with the process group of the stages that hold it.

        DeepSpeed sums the ``.grad`` of what is returned over the group.

        Why: an optimizer that accumulates gradients in another dtype has moved them from ``.grad`` to ``.grad_accum``.
        Since: 0.12 or before. It can go when a tied weight trains in bf16 without this method.
        """
        return [
            (weight if getattr(weight, "grad_accum", None) is None else SimpleNamespace(grad=weight.grad_accum), group)
            for weight, group in super().get_tied_weights_and_groups()
        ]

    def tied_module(self, name: str) -> nn.Module:
        """Return this stage's copy of the tied module that has this name."""
        return self.tied_modules[name]


def set_micro_batches(engine: deepspeed.DeepSpeedEngine, count: int) -> None:
    """Set how many micro-batches the next step of a pipeline has; losses are divided by the accumulation steps still.

    Why: a step of mixed training has more micro-batches than accumulation steps. Since: 0.12 or before.
    It can go when ``train_batch`` takes the number of micro-batches.
    """
    engine.micro_batches = count


def without_part_number(name: str) -> str:
    """Return a parameter's name in the model, which lacks the number of the part that a pipeline puts before it."""
    first, _, rest = name.partition(".")
    return rest if first.isdigit() or first == "tied_modules" else name


def evaluate_micro_batch(engine: deepspeed.DeepSpeedEngine, micro_batch: Any) -> Any:
    """Send one micro-batch forward through the pipeline, and return the list of its loss on the last stage.

    Why: by its documented parameters ``eval_batch`` reads as many micro-batches as a training step, and broadcasts
    their mean to all stages. It adds the loss to ``total_loss`` of the last call, which may have another shape.
    Since: 0.13, and ``bcast_loss`` and ``total_loss`` 0.12 or before.
    It can go when both parameters stand in DeepSpeed's documentation, and ``eval_batch`` forgets ``total_loss``.
    """
    engine.total_loss = None
    return engine.eval_batch(iter([micro_batch]), reduce_output=None, bcast_loss=False, num_micro_batches=1)


# The optimizer's state


def base_optimizer(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> torch.optim.Optimizer:
    """Return the optimizer that we built, from inside the one that ZeRO wraps around it.

    Why: checkpoints save and restore its moments and its step count. Since: 0.12 or before.
    It can go when DeepSpeed gives the inner optimizer a documented name.
    """
    return engine.optimizer if zero_stage == 0 else engine.optimizer.optimizer


def stepped_tensors(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> list[torch.Tensor]:
    """Return the tensors that the optimizer updates: shards of flattened parameters, or the parameters under ZeRO 0.

    Why: ZeRO 3 keeps them outside the optimizer's groups. Since: 0.12 or before. It can go with ``base_optimizer``.
    """
    if zero_stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [tensor for group in base_optimizer(engine, zero_stage).param_groups for tensor in group["params"]]


def link_optimizer_states(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Link each parameter under ZeRO 1 and 2 to its part of the flattened optimizer state.

    Why: DeepSpeed links parameters once, after the first group's first step, and misses those of other groups.
    Since: 0.14. It can go when ``safe_get_full_optimizer_state`` works before the first step, for every group.
    """
    zero_parameters: Iterable[Any] = parameters
    for parameter in zero_parameters:
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
            mapping.set_optim_state_fragment(flat, optimizer.state[flat])


class Place(NamedTuple):
    """The run of a parameter's elements that an optimizer steps on this rank.

    Attributes:
        tensor: the stepped tensor that has them; None where this rank steps none of them.
        offset: number of the first of them in the flattened ``tensor``.
        start: number of the first of them in the flattened parameter.
        length: how many there are.
    """

    tensor: torch.Tensor | None
    offset: int
    start: int
    length: int


def place_in_flat(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Place:
    """Return where the elements of a parameter lie in this rank's flattened tensors under ZeRO 1 and 2.

    Why: Muon needs the whole matrix that the elements are of. Since: 0.14.
    It can go when DeepSpeed has a public function for the position of a parameter in its partition.
    """
    zero_parameter: Any = parameter
    mapping = zero_parameter._hp_mapping
    if mapping is None:
        return Place(None, 0, 0, 0)
    flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
    held, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Place(flat, held.start, of_parameter.start, of_parameter.numel)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO 3 holds a shard of this parameter instead of the whole.

    Why: such a parameter is read and set by other functions. Since: 0.12 or before. It can go with ``shard_length``.
    """
    return hasattr(parameter, "ds_id")


def shard_length(parameter: nn.Parameter) -> int:
    """Return the number of elements of a ZeRO 3 shard, padding included, which is equal on all ranks.

    Why: ``safe_set_local_...`` needs a tensor of exactly this length. Since: 0.12 or before.
    It can go when those functions pad.
    """
    zero_parameter: Any = parameter
    return zero_parameter.ds_tensor.numel()


def own_shard(parameter: nn.Parameter, data_rank: int) -> torch.Tensor | None:
    """Return the elements (n,) of a parameter that this rank alone holds; None where it holds the whole parameter.

    Under ZeRO 3 small parameters stay whole on every rank. The padding of the last shard is left out.

    Why: the shards of a replicated parameter are compared between tensor-parallel ranks. Since: 0.12 or before.
    It can go when DeepSpeed has a public function for a rank's shard in the type of the model.
    """
    if not is_sharded(parameter) or parameter.numel():
        return None
    zero_parameter: Any = parameter
    length = shard_length(parameter)
    return zero_parameter.ds_tensor.detach().flatten()[: max(0, zero_parameter.ds_numel - data_rank * length)]
