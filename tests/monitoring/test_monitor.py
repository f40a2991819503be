"""``megachiar monitor`` on a real terminal: what a person sees of runs that train, die, go on, or are damaged."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from rich.cells import cell_len
from support import pretrain, python, start_ranks
from terminal import on_terminal
from watched_runs import STEPS, records_of, watched_config

from megachiar.cli.monitor import main
from megachiar.cli.page import main as write_page
from megachiar.errors import UserError
from megachiar.monitoring.curves import MOST_POINTS, NEWEST, Curve, thinned
from megachiar.monitoring.growing_file import GrowingFile
from megachiar.monitoring.run_history import MOST_ROWS, LayerRows, RunHistory
from megachiar.monitoring.run_record import record_of_run
from megachiar.monitoring.watched_run import WatchedRun

DIGITS = b"1" + b"0" * 400
HUGE = b'{"step": %s, "kind": "train"}\n{"step": 1, "time": NaN, "kind": "start", "seconds": %s}' % (DIGITS, DIGITS)
"""Lines with numbers that no float holds, as a damaged disk may leave them."""
MONITOR = ("-m", "megachiar", "monitor")


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_run_is_seen_to_train_to_be_killed_and_to_go_on_to_its_end(trained, tmp_path):
    """At 80x24, from before its folder is there; at the end ``q`` leaves the terminal as it was."""
    config = watched_config(trained.parent, "mortal", training={"steps": 100_000, "evaluate_every": 4})
    run = trained.parent / "mortal"
    with on_terminal(*MONITOR, str(run), "--every", "0.2", "--silent-after", "5") as terminal:
        terminal.wait_for("there is no such folder yet")
        (rank,) = start_ranks(1, "-m", "megachiar.pretrain", "--config", config)
        try:
            terminal.wait_for("running")
            terminal.wait_for("loss", "valid", "tok/s", "left", "/100,000")
            terminal.wait_for("saved step 3")
            rank.send_signal(signal.SIGSTOP)
            terminal.wait_for("silent")
            terminal.wait_for("nothing written for")
        finally:
            rank.kill()
            rank.wait()
        terminal.wait_for("killed", f"process {rank.pid}", "is gone")
        steps = records_of(run, "train")[-1]["step"]
        pretrain(config, f"training.steps={steps + 5}")
        loss, valid = records_of(run, "train")[-1]["mean_loss"], records_of(run, "evaluation/valid")[-1]["loss"]
        terminal.wait_for("finished", f"step {steps + 5:,}/{steps + 5:,}", "100%", "went on from step")
        terminal.wait_for(f"loss {loss:.4f}", f"valid {valid:.4f}")
        terminal.type("q")
        assert terminal.end() == 0
        assert b"\x1b[?1049l" in terminal.written and b"Traceback" not in terminal.written


def test_two_runs_are_side_by_side_and_a_narrow_terminal_has_a_line_for_each(trained, copied):
    """Nothing is wider or higher than the terminal, whatever its size, and its size may change."""
    last = records_of(trained, "train")[-1]
    with on_terminal(*MONITOR, str(trained), str(copied), "--every", "0.2") as terminal:
        loss = f"loss {last['mean_loss']:.4f}"
        seen = terminal.wait_for(
            lambda text: text.count(f"step {STEPS}/{STEPS}") == 2,
            lambda text: text.count(loss) == 2 and text.count("attention") >= 2,
            lambda text: text.splitlines()[22].startswith("╰") and "q ends the view" in text.splitlines()[23],
        )
        top = terminal.lines[0]
        assert top.startswith("╭─ run ─") and "╭─ copy ─" in top and len(top) == 80
        assert any(0x2801 <= ord(letter) <= 0x28FF for letter in seen), "a curve of braille dots"
        terminal.resize(34, 8)
        two_lines = [["run", "finished"], ["copy", "finished"]]
        terminal.wait_for(
            lambda text: "state" in text.splitlines()[0],
            lambda text: [line.split()[:2] for line in text.splitlines()[1:3]] == two_lines,
        )
        terminal.resize(150, 50)
        terminal.wait_for(
            lambda text: text.count(f"finished after step {STEPS}") == 2,
            lambda text: text.count("by layer") == 4 and len(text.splitlines()[0]) == 150,
        )
        terminal.type("\x03")  # Ctrl-C
        assert terminal.end() == 0


def test_damaged_and_half_written_lines_are_told_apart(copied):
    metrics = copied / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0][:30] + b"\n", *lines[1:]]))
    with on_terminal(*MONITOR, str(copied), "--every", "0.2") as terminal:
        terminal.wait_for("1 damaged line")
        record = json.dumps({**json.loads(lines[0]), "step": 13, "mean_loss": 1.25}).encode()
        with open(metrics, "ab", buffering=0) as file:
            file.write(record[:40])
            terminal.resize(100, 30)  # a frame that is drawn after the half line
            seen = terminal.wait_for(lambda text: len(text.splitlines()[0]) == 100, "1 damaged line")
            assert "1.2500" not in seen
            file.write(record[40:] + b"\n")
        terminal.wait_for("loss 1.2500", "1 damaged line")
        terminal.type("q")
        assert terminal.end() == 0


def test_a_run_that_goes_back_forgets_the_steps_that_it_takes_again(copied):
    """As by a rollback, which replaces metrics.jsonl by a shorter file, and as by a file that has steps twice."""
    run = WatchedRun(copied, "copy")
    run.read()
    records = [json.loads(line) for line in (copied / "metrics.jsonl").read_bytes().splitlines()]
    losses = {record["step"]: record["mean_loss"] for record in records if record["kind"] == "train"}
    assert dict(zip(run.history.losses.steps, run.history.losses.values, strict=True)) == losses
    kept = [record for record in records if record["step"] <= 5] + [{"step": 5, "kind": "rollback", "from_step": 9}]
    content = b"".join(json.dumps(record).encode() + b"\n" for record in kept)
    (copied / "new").write_bytes(content)
    os.replace(copied / "new", copied / "metrics.jsonl")
    run.read()
    assert run.history.losses.steps == [1, 2, 3, 4, 5] and run.history.marks == [kept[-1]]
    assert run.history.curve("evaluation/valid", "loss").steps == [2, 4]

    again = RunHistory()
    again.take([*records, *({**record, "mean_loss": 9.0} for record in records if record["step"] in (7, 8))])
    assert again.losses.steps == list(range(1, 9)) and again.losses.values[6:] == [9.0, 9.0]
    assert again.losses.values[:6] == [losses[step] for step in range(1, 7)]
    assert again.curve("evaluation/valid", "loss").steps == [2, 4, 6, 8] and again.layers["entropy"].steps[-1] == 8


def test_a_long_file_is_read_once(tmp_path, monkeypatch):
    """A second look reads what is new alone, and memory holds a bounded number of points, the peaks among them."""
    path, count = tmp_path / "metrics.jsonl", 50_000
    line = '{{"step": {}, "kind": "train", "mean_loss": {}, "attention_share": [0.5, {}]}}\n'
    losses = {step: 5.0 - step / count for step in range(1, count + 1)} | {31_415: 77.5}
    path.write_text("".join(line.format(step, loss, step / count) for step, loss in losses.items()))
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: read.append(found := pread(*place)) or found)
    file, history = GrowingFile(path), RunHistory()
    history.take(file.read().records)
    assert sum(map(len, read)) == path.stat().st_size and not file.has_more
    assert len(history.losses.steps) <= MOST_POINTS and max(history.losses.values) == 77.5
    assert history.losses.steps[0] == 1 and history.losses.steps[-1] == count
    assert len(history.layers["attention_share"].rows) <= MOST_POINTS
    assert history.layers["attention_share"].rows[-1] == [0.5, 1.0]
    read.clear()
    with open(path, "a") as grown:
        grown.write(line.format(count + 1, 0.5, 1))
    assert [record["step"] for record in file.read().records] == [count + 1]
    assert sum(map(len, read)) < 1000


def test_a_file_that_is_written_anew_in_place_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = GrowingFile(path)
    assert file.read() == (False, [], 0)
    first = [{"step": step, "kind": "train", "loss": 1.0} for step in range(20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in first))
    assert file.read().records == first
    second = [{"step": step, "kind": "train", "loss": 2.0} for step in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in second))  # longer, in the same file
    assert file.read() == (True, second, 0)
    path.write_text("")
    assert file.read() == (True, [], 0)
    path.unlink()
    assert file.read() == (True, [], 0)


def test_a_long_curve_is_thinned_evenly_over_its_steps():
    """However often it is thinned, each part of the run keeps its share of the points, and the newest stay."""
    curve, count = Curve(), 200_000
    for step in range(1, count + 1):
        curve.add(step, math.exp(-step / 40_000))
    parts = Counter((step - 1) * 10 // count for step in curve.steps)
    assert len(curve.steps) <= MOST_POINTS and min(parts.values()) >= MOST_POINTS / 40, parts
    assert curve.steps[-NEWEST:] == list(range(count - NEWEST + 1, count + 1))
    kept = thinned(curve.steps, curve.values, 100)
    shares = Counter(curve.steps[place] * 4 // (count + 1) for place in kept)
    assert len(kept) <= 102 and min(shares.values()) >= 20, shares


def test_rows_of_layers_stay_evenly_apart_when_a_run_goes_back():
    rows, count = LayerRows(), 3 * MOST_ROWS
    for step in range(count):
        rows.add(step, [float(step)])
    rows.forget_from(count - 7)
    for step in range(count - 7, count + 20):
        rows.add(step, [float(step)])
    apart = {after - before for before, after in pairwise(rows.steps[:-1])}
    assert apart == {4} and rows.steps[-1] == count + 19 and rows.rows[-1] == [count + 19.0]


def test_a_number_that_is_not_finite_any_more_is_not_shown_as_the_one_before(copied, capsys):
    """A loss that has become nan is null in the file; the newest finite one is of an earlier step."""
    metrics = copied / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if record["step"] == STEPS:
            record |= dict.fromkeys({"mean_loss", "loss", "gradient_norm"} & record.keys())
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main([str(copied), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "loss nan" in shown and "valid nan" in shown and "grad nan" in shown and "MFU" not in shown
    run = WatchedRun(copied, "copy")
    run.read()
    facts = {label: (value, note) for value, label, note in record_of_run(run, {})["facts"]}
    assert facts["training loss"] == facts["loss on valid"] == ("nan", f"step {STEPS}")


def test_texts_of_a_run_cannot_command_the_terminal(copied, capsys):
    """Escape sequences, line breaks and marks of direction of reasons and names are no more than signs in one line."""
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9b2J\r\nc\u202ed [bold]e[/]"
    with open(copied / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 1e9, "step": 12, "kind": "bad step", "reason": hostile, "action": "x"}) + "\n")
        file.write(json.dumps({"time": 1e9, "step": 12, "kind": "failed", "reason": hostile}) + "\n")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 12, "kind": f"evaluation/{hostile}", "loss": 1.5}) + "\n")
    hostile_folder = copied.rename(copied.parent / "x\x1b[2J")
    assert main([str(hostile_folder), "--once"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert all(line.isprintable() for line in lines) and len(lines) == 24 - 1
    assert "[bold]e[/]" in shown and "[2J" in shown and {cell_len(line) for line in lines} == {80}


def test_arrow_keys_and_the_wheel_do_not_end_the_view(trained):
    """They begin with the sign of Esc, which ends it alone."""
    with on_terminal(*MONITOR, str(trained), "--every", "0.2") as terminal:
        terminal.wait_for("finished")
        for keys in ("\x1b[A", "\x1b[B\x1b[B", "\x1bOA", "x"):
            terminal.type(keys)
        terminal.resize(100, 30)
        terminal.wait_for(lambda text: len(text.splitlines()[0]) == 100)
        terminal.type("\x1b")
        assert terminal.end() == 0


def test_thinned_curves_keep_order_and_extremes():
    curve = Curve()
    for step in range(3 * MOST_POINTS):
        curve.add(step, float((step * 7919) % 1000) + (5000.0 if step == 4321 else 0.0))
    assert len(curve.steps) <= MOST_POINTS and curve.steps == sorted(curve.steps)
    assert max(curve.values) == float((4321 * 7919) % 1000) + 5000.0 and min(curve.values) == 0.0
    curve.forget_from(100)
    assert curve.steps[-1] < 100


def test_one_frame_goes_to_a_log_without_torch(trained):
    """Its numbers are those of metrics.jsonl."""
    check = "import sys; from megachiar.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = python("-c", check, "monitor", trained, COLUMNS="100", LINES="30", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    last, held_out = records_of(trained, "train")[-1], records_of(trained, "evaluation/valid")[-1]
    for shown in (
        f"loss {last['mean_loss']:.4f}",
        f"valid {held_out['loss']:.4f}",
        f"lr {last['learning_rate']:.2e}",
        f"grad {last['gradient_norm']:.3f}",
        f"{last['tokens_per_second']:,.0f} tok/s",
        f"g {last['gate']:.3f}",
        f"attention {sum(last['attention_share'][1:3]) / 2:.0%}",
        f"H {sum(last['entropy'][1:3]) / 2:.4f}",
        "finished",
        "keys of the config changed",
    ):
        assert shown in done.stdout, shown
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) == 100


def test_a_terminal_without_braille_gets_ascii(trained):
    done = python(*MONITOR, trained, "--once", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "*" in done.stdout and f"step {STEPS}/{STEPS}" in done.stdout
    lines = done.stdout.splitlines()
    assert {len(line) for line in lines} == {80} and len(lines) == 23, "no sign became several"
    assert f"| {'=' * 70} 100%  |" in lines


def test_a_terminal_that_only_prints_lines_gets_one_frame(trained):
    """Nothing can be drawn over on TERM=dumb, as in an editor's shell: a live view would stay empty there."""
    with on_terminal(*MONITOR, str(trained), TERM="dumb") as terminal:
        assert terminal.end() == 0
        assert f"step {STEPS}/{STEPS}".encode() in terminal.written and b"\x1b" not in terminal.written


