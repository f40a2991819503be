"""Train on one rank, and alter one weight of rank 1 between two steps.

    python altered_rank_worker.py STEP ARGUMENTS_OF_PRETRAIN...      alters it after step STEP

``tests/training/test_compare_ranks.py`` starts it.
"""

from __future__ import annotations

import sys

import torch

from megachiar.console import global_rank, run
from megachiar.pretrain import main
from megachiar.training.trainer import Trainer


def alter_after(step: int) -> None:
    take_step = Trainer._step

    def altered(trainer, loader):
        result = take_step(trainer, loader)
        if trainer.progress.step == step and global_rank() == 1:
            _, parameter = next(iter(trainer.engine.named_parameters()))
            with torch.no_grad():
                parameter.view(-1)[7] += 1e-3
        return result

    Trainer._step = altered


if __name__ == "__main__":
    _, altered_step, *arguments = sys.argv
    alter_after(int(altered_step))
    sys.argv = ["megachiar.pretrain", *arguments]
    run(main)
