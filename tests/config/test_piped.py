"""A config may come from standard input or from a pipe."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ROOT, small_config, write_config

from megachiar import launch
from megachiar.config import load_config
from megachiar.errors import UserError

CONFIG = ROOT / "configs" / "tiny.yaml"


def test_a_config_from_standard_input(monkeypatch, tmp_path):
    text = f"base: {CONFIG}\ntraining: {{steps: 7}}\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert load_config("-") == load_config(CONFIG, ["training.steps=7"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"model: [")))
    with pytest.raises(UserError, match=r"^standard input:1:9: not valid YAML"):
        load_config("-")


def test_a_config_from_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = write_config(tmp_path / "config.yaml", small_config(tmp_path)).read_text()
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    read = load_config(pipe)
    writer.join()
    assert read == load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("has_writer", [False, True])
def test_a_pipe_that_nobody_writes_to_is_a_message(has_writer, tmp_path, monkeypatch):
    monkeypatch.setattr("megachiar.config.yaml_file.PIPE_TIMEOUT_S", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR) if has_writer else None
    with pytest.raises(UserError, match="nothing was written to this pipe"):
        load_config(pipe)
    if descriptor is not None:
        os.close(descriptor)


@pytest.mark.parametrize("name", ["-", "pipe"])
def test_several_ranks_do_not_share_a_pipe(name, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    launch.refuse_shared_pipe(Path(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several ranks cannot read one"):
        launch.refuse_shared_pipe(Path(name))
