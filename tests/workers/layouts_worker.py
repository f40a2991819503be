"""Train one config under several layouts on one rank, and record losses, parameters and routes.

    python layouts_worker.py CONFIG OUTPUT_FOLDER JSON

JSON: {layout's name: {"set": overrides of the config, "replay": recording whose routes are taken, or null}}

``tests/engine/test_layouts.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import nn

from megachiar import launch
from megachiar.config import RunConfig, load_config
from megachiar.data.sampling.loader import BatchLoader
from megachiar.engine.engine import Engine, start_process_group
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import RoutedLayer
from megachiar.model.router import Router, RoutingDecision
from megachiar.parallel.shard import shard_of
from megachiar.topology import Topology, build_topology
from megachiar.training.evaluation import evaluate
from megachiar.training.run_data import open_data
from megachiar.training.schedule import learning_rate


def main() -> None:
    config_path, output, layouts = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    for name, layout in json.loads(layouts).items():
        config = load_config(config_path, layout["set"])
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        groups.mpu = None  # DeepSpeed keeps that of the last layout
        topology = topology.with_groups()
        replay = np.load(layout["replay"])["routes"] if layout["replay"] else None
        recording = train(config, topology, device, replay)
        if topology.is_main:
            Path(output).mkdir(parents=True, exist_ok=True)
            np.savez(Path(output) / f"{name}.npz", **recording)
    dist.destroy_process_group()


def train(
    config: RunConfig, topology: Topology, device: torch.device, replay: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Train all steps and return the recording of the run.

    It holds losses, gradient norms and statistics by step, the evaluation, the last parameters, and the route of each
    token at each step. With ``replay``, an array of recorded routes, the routers take these.
    """
    data = open_data(config)
    engine = Engine(config, topology, device)
    training, micro = config.training, config.training.micro_batch_size
    routes = Routes(config, engine, topology, replay)
    results = []
    loader = BatchLoader(data.training, micro, engine.accumulation_steps, topology.data_rank, topology.data_size)
    with loader:
        for step in range(training.steps):
            batches = (
                (loader.position + topology.data_rank * micro, next(loader)) for _ in range(engine.accumulation_steps)
            )
            results.append(engine.train_step(batches, learning_rate(config, step + 1)))
    evaluation = [
        evaluate(
            engine.evaluate,
            dataset,
            micro,
            rank=topology.data_rank,
            ranks=topology.data_size,
            reduce_sum=engine.sum_over_world,
        ).loss
        for dataset in data.validation.values()
    ]
    taken, margin = routes.gather()
    return {
        "loss": np.array([r.loss for r in results]),
        "regulariser": np.array([r.regulariser for r in results]),
        "gradient_norm": np.array([r.gradient_norm for r in results]),
        "attention_share": np.array([r.attention_share for r in results]),
        "entropy": np.array([r.entropy for r in results]),
        "gate": np.array([r.gate for r in results]),
        "evaluation": np.array(evaluation),
        "routes": taken,
        "margin": margin,
        **{f"parameter {name}": value for name, value in gather_parameters(engine, topology).items()},
        **{f"running {name}": value for name, value in gather_running_numbers(engine).items()},
    }


def _margin(decision: RoutingDecision, thresholds: tuple[float, ...]) -> torch.Tensor:
    """Return how far each row is from another operator: in H, in its coin, or in the weight of the gate's best two."""
    if decision.score is None:
        best = decision.gates.detach().float().topk(2).values
        return best[:, 0] - best[:, 1]
    return (decision.score.float()[:, None] - torch.tensor(thresholds)).abs().amin(1)


def _operator(decision: RoutingDecision, router: Router, x: torch.Tensor) -> torch.Tensor:
    """Return the operator of each row of ``x``, where a partition compares the scores too."""
    if decision.operator is not None:
        return decision.operator
    return (decision.score > router.threshold_of(x)).long()


def _with_operator(decision: RoutingDecision, operator: torch.Tensor) -> RoutingDecision:
    """Return a decision for these operators; scores that a partition compares are beyond any threshold."""
    if decision.operator is not None:
        return replace(decision, operator=operator)
    return replace(decision, score=torch.where(operator > 0, torch.inf, -torch.inf).to(decision.score.dtype))


