"""Whatever happens to an unfinished run's files, the same command makes the right dataset or says what is wrong."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import EXAMPLES, IN_PLACE, for_each_damage, fresh_folder, put_in_place, refused
from text_helpers import numbered_documents, train, write_jsonl

from megachiar.data.inputs import chunk_groups
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing import journal, run
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards

pytestmark = pytest.mark.timeout(60)
DATASET = ("out.bin", "out.idx", "out.json")


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Stop(Exception):
    """Stands in for a kill."""


class Unfinished:
    """A run that was stopped: its settings, the files that it left, and those that it makes undisturbed."""

    def __init__(self, folder: Path, shuffle_seed: int | None):
        self.folder, self.shuffle_seed = folder, shuffle_seed
        folder.mkdir()
        self.model = train(folder, "sentencepiece")
        documents = numbered_documents(24)
        documents[0] *= 2  # the first two have different lengths
        names = [folder / f"in_{number}.jsonl" for number in range(6)]
        self.inputs = [write_jsonl(path, documents[4 * n : 4 * n + 4]) for n, path in enumerate(names)]
        self.expected = self.go_on({})
        self.files = self._stop()

    def settings(self) -> PreprocessSettings:
        output, sources = self.folder / "made" / "out", find_sources(self.inputs)
        return PreprocessSettings(sources, self.model, output, append_eod=True, shuffle_seed=self.shuffle_seed)

    def go_on(self, files: dict[str, bytes], in_place: tuple[str, str] | None = None) -> dict[str, bytes]:
        """Run the command where an earlier run left ``files``, and return the dataset."""
        made = fresh_folder(self.folder / "made", files)
        made.mkdir(exist_ok=True)
        if in_place is not None:
            put_in_place(made / in_place[0], in_place[1])
        preprocess(self.settings(), io.StringIO())
        return {name: (made / name).read_bytes() for name in DATASET}

    def _stop(self) -> dict[str, bytes]:
        """Stop a run before its last input, or before it shuffles; every input before is recorded."""

        def stop(*_: object) -> None:
            raise Stop

        real, seen = run.read_groups, []

        def until_the_last(*arguments: object) -> object:
            for group in real(*arguments):
                seen.append(group)
                if len(seen) == len(self.inputs):
                    raise Stop
                yield group

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunk_groups, "GROUP_BYTES", 1)
            patch.setattr(journal, "SECONDS_BETWEEN_CHECKPOINTS", 0)
            patch.setattr(journal, "LARGEST_SHARE", 1e9)
            if self.shuffle_seed is None:
                patch.setattr(run, "read_groups", until_the_last)
            else:
                patch.setattr(run, "shuffle_documents", stop)
            fresh_folder(self.folder / "made", {})
            with pytest.raises(Stop):
                preprocess(self.settings(), io.StringIO())
        return {path.name: path.read_bytes() for path in (self.folder / "made").iterdir()}


@pytest.fixture(scope="module", params=[None, 7], ids=["encoding", "shuffling"])
def unfinished(request, tmp_path_factory) -> Unfinished:
    return Unfinished(tmp_path_factory.mktemp("unfinished") / "run", request.param)


def test_an_undamaged_run_goes_on(unfinished):
    assert json.loads(unfinished.files["out.journal"].splitlines()[-1])["outputs"][0]["tokens"] > 0
    assert unfinished.go_on(unfinished.files) == unfinished.expected


@EXAMPLES
def test_damage_gives_the_right_dataset_or_one_error(unfinished, examples):
    for name, content in unfinished.files.items():
        noticed = []

        def check(damaged: bytes, name: str = name, noticed: list[bool] = noticed) -> None:
            files, found = {**unfinished.files, name: damaged}, []
            error = refused(lambda: found.append(unfinished.go_on(files)))
            noticed.append(error is not None)
            assert error is not None or found == [unfinished.expected]

        if content:
            for_each_damage(content, check, examples // 2)
            assert any(noticed) or unfinished.shuffle_seed, name  # shuffling, the temporary files are written anew


def test_documents_that_exchanged_their_lengths_are_noticed(unfinished):
    if unfinished.shuffle_seed is None:
        content, first, second = unfinished.files["out.idx.tmp"], 34, 38
        lengths = [content[place : place + 4] for place in (first, second)]
        assert lengths[0] != lengths[1]
        damaged = content[:first] + lengths[1] + lengths[0] + content[second + 4 :]
        error = refused(lambda: unfinished.go_on({**unfinished.files, "out.idx.tmp": damaged}))
        assert error is not None and "out.idx.tmp" in error.where


def test_documents_that_begin_elsewhere_are_noticed_before_they_are_shuffled(unfinished):
    """No other number of an index tells where documents begin."""
    if unfinished.shuffle_seed is not None:
        content = bytearray(unfinished.files["out.unshuffled.idx"])
        content[-16] -= 1  # the last document begins one sequence before
        error = refused(lambda: unfinished.go_on({**unfinished.files, "out.unshuffled.idx": bytes(content)}))
        assert error is not None and "out.unshuffled.idx" in error.where


def test_a_line_that_is_gone_doubled_or_moved_is_noticed(unfinished):
    *lines, _ = unfinished.files["out.journal"].split(b"\n")
    assert len(lines) > 3
    for number in range(1, len(lines) - 1):
        for changed in (
            [*lines[:number], *lines[number + 1 :]],
            [*lines[: number + 1], *lines[number:]],
            [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]],
        ):
            files = {**unfinished.files, "out.journal": b"".join(line + b"\n" for line in changed)}
            error = refused(lambda files=files: unfinished.go_on(files))
            assert error is not None and "out.journal:" in error.where and "--restart" in error.remedy


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_is_no_file_is_refused_or_written_anew(unfinished, what):
    for name in unfinished.files:

        def go_on(name: str = name) -> None:
            assert unfinished.go_on(unfinished.files, (name, what)) == unfinished.expected

        refused(go_on)


def test_a_link_is_not_followed_to_write_elsewhere(unfinished, tmp_path):
    """A temporary file that is a link to another file would else be written through it."""
    victim = tmp_path / "victim"
    for name in [*unfinished.files, "out.json.tmp", "out.inputs.tmp"]:
        victim.write_bytes(b"somebody's")
        made = fresh_folder(unfinished.folder / "made", {k: v for k, v in unfinished.files.items() if k != name})
        made.mkdir(exist_ok=True)
        (made / name).symlink_to(victim)
        refused(lambda: preprocess(unfinished.settings(), io.StringIO()))
        assert victim.read_bytes() == b"somebody's", name


def test_a_damaged_record_of_a_shard_is_no_shard(unfinished):
    if unfinished.shuffle_seed is None:
        fresh_folder(unfinished.folder / "made", {})
        for number in range(2):
            make_shard(unfinished.settings(), number, 2, io.StringIO())
        record = unfinished.folder / "made" / "out.shards" / "00001-of-00002.done"
        content = record.read_bytes()
        for damaged in (
            content[:-5],
            content.replace(b'"unknown_tokens": [0]', b'"unknown_tokens": [1]'),
            b"[" * 10**5,
        ):
            assert damaged != content
            record.write_bytes(damaged)
            error = refused(lambda: merge_shards(unfinished.settings(), 2))
            assert error is not None and "shard 1 of 2 was not made" in str(error)
        make_shard(unfinished.settings(), 1, 2, io.StringIO())
        merge_shards(unfinished.settings(), 2)
        assert (unfinished.folder / "made" / "out.bin").read_bytes() == unfinished.expected["out.bin"]
