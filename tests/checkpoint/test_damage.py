"""Whatever happens to a file of a checkpoint is noticed, and the newest whole checkpoint is used in its place."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import damage_of, pretrain

from megachiar.checkpoint.checksums import checksum
from megachiar.checkpoint.format import (
    CONFIG_FILE,
    SINCE_VERSION_4,
    STATE_FILE,
    checkpoint_name,
    find_damage,
    read_state,
)
from megachiar.checkpoint.reading import locate_checkpoint, open_tensors, read_weights
from megachiar.checkpoint.save import remove_surplus
from megachiar.checkpoint.verify import share_of_files
from megachiar.config import load_config
from megachiar.config.sections import CheckpointConfig
from megachiar.data.storage import regular_file
from megachiar.errors import UserError
from megachiar.inference.loading import load_for_inference
from megachiar.topology import LaunchError
from megachiar.training.start import find_start

STEPS, BEFORE = 3, 2
FILES = [
    STATE_FILE,
    CONFIG_FILE,
    *(f"{kind}-p00-t0{rank}-d00.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)),
]


@pytest.fixture(scope="module")
def run(trained_run) -> Iterator[Path]:
    """A run of which a test alters a file in ``Damaged`` alone, which puts the file back."""
    assert sorted(p.name for p in checkpoint(trained_run).iterdir()) == sorted(FILES)
    yield trained_run
    for step in range(1, STEPS + 1):
        assert damage_of(checkpoint(trained_run, step)) is None


def checkpoint(folder: Path, step: int = STEPS) -> Path:
    return folder / "run" / "checkpoints" / checkpoint_name(step)


def delete(path: Path, _: Path) -> None:
    path.unlink()


def truncate(path: Path, _: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def cut_last_byte(path: Path, _: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def zero(first: float, last: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, _: Path) -> None:
        content = bytearray(path.read_bytes())
        begin, end = int(first * len(content)), int(last * len(content))
        content[begin:end] = bytes(end - begin)
        path.write_bytes(content)

    return damage


def swap(path: Path, before: Path) -> None:
    shutil.copyfile(before / path.name, path)


def make_folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_broken_link(path: Path, _: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = {
    "deleted": delete,
    "truncated": truncate,
    "last byte cut": cut_last_byte,
    "a byte more": append,
    "head zeroed": zero(0, 0.1),
    "tail zeroed": zero(0.9, 1),
    "block zeroed": zero(0.5, 0.6),
    "all zeroed": zero(0, 1),
    "swapped": swap,
    "a folder": make_folder,
    "a fifo": make_fifo,
    "a broken link": make_broken_link,
}


class Damaged:
    """In this block a file of the newest checkpoint is damaged; afterwards it is as before."""

    def __init__(self, run: Path, name: str, damage: Callable[[Path, Path], None]):
        self.path, self.before, self.damage = checkpoint(run) / name, checkpoint(run, BEFORE), damage

    def __enter__(self) -> None:
        self.content = self.path.read_bytes()
        self.damage(self.path, self.before)

    def __exit__(self, *_: object) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            self.path.rmdir()
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(self.content)


def assert_passed_over(run: Path, name: str) -> None:
    """Training and reading take the checkpoint before the damaged one, and say which file is to blame."""
    lines: list[str] = []
    start = find_start(load_config(run / "config.yaml"), lines.append)
    assert (start.path, start.step) == (checkpoint(run, BEFORE), BEFORE), name
    assert len(lines) == 1 and lines[0].startswith(f"passed over {checkpoint(run)}, because "), lines
    # A swapped record fits its seal: then the files are to blame, which are not those that it lists.
    assert name in lines[0], lines
    with pytest.raises(UserError, match="is not a whole checkpoint: ") as caught:
        locate_checkpoint(checkpoint(run))
    assert caught.value.remedy


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_noticed_and_the_checkpoint_before_is_used(run, name, damage):
    if damage == "swapped" and name == CONFIG_FILE:
        assert (checkpoint(run) / name).read_bytes() == (checkpoint(run, BEFORE) / name).read_bytes()
        return  # the same content is no damage; another config is one of the flips below
    with Damaged(run, name, DAMAGES[damage]):
        assert_passed_over(run, name)
        assert load_for_inference(run / "run")[2].step == BEFORE


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_is(run, name):
    size = (checkpoint(run) / name).stat().st_size
    places = random.Random(name).sample(range(size * 8), 20)
    if name == STATE_FILE:  # among them the digit of the version and all of the seal
        text = (checkpoint(run) / name).read_bytes()
        at = text.index(b'"format_version": 4') + len('"format_version": ')
        places += [at * 8 + bit for bit in range(8)] + list(range((size - 50) * 8, size * 8, 3))
    for place in places:

        def flip(path: Path, _: Path, place: int = place) -> None:
            content = bytearray(path.read_bytes())
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)

        with Damaged(run, name, flip):
            assert_passed_over(run, name)


def test_an_extra_file_is_neither_read_nor_a_damage(run):
    extra = checkpoint(run) / "weights-p07-t00-d00.safetensors"
    shutil.copyfile(checkpoint(run, BEFORE) / "weights-p00-t00-d00.safetensors", extra)
    try:
        expected = read_weights(locate_checkpoint(run / "run"))
        assert find_start(load_config(run / "config.yaml")).path == checkpoint(run)
    finally:
        extra.unlink()
    found = read_weights(checkpoint(run))
    assert all(torch.equal(found[name], expected[name]) for name in found) and set(found) == set(expected)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_passed_over(run, name, monkeypatch):
    real = open

    def refusing(path: Path, *arguments: object, **options: object) -> object:
        if Path(path) == checkpoint(run) / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(regular_file, "open", refusing, raising=False)
    assert_passed_over(run, name)


def test_a_file_in_place_of_a_checkpoint_is_passed_over(run):
    later = checkpoint(run, STEPS + 1)
    later.write_text("no folder")
    lines: list[str] = []
    try:
        assert locate_checkpoint(run / "run", log=lines.append) == checkpoint(run)
    finally:
        later.unlink()
    assert len(lines) == 1 and str(later) in lines[0]


def reseal(path: Path, **changes: object) -> None:
    """Change fields of ``state.json`` as somebody would who knows the format, with the seal that then fits."""
    record = json.loads(path.read_text()) | changes
    record.pop("seal", None)
    body = json.dumps(record, indent=2).removesuffix("\n}")
    path.write_text(f'{body},\n  "seal": "{checksum(body.encode())}"\n}}\n')


def test_an_edited_record_is_noticed(run):
    path = checkpoint(run) / STATE_FILE

    def edit(path: Path, _: Path) -> None:
        path.write_text(path.read_text().replace('"step": 3', '"step": 2'))

    def reseal_step(path: Path, _: Path) -> None:
        reseal(path, step=2)

    def without_checksums(path: Path, _: Path) -> None:
        record = json.loads(path.read_text())
        del record["seal"]
        path.write_text(json.dumps(record | {"format_version": 3}))

    def older_with_seal(path: Path, _: Path) -> None:
        reseal(path, format_version=3)

    def outside(path: Path, _: Path) -> None:
        record = json.loads(path.read_text())
        reseal(path, files=record["files"] | {"../secret": 1}, checksums=record["checksums"] | {"../secret": "0"})

    def nothing(path: Path, _: Path) -> None:
        reseal(path, files={}, checksums={})

    for damage in (edit, reseal_step, without_checksums, older_with_seal, outside, nothing):
        with Damaged(run, STATE_FILE, damage):
            assert_passed_over(run, STATE_FILE)
    assert read_state(path.parent).step == STEPS


HOSTILE = {
    "an empty file": b"",
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "a deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "an absurd shape": b'{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}}',
    "shards without sense": b'{"__metadata__":{"rank":"0","size":"1","shards":"{\\"a\\":[7,0]}"},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "shards as deep as can be": b'{"__metadata__":{"rank":"0","size":"1","shards":"' + b"[" * 50_000 + b'"},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "no metadata": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("version", [3, 4])
def test_a_hostile_header_is_passed_over_even_if_its_checksum_fits(run, name, version, tmp_path):
    content = HOSTILE[name]
    if content.startswith(b"{"):
        content = len(content).to_bytes(8, "little") + content + bytes(4)
    copy_with(run, tmp_path, FILES[2], content, version)
    assert_hostile_passed_over(run, tmp_path, FILES[2])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 5000, b"a: &a [*a]\n", b"model: 7\n", b"\x00"])
@pytest.mark.parametrize("version", [3, 4])
def test_a_hostile_config_is_passed_over_even_if_its_checksum_fits(run, content, version, tmp_path):
    copy_with(run, tmp_path, CONFIG_FILE, content, version)
    assert_hostile_passed_over(run, tmp_path, CONFIG_FILE)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 200_000, b"null", b"7", b'{"format_version": 4}', b"{}\x00"])
def test_a_hostile_record_is_passed_over(run, content, tmp_path):
    copy_with(run, tmp_path, STATE_FILE, content, 4)
    assert_hostile_passed_over(run, tmp_path, STATE_FILE)


def copy_with(run: Path, folder: Path, name: str, content: bytes, version: int) -> None:
    """Copy the newest two checkpoints, with ``content`` in a file of the newest one and a record that fits it."""
    for step in (BEFORE, STEPS):
        shutil.copytree(checkpoint(run, step), checkpoint(folder, step))
    path = checkpoint(folder) / name
    path.write_bytes(content)
    if name == STATE_FILE:
        return
    record = path.parent / STATE_FILE
    old = json.loads(record.read_text())
    old["files"][name], old["checksums"][name] = len(content), checksum(content)
    if version == 4:
        reseal(record, files=old["files"], checksums=old["checksums"])
    else:
        for key in ("seal", *SINCE_VERSION_4):
            del old[key]
        record.write_text(json.dumps(old | {"format_version": 3}))


def assert_hostile_passed_over(run: Path, folder: Path, name: str) -> None:
    lines: list[str] = []
    assert locate_checkpoint(folder / "run", log=lines.append) == checkpoint(folder, BEFORE)
    assert len(lines) == 1 and name in lines[0] and "\n" not in lines[0]
    assert load_for_inference(folder / "run")[2].step == BEFORE


def test_a_folder_of_which_no_checkpoint_is_whole_starts_nothing(run, tmp_path):
    for step in (1, STEPS):
        shutil.copytree(checkpoint(run, step), checkpoint(tmp_path, step))
    (checkpoint(tmp_path, 1) / CONFIG_FILE).unlink()
    zero(0.5, 0.6)(checkpoint(tmp_path) / FILES[-1], tmp_path)
    settings = load_config(run / "config.yaml", [f"logging.folder={tmp_path / 'run'}"])
    for find in (lambda: find_start(settings), lambda: load_for_inference(tmp_path / "run")):
        with pytest.raises(UserError, match="none of its checkpoints is whole") as caught:
            find()
        assert f"{CONFIG_FILE} is missing" in str(caught.value) and FILES[-1] in str(caught.value)
        assert caught.value.remedy
    (output,) = pretrain(
        run / "config.yaml", f"logging.folder={tmp_path / 'run'}", "parallel.tensor_size=1", codes=(2,)
    )
    assert "none of its checkpoints is whole" in output and "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_newer_format_is_a_clear_error_and_not_a_damage(run, tmp_path):
    shutil.copytree(checkpoint(run), checkpoint(tmp_path))
    reseal(checkpoint(tmp_path) / STATE_FILE, format_version=5)
    with pytest.raises(LaunchError, match="has format_version 5"):
        find_damage(checkpoint(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 20])
def test_ranks_verify_every_file_once(run, ranks):
    state = read_state(checkpoint(run))
    shares = [share_of_files(state, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(state.files)


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_bit_identical(run, tmp_path):
    for step in (BEFORE, STEPS):
        shutil.copytree(checkpoint(run, step), checkpoint(tmp_path, step))
    path = checkpoint(tmp_path) / FILES[-1]  # the last rank finds it, and all ranks must agree
    zero(0.5, 0.50001)(path, tmp_path)
    shutil.copytree(checkpoint(tmp_path), damaged := tmp_path / "run" / "checkpoints" / "step_00000099")
    (damaged / CONFIG_FILE).write_text("")
    keeps = ["checkpoint.keep=1", "checkpoint.every=1"]  # neither may be taken for a newer one than those of this run
    output = pretrain(run / "config.yaml", f"logging.folder={tmp_path / 'run'}", *keeps, ranks=2)[0]
    assert f"passed over {checkpoint(tmp_path)}, because {path.name} was altered" in output
    assert f"resumed from {checkpoint(tmp_path, BEFORE)}" in output
    for step in (STEPS, 99):
        assert f"{checkpoint(tmp_path, step)} is now {checkpoint_name(step)}.set_aside" in output
    ours, theirs = open_tensors(checkpoint(tmp_path)), open_tensors(checkpoint(run))
    assert sorted(ours.names()) == sorted(theirs.names())
    assert all(torch.equal(ours.whole(name), theirs.whole(name)) for name in ours.names())


def test_a_damaged_later_checkpoint_does_not_count_as_the_newest_when_others_are_removed(run, tmp_path):
    """Sizes tell nothing of a flipped bit: the checkpoint just saved was removed for the damaged one."""
    for step in range(1, STEPS + 1):
        shutil.copytree(checkpoint(run, step), checkpoint(tmp_path, step))
    zero(0.5, 0.50001)(checkpoint(tmp_path) / FILES[-1], tmp_path)
    assert remove_surplus(checkpoint(tmp_path, BEFORE), CheckpointConfig(keep=1)) == []
    left = sorted(path.name for path in checkpoint(tmp_path).parent.iterdir())
    assert left == [checkpoint_name(BEFORE), checkpoint_name(STEPS)]


def test_files_have_the_permissions_of_the_files_beside_them(run):
    assert len({path.stat().st_mode for path in checkpoint(run).iterdir()}) == 1