class Routes:
    """Recorder of each token's operator in each step, and of its distance to another one.

    It can replay recorded operators.

    Both arrays are (steps, routed layers, tokens of a step), in the order of the data.
    """

    def __init__(self, config: RunConfig, engine: Engine, topology: Topology, replay: np.ndarray | None):
        self.config = config
        self.topology = topology
        self.replay = replay
        self.accumulation = engine.accumulation_steps
        layers = len(config.model.routed_layers)
        shape = (config.training.steps, layers, config.training.global_batch_size * config.sequence_length)
        self.taken, self.margin = np.full(shape, -1), np.zeros(shape, np.float32)
        model = engine.deepspeed.module
        routed = [module for module in model.modules() if isinstance(module, RoutedLayer)]
        on_demand = config.training.static_shapes is True or config.training.cuda_graphs is not None
        assert all(layer.has_static_shapes == on_demand for layer in routed), "a CPU has them on demand alone"
        if config.training.cuda_graphs is not None:
            self._watch_captured(model, routed)
            return
        for layer in routed:
            self._watch(layer)

    def _watch_captured(self, model: nn.Module, routed: list[RoutedLayer]) -> None:
        """Record the routes of layers whose routers are not called again; they are not replayed."""
        assert self.replay is None, "captured routers decide"
        seen = 0

        def after(model, arguments, output):
            nonlocal seen
            if not model.training:
                return
            tokens = self._tokens(seen, BatchLayout(*arguments[0].shape))
            for index, layer in enumerate(routed):
                self.taken[seen // self.accumulation, index, tokens] = layer.last_routes
            seen += 1

        model.register_forward_hook(after)

    def _watch(self, layer: RoutedLayer) -> None:
        index = int(layer.name.rpartition(".")[2]) - self.config.model.routed_layers.start
        seen = 0

        def after(router, arguments, decision):
            nonlocal seen
            is_recomputed = torch._C._current_graph_task_id() != -1  # in a backward pass
            if not router.training or is_recomputed:
                return None
            tokens = self._tokens(seen, arguments[1])
            step, seen = seen // self.accumulation, seen + 1
            self.margin[step, index, tokens] = _margin(decision, router.thresholds())
            if self.replay is None:
                self.taken[step, index, tokens] = _operator(decision, router, arguments[0])
                return None
            operator = torch.from_numpy(self.replay[step, index, tokens])
            self.taken[step, index, tokens] = operator
            return _with_operator(decision, operator)

        layer.router.register_forward_hook(after)

    def _tokens(self, seen: int, layout) -> slice:
        """Return which of a step's tokens the rows of this rank's micro-batch number ``seen`` are."""
        micro = self.config.training.micro_batch_size
        first = (seen % self.accumulation * self.topology.data_size + self.topology.data_rank) * micro * layout.length
        return slice(first + layout.local_slice.start, first + layout.local_slice.stop)

    def gather(self) -> tuple[np.ndarray, np.ndarray]:
        """Return operators and distances of the whole model, gathered from all ranks."""
        recorded: list = [None] * self.topology.world_size
        dist.all_gather_object(recorded, (self.taken, self.margin))
        return np.max([taken for taken, _ in recorded], axis=0), np.max([margin for _, margin in recorded], axis=0)


def gather_running_numbers(engine: Engine) -> dict[str, np.ndarray]:
    """Return what routers carry from step to step by name, gathered from all ranks, of which none may differ."""
    local = {name: value.numpy().copy() for name, value in engine.named_buffers() if ".router." in name}
    recorded: list = [None] * engine.topology.world_size
    dist.all_gather_object(recorded, local)
    found: dict[str, np.ndarray] = {}
    for of_rank in recorded:
        for name, value in of_rank.items():
            assert np.array_equal(found.setdefault(name, value), value), name
    return found


def gather_parameters(engine: Engine, topology: Topology) -> dict[str, np.ndarray]:
    """Return the unsharded parameters of the model by name, gathered from all ranks."""
    local = {}
    for name, parameter in engine.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        value = parameter if value is None else value
        local[name] = (value.detach().float().numpy().copy(), shard_of(parameter), topology.tensor.rank)
    gathered: list = [None] * topology.world_size
    dist.all_gather_object(gathered, local)
    whole: dict[str, np.ndarray] = {}
    for parameters in gathered:
        for name, (value, shard, rank) in parameters.items():
            if shard is None:
                whole[name] = value
                continue
            shape = shard.whole_shape(value.shape, topology.tensor.size)
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            for start, length, at in shard.pieces(shape, rank, topology.tensor.size):
                index = (slice(None),) * shard.dim
                target[(*index, slice(start, start + length))] = value[(*index, slice(at, at + length))]
    return whole


if __name__ == "__main__":
    main()
