"""Progress: a line now and then in a log, a bar on a terminal, nothing on standard output."""

from __future__ import annotations

import io

import pytest

from megachiar import progress as module
from megachiar.progress import ByteProgress, TextProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 5.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_file_gets_lines_now_and_then_with_rate_and_time_left(capsys, clock):
    with ByteProgress("merging", 40_000_000) as progress:
        for seconds in (4, 7, 1, 8, 60):
            clock.now += seconds
            progress.advance(5_500_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "merging: 11.0 MB, 1.0 MB/s, 28 %, 0:00:29 left",
        "merging: 27.5 MB, 0.3 MB/s, 69 %, 0:00:36 left",
    ]


def test_text_is_counted_in_documents_and_bytes_of_its_own(clock):
    stream = io.StringIO()
    with TextProgress("preprocessing", 4_000_000, stream) as progress:
        clock.now += 4000
        progress.advance(consumed=1_000_000, text_bytes=2_000_000_000, documents=12_000)
    assert stream.getvalue() == (
        "preprocessing: 12,000 documents, 2,000.0 MB, 0.5 MB/s, 3 documents/s, 25 %, 3:20:00 left\n"
    )


def test_without_known_sizes_there_is_no_time_left(clock):
    stream = io.StringIO()
    with TextProgress("reading", None, stream) as progress:
        clock.now += 10
        progress.advance(0, 1_000_000, 20)
    assert stream.getvalue() == "reading: 20 documents, 1.0 MB, 0.1 MB/s, 2 documents/s\n"


@pytest.mark.parametrize("total", [0, 100])
def test_work_of_no_bytes_is_shown_too(clock, total):
    stream = io.StringIO()
    with ByteProgress("merging", total, stream, every=0.0) as progress:
        progress.advance(0)
    assert stream.getvalue().startswith("merging: 0.0 MB, 0.0 MB/s") and "left" not in stream.getvalue()


@pytest.mark.parametrize("total", [10_000_000, None])
def test_a_terminal_gets_a_bar(clock, total):
    stream = Terminal()
    with TextProgress("preprocessing", total, stream) as progress:
        clock.now += 2
        progress.advance(5_000_000, 4_000_000, 6)
    assert "preprocessing" in stream.getvalue() and "2.0 MB/s, 3 documents/s" in stream.getvalue()
    assert ("50%" in stream.getvalue()) == ("0:00:02 left" in stream.getvalue()) == (total is not None)


def test_the_bar_of_standard_error_is_the_default(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with ByteProgress("verifying", 2_000_000) as progress:
        clock.now += 1
        progress.advance(2_000_000)
    for shown in ("verifying", "100%", "2.0 MB/s", "0:00:00 left"):
        assert shown in terminal.getvalue()
