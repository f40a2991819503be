"""Read the micro-batches of each step: those of the main task, and of the tasks that join it in mixed training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType

import numpy as np

from megachiar.config import RunConfig
from megachiar.data.sampling.loader import BatchLoader, Samples
from megachiar.engine.micro_batches import MicroStep
from megachiar.topology import Topology
from megachiar.training.mixing import Mixing
from megachiar.training.run_data import RunData


class StepBatches:
    """Reads this rank's micro-batches, which threads read ahead; use it in a ``with`` block.

    Args:
        config: of the run.
        topology: of this rank.
        data: of the run.
        position: samples of the main task that all ranks together have consumed.
        pin_memory: see ``BatchLoader``.
    """

    def __init__(self, config: RunConfig, topology: Topology, data: RunData, position: int, *, pin_memory: bool):
        training, size = config.training, topology.data_size
        self._mixing = Mixing(config, size, data.tasks_read)
        self._global_batch_size = training.global_batch_size
        self._offset = topology.data_rank * training.micro_batch_size
        self._exit = ExitStack()

        def loader(stream: Samples, batch_size: int, start: int) -> BatchLoader:
            opened = BatchLoader(
                stream,
                training.micro_batch_size,
                batch_size // (training.micro_batch_size * size),
                topology.data_rank,
                size,
                start,
                prefetch=config.data.prefetch,
                pin_memory=pin_memory,
            )
            return self._exit.enter_context(opened)

        drawn = self._mixing.samples_before(position)
        with self._exit:  # closes those that are open where one fails
            self._loaders = [loader(data.training, training.global_batch_size, position)]
            for task, of_config, start in zip(data.auxiliary, config.mixed.tasks.values(), drawn, strict=True):
                self._loaders.append(loader(task.training, of_config.global_batch_size, start))
            self._exit = self._exit.pop_all()

    def plan(self) -> list[MicroStep]:
        """Return the micro-batches of the next step, the same on all ranks."""
        first = self._loaders[0].position
        return self._mixing.plan(range(first, first + self._global_batch_size))

    def read(
        self, plan: list[MicroStep], reads: Callable[[int, int], None], has_read: Callable[[int, np.ndarray], None]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of the first sample, within its task, and the samples of each micro-batch of a plan.

        Args:
            plan: of the step.
            reads: is called with the number of the micro-batch, from 1, and of its first sample before it is read.
            has_read: is called with the number of the micro-batch and its samples.
        """
        for number, micro_step in enumerate(plan, 1):
            loader = self._loaders[micro_step.task]
            first = loader.position + self._offset
            reads(number, first)
            batch = next(loader)
            has_read(number, batch)
            yield first, batch

    def take_wait_seconds(self) -> float:
        """Return the seconds that reading has waited for data since the last call of this method."""
        return sum(loader.take_wait_seconds() for loader in self._loaders)

    def __enter__(self) -> StepBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()
