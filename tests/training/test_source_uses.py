"""A source that is too small for its weight is named before the run starts, or refused."""

from __future__ import annotations

import os
import shutil

import indexed_oracle as oracle
import pytest
from support import small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.topology import LaunchError
from megachiar.training.describe_data import describe_repeated_sources, describe_seen_sets, describe_source_usage
from megachiar.training.run_data import check_max_epochs, open_data


@pytest.fixture
def config(tmp_path):
    """Return a config of 640 samples of 32 tokens, two thirds from some 2,400 tokens, the rest from a large source."""
    small, large = write_tokens(tmp_path / "small"), write_tokens(tmp_path / "large", documents=400)
    sections = {
        "data": {"train": [{"path": str(small), "weight": 2}, {"path": str(large)}], "validation": {}},
        "training": {"steps": 80},
    }
    return write_config(tmp_path / "config.yaml", small_config(tmp_path, **sections))


def test_what_is_passed_over_often_is_reported(config):
    loaded = load_config(config)
    small, large = describe_source_usage(loaded, open_data(loaded))
    assert "66.7% of samples" in small and "small for its weight" in small
    assert "small for its weight" not in large and "epochs" in large


def test_more_passes_than_allowed_are_refused_and_the_remedy_holds(config):
    with pytest.raises(LaunchError, match=r"small: .* more than data\.max_epochs 3") as refused:
        loaded = load_config(config, ["data.max_epochs=3"])
        check_max_epochs(loaded, open_data(loaded))
    share = float(refused.value.remedy.split("at most ")[1].split(" ")[0])
    weight = 2 / 3 * share / (1 - 2 / 3 * share)  # the other source has weight 1
    mended = load_config(config, ["data.max_epochs=3", f"data.train.0.weight={weight:.3f}"])
    (use, _) = describe_source_usage(mended, open_data(mended))
    assert 2.8 <= float(use.split()[-2]) <= 3


def test_a_validation_set_that_is_trained_on_is_named(config, tmp_path):
    """The set is recognised by its path, or as a copy by the content that the manifests record."""

    def lines(**validation: object) -> list[str]:
        sets = ", ".join(f"{name}: {path}" for name, path in validation.items())
        return describe_seen_sets(open_data(load_config(config, [f"data.validation={{{sets}}}"])))

    write_tokens(tmp_path / "valid", seed=1)
    assert lines(own=tmp_path / "valid") == []
    (line,) = lines(own=tmp_path / "valid", again=tmp_path / "small")
    assert "data.validation.again holds the same tokens as" in line and str(tmp_path / "small") in line
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"small{suffix}", tmp_path / f"copy{suffix}")
    assert lines(copy=tmp_path / "copy") == [], "nothing tells, without reading both"
    for name in ("small", "copy", "valid"):
        oracle.make_manifest(tmp_path / name, vocab_size=64)
    (line,) = lines(own=tmp_path / "valid", copy=tmp_path / "copy")
    assert "data.validation.copy" in line


@pytest.mark.parametrize("how", ["copy", "link", "link of a file"])
def test_a_source_under_two_names_is_named_once(config, tmp_path, how):
    """The copy is recognised by the content that the manifests record, and links by the file that they lead to."""

    def lines(*more: str) -> list[str]:
        sources = ", ".join(f"{{path: {tmp_path / name}}}" for name in ("small", "large", *more))
        return describe_repeated_sources(open_data(load_config(config, [f"data.train=[{sources}]"])))

    names = ("small", "large")
    if how == "copy":
        for name in names:
            oracle.make_manifest(tmp_path / name, vocab_size=64)
    for suffix in (".bin", ".idx", ".json"):
        if (tmp_path / f"small{suffix}").exists():
            is_link = how == "link" or (how == "link of a file" and suffix == ".bin")
            (os.symlink if is_link else shutil.copy)(tmp_path / f"small{suffix}", tmp_path / f"again{suffix}")
    assert lines() == []
    (line,) = lines("again")
    assert f"{tmp_path / 'again'} holds the same tokens as {tmp_path / 'small'}" in line
