"""data.document_mask refuses datasets that it cannot mask; without it, the log names those that end otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest
from support import forked_python, pretrain, small_config, write_config

from megachiar.config import load_config
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.document_end import document_end, why_unmasked
from megachiar.topology import LaunchError
from megachiar.training.document_ends import describe_document_ends, with_document_end
from megachiar.training.run_data import open_data

END, OTHER = 3, 5
MASK = ("data.document_mask=true",)


def write_documents(prefix: Path, end: int | None, *, manifest: bool = True, seed: int = 0) -> Path:
    """Write 24 documents of ids from 8 on, each ended by id ``end``, with or without a manifest that records it."""
    rng = np.random.default_rng(seed)
    tail = [] if end is None else [end]
    oracle.write(prefix, [[[*rng.integers(8, 64, rng.integers(60, 140)).tolist(), *tail]] for _ in range(24)])
    if manifest:
        recorded = END if end is None else end
        oracle.make_manifest(prefix, vocab_size=64, eod_id=recorded, append_eod=end is not None)
    return prefix


@pytest.fixture
def folder(tmp_path):
    for number, (name, end) in enumerate((("train", END), ("same", END), ("other", OTHER), ("none", None))):
        write_documents(tmp_path / name, end, seed=number)
        write_documents(tmp_path / f"megatron_{name}", end, manifest=False, seed=10 + number)
    write_documents(tmp_path / "valid", END, seed=20)
    return tmp_path


def config_file(folder: Path, train: list[str], valid: str = "valid", **sections: dict) -> Path:
    data = {"train": [{"path": str(folder / name)} for name in train], "validation": {"v": str(folder / valid)}}
    return write_config(folder / "config.yaml", small_config(folder, data=data, **sections))


def resolved_end(folder: Path, train: list[str], valid: str = "valid", *overrides: str) -> int:
    config = load_config(config_file(folder, train, valid), [*MASK, *overrides])
    return with_document_end(config, open_data(config)).document_end


@pytest.mark.parametrize("name", ["none", "other", "megatron_none", "megatron_other"])
@pytest.mark.parametrize("place", ["first", "second", "validation"])
def test_every_source_that_cannot_be_masked_is_refused(folder, name, place):
    train, valid = {
        "first": ([name, "train"], "valid"),
        "second": (["train", name], "valid"),
        "validation": (["train", "same"], name),
    }[place]
    with pytest.raises(LaunchError) as refused:
        resolved_end(folder, train, valid)
    assert refused.value.where == "data.document_mask" and "--append-eod" in refused.value.remedy
    # Where two manifests record different ids, the first one counts and the message names the other dataset.
    named = "train" if (place, name) == ("first", "other") else name
    assert f"{folder / named}.json" in refused.value.problem
    said = {"none": "no token of their own", "other": f"id {OTHER}", "train": f"id {END}"}
    said |= {"megatron_none": "different tokens", "megatron_other": f"id {OTHER}"}
    assert said[named] in refused.value.problem


def test_sources_that_end_alike_are_masked(folder):
    assert resolved_end(folder, ["train", "same"]) == END
    assert resolved_end(folder, ["other"], "megatron_other") == OTHER
    # The documents of a source without a manifest confirm the id that another source's manifest records.
    assert resolved_end(folder, ["megatron_train", "same"]) == END


def test_an_end_that_the_config_names_must_be_one(folder):
    """A token that occurs in the text may be named, but not one that a manifest contradicts or that never occurs."""
    named = f"data.document_end={END}"
    assert resolved_end(folder, ["train", "megatron_train"], "valid", named) == END
    assert resolved_end(folder, ["megatron_none"], "none", "data.document_end=9") == 9  # id 9 occurs in both
    for name in ("other", "none", "megatron_none", "megatron_other"):
        with pytest.raises(
            LaunchError, match=f"data.document_end says that documents end with id {END}, but .*{name}.json"
        ):
            resolved_end(folder, ["train", name], "valid", named)


def test_a_token_between_documents_of_the_text_is_found_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr("megachiar.data.sampling.document_end.TOKENS_SEARCHED", 100)
    monkeypatch.setattr("megachiar.data.sampling.dataset.READ_TOKENS", 10)
    tokens = np.full(1000, 9)
    tokens[5::50] = END
    source = TokenSource(oracle.write_stream(tmp_path / "a", tokens))
    assert why_unmasked(source, END, is_stated=True) is None
    assert "id 4 does not occur" in why_unmasked(source, 4, is_stated=True)
    assert document_end(source) == 9  # id 9 ends its only document, which proves nothing
    assert why_unmasked(source, END, is_stated=False) is not None


def test_one_document_runs_into_no_other(folder):
    oracle.write_stream(folder / "one", np.arange(8, 64), documents=1)
    with pytest.raises(LaunchError, match=r"one\.json: there is no manifest"):
        resolved_end(folder, ["train"], "one")
    oracle.make_manifest(folder / "one", vocab_size=64, append_eod=False)
    assert resolved_end(folder, ["train"], "one") == END
    assert describe_document_ends(open_data(load_config(config_file(folder, ["train"], "one")))) == []


def test_a_refused_source_is_one_message_of_a_run(folder):
    path = config_file(folder, ["train", "none"])
    output = pretrain(path, *MASK, ranks=2, codes=(2, 2))
    text = " ".join(" ".join(output).split())
    assert text.count("error:") == 1 and "remedy: preprocess it with --append-eod" in text and "Traceback" not in text
    assert not (folder / "run").exists()


def test_a_source_that_a_run_goes_on_with_is_refused_as_well(folder):
    path = config_file(folder, ["train"], training={"steps": 2})
    pretrain(path, *MASK)
    more = [*MASK, f"data.train=[{{path: {folder / 'none'}}}]", "data.on_change=continue", "training.steps=3"]
    output = " ".join(pretrain(path, *more, codes=(2,))[0].split())
    assert "none.json says that documents end with no token of their own" in output
    other = [*MASK, f"data.train=[{{path: {folder / 'other'}}}]", f"data.validation={{v: {folder / 'other'}}}"]
    output = " ".join(pretrain(path, *other, "data.on_change=continue", "training.steps=3")[0].split())
    assert f"data.document_end was {END} up to here and is {OTHER} from here on" in output
    assert f"{folder / 'train'} (read earlier) with id {END}" in output


def test_without_the_mask_different_ends_are_said_at_the_start(folder):
    def lines(train: list[str], valid: str = "valid") -> list[str]:
        return describe_document_ends(open_data(load_config(config_file(folder, train, valid))))

    assert lines(["train", "same", "megatron_train"]) == []
    assert lines(["none", "megatron_none"], "none") == []
    (line,) = lines(["train", "same", "other"], "none")
    for part in (
        f"train, {folder / 'same'} with id {END}",
        f"other with id {OTHER}",
        "none with no token of their own",
    ):
        assert part in line
    path = config_file(folder, ["train", "other"], training={"steps": 1})
    output = " ".join(pretrain(path)[0].split())
    assert 0 < output.find("documents end differently") < output.index("step 1/1")


def test_a_masked_run_is_not_scored_on_documents_that_it_cannot_tell(folder):
    path = config_file(folder, ["train"], training={"steps": 1})
    pretrain(path, *MASK)

    def tool(name: str, *arguments: object):
        return forked_python(f"tools/{name}.py", folder / "run", *arguments)

    assert json.loads(tool("evaluate", "--data", folder / "same", "--json").stdout)["tokens"] > 0
    for name in ("evaluate", "calibrate_tau", "routing_flips", "analyze_routing"):
        for dataset in ("none", "other", "megatron_none"):
            done = tool(name, "--data", folder / dataset)
            assert done.returncode == 2 and "Traceback" not in done.stderr
            assert f"{dataset}.json" in " ".join(done.stderr.split()).replace(" ", "") or dataset in done.stderr
            assert f"end with id {END}" in " ".join(done.stderr.split())
