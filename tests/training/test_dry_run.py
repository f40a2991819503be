"""A dry run refuses data, checkpoint and layout that training would refuse, with its message, and writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest
from support import pretrain, small_config, write_config

from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.training.dry_run import print_plan

STEPS = 2


def write_documents(prefix: Path, end: int, seed: int) -> Path:
    """Write 24 documents that id ``end`` ends, and the manifest that records it."""
    rng = np.random.default_rng(seed)
    documents = [[[*rng.integers(8, 64, rng.integers(60, 140)).tolist(), end]] for _ in range(24)]
    oracle.write(prefix, documents)
    oracle.make_manifest(prefix, vocab_size=64, eod_id=end, append_eod=True)
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of two models, and what is no run, beside the config of the first."""
    folder = tmp_path_factory.mktemp("dry_run")
    for number, (name, end) in enumerate((("train", 3), ("valid", 3), ("other", 5))):
        write_documents(folder / name, end, seed=number)
    write_config(folder / "config.yaml", small_config(folder, training={"steps": STEPS}))
    pretrain(folder / "config.yaml")
    pretrain(folder / "config.yaml", f"logging.folder={folder / 'wide'}", "model.hidden_size=64")
    (folder / "no_run").mkdir()
    shutil.copytree(folder / "run", folder / "damaged")
    next((folder / "damaged").rglob("weights*")).write_bytes(b"")
    shutil.copytree(folder / "run", folder / "later_damaged")
    (newest,) = (folder / "later_damaged" / "checkpoints").iterdir()
    shutil.copytree(newest, newest.with_name("step_00000003"))  # its record is that of step 2
    return folder


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def dry_run(folder: Path, *sets: str) -> None:
    before = files(folder)
    try:
        print_plan(load_config(folder / "config.yaml", sets), None)
    finally:
        assert files(folder) == before, "a dry run writes nothing"


NEW = "logging.folder={}/new"
ALL = ("checkpoint.load=all", NEW, "checkpoint.load_from={}/run")
BOTH = "data.train=[{{path: {0}/train}}, {{path: {0}/other}}]"
LONGER = f"training.steps={STEPS + 1}"
REFUSED = {
    "mixed ends of documents under a mask": (
        ["data.document_mask=true", BOTH, NEW],
        "data.document_mask",
        "--append-eod",
    ),
    "load_from of a missing folder": (["checkpoint.load_from={}/nowhere", NEW], "checkpoint.load_from", "run folder"),
    "load_from of a folder without checkpoints": (
        ["checkpoint.load_from={}/no_run", NEW],
        "checkpoint.load_from",
        "run folder",
    ),
    "load_from of damaged checkpoints": (
        ["checkpoint.load_from={}/damaged", NEW],
        "checkpoint.load_from",
        "run folder",
    ),
    "weights of another model": (
        ["checkpoint.load_from={}/wide", NEW],
        "model.hidden_size is 64 in the checkpoint",
        "leave checkpoint.load_from out",
    ),
    "all of another model": (
        [*ALL, "model.hidden_size=64", LONGER],
        "model.hidden_size is 32 in the checkpoint",
        "leave checkpoint.load_from out",
    ),
    "another run's data": ([*ALL, BOTH, LONGER], "data.train: was", "set checkpoint.load to weights"),
    "another run's seed": ([*ALL, "training.seed=7", LONGER], "training.seed: was", "set checkpoint.load to weights"),
    "another run's last step": ([*ALL], "ends the run at step 2", "checkpoint.load: weights"),
    "a run of another model": (
        ["logging.folder={}/wide"],
        "model.hidden_size is 64 in the checkpoint",
        "another logging.folder",
    ),
    "a run whose checkpoints are damaged": (
        ["logging.folder={}/damaged"],
        "none of its checkpoints is whole",
        "an undamaged copy",
    ),
    "a run that must not go on": (["checkpoint.resume=never"], "checkpoint.resume is never", "another logging.folder"),
    "other data in mid-run": ([BOTH, LONGER], "data.train: was", "set data.on_change to continue"),
    "a source that is too small": (
        ["data.max_epochs=0.01", NEW, "training.steps=100"],
        "more than data.max_epochs",
        "add text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_refuses_is_refused_with_its_message(folder, name):
    sets, problem, remedy = REFUSED[name]
    sets = [each.format(folder) for each in sets]
    with pytest.raises(UserError) as refused:
        dry_run(folder, *sets)
    said = " ".join(str(refused.value).split())
    assert problem in said and remedy in refused.value.remedy
    (output,) = pretrain(folder / "config.yaml", *sets, codes=(2,))
    assert said in " ".join(output.split())
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("weights of another model", []),
        ("another run's data", ["checkpoint.load=weights"]),
        ("another run's seed", ["checkpoint.load=weights"]),
        ("other data in mid-run", ["data.on_change=continue"]),
        ("other data in mid-run", [NEW, "checkpoint.load_from={}/run"]),
        ("a run of another model", [NEW]),
    ],
)
def test_the_remedy_works(folder, name, remedy):
    sets = [each.format(folder) for each in (*REFUSED[name][0], *remedy)]
    if not remedy:
        sets = [each for each in sets if "load_from" not in each]
    dry_run(folder, *sets)


def test_it_says_where_the_run_starts_and_what_may_surprise(folder, capsys):
    def said(*sets: str) -> str:
        dry_run(folder, *(each.format(folder) for each in sets))
        return " ".join(capsys.readouterr().out.split())

    assert "start: fresh" in said(NEW)
    assert "start: weights from" in said(NEW, "checkpoint.load_from={}/run")
    assert "start: resumed from" in said(LONGER) and "is finished" in said()
    both = said(NEW, BOTH, "data.document_mask=false")
    assert "documents end differently" in both and "other with id 5" in both.replace("/ ", "/")
    assert "document_end: 3" in said(NEW, "data.document_mask=true"), "as training resolves it"
    assert "passed over" in said("logging.folder={}/later_damaged")
    assert "data.train was" in said(BOTH, LONGER, "data.on_change=continue")


def test_a_checkpoint_is_checked_where_the_data_is_not(folder):
    gone = f"data.train=[{{path: {folder}/gone}}]"
    dry_run(folder, gone, f"logging.folder={folder}/new")
    for sets, problem in (
        ([f"logging.folder={folder}/wide"], "model.hidden_size is 64"),
        (["checkpoint.resume=never"], "resume is never"),
        ([f"logging.folder={folder}/new", f"checkpoint.load_from={folder}/nowhere"], "no such folder"),
        ([each.format(folder) for each in ALL], "ends the run at step 2"),
    ):
        with pytest.raises(UserError, match=problem):
            dry_run(folder, gone, *sets)
