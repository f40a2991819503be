"""Every tool that reads a corpus is told of it in the same words."""

from __future__ import annotations

import argparse
import re

import pytest
from support import ROOT, python

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.input_options import add_input_options, named_inputs, read_options
from megachiar.data.inputs.source import Source
from megachiar.errors import UserError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_input_options(parser)
    return parser.parse_args(arguments)


def test_what_is_not_said_is_the_readers_own_default():
    arguments = parse("--input", "-")
    assert read_options(arguments) == ReadOptions()
    assert named_inputs(arguments).sources == [Source(None, "jsonl")]
    assert arguments.on_error == "refuse"


def test_every_option_arrives(tmp_path):
    for name in ("a.data", "b.data"):
        (tmp_path / name).write_text("x")
    arguments = parse(
        *("--input", str(tmp_path / "b.data"), str(tmp_path / "a.*"), "--format", "txt.gz", "--text-key", "body"),
        *("--txt-documents", "line", "--max-document-mib", "3", "--on-error", "skip"),
    )
    assert named_inputs(arguments).sources == [Source(tmp_path / name, "txt", "gz") for name in ("b.data", "a.data")]
    assert read_options(arguments) == ReadOptions("body", "line", 3 << 20)
    assert arguments.on_error == "skip"


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_limit_that_no_document_meets_is_refused(size):
    with pytest.raises(UserError, match=f"--max-document-mib: {size} MiB"):
        read_options(parse("--input", "-", "--max-document-mib", size))


@pytest.mark.parametrize("tool", ["preprocess", "tokenizer"])
def test_the_tools_have_them_and_their_commands_are_shown_as_they_are_typed(tool):
    shown = python("-m", "megachiar", tool, "--help").stdout
    for option in ("--input", "--format", "--text-key", "--txt-documents", "--max-document-mib", "--on-error"):
        assert re.search(rf"^  {option} ", shown, re.M), option
    source = (ROOT / "megachiar" / "cli" / f"{tool}.py").read_text()
    command = re.search(r"^    megachiar .*?\n\n", source, re.M | re.S)[0].replace("\\\\", "\\")
    assert command in shown
