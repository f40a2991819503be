"""``data.train[].fraction``: a run on the first part of a dataset is the run on a dataset that has no more."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from support import pretrain, small_config, write_config, write_tokens

from megachiar.config import ConfigError, load_config
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.training.describe_data import source_usage
from megachiar.training.epochs import resolve_epochs
from megachiar.training.metrics import read_metrics
from megachiar.training.moved_data import with_data_of_step
from megachiar.training.run_data import open_data

FRACTION = 0.3


@pytest.fixture
def config(tmp_path) -> Path:
    write_tokens(tmp_path / "train")
    tokens = IndexedDataset(tmp_path / "train").tokens
    with IndexedDatasetBuilder(tmp_path / "part", np.uint16) as builder:
        builder.add_document(np.array(tokens[: math.ceil(0.3 * tokens.size)]))
    sections = small_config(tmp_path, checkpoint={"every": 2, "keep": None}, training={"steps": 6})
    sections["data"] = {"train": [{"path": str(tmp_path / "train"), "fraction": FRACTION}]}
    return write_config(tmp_path / "config.yaml", sections)


def test_it_has_the_samples_of_the_shorter_dataset(config):
    part = f"data.train=[{{path: {config.parent / 'part'}}}]"
    ours, theirs = (open_data(load_config(config, sets)).training for sets in ([], [part]))
    positions = range(200)  # several passes
    np.testing.assert_array_equal(ours.batch(positions), theirs.batch(positions))
    used = IndexedDataset(config.parent / "train").document_of_token(ours.sources[0].tokens.size - 1)
    assert {document for position in positions for document in ours.documents(position)} == set(range(used + 1))
    epochs = [resolve_epochs(load_config(config, ["training.epochs=2", *sets])).steps for sets in ([], [part])]
    assert epochs[0] == epochs[1] < resolve_epochs(load_config(config, ["training.epochs=2", WHOLE])).steps
    (use,) = source_usage(load_config(config), open_data(load_config(config)))
    assert use.tokens == IndexedDataset(config.parent / "part").tokens.size


WHOLE = "data.train.0.fraction=1.0"


def test_a_run_goes_on_with_its_part_and_no_other(config):
    pretrain(config, "training.steps=4", "schedule.decay_steps=6")
    (output,) = pretrain(config, WHOLE, "schedule.decay_steps=6", codes=[2])
    assert "the order of samples would change" in output
    pretrain(config, "schedule.decay_steps=6")
    apart = config.parent / "apart"
    pretrain(config, f"data.train=[{{path: {config.parent / 'part'}}}]", f"logging.folder={apart}")
    losses = [[record["loss"] for record in read_metrics(run, "train")] for run in (config.parent / "run", apart)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_past_step_finds_its_part_again(config):
    """The dataset has moved; its record has the number of tokens, not the fraction."""
    history = open_data(load_config(config)).history
    for suffix in (".bin", ".idx"):
        (config.parent / f"train{suffix}").rename(config.parent / f"moved{suffix}")
    found = with_data_of_step(load_config(config), history, 1, [config.parent / "moved"])
    assert found.data.train[0].path == config.parent / "moved"
    assert open_data(found).training.sources[0].tokens.size == history.sources[0].tokens


def test_megatrons_order_has_no_parts(config):
    with pytest.raises(ConfigError, match=r"data\.train\.0\.fraction: is 0\.3, but data\.order is megatron"):
        load_config(config, ["data.order=megatron"])
