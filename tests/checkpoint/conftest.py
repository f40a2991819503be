"""A run that several files of tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import pretrain, small_config, write_config, write_tokens


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A run of two tensor-parallel ranks with a checkpoint after each of its 3 steps: config.yaml, train, run/."""
    folder = tmp_path_factory.mktemp("trained")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, checkpoint={"every": 1, "keep": None})
    config["training"] |= {"steps": 3}
    config["parallel"] = {"tensor_size": 2}
    pretrain(write_config(folder / "config.yaml", config), ranks=2)
    return folder
