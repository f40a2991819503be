"""Draw the batches of other tasks that join a step of mixed training (paper, MetaRouter).

The samples of the main language model are cut into groups. Each group is joined with probability p by a batch of
another task, whose mean loss is added to the group's:

    group     0        1        2        3   |    4     ...     loss of a step = mean over its groups of
    joined    -        imdb     -        -   |    listops       L(group) + loss_weight * L(batch that joined)
    step      1                              |    2

Whether and which is a function of the seed and the number of the group alone. It is the same in every layout, wherever
a run is continued, and whatever the batch size becomes. Where a run that goes on draws otherwise (``data.on_change:
continue``), each task goes on from where it is in its data.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from megachiar.config import RunConfig
from megachiar.engine.micro_batches import MicroStep, main_steps
from megachiar.kernels.hash import GOLDEN, uniform_hash
from megachiar.training.auxiliary_data import NOTHING_READ, TasksRead

_COUNTED_TOGETHER = 1 << 20
_KEY = 0x6D69786564  # "mixed": no other use of the hash has the same keys


class Mixing:
    """The draws of a run.

    Args:
        config: of the run.
        data_size: number of data-parallel ranks.
        read: how far the tasks had read their data when the run went on with these draws.
    """

    def __init__(self, config: RunConfig, data_size: int, read: TasksRead = NOTHING_READ):
        mixed, training = config.mixed, config.training
        self._tasks = list(mixed.tasks.values())
        self._read = read
        self._group_size = mixed.group_size or training.global_batch_size
        self._groups = training.global_batch_size // self._group_size
        self._samples_at_once = training.micro_batch_size * data_size
        self._main = training.global_batch_size // self._samples_at_once
        weights = np.array([task.weight for task in self._tasks])
        self._bounds = mixed.probability * np.cumsum(weights) / weights.sum() if self._tasks else np.zeros(0)
        self._key = ((training.seed * 1_000_003 + mixed.seed) * 1_000_003 + _KEY) * (GOLDEN % 2**64) % 2**62

    def draws(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the task that joins each group from ``first`` to ``last - 1``: its number from 1, or 0 for none."""
        if not self._tasks:
            return np.zeros(last - first, np.int64)
        uniform = uniform_hash(torch.arange(first, last) + self._key).numpy()
        # Of u in [0, p) the tasks have parts of the sizes of their weights; a u of p or more draws none.
        number = np.searchsorted(self._bounds, uniform, side="right") + 1
        return np.where(number > len(self._tasks), 0, number)

    def plan(self, positions: range) -> list[MicroStep]:
        """Return the micro-batches of a step that reads the main task's samples at ``positions``.

        They are the same on all ranks. The main task's come first, then those of each batch that was drawn.
        """
        plan = main_steps(self._main)
        for task in self._draws_of(positions):
            if task:
                of_batch = self._micro_steps(int(task))
                weight = self._tasks[task - 1].loss_weight * self._main / (self._groups * of_batch)
                plan += [MicroStep(int(task), weight)] * of_batch
        return plan

    def samples_before(self, position: int) -> list[int]:
        """Return how many samples of each task the run has read before ``position`` of the main task."""
        counts = np.zeros(len(self._tasks) + 1, np.int64)
        begin, end = (-(-p // self._group_size) for p in (self._read.position, position))
        for first in range(begin, end, _COUNTED_TOGETHER) if self._tasks else ():
            drawn = self.draws(first, min(first + _COUNTED_TOGETHER, end))
            counts += np.bincount(drawn, minlength=len(counts))
        before = self._read.samples or [0] * len(self._tasks)
        return [
            earlier + int(count) * task.global_batch_size
            for earlier, count, task in zip(before, counts[1:], self._tasks, strict=True)
        ]

    def _draws_of(self, positions: range) -> NDArray[np.int64]:
        """Return the draws of the groups that begin at ``positions``."""
        size = self._group_size
        return self.draws(-(-positions.start // size), -(-positions.stop // size))

    def _micro_steps(self, task: int) -> int:
        """Return the micro-batches that each replica computes of a batch of ``task``."""
        return self._tasks[task - 1].global_batch_size // self._samples_at_once


def samples_of_tasks(config: RunConfig, read: TasksRead, position: int) -> dict[str, int]:
    """Return how many samples of each auxiliary task a run has read before ``position`` of the main task, by name."""
    mixing = Mixing(config, data_size=1, read=read)
    return dict(zip(config.mixed.tasks, mixing.samples_before(position), strict=True))
