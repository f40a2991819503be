"""Which files are read: what a folder gives, what it leaves out and what it refuses; loops of links end."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_helpers import run_tool, train, write_jsonl

from megachiar.data.inputs.documents import InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.find_inputs import find_inputs, find_sources
from megachiar.data.inputs.folder_walk import walk
from megachiar.data.inputs.readers import read_documents
from megachiar.data.inputs.source import FORMATS, Source
from megachiar.errors import UserError

LINE = '{"text": "a"}\n'


def names(sources: list[Source]) -> list[str]:
    return [source.path.name for source in sources]


def write(folder: Path, *files: str, content: str = "x") -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def read(path: Path, format: str) -> list[str]:
    return [item.text for item in read_documents(find_sources([path], format), ReadOptions(), InvalidDocumentLog())]


def told(folder: Path, **options) -> str:
    """What is said of a folder."""
    (found,) = find_inputs([folder], **options).found
    return "\n".join(found.lines()).replace(str(folder), "FOLDER")


def test_globs_and_folders_are_sorted_and_arguments_keep_their_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "sub/.hidden.jsonl", "sub/info.json", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(find_sources([f"{tmp_path}/*.txt"])) == ["a.txt", "b.txt"]
    assert names(find_sources([tmp_path / "b.txt", tmp_path / "a.txt"])) == ["b.txt", "a.txt"]
    assert names(find_sources([tmp_path])) == ["a.txt", "b.txt", "c.jsonl"]
    assert names(find_sources([f"{tmp_path}/**/*.jsonl"])) == ["c.jsonl"]
    assert names(find_sources([tmp_path / "sub" / "info.json"])) == ["info.json"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing*.jsonl", "the glob matches no file"),
        ("nothing.jsonl", "there is no such file"),
        ("empty", "holds no file of a known format"),
        ("notes.md", "cannot tell the format by the suffix '.md'"),
        ("a.parquet.gz", "cannot tell the format"),
    ],
)
def test_what_is_not_there_or_not_known_is_named(tmp_path, pattern, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.parquet.gz").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        find_sources([tmp_path / pattern])
    assert pattern in str(caught.value)


def test_a_file_named_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="named twice"):
        find_sources([f"{tmp_path}/*.txt", tmp_path / "a.txt"])
    with pytest.raises(UserError, match="standard input: is named twice"):
        find_sources(["-", "-"])


def test_a_format_can_be_given_for_any_name(tmp_path):
    (tmp_path / "corpus").write_text('{"text": "a"}\n')
    assert read(tmp_path / "corpus", "jsonl") == ["a"]
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(b"b", mtime=0))
    assert read(tmp_path / "corpus.gz", "txt") == ["b"]
    with pytest.raises(UserError, match="unknown format 'xml'"):
        find_sources([tmp_path / "corpus"], "xml")


def test_no_input_is_refused():
    with pytest.raises(UserError, match="no input was named"):
        find_sources([])


# --- what a folder gives ----------------------------------------------------------------------------------------------


def test_a_folder_gives_what_is_behind_links_in_any_case_and_compressed(tmp_path):
    folder, other = tmp_path / "corpus", tmp_path / "other"
    write(folder, "a.TXT", "sub/b.Jsonl", "z.txt")
    write(other, "deep/c.txt")
    for suffix in ("jsonl.gz", "txt.xz", "jsonl.bz2", "TXT.GZ", "parquet"):
        write(folder, f"d.{suffix}")
    (folder / "link").symlink_to(other)
    (folder / "one.txt").symlink_to(other / "deep" / "c.txt")
    with pytest.raises(UserError, match="named twice"):  # by a link to the file and one to its folder
        find_sources([folder])
    (folder / "one.txt").unlink()
    sources = find_sources([folder])
    assert [str(source.path.relative_to(folder)) for source in sources] == [
        *("a.TXT", "d.TXT.GZ", "d.jsonl.bz2", "d.jsonl.gz", "d.parquet", "d.txt.xz", "link/deep/c.txt", "sub/b.Jsonl"),
        "z.txt",
    ]
    assert {(source.format, source.compression) for source in sources} == {
        *(("txt", ""), ("txt", "gz"), ("txt", "xz"), ("jsonl", ""), ("jsonl", "gz"), ("jsonl", "bz2"), ("parquet", "")),
    }
    assert told(folder) == (
        "FOLDER: 9 files read (3 txt, 1 txt.gz, 1 jsonl.bz2, 1 jsonl.gz, 1 parquet, 1 txt.xz, 1 jsonl): "
        "a.TXT, d.TXT.GZ, d.jsonl.bz2, ... z.txt"
    )


def test_files_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    """As before links were followed, or existing datasets would change: part by part, not character by character."""
    write(tmp_path, "a/z.txt", "a-b/y.txt", "a.txt", "a b.txt", "b/c/d.txt", "b/c.txt", "B.txt")
    assert [source.path for source in find_sources([tmp_path])] == sorted(tmp_path.rglob("*.txt"))


def test_what_a_folder_leaves_out_is_told(tmp_path):
    write(tmp_path, "a.txt", ".git/b.txt", ".c.txt", "notes.md", "d.html", "a.txt.sha256", "LICENSE", "_SUCCESS")
    write(tmp_path, "info.json", "empty", content="")
    (tmp_path / "photo").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    assert told(tmp_path).splitlines() == [
        "FOLDER: 1 file read (1 txt): a.txt",
        "FOLDER: 1 left out, .json without 'text' in it: info.json",
        "FOLDER: 1 left out, a broken link: gone.md",
        "FOLDER: 2 left out, hidden: .c.txt, .git",
        "FOLDER: 4 left out, no suffix: LICENSE, _SUCCESS, empty, photo",
        "FOLDER: 1 left out, not a file: pipe.txt",
        "FOLDER: 1 left out, suffix .html: d.html",
        "FOLDER: 1 left out, suffix .md: notes.md",
        "FOLDER: 1 left out, suffix .sha256: a.txt.sha256",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"holds no file of a known format: 1 left out, \.json without 'text'"):
        find_inputs([tmp_path])


def test_json_files_of_a_folder_are_read_where_they_hold_the_text(tmp_path):
    write(tmp_path, "a.json", content=LINE * 2)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(LINE.encode()))
    write(tmp_path, "c.json", content='{"body": "a"}\n')
    write(tmp_path, "d.json", content=json.dumps({"name": "corpus", "splits": [1, 2]}, indent=2))
    write(tmp_path, "e.json", content='["text"]')
    write(tmp_path, "vocab.json", content=json.dumps({"text": 5, "a": 6}))
    write(tmp_path, "tokenizer.json", content=json.dumps({"model": {"vocab": {"text": 5}}}, indent=2))
    write(tmp_path, "settings.json", content=json.dumps({"prompt": {"text": "a"}}))
    (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "x" * 100_000}).encode())
    assert names(find_sources([tmp_path])) == ["a.json", "b.json.gz", "f.json"]
    assert "6 left out, .json without 'text' in it: c.json, d.json, e.json, ... vocab.json" in told(tmp_path)
    assert "(1 jsonl): c.json" in told(tmp_path, text_keys=["body"])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "problem", "remedy"),
    [
        ("part-00000", LINE.encode(), "JSON, suffix missing", "--format"),
        ("part-00000", gzip.compress(b"x", mtime=0), "gzip data, suffix missing", "--format"),
        ("wiki_00", b"Once upon a time\n", "text, suffix missing", "--format"),
        ("text.001", "Es war einmal ein König".encode(), "text, suffix .001", "--format"),
        ("x.c000", LINE.encode(), "JSON, suffix .c000", "--format"),
        ("a.gz", gzip.compress(b"x", mtime=0), "its name does not tell what .gz holds", "--format"),
        ("a.md.gz", gzip.compress(b"x", mtime=0), "its name does not tell what .gz holds", "--format"),
        ("a.txt.part", b"x", ".part after a suffix of text", "--format"),
        ("a.jsonl-00000-of-00008", LINE.encode(), "JSON, suffix .jsonl-00000-of-00008", "--format"),
        ("a.tsv", b"x", ".tsv is not read", "make jsonl"),
        ("a.warc.gz", b"x", ".warc.gz is not read", "make jsonl"),
        ("a.tar.gz", b"x", ".tar.gz is not read", "make jsonl"),
        ("a.json", b'{\n  "text": "a"\n}\n', "is pretty-printed JSON", "jq -c ."),
        ("a.json.gz", b'{"text": "a"}\n', "is not gzip data, but plain text", "take .gz off its name"),
        ("a.json", LFS.encode(), "is a pointer of git-LFS", "git lfs pull"),
    ],
)
def test_what_looks_like_text_data_but_cannot_be_read_is_refused(tmp_path, name, content, problem, remedy):
    write(tmp_path, "a.txt")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        find_inputs([tmp_path])
    assert caught.value.where == str(tmp_path) and f"{name} ({problem}" in caught.value.problem
    assert remedy in caught.value.remedy and f"'{tmp_path}/**/*.jsonl'" in caught.value.remedy
    assert names(find_sources([f"{tmp_path}/**/*.txt"])) == ["a.txt"], "the glob of the remedy reads what it names"


def test_a_link_that_leads_nowhere_is_refused_where_it_should_be_data(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("nowhere.txt")
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(UserError, match=r"2 files .*: b\.txt \(a broken link\), c\.txt \(a broken link\)"):
        find_inputs([tmp_path])


def test_only_the_first_of_many_unreadable_files_are_named(tmp_path):
    write(tmp_path, *(f"part-{number:05}" for number in range(40)), content=LINE)
    with pytest.raises(UserError, match=r"holds 40 files .* part-00004 \(JSON, suffix missing\) and 35 more"):
        find_inputs([tmp_path])


def test_loops_of_links_end(tmp_path):
    """In a process of its own, which is ended: every loop multiplies the ways to a file."""
    write(tmp_path / "corpus", "a.txt", "sub/b.txt", "sub/deep/c.txt")
    write(tmp_path, "outside.txt")
    for number in range(8):
        (tmp_path / "corpus" / f"up{number}").symlink_to(tmp_path / "corpus")
        (tmp_path / "corpus" / "sub" / f"up{number}").symlink_to("../..")
        (tmp_path / "corpus" / "sub" / "deep" / f"side{number}").symlink_to("..")
    program = (
        "import sys\nfrom megachiar.data.inputs.find_inputs import find_sources\n"
        "for pattern in sys.argv[1:]:\n"
        "    print(*(source.path.name for source in find_sources([pattern])))\n"
    )
    patterns = [str(tmp_path / "corpus"), f"{tmp_path}/corpus/**/*.txt", f"{tmp_path}/co*/**", f"{tmp_path}/**/*.txt"]
    done = subprocess.run([sys.executable, "-c", program, *patterns], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [*["a.txt b.txt c.txt"] * 3, "a.txt b.txt c.txt outside.txt"], done.stderr
    assert "a link to a folder that is read already or leads up: sub/deep/side0, " in told(tmp_path / "corpus")


def test_a_folder_behind_two_links_is_read_once(tmp_path):
    write(tmp_path / "data", "a.txt")
    (tmp_path / "corpus").mkdir()
    for name in ("x", "y"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "data")
    assert [source.path for source in find_sources([tmp_path / "corpus"])] == [tmp_path / "corpus" / "x" / "a.txt"]
    assert "1 left out, a link to a folder that is read already or leads up: y" in told(tmp_path / "corpus")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("**", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("sub/**/*.txt", ["sub/b.txt", "sub/deep/c.txt"]),
        ("s*/**/deep/*.txt", ["sub/deep/c.txt"]),
        ("**/deep/**/c.txt", ["sub/deep/c.txt"]),
        ("**/.h/*.txt", [".h/d.txt"]),
        ("**/*/*.txt", ["sub/b.txt", "sub/deep/c.txt"]),
        ("*.txt", ["a.txt"]),
    ],
)
def test_globs_match_what_the_shells_do(tmp_path, monkeypatch, pattern, expected):
    write(tmp_path, "a.txt", "sub/b.txt", "sub/deep/c.txt", ".h/d.txt", "sub/.e.txt")
    assert [str(source.path) for source in find_sources([f"{tmp_path}/{pattern}"])] == [
        str(tmp_path / name) for name in expected
    ]
    monkeypatch.chdir(tmp_path)
    assert [str(source.path) for source in find_sources([pattern])] == expected


def test_folders_that_a_glob_matches_are_told(tmp_path):
    write(tmp_path, "a.txt", "b/c.txt")
    (found,) = find_inputs([f"{tmp_path}/*"]).found
    assert list(found.lines())[1].endswith(f"1 left out, a folder, which a glob does not read: {tmp_path}/b")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "secret/b.txt")
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in (tmp_path, f"{tmp_path}/**/*.txt"):
        with pytest.raises(UserError, match=r"secret/?: cannot read: Permission denied") as caught:
            find_inputs([pattern])
        assert caught.value.remedy == "make it readable"


def test_a_walk_tells_folders_apart_from_files(tmp_path):
    write(tmp_path, "a.txt/b.txt", "c")
    assert walk(str(tmp_path)) == (["a.txt/b.txt", "c"], [])


def test_every_format_can_be_named():
    assert {"jsonl", "jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "txt", "txt.bz2", "parquet"} <= set(FORMATS)


def test_both_tools_say_what_a_folder_gave(tmp_path):
    model = train(tmp_path, "sentencepiece")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl.xz", ["the quick brown fox " * 20] * 50)
    write(folder, "notes.md")
    expected = [f"{folder}: 1 file read (1 jsonl.xz): a.jsonl.xz", f"{folder}: 1 left out, suffix .md: notes.md"]
    arguments = ("--tokenizer", model, "--output-prefix", tmp_path / "out", "--workers", 1)
    done = run_tool("preprocess_data", "--input", folder, *arguments)
    assert done.returncode == 0 and done.stderr.splitlines()[:2] == expected
    assert done.stderr.count(expected[0]) == 2, "at the beginning and in the report"
    arguments = ("--vocab-size", 300, "--output", tmp_path / "t.json")
    done = run_tool("train_tokenizer", "--input", folder, *arguments)
    assert done.stderr.splitlines()[:2] == expected
