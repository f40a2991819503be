"""The parts of a report that need no trained run: names, histories, LaTeX, CSV, output folders, comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import pytest
from scipy import stats

from megachiar.errors import UserError
from megachiar.reporting.ablation import ablation_table, compare
from megachiar.reporting.drawing import check_matplotlib, shortened, style_of
from megachiar.reporting.history import Curve, against_tokens, one_history
from megachiar.reporting.latex import as_latex, escaped
from megachiar.reporting.notes import Notes
from megachiar.reporting.output import PAGE, check_output, write_report
from megachiar.reporting.page import report_page
from megachiar.reporting.report import file_names
from megachiar.reporting.result_tables import is_wikitext_2
from megachiar.reporting.run_names import name_runs
from megachiar.reporting.table import Table, decimal, text
from megachiar.reporting.table import shortened as short_number


def test_runs_of_one_name_stay_apart():
    paths = ["/x/a/run", "/x/b/run", "/x/tiny", "/x/one/threshold/seed_1", "/x/one/threshold/seed_2"]
    names = name_runs([Path(path) for path in paths])
    assert [name.label for name in names] == ["a/run", "b/run", "tiny", "threshold/seed_1", "threshold/seed_2"]
    assert [name.variant for name in names[3:]] == ["threshold", "threshold"]


def test_variants_of_two_sweeps_stay_whole():
    """A variant keeps one name, though only one of its runs has a namesake in the other sweep."""
    paths = ["/x/a/base/seed_1", "/x/a/base/seed_2", "/x/b/base/seed_1"]
    names = name_runs([Path(path) for path in paths])
    assert [name.variant for name in names] == ["a/base", "a/base", "b/base"]
    assert len({name.label for name in names}) == 3


def test_a_name_is_found_where_the_paths_end():
    assert [name.label for name in name_runs([Path("/run"), Path("/a/run")])] == ["//run", "a/run"]


def records(*steps: tuple[int, str, float]) -> list[dict]:
    return [{"step": step, "kind": kind, "loss": loss} for step, kind, loss in steps]


def test_repeated_steps_are_those_of_the_last_start():
    first = records((10, "train", 1.0), (20, "train", 2.0), (20, "evaluation/v", 2.5), (30, "train", 3.0))
    again = records((20, "train", 2.1), (25, "train", 2.6))
    assert one_history([*first, *again]) == [first[0], *again]
    assert one_history(first) == first
    measured_again = records((30, "evaluation/v", 2.0), (30, "evaluation/v", 2.2))
    assert one_history([*first, *measured_again]) == [*first, measured_again[1]], "the step itself stays"
    same = records((20, "train", 9.0))
    assert one_history([*first[:3], *same]) == [first[0], *same], "the evaluation was that of the weights before"


def test_tokens_of_steps_between_records_are_interpolated():
    known = [{"step": 10, "kind": "train", "tokens": 1000}, {"step": 20, "kind": "train", "tokens": 3000}]
    found = against_tokens(Curve([5.0, 15.0, 20.0], [3.0, 2.0, 1.0]), known)
    assert found == Curve([500.0, 2000.0, 3000.0], [3.0, 2.0, 1.0])
    assert against_tokens(Curve([5.0], [1.0]), [{"step": 10, "kind": "train", "tokens": None}]) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            r"a_b & 5 % #1 $x$ {y} ~^\ ",
            r"a\_b \& 5 \% \#1 \$x\$ \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{}",
        ),
        ("<s> | x", r"\textless{}s\textgreater{} \textbar{} x"),
        ("Grüße, café", r"Gr\"{u}\ss{}e, caf\'{e}"),
        ("1.0 ± 0.1 … “x”", r"1.0 $\pm$ 0.1 \ldots{} ``x''"),
        ("東\x00🙂", r"\texttt{U+6771}\texttt{U+0000}\texttt{U+1F642}"),
        ("two\n\n lines\t", "two lines"),
    ],
)
def test_latex_is_escaped(given, expected):
    assert escaped(given) == expected


def test_a_row_that_begins_with_a_bracket_is_no_argument_of_the_line_before():
    table = Table("t", "T", ["a"], [{"a": "x"}, {"a": "[3cm]"}, {"a": "*"}], [text("a", "a")])
    lines = as_latex(table).splitlines()
    assert not any(line.lstrip().startswith(("[", "*")) for line in lines)


def test_a_table_has_all_digits_in_csv_and_hides_empty_columns():
    rows = [{"a": 'x,\n"y"', "b": 1 / 3}, {"a": "z"}]
    table = Table("t", "T", ["a", "b", "c"], rows, [text("A", "a"), decimal("B", "b", 2), decimal("C", "c", 2)])
    assert list(csv.reader(io.StringIO(table.as_csv()))) == [
        ["a", "b", "c"],
        ['x,\n"y"', repr(1 / 3), ""],
        ["z", "", ""],
    ]
    columns, shown = table.shown()
    assert [column.heading for column in columns] == ["A", "B"] and shown == [['x,\n"y"', "0.33"], ["z", "-"]]


@pytest.mark.parametrize(
    ("value", "shown"), [(7, "7"), (1234, "1.23 k"), (59713, "59.7 k"), (4.04e8, "404 M"), (2e15, "2,000 T")]
)
def test_large_numbers_have_letters(value, shown):
    assert short_number(value) == shown


def numbers(variant: str, seed: int, loss: float | None, **more) -> dict:
    row = {"run": f"{variant}/seed_{seed}", "variant": variant, "seed": seed, "finished": loss is not None, **more}
    return row | ({} if loss is None else {"test_loss": loss})


def test_the_ablation_has_mean_spread_and_paired_differences():
    losses = {"base": {1: 3.0, 2: 3.5, 3: 3.2}, "other": {1: 3.2, 2: 3.6, 3: 3.7, 4: 9.0}}
    rows = [numbers(variant, seed, loss) for variant, found in losses.items() for seed, loss in found.items()]
    notes = Notes()
    table = ablation_table(compare([*rows, numbers("other", 5, None)], None, notes))
    base, other = table.rows
    assert base["test_loss_mean"] == pytest.approx(statistics.mean(losses["base"].values()))
    assert other["test_loss_deviation"] == pytest.approx(statistics.stdev(losses["other"].values()))
    assert "test_loss_difference_mean" not in base and other["test_loss_difference_n"] == 3
    pairs = [losses["other"][seed] - losses["base"][seed] for seed in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(3))
    assert (other["test_loss_difference_low"], other["test_loss_difference_high"]) == pytest.approx((low, high))
    assert notes.lines == ["other/seed_5: is not finished, and so no part of the ablation"]
    (difference,) = [shown for column, shown in zip(*_texts(table, 1), strict=True) if column.startswith("minus base")]
    assert difference == f"+{statistics.mean(pairs):.4f} [{low:+.4f}, {high:+.4f}]"


def _texts(table: Table, row: int) -> tuple[list[str], list[str]]:
    columns, rows = table.shown()
    return [column.heading for column in columns], rows[row]


def test_runs_on_other_data_are_not_compared():
    rows = [numbers("a", 1, 1.0, measured_on="x"), numbers("b", 1, 2.0, measured_on="y")]
    rows += [numbers("c", 1, 3.0, measured_on="x")]
    notes = Notes()
    assert list(compare(rows, None, notes).effects) == ["a", "c"]
    (line,) = notes.lines
    assert line.startswith("b/seed_1, ablation: has another task or other validation or test data than a")
    assert compare(rows, "b", Notes()) is None


def test_a_reference_is_named_or_refused():
    rows = [numbers("a", 1, 1.0), numbers("b", 1, 2.0)]
    assert compare(rows, "b", Notes()).effects["a"]["test_loss"].difference.mean == -1.0
    with pytest.raises(UserError, match="variants: a, b"):
        compare(rows, "c", Notes())
    assert compare(rows[:1], None, Notes()) is None


@pytest.mark.parametrize(
    ("name", "data", "is_it"),
    [
        ("test", "data/wikitext-2/test", True),
        ("wikitext2", "x/y", True),
        ("test", "/home/wikitext-2/runs/data/ptb/test", False),
        ("test", "data/wikitext-103/test", False),
        ("WikiText_2", None, True),
        ("test", "data/wikitext-23/test", False),
    ],
)
def test_wikitext_2_is_told_by_its_name(name, data, is_it):
    assert is_wikitext_2({"set": name, "data": data}) == is_it


def test_files_of_different_labels_have_different_names():
    assert file_names(["a/b", "a_b", "A b", "..", "ü"]) == {
        "a/b": "a_b",
        "a_b": "a_b_2",
        "A b": "A_b_3",
        "..": "run",
        "ü": "run_2",
    }


def test_lines_of_a_figure_differ():
    assert len({str(style_of(place)) for place in range(32)}) == 32
    assert len(shortened("x" * 99)) == 44 and shortened("_x") == " _x"


def test_an_output_folder_is_ours_or_empty_or_refused(tmp_path):
    check_output(tmp_path / "new", False, [])
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", False, [])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no report"):
        check_output(tmp_path / "foreign", False, [])
    check_output(tmp_path / "foreign", True, [])
    with pytest.raises(UserError, match="is a run"):
        check_output(tmp_path / "foreign", True, [tmp_path / "x" / ".." / "foreign"])
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "foreign" / "mine.txt", True, [])


def test_a_new_report_removes_the_files_that_it_has_no_more_and_no_others(tmp_path):
    write_report(tmp_path, {PAGE: b"1", "tables/a.csv": b"a", "figures/b.png": b"b"})
    (tmp_path / "tables" / "mine.txt").write_text("mine")
    outside = tmp_path.parent / "outside.csv"
    outside.write_text("x")
    record = json.loads((tmp_path / "report.json").read_text())
    record["files"] += ["tables/../../outside.csv", "../outside.csv"]
    (tmp_path / "report.json").write_text(json.dumps(record))
    check_output(tmp_path, False, [])
    write_report(tmp_path, {PAGE: b"2", "tables/a.csv": b"c"})
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["report.html", "report.json", "tables/a.csv", "tables/mine.txt"]
    assert (tmp_path / PAGE).read_bytes() == b"2" and outside.exists()


def test_a_report_that_is_killed_leaves_a_folder_that_is_ours(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    (tmp_path / "report").mkdir()
    (folder / "tables").write_text("a file stands where the folder should be")
    with pytest.raises(UserError):
        write_report(folder, {"tables/a.csv": b"a", PAGE: b"1"})
    assert not (folder / PAGE).exists()
    check_output(folder, False, [])


def test_the_page_escapes_all_texts():
    hostile = '<script>alert(1)</script>\x00 & "q"'
    table = Table("t", hostile, ["a"], [{"a": hostile}], [text(hostile, "a")], hostile)
    page = report_page([table], [], [hostile])
    assert "<script" not in page and "\x00" not in page
    assert page.count("&lt;script&gt;") == 6


def test_without_matplotlib_one_message_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt -e '\.\[report\]'"):
        check_matplotlib()


def test_matplotlib_is_imported_in_one_place():
    room = Path(check_matplotlib.__code__.co_filename).parents[1]
    found = {
        path.name
        for path in room.rglob("*.py")
        if "import matplotlib" in (t := path.read_text()) or "from matplotlib" in t
    }
    assert found == {"drawing.py"}
