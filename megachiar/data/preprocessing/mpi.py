"""Preprocess with the ranks of ``mpirun``: each rank makes a shard, and the first one merges them."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TextIO

from megachiar.data.preprocessing.report import Report
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.errors import EXIT_USER_ERROR, UserError


def preprocess_with_mpi(settings: PreprocessSettings, stream: TextIO | None = None) -> Report | None:
    """Tokenize a corpus with all ranks of ``MPI.COMM_WORLD``; every rank must call this.

    Ranks beyond the number of inputs have nothing to do.

    Args:
        settings: of the run.
        stream: where rank 0 shows progress; standard error if None.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: mpi4py or MPI is missing, or this rank's shard or the merge failed.
        SystemExit: another rank failed, which prints the message; this one ends with exit code 2.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package is there, an MPI library is not
        raise UserError("--mpi", f"needs mpi4py and an MPI library: {error}", "pip install 'megachiar[mpi]'") from error
    world = MPI.COMM_WORLD
    shards = min(world.size, len(settings.sources))
    failure: UserError | None = None
    try:
        if world.rank < shards:
            with open(os.devnull, "w") as nowhere:
                make_shard(settings, world.rank, shards, (stream or sys.stderr) if world.rank == 0 else nowhere)
    except UserError as error:
        failure = error
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)  # the others would wait for this rank forever; this ends the process too
    if any(world.allgather(failure is not None)):
        if failure is not None:
            raise failure
        sys.exit(EXIT_USER_ERROR)
    return merge_shards(settings, shards) if world.rank == 0 else None
