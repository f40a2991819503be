"""``megachiar checkpoint``: what it lists, verifies, shows, compares and removes."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megachiar.checkpoint import checksums
from megachiar.checkpoint.checksums import write_checksummed
from megachiar.checkpoint.format import CONFIG_FILE, STATE_FILE, checkpoint_name, read_state
from megachiar.checkpoint.inspection import compare
from megachiar.checkpoint.reading import open_tensors
from megachiar.checkpoint.sharded_tensors import ShardReader, write_safetensors
from megachiar.checkpoint.verify import find_damaged_file
from megachiar.cli.checkpoint import main
from megachiar.errors import UserError
from megachiar.progress import MEGA, ByteProgress

PLAIN = "embedding.weight"


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of a run of 3 steps that a test may change."""
    shutil.copytree(trained_run / "run" / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


def output_of(capsys, *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_verifying_shows_progress_that_ends_at_the_size_of_the_files(run, capsys, monkeypatch):
    monkeypatch.setattr(ByteProgress.__init__, "__defaults__", (None, 0.0))  # a line for each report
    monkeypatch.setattr(checksums, "REPORTED_BYTES", 1)
    main(["verify", str(run)])
    lines = capsys.readouterr().err.splitlines()
    size = sum(read_state(checkpoint(run, 3)).files.values()) / MEGA
    last = [line for line in lines if line.startswith(f"verifying {checkpoint_name(3)}: ")][-1]
    assert last.startswith(f"verifying {checkpoint_name(3)}: {size:.1f} MB, ") and " MB/s, 100 %, 0:00:00 left" in last
    assert len(lines) > 3
    state = read_state(checkpoint(run, 3))
    assert find_damaged_file(checkpoint(run, 3), state, list(state.files)) is None
    assert capsys.readouterr().err == "", "of several ranks one shows progress"


def test_list_names_every_checkpoint_and_what_is_wrong_with_it(run, capsys):
    (checkpoint(run, 2) / CONFIG_FILE).unlink()
    (run / "checkpoints" / "step_00000004.incomplete").mkdir()
    found = json.loads(output_of(capsys, "list", run, "--json"))
    assert [(c["step"], c["problem"]) for c in found] == [(1, None), (2, f"{CONFIG_FILE} is missing"), (3, None)]
    state = read_state(checkpoint(run, 1))
    assert found[0]["size"] == sum(state.files.values()) and found[0]["layout"] == state.layout
    text = output_of(capsys, "list", run)
    assert "complete" in text and f"{CONFIG_FILE} is missing" in text and state.layout in text


def test_verify_reads_the_contents(run, capsys):
    text = output_of(capsys, "verify", run)
    assert text.count(": whole") == 3
    flip(checkpoint(run, 2) / "weights-p00-t01-d00.safetensors")
    (checkpoint(run, 3) / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="1 of 3 checkpoints are not whole"):
        main(["verify", str(run)])
    text = capsys.readouterr().out
    assert (
        "weights-p00-t01-d00.safetensors was altered" in text and "does not list, and nobody reads, notes.txt" in text
    )
    assert output_of(capsys, "verify", checkpoint(run, 1)).endswith(": whole\n")


def test_show_has_every_tensor_whole_with_its_norm(run, capsys):
    shown = json.loads(output_of(capsys, "show", run, "--json"))
    assert shown["state"]["step"] == 3 and shown["checkpoint"].endswith(checkpoint_name(3))
    reader = open_tensors(checkpoint(run, 3))
    assert {t["name"] for t in shown["tensors"]} == set(reader.names())
    for tensor in shown["tensors"]:
        whole = reader.whole(tensor["name"])
        assert tensor["shape"] == list(whole.shape) and tensor["dtype"] == "float32"
        assert tensor["norm"] == pytest.approx(whole.double().square().sum().sqrt().item(), rel=1e-12)
    text = output_of(capsys, "show", checkpoint(run, 1))
    assert "step: 1" in text and PLAIN in text and "XXH3-128" in text


def change(checkpoint: Path, name: str, *, drop: str | None = None) -> None:
    """Add 0.5 to one element of a tensor, drop another tensor, and write the record that fits."""
    state = read_state(checkpoint)
    sizes, checksums = dict(state.files), dict(state.checksums)
    for file in state.tensor_files:
        with safe_open(checkpoint / file, "pt") as opened:
            metadata, tensors = opened.metadata(), {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
        if name in tensors:
            tensors[name].view(-1)[3] += 0.5
        tensors.pop(drop, None)
        sizes[file], checksums[file] = write_safetensors(checkpoint / file, tensors, metadata)
    record = state.model_copy(update={"files": sizes, "checksums": checksums})
    write_checksummed(checkpoint / STATE_FILE, record.to_json())


def test_diff_says_which_tensors_differ_and_by_how_much(run, capsys):
    assert "equal in every bit" in output_of(capsys, "diff", run, checkpoint(run, 3))
    other = run / "other"
    shutil.copytree(checkpoint(run, 3), other)
    names = open_tensors(other).names()
    gone = next(name for name in names if name.endswith("exp_avg"))
    change(other, PLAIN, drop=gone)
    found = json.loads(output_of(capsys, "diff", run, other, "--json"))
    by_name = {difference["name"]: difference for difference in found["different"]}
    ranks = 2 if open_tensors(other)._stored[PLAIN][0].shard else 1  # each rank's part was changed
    norm = open_tensors(checkpoint(run, 3)).whole(PLAIN).double().norm().item()
    assert set(by_name) == {PLAIN, gone} and found["equal"] == found["tensors"] - 2
    assert by_name[PLAIN]["largest"] == pytest.approx(0.5, rel=1e-6)
    assert by_name[PLAIN]["relative"] == pytest.approx(0.5 * ranks**0.5 / norm, rel=1e-5)
    assert by_name[gone]["problem"] == "is in the first alone"
    text = output_of(capsys, "diff", run, other)  # which finds both whole: comparing has changed no file
    assert PLAIN in text and "is in the first alone" in text


def test_diff_holds_one_tensor_of_each_at_a_time(run, monkeypatch):
    read: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    real = ShardReader.whole

    def counted(self: ShardReader, name: str) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in read))
        tensor = real(self, name)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ShardReader, "whole", counted)
    list(compare(checkpoint(run, 1), checkpoint(run, 3)))
    assert len(read) > 100 and max(alive) == 1


