"""A value of the wrong kind is named with what the key takes, and paths are expanded."""

from __future__ import annotations

import pytest
from support import small_config, write_config

from megachiar.config import ConfigError, load_config

WRONG = {
    "optimizer.learning_rate=.inf": "is Infinity, must be a finite number",
    "optimizer.learning_rate=.nan": "is NaN, must be a finite number",
    "model.router=3": "is 3, must be a mapping of keys",
    "data.train.0=5": "is 5, must be a mapping of keys",
    "data.validation=3": "is 3, must be a mapping of keys",
    "model.router.tau=high": 'is "high", must be a number or a list',
    "precision.loss_scale=abc": "is \"abc\", must be a number or 'dynamic'",
    "precision.loss_scale=-1": "is -1, must be a value greater than 0 or 'dynamic'",
    "optimizer.betas=[0.9]": "lacks value 2 of its list",
    "training.steps=2.5": "is 2.5, must be an integer",
    "logging.tensorboard=1": "is 1, must be true or false",
    "logging.folder=$NO_SUCH_NAME/x": "must be a path whose variables are all set; NO_SUCH_NAME is not",
    "logging.folder=~no-such-user/x": "must be a path in the home folder of a user of this machine",
}


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / "config.yaml", small_config(tmp_path))


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_told_with_what_the_key_takes(override, config, monkeypatch):
    monkeypatch.delenv("NO_SUCH_NAME", raising=False)
    with pytest.raises(ConfigError) as raised:
        load_config(config, [override])
    assert WRONG[override] in str(raised.value)
    assert f"--set {override}: " in str(raised.value)
    assert "value a" not in str(raised.value)


def test_paths_are_expanded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    overrides = ["logging.folder=~/runs/a", "data.train.0.path=$SCRATCH/train", "data.validation={v: '${SCRATCH}x/v'}"]
    read = load_config(config, [*overrides, "data.tokenizer=~", "checkpoint.load_from=~/other"])
    assert str(read.logging.folder) == "/home/me/runs/a"
    assert str(read.data.train[0].path) == "/fast/train"
    assert {name: str(path) for name, path in read.data.validation.items()} == {"v": "/fastx/v"}
    assert read.data.tokenizer is None  # a lone ~ is YAML's null
    assert str(read.checkpoint.load_from) == "/home/me/other"
    again = write_config(tmp_path / "resolved.yaml", read.model_dump(mode="json"))
    assert load_config(again) == read
