"""Tasks that are read from local files: IMDB, the Arena's tables, Pathfinder and CIFAR-10, on small made-up files."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hostile import refused
from text_helpers import ROOT, run_tool

from megachiar.cli import corpus as command
from megachiar.data.inputs.documents import InvalidDocumentLog
from megachiar.data.tasks import imdb as imdb_module
from megachiar.data.tasks.images import CIFAR_CLASSES, DIFFICULTIES, gray_of
from megachiar.data.tasks.lra_tables import AAN_FILES, LISTOPS_FILES
from megachiar.data.tasks.tables import Table, read_table
from megachiar.errors import UserError

PARTS = ("train", "valid", "test")


def run(task: str, folder: Path | None, output: Path, *more: str) -> dict[str, list[dict]]:
    """Run the command and return the lines of each part."""
    source = [] if folder is None else ["--from", str(folder)]
    command.main([task, *source, "--output", str(output), *more])
    return {part: [json.loads(line) for line in (output / f"{part}.jsonl").read_text().splitlines()] for part in PARTS}


def refusal(task: str, folder: Path, output: Path, *more: str) -> UserError:
    error = refused(lambda: run(task, folder, output, *more))
    assert error is not None and not [path for path in output.glob("*") if path.suffix in (".jsonl", ".tmp")]
    return error


# --- IMDB -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path) -> Path:
    """The folders of the original archive, with 40 reviews of each kind."""
    root = tmp_path / "aclImdb"
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            (root / split / label).mkdir(parents=True)
            for number in range(40):
                text = f"A {label} film, number {number} to {split}.<br /><br />Ünd so weiter"
                (root / split / label / f"{number}_{number % 10}.txt").write_text(text)
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_text("no label")
    return root


def test_the_archive_gives_every_review_once_and_a_validation_set_of_training_reviews(archive, tmp_path, capsys):
    parts = run("imdb", archive, tmp_path / "out")
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'out'}/test.jsonl: 80 examples; neg 40, pos 40" in shown
    assert len(parts["test"]) == 80 and len(parts["train"]) + len(parts["valid"]) == 80
    assert 2 <= len(parts["valid"]) <= 20
    for part, records in parts.items():
        for record in records:
            split, label, name = record["id"].split("/")
            assert split == ("test" if part == "test" else "train") and label == record["label"]
            assert record["text"] == (archive / split / label / f"{name}.txt").read_text()
    names = [record["id"] for part in parts.values() for record in part]
    assert len(set(names)) == 160
    numbers = [int(record["id"].split("/")[2].split("_")[0]) for record in parts["test"]]
    assert numbers == [*range(40), *range(40)]


def test_the_folder_above_the_archive_and_a_second_call_will_do(archive, tmp_path, capsys):
    run("imdb", archive.parent, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    run("imdb", archive.parent, tmp_path / "out")
    assert "nothing was done" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == before
    (archive / "test" / "pos" / "3_3.txt").write_text("another text")
    error = refused(lambda: run("imdb", archive.parent, tmp_path / "out"))
    assert error is not None and "holds another text" in error.problem


def test_a_review_that_is_no_text_is_named_or_left_out(archive, tmp_path, capsys):
    bad = archive / "train" / "neg" / "7_7.txt"
    bad.write_bytes(b"caf\xe9")
    error = refusal("imdb", archive, tmp_path / "out")
    assert error.where == str(bad) and "byte 3 is not valid UTF-8 [invalid_utf8]" in error.problem
    (archive / "test" / "neg" / "1_1.txt").write_text(" \n")
    parts = run("imdb", archive, tmp_path / "out", "--on-error", "skip")
    assert sum(map(len, parts.values())) == 158
    assert "left out: 1 empty, 1 invalid_utf8" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_review_that_is_a_fifo_is_refused(archive, tmp_path):
    (archive / "train" / "neg" / "7_7.txt").unlink()
    os.mkfifo(archive / "train" / "neg" / "7_7.txt")
    error = refusal("imdb", archive, tmp_path / "out")
    assert error.where.endswith("7_7.txt") and "fifo" in error.problem


def test_folders_that_hold_no_reviews_are_refused(archive, tmp_path):
    assert "does not exist" in refusal("imdb", tmp_path / "nowhere", tmp_path / "out").problem
    (tmp_path / "empty").mkdir()
    error = refusal("imdb", tmp_path / "empty", tmp_path / "out")
    assert "there is no" in error.problem and "aclImdb_v1.tar.gz" in error.remedy
    for path in (archive / "test" / "pos").iterdir():
        path.unlink()
    (archive / "test" / "pos").rmdir()
    assert f"there is no {archive / 'test' / 'pos'}" in refusal("imdb", archive, tmp_path / "out").problem
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal("imdb", tmp_path / "file", tmp_path / "out").problem


def write_table(path: Path, rows: list[list[str]], separator: str = "\t") -> None:
    path.write_text("".join(separator.join(row) + "\n" for row in rows))


def test_tables_of_reviews_are_read(tmp_path):
    rows = [["id", "label", "text"], *([str(n), str(n % 2), f"review {n}"] for n in range(60))]
    folder = tmp_path / "tables"
    folder.mkdir()
    write_table(folder / "train.tsv", rows)
    (folder / "test.csv").write_text('label,text\n1,"a, b ""quoted"" and\nanother line"\n0,c\n')
    parts = run("imdb", folder, tmp_path / "out")
    assert parts["test"] == [{"text": 'a, b "quoted" and\nanother line', "label": "1"}, {"text": "c", "label": "0"}]
    assert len(parts["train"]) + len(parts["valid"]) == 60 and parts["valid"]
    write_table(folder / "valid.tsv", rows[:2])
    parts = run("imdb", folder, tmp_path / "with_validation")
    assert len(parts["train"]) == 60 and parts["valid"] == [{"text": "review 0", "label": "0"}]


@pytest.mark.parametrize(
    ("row", "line", "problem"),
    [
        ("1\tone\ttwo", 3, "has 3 fields, but rows have 2: label, text"),
        ("1", 3, "has 1 fields"),
        ("1\t ", 3, "field 'text' is empty"),
        ('1\t"open', 3, "is no row of a table"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, line, problem):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("train.tsv", "test.tsv"):
        (folder / name).write_text(f"label\ttext\n0\tgood\n{row if name == 'train.tsv' else '1	fine'}\n")
    error = refusal("imdb", folder, tmp_path / "out")
    assert error.where == f"{folder / 'train.tsv'}:{line}" and problem in error.problem


def test_a_table_without_a_column_or_with_bytes_is_refused(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "test.tsv").write_text("label\ttext\n0\ta\n")
    (folder / "train.tsv").write_text("stars\ttext\n0\ta\n")
    assert "has no column 'label', only stars, text" in refusal("imdb", folder, tmp_path / "out").problem
    (folder / "train.tsv").write_bytes(b"label\ttext\n0\tcaf\xe9\n")
    error = refusal("imdb", folder, tmp_path / "out")
    assert error.where == f"{folder / 'train.tsv'}:2" and "byte 0xe9" in error.problem


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbflabel\ttext\n0\ta\n")
    assert [row for _, row in read_table(tmp_path / "a.tsv", Table(), InvalidDocumentLog())] == [
        {"label": "0", "text": "a"}
    ]


def test_the_hub_gives_the_same_parts(tmp_path, monkeypatch):
    rows = {split: [{"text": f"{split} {n}", "label": n % 2} for n in range(50)] for split in ("train", "test")}
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name: asked.append(name) or rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    parts = run("imdb", None, tmp_path / "out")
    assert asked == [imdb_module.HUB_NAME] and len(parts["test"]) == 50
    assert len(parts["train"]) + len(parts["valid"]) == 50 and parts["valid"]
    assert {record["label"] for record in parts["test"]} == {"neg", "pos"}

    def fails(name: str) -> None:
        raise ConnectionError("no route to the hub\nand much more")

    module.load_dataset = fails
    with pytest.raises(UserError, match="cannot be fetched: no route to the hub") as caught:
        run("imdb", None, tmp_path / "other")
    assert "--from aclImdb" in caught.value.remedy
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets") as caught:
        run("imdb", None, tmp_path / "other")
    assert "[hf]" in caught.value.remedy and "--from aclImdb" in caught.value.remedy


# --- the Arena's tables -----------------------------------------------------------------------------------------------


def test_the_arenas_listops_is_read_without_its_parentheses(tmp_path):
    folder = tmp_path / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for number, name in enumerate(LISTOPS_FILES.values()):
        rows = [["Source", "Target"], ["( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )", str(number + 4)]]
        write_table(folder / name, rows)
    for given in (folder, tmp_path):
        parts = run("listops", given, tmp_path / f"out_{given.name}")
        assert [parts[part] for part in PARTS] == [[{"text": "[MAX 4 [MIN 2 3 ] ]", "label": n + 4}] for n in range(3)]
    write_table(folder / "basic_val.tsv", [["Source", "Target"], ["7", "seven"]])
    error = refusal("listops", folder, tmp_path / "bad")
    assert error.where == f"{folder / 'basic_val.tsv'}:2" and "label 'seven' is no whole number" in error.problem
    (folder / "basic_test.tsv").unlink()
    error = refusal("listops", folder, tmp_path / "bad")
    assert "holds no basic_test.tsv" in error.problem and "listops-1000" in error.remedy


def test_pairs_of_papers_are_read(tmp_path):
    folder = tmp_path / "tsv_data"
    folder.mkdir()
    for number, name in enumerate(AAN_FILES.values()):
        write_table(folder / name, [["1.0", "P1", "P2", 'a "quote', f"b {number}"], ["0", "P3", "P4", "c", "d"]])
    parts = run("aan", tmp_path, tmp_path / "out")
    assert parts["valid"] == [
        {"label": 1, "id1": "P1", "id2": "P2", "text1": 'a "quote', "text2": "b 1"},
        {"label": 0, "id1": "P3", "id2": "P4", "text1": "c", "text2": "d"},
    ]
    for row, problem in ((["1", "P", "Q", "a"], "has 4 fields"), (["1", "P", "Q", "", "b"], "field 'text1' is empty")):
        write_table(folder / AAN_FILES["test"], [["0", "P3", "P4", "c", "d"], row])
        error = refusal("aan", tmp_path, tmp_path / "bad")
        assert error.where == f"{folder / AAN_FILES['test']}:2" and problem in error.problem
        parts = run("aan", tmp_path, tmp_path / f"skipped_{len(row)}", "--on-error", "skip")
        assert len(parts["test"]) == 1
    with pytest.raises(UserError, match="--from is missing"):
        command.main(["aan", "--output", str(tmp_path / "x")])


# --- images -----------------------------------------------------------------------------------------------------------


def make_pathfinder(root: Path, *, as_array: bool = False, images: int = 60, size: int = 4) -> dict[str, np.ndarray]:
    """Write images of random pixels in two folders, and return them by name."""
    from PIL import Image

    rng, pixels = np.random.default_rng(0), {}
    (root / "metadata").mkdir(parents=True)
    for group in range(2):
        (root / "imgs" / str(group)).mkdir(parents=True)
        lines = []
        for number in range(images // 2):
            name = f"imgs/{group}/sample_{number}.png"
            pixels[name] = rng.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels[name]).save(root / name)
            lines.append(f"imgs/{group} sample_{number}.png {number} {number % 2} 1.8 2 3 4")
        path = root / "metadata" / f"{group}.npy"
        if as_array:
            np.save(path, np.array([line.split() for line in lines]))
        else:
            path.write_text("".join(f"{line}\n" for line in lines))
    return pixels


@pytest.mark.parametrize("as_array", [False, True])
def test_pathfinder_gives_each_image_as_its_pixels(tmp_path, as_array):
    pytest.importorskip("PIL")
    pixels = make_pathfinder(tmp_path / DIFFICULTIES["hard"], as_array=as_array)
    parts = run("pathfinder", tmp_path, tmp_path / "out")
    records = [record for part in parts.values() for record in part]
    assert len(records) == 60 and all(parts.values()) and len(parts["train"]) > 35
    for record in records:
        assert record["tokens"] == pixels[record["image"]].reshape(-1).tolist()
        number = int(record["image"].split("_")[1].removesuffix(".png"))
        assert record["label"] == number % 2
    assert run("pathfinder", tmp_path / DIFFICULTIES["hard"], tmp_path / "same") == parts


def test_pathfinder_leaves_empty_images_out_and_names_others(tmp_path, capsys):
    pytest.importorskip("PIL")
    root = tmp_path / DIFFICULTIES["easy"]
    make_pathfinder(root)
    (root / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    parts = run("pathfinder", tmp_path, tmp_path / "out", "--difficulty", "easy")
    assert sum(map(len, parts.values())) == 59 and "left out: 1 empty" in capsys.readouterr().err
    (root / "imgs" / "1" / "sample_4.png").write_bytes(b"\x89PNG broken")
    error = refusal("pathfinder", tmp_path, tmp_path / "bad", "--difficulty", "easy")
    assert error.where == f"{root / 'metadata' / '1.npy'}:5" and "sample_4.png cannot be read" in error.problem
    (root / "imgs" / "1" / "sample_4.png").unlink()
    assert "No such file" in refusal("pathfinder", tmp_path, tmp_path / "bad", "--difficulty", "easy").problem
    parts = run("pathfinder", tmp_path, tmp_path / "skipped", "--difficulty", "easy", "--on-error", "skip")
    assert sum(map(len, parts.values())) == 58
    (root / "metadata" / "1.npy").write_text("imgs/1 sample_0.png 0 2\n")
    assert (
        "'imgs/1 sample_0.png 0 2' is no folder"
        in refusal("pathfinder", tmp_path, tmp_path / "bad", "--difficulty", "easy").problem
    )
    np.save(root / "metadata" / "1.npy", np.array([{}]), allow_pickle=True)
    assert "is no metadata" in refusal("pathfinder", tmp_path, tmp_path / "bad", "--difficulty", "easy").problem


def test_pathfinder_of_another_size_or_place_is_refused(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    root = tmp_path / DIFFICULTIES["hard"]
    make_pathfinder(root)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "imgs" / "1" / "sample_9.png")
    assert "images of two sizes: 4 x 4" in refusal("pathfinder", tmp_path, tmp_path / "bad").problem
    error = refusal("pathfinder", tmp_path, tmp_path / "bad", "--difficulty", "easy")
    assert "holds no curv_baseline/metadata" in error.problem
    error = refusal("pathfinder", root, tmp_path / "bad", "--difficulty", "easy")
    assert "is not curv_baseline" in error.problem


def test_pathfinder_without_pillow_says_how_to_get_it(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    make_pathfinder(tmp_path / DIFFICULTIES["hard"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    error = refusal("pathfinder", tmp_path, tmp_path / "bad")
    assert "needs the package pillow" in error.problem and "[images]" in error.remedy


def make_cifar(folder: Path, images: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng, batches = np.random.default_rng(1), {}
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        labels = rng.integers(0, 10, images, dtype=np.uint8)
        planes = rng.integers(0, 256, (images, 3, 1024), dtype=np.uint8)
        rows = np.concatenate([labels[:, None], planes.reshape(images, -1)], axis=1)
        (folder / name).write_bytes(rows.tobytes())
        batches[name] = labels, planes
    return batches


def test_cifar_is_gray_and_its_last_training_images_validate(tmp_path):
    batches = make_cifar(tmp_path / "cifar-10-batches-bin")
    parts = run("cifar10", tmp_path, tmp_path / "out")
    assert {part: len(records) for part, records in parts.items()} == {"train": 90, "valid": 10, "test": 20}
    labels, planes = batches["test_batch.bin"]
    for record, label, (red, green, blue) in zip(parts["test"], labels, planes.astype(float), strict=True):
        assert record["label"] == CIFAR_CLASSES[label] and len(record["tokens"]) == 1024
        luminance = 0.2989 * red + 0.5870 * green + 0.1140 * blue
        difference = np.array(record["tokens"]) - luminance  # rounded down, from values that are 0.2 % too large
        assert difference.min() > -1 and difference.max() <= 0.51
    last = gray_of(batches["data_batch_5.bin"][1][-10:])
    assert [record["tokens"] for record in parts["valid"]] == last.tolist()


def test_gray_keeps_black_gray_and_white():
    planes = np.repeat(np.array([0, 1, 100, 128, 254, 255], np.uint8)[None, None], 3, axis=1)
    assert np.abs(gray_of(planes).astype(int) - [[0, 1, 100, 128, 254, 255]]).max() <= 1
    assert gray_of(planes)[0, 0] == 0 and gray_of(planes)[0, -1] == 255


def test_damaged_cifar_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    make_cifar(folder)
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-1])
    assert "no multiple of the 3,073" in refusal("cifar10", folder, tmp_path / "bad").problem
    (folder / "data_batch_2.bin").write_bytes(whole[:3073] + b"\x0b" + whole[3074:])
    assert "image 1 has label 11" in refusal("cifar10", folder, tmp_path / "bad").problem
    (folder / "data_batch_2.bin").unlink()
    error = refusal("cifar10", folder, tmp_path / "bad")
    assert "holds no data_batch_2.bin" in error.problem and "not the Python version" in error.remedy


# --- from a corpus to a dataset ---------------------------------------------------------------------------------------


def test_a_corpus_becomes_labelled_datasets(tmp_path):
    """The commands as the documentation shows them."""
    make_cifar(tmp_path / "cifar-10-batches-bin", images=10)
    run("cifar10", tmp_path, tmp_path / "out")
    for part in PARTS:
        classes = [] if part == "train" else ["--classes-from", tmp_path / "train"]
        done = run_tool(
            *("preprocess_data", "--input", tmp_path / "out" / f"{part}.jsonl", "--output-prefix", tmp_path / part),
            *("--label-key", "label", "--token-key", "tokens", "--vocab-size", 256, *classes),
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "test.bin").stat().st_size == 10 * 1024 * 2
    assert ROOT.exists()
