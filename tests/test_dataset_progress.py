"""Progress in bytes: a line now and then in a log, a bar on a terminal, nothing on standard output."""

from __future__ import annotations

import io

from megachiar.data import byte_progress as module
from megachiar.data.byte_progress import byte_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_lines_with_rate_and_time_left(capsys, monkeypatch):
    clock = iter((0.0, 4.0, 11.0, 12.0, 21.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with byte_progress("merging", 40_000_000) as on_bytes:
        for _ in range(4):
            on_bytes(5_500_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "merging: 11 of 40 MB, 1 MB/s, 29 s left",
        "merging: 22 of 40 MB, 1 MB/s, 17 s left",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with byte_progress("verifying", 2_000_000) as on_bytes:
        on_bytes(2_000_000)
    assert "verifying" in terminal.getvalue() and "2.0/2.0 MB" in terminal.getvalue()