def test_a_view_that_is_terminated_gives_the_terminal_back(trained):
    with on_terminal(*MONITOR, str(trained), "--every", "0.2") as terminal:
        terminal.wait_for("finished")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        assert terminal.written.rindex(b"\x1b[?1049l") > terminal.written.rindex(b"\x1b[?1049h")
        assert b"Traceback" not in terminal.written


def test_what_is_no_run_is_refused_in_one_message(trained, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for arguments, where, problem, remedy in (
        ([tmp_path / "file"], "file", "is no folder", "give a run folder"),
        ([tmp_path / "other"], "other", "holds no run: none of metrics.jsonl", "give a run folder"),
        ([trained.parent], trained.parent.name, "holds no run", f"did you mean {trained.parent}/"),
        ([tmp_path / "missing", "--once"], "missing", "there is no such folder", "give a run folder"),
    ):
        with pytest.raises(UserError) as raised:
            main([str(argument) for argument in arguments])
        assert str(raised.value.where).endswith(where) and problem in raised.value.problem
        assert remedy in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[]\n", b'{"step": "x"}\n', b'{"step": 1, "kind": "start"}\n' * 3, HUGE]
)
def test_strange_events_and_metrics_are_survived(copied, content, monkeypatch, capsys):
    for name in ("events.jsonl", "metrics.jsonl"):
        (copied / name).write_bytes(content + b"\n")
    assert main([str(copied), "--once"]) == 0
    assert "copy" in capsys.readouterr().out
    write_page([str(copied), "--no-routes"])
    assert "wrote" in capsys.readouterr().err


def test_the_package_stays_importable_without_a_terminal(trained):
    """Standard input may be closed, as below a daemon."""
    with open(os.devnull) as nothing, contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = nothing
        assert main([str(trained), "--once"]) == 0