def test_prune_keeps_what_the_rule_says_and_always_the_newest_whole_one(run, capsys):
    assert "would remove" in output_of(capsys, "prune", run, "--keep", 1, "--dry-run") and len(steps(run)) == 3
    assert output_of(capsys, "prune", run, "--keep", 2).count("removed ") == 1
    assert steps(run) == [checkpoint_name(2), checkpoint_name(3)]
    flip(checkpoint(run, 3) / "optimizer-p00-t00-d00.safetensors")  # complete by its sizes, but not whole
    assert "nothing to remove" in output_of(capsys, "prune", run, "--keep", 1)
    with pytest.raises(UserError, match="is the newest whole checkpoint"):
        main(["prune", str(run), "--steps", "2"])
    assert "removed" in output_of(capsys, "prune", run, "--steps", "3")
    assert steps(run) == [checkpoint_name(2)]


def test_prune_by_multiples_and_by_both_rules(run, capsys):
    assert output_of(capsys, "prune", run, "--keep-every", 2).count("removed ") == 1
    assert steps(run) == [checkpoint_name(2), checkpoint_name(3)]
    assert "nothing to remove" in output_of(capsys, "prune", run, "--keep-every", 2, "--keep", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "{run}/nowhere"], "no such folder"),
        (["show", "{run}/checkpoints/step_00000009"], "no such folder"),
        (["prune", "{run}"], "needs a rule"),
        (["prune", "{run}", "--keep", "1", "--steps", "1"], "needs a rule"),
        (["prune", "{run}", "--keep", "0"], "must be at least 1"),
        (["prune", "{run}", "--steps", "7"], "holds no checkpoint of step 7"),
        (["diff", "{run}", "{run}/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_one_message(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main([argument.format(run=run) for argument in arguments])
    assert caught.value.remedy
    assert len(steps(run)) == 3


def test_checkpoints_of_format_3_are_listed_and_shown(capsys):
    written = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0" / "run"
    assert json.loads(output_of(capsys, "list", written, "--json"))[0]["problem"] is None
    assert "format_version 3 has no checksums" in output_of(capsys, "verify", written)
    assert json.loads(output_of(capsys, "show", written, "--json"))["state"]["step"] == 4
