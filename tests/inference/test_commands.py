"""``generate``, ``chat`` and ``serve`` of a trained run, as a user starts them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import openai
import psutil
import pytest
from routed_runs import make_run
from support import ROOT, heed_ctrl_c, python

from megachiar.cli.main import main
from megachiar.errors import UserError

COMMAND = [sys.executable, "-m", "megachiar"]
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def command(run, capsys, monkeypatch):
    """Run a command in this process: what it prints on standard output, after what is typed."""

    def call(name: str, *arguments: object, typed: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert main([name, *map(str, arguments)]) in (None, 0)
        return capsys.readouterr().out

    return call


@pytest.fixture
def generated(run, command):
    """Return a prompt with the text that ``generate --json`` puts behind it."""
    return lambda prompt: json.loads(command("generate", run, "--json", "--prompt", prompt, *GREEDY))["text"]


def test_a_model_is_loaded_without_deepspeed(run):
    """DeepSpeed takes seconds to load, and writes to standard output, where ``--json`` has its object."""
    done = python("-m", "megachiar", "generate", run, "--json", "--prompt", "the quick", "--max-new-tokens", "1")
    assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] == 1


def test_generate_streams_the_text_that_json_has(run, command, generated):
    whole = generated("the quick")
    assert command("generate", run, "--prompt", "the quick", *GREEDY) == whole + "\n"
    two = command("generate", run, "--prompt", "the quick", *GREEDY, "--num-samples", 2)
    assert two == f"{whole}\n\n{whole}\n"


def test_chat_goes_on_from_each_line_and_begins_anew(run, command, generated):
    first = generated("the quick")
    second, third = generated(first + "\nbrown"), generated("lazy")
    expected = [first[len("the quick") :], second[len(first + "\nbrown") :], third[len("lazy") :]]
    typed = "the quick\nbrown\n/new\nlazy\n/quit\nnever read\n"
    assert command("chat", run, *GREEDY, typed=typed) == "".join(f"{text}\n" for text in expected)
    assert command("chat", run, *GREEDY, typed="the quick") == expected[0] + "\n"


def wait_until_idle(pid: int) -> None:
    """Wait until a process takes no more processor time: ``input`` loses a signal between its prompt and its wait."""
    process, before = psutil.Process(pid), -1.0
    while (now := sum(process.cpu_times()[:2])) != before:
        before = now
        time.sleep(0.5)


def test_ctrl_c_stops_what_chat_writes_and_then_ends_it(run):
    """On a terminal: the first Ctrl-C stops an answer, and the prompt is back; there it ends the program with 130."""
    master, slave = pty.openpty()
    arguments = [*COMMAND, "chat", str(run), "--max-new-tokens", "1000000"]
    process = subprocess.Popen(
        arguments,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    os.close(slave)
    seen = b""

    def read_until(mark: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 240
        while mark not in seen:
            assert time.monotonic() < deadline, seen[-500:]
            seen += os.read(master, 65536)

    try:
        read_until(b"> ")
        os.write(master, b"the quick\n")
        before = len(seen)
        while len(seen) < before + 200:
            seen += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        read_until(b"(stopped)")
        seen = seen[seen.index(b"(stopped)") :]
        read_until(b"> ")
        wait_until_idle(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        os.close(master)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_serve_answers_until_ctrl_c_or_a_service_manager_ends_it(number, run, generated):
    process = subprocess.Popen(
        [*COMMAND, "serve", str(run), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"run: (http://127\.0\.0\.1:\d+/v1) ", line)
        assert found, line
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=120)
        answer = client.completions.create(model="run", prompt="the quick", max_tokens=12, temperature=0)
        assert "the quick" + answer.choices[0].text == generated("the quick")
        endless = client.completions.create(model="run", prompt="the quick", max_tokens=2048, n=16, stream=True)
        next(iter(endless))
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="the server ends"):
            list(endless)
        assert process.wait(60) == 0 and process.stderr.read() == "stopped\n"
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("serve", "nowhere"), "nowhere"),
        (("chat", "nowhere"), "nowhere"),
        (("serve", "RUN", "--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        (("serve", "RUN", "--port", "70000"), "--port"),
        (("chat", "RUN", "--step", "77"), "77"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_message(run, arguments, where):
    with pytest.raises(UserError) as refused:
        main([str(run) if word == "RUN" else word for word in arguments])
    assert where in str(refused.value) and refused.value.remedy
