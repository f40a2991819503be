"""How often a run should save, and how much of a cluster's time becomes progress, where GPUs fail.

A failure of any GPU stops the run. It starts again from the newest checkpoint and repeats the steps since. Failures
come at random and independently, so that a cluster of n GPUs fails n times as often as one.

    |-- interval of steps --|save|-- interval --|save|-- steps, X   |-- start --|-- the same steps again ...
                                                            failure

The formulas are those of J. Young, "A first order approximation to the optimum checkpoint interval", 1974, and of
J. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006. A simulation in
``tests/planning/test_goodput.py`` stands beside them. All times are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOUR = 3600.0
WEEK = 7 * 24 * HOUR


@dataclass(frozen=True)
class Failures:
    """The costs of failures and saves.

    Attributes:
        gpu_mtbf: mean time between failures of one GPU, including its share of host, links and software.
        save: time that a save stops training.
        write: time from there until the checkpoint is complete on the disk, while training goes on.
        start: time from a failure to the first step: noticing it, the scheduler, start-up, and loading.
        straggler_loss: share of the time of steps that ranks spend waiting for slow ones.
    """

    gpu_mtbf: float
    save: float
    start: float
    write: float = 0.0
    straggler_loss: float = 0.0

    def cluster_mtbf(self, gpus: int) -> float:
        """Return the mean time between failures of any of ``gpus`` GPUs."""
        return self.gpu_mtbf / gpus


def young_interval(save: float, mtbf: float) -> float:
    """Return Young's time of steps between two saves: the first order of ``daly_interval``, for short saves."""
    return math.sqrt(2 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """Return Daly's time of steps between two saves, which comes near the best one where saves are not short.

    Args:
        save: time that a save stops training.
        mtbf: mean time between failures of the whole cluster.
    """
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young_interval(save, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def best_interval(failures: Failures, gpus: int) -> float:
    """Return the time of steps between two saves on ``gpus`` GPUs: Daly's, and no shorter than a checkpoint's write."""
    return max(daly_interval(failures.save, failures.cluster_mtbf(gpus)), failures.write)


def goodput(failures: Failures, gpus: int, interval: float) -> float:
    """Return the goodput: the share of the time that becomes lasting progress.

    The time of an interval with its save is ``M exp(R / M) (exp((interval + save) / M) - 1)``: Daly's complete model,
    with M the mean time between failures and R the cost of a failure beside the repeated steps. Steps that were taken
    while a checkpoint was written are repeated too, so that R is the start and the write.

    Args:
        failures: their costs.
        gpus: of the cluster.
        interval: time of steps between two saves, the waits for slow ranks included.
    """
    mtbf = failures.cluster_mtbf(gpus)
    exponents = (failures.start + failures.write) / mtbf, (interval + failures.save) / mtbf
    if max(exponents) > 700:  # beyond the range of exp: the run never gets through an interval
        return 0.0
    elapsed = mtbf * math.exp(exponents[0]) * math.expm1(exponents[1])
    return interval / elapsed * (1 - failures.straggler_loss)


@dataclass(frozen=True)
class GoodputPlan:
    """The expected goodput of a cluster, and the interval that gives it.

    Attributes:
        gpus: of the cluster.
        mtbf: mean time between its failures.
        interval: time of steps between two saves.
        goodput: share of the time that becomes progress.
    """

    gpus: int
    mtbf: float
    interval: float
    goodput: float

    @property
    def lost_hours_a_week(self) -> float:
        """Hours of each week that saves, failures and stragglers take."""
        return (1 - self.goodput) * WEEK / HOUR


def plan_goodput(failures: Failures, gpus: int) -> GoodputPlan:
    """Return the best interval between saves on ``gpus`` GPUs and the goodput that it gives."""
    interval = best_interval(failures, gpus)
    return GoodputPlan(gpus, failures.cluster_mtbf(gpus), interval, goodput(failures, gpus, interval))
