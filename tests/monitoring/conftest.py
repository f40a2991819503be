"""One trained run for all tests of this folder that only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from watched_runs import make_watched_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    return make_watched_run(tmp_path_factory.mktemp("watched"))
