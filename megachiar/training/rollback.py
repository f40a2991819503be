"""Go back to the newest checkpoint, and go on without the samples of a bad step.

    checkpoint of step 10      steps 11 12 13 14 15      15 is bad: it read the samples 112 to 119
    back to 10, then           steps 11 12 13 14 15      15 reads what 16 would have read, 120 to 127

The steps from the checkpoint on are those of a run that never had the bad samples. The order of samples records what
is left out (``DataHistory.leave_out``), and so does every later checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from megachiar.checkpoint.format import CheckpointState, read_state
from megachiar.checkpoint.resume import resume
from megachiar.engine.engine import Engine
from megachiar.training.run_data import RunData
from megachiar.training.start import check_whole


def roll_back(engine: Engine, data: RunData, bad_step: int, checkpoint: Path) -> tuple[CheckpointState, RunData]:
    """Load ``checkpoint`` of this run and leave out the samples of ``bad_step``; every rank calls this function.

    Args:
        engine: of the run.
        data: that the bad step has read.
        bad_step: number of the step.
        checkpoint: of a step before it.

    Returns:
        The checkpoint's record, and the data that the run reads from there on.

    Raises:
        LaunchError: the checkpoint is damaged.
    """
    check_whole(checkpoint, engine.topology)
    state = read_state(checkpoint)
    resume(engine, checkpoint, state)
    return state, data.leave_out(data.history.samples_of(bad_step))
