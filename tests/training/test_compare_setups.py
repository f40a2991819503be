"""Ranks that start with different configs, data or versions are named before they train."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.data.storage.files import bin_path
from megachiar.training import compare_setups
from megachiar.training.run_data import open_data

ALTERED = {
    "seed": ({"training": {"seed": 99}}, "training.seed: is 99 on rank 1 on .*, but 1234 on rank 0"),
    "learning rate": (
        {"optimizer": {"learning_rate": 3e-3}},
        "optimizer.learning_rate: is 0.003 on rank 1 on .*, but 0.002 on rank 0",
    ),
    "dropout": ({"model": {"dropout": 0.2}}, "model.dropout: is 0.2 on rank 1 on .*, but 0.0 on rank 0"),
    "tau": ({"model": {"router": {"tau": 0.5}}}, "model.router.tau: is 0.5 on rank 1 on .*, but 0.79 on rank 0"),
    "data": ({}, "data of train: is .* on rank 1 on .*, but .* on rank 0"),
}


def make_host(folder: Path, run: Path, altered: dict, data_seed: int) -> None:
    """Write what one host mounts: a config and datasets, at the same relative paths as on the other hosts."""
    folder.mkdir()
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1)
    if data_seed:
        tokens = np.fromfile(bin_path(folder / "train"), np.uint16)
        np.random.default_rng(data_seed).permutation(tokens).tofile(bin_path(folder / "train"))
    config = small_config(Path(), **altered)
    config["logging"]["folder"] = str(run)
    config["training"] |= {"steps": 2}
    write_config(folder / "config.yaml", config)


@pytest.mark.parametrize("case", ALTERED)
def test_a_rank_that_differs_is_named_before_anything_is_written(case, tmp_path):
    altered, message = ALTERED[case]
    make_host(tmp_path / "a", tmp_path / "run", {}, data_seed=0)
    make_host(tmp_path / "b", tmp_path / "run", altered, data_seed=int(case == "data"))
    folders = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    output, other = run_ranks(2, WORKERS / "elsewhere_worker.py", folders, "--config", "config.yaml", codes=(2,))
    assert re.search(message, output), output
    assert "remedy: start all ranks with one config" in output
    assert "Traceback" not in output + other
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_changed_token_changes_the_fingerprint(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1)
    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)))
    source = open_data(config).training.sources[0]
    before = compare_setups.fingerprint(source)
    with open(bin_path(source.prefix), "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    assert compare_setups.fingerprint(source) != before


def test_versions_are_part_of_the_setup(tmp_path, monkeypatch):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1)
    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)))
    setup = compare_setups.describe_setup(config, open_data(config))
    assert {"version of torch", "version of deepspeed", "version of numpy", "version of Python"} <= setup.keys()
    error = compare_setups._first_difference(["x", "y", "y"], [setup, setup, setup | {"version of torch": "1.0"}])
    assert f"version of torch: is 1.0 on rank 2 on y, but {setup['version of torch']} on ranks 0, 1" in str(error)
