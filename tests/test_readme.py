"""Every command of the README works: each ```bash block says, in a comment above it, how it is tested.

<!-- test: run -->         executed word for word, in order, in one clone of the working tree
<!-- test: quickstart -->  a make target that is executed on a clone with an empty home (slow set)
<!-- test: make -->        a make target that exists; running it here would run these tests again
<!-- test: cluster -->     commands for GPUs, clusters or a network: parsed, and all they name must exist
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT, process_environment, python

from megachiar.config import load_config
from megachiar.errors import UserError

README = ROOT / "README.md"
KINDS = ("run", "quickstart", "make", "cluster")
BLOCK = re.compile(
    r"(?:<!-- test: (?P<kind>[\w-]+) -->\s*\n)?^```(?:bash|sh|shell|console)\n(?P<commands>.*?)^```", re.M | re.S
)
OUR_PATH = re.compile(r"(?:tools|slurm|configs|megachiar|tests)/[\w./-]*|constraints\.txt")


class Block(NamedTuple):
    """One block of commands; ``kind`` is None without a marker, ``line`` counts from 1."""

    line: int
    kind: str | None
    commands: str


def blocks(readme: str) -> list[Block]:
    return [
        Block(1 + readme.count("\n", 0, match.start("commands")), match["kind"], match["commands"])
        for match in BLOCK.finditer(readme)
    ]


def of_kind(kind: str) -> list[str]:
    return [block.commands for block in blocks(README.read_text()) if block.kind == kind]


def commands_of(block: str) -> Iterator[list[str]]:
    """Words of each simple command of a block: lines, and what ; && || | separate."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def problems(readme: str) -> list[str]:
    """What is wrong with the commands of a README, without running them; each with its line."""
    found = []
    for block in blocks(readme):
        if block.kind not in KINDS:
            found.append(f"{block.line}: no marker, or an unknown one: {block.kind}")
        elif block.kind in ("make", "quickstart"):
            found += [f"{block.line}: {each}" for each in make_problems(block.commands)]
        else:
            found += [f"{block.line}: {each}" for each in command_problems(block.commands)]
    for path in set(re.findall(rf"`({OUR_PATH.pattern})[^`\n]*`", readme)):
        if not (ROOT / path).exists():
            found.append(f"text: there is no {path}")
    return found


def make_problems(commands: str) -> Iterator[str]:
    for words in commands_of(commands):
        if words[0] != "make" or len(words) != 2:
            yield f"not one make target: {shlex.join(words)}"
        elif (done := make("--dry-run", words[1])).returncode:
            yield done.stderr


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def command_problems(commands: str) -> Iterator[str]:
    parsed = subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True)
    if parsed.returncode:
        yield parsed.stderr
        return
    for words in commands_of(commands):
        for word in words:
            if OUR_PATH.fullmatch(word) and not (ROOT / word).exists():
                yield f"there is no {word}"
        place = next((i for i, word in enumerate(words) if program_of(word)), None)
        if place is not None and (ROOT / program_of(words[place])).exists():
            yield from argument_problems(program_of(words[place]), words[place], words[place + 1 :])


def program_of(word: str) -> str | None:
    """The file whose flags follow ``word``: a tool, or the way into training, also through a Slurm script."""
    if word == "megachiar.pretrain" or re.fullmatch(r"slurm/pretrain_\w+\.sh", word):
        return "megachiar/pretrain.py"
    return word if re.fullmatch(r"tools/\w+\.py|megachiar/pretrain\.py", word) else None


@functools.cache
def help_of(program: str) -> str:
    return python(program, "--help").stdout


def argument_problems(program: str, word: str, arguments: list[str]) -> Iterator[str]:
    known = set(re.findall(r"--[\w-]+", help_of(program)))
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known:
            yield f"{program} has no {flag}"
    if program == "megachiar/pretrain.py":
        yield from override_problems(word, arguments)


def override_problems(word: str, arguments: list[str]) -> Iterator[str]:
    """Load the config that a training command names, with its overrides."""
    by_script = re.sub(r"slurm/pretrain_(\w+)\.sh", r"configs/\1.yaml", word)
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else by_script
    overrides = []
    if "--set" in arguments:
        for argument in arguments[arguments.index("--set") + 1 :]:
            if argument.startswith("--"):
                break
            overrides.append(argument)
    if (ROOT / config).suffix == ".yaml" and (ROOT / config).exists():
        try:
            load_config(ROOT / config, overrides)
        except UserError as error:
            yield str(error)


def test_the_readme_has_no_problem():
    assert problems(README.read_text()) == []


def test_the_readme_has_blocks_of_every_kind():
    found = blocks(README.read_text())
    assert {block.kind for block in found} == set(KINDS)
    assert sum("megachiar" in block.commands or "tools/" in block.commands for block in found) >= 4


def block(kind: str, commands: str) -> str:
    return f"Text.\n\n<!-- test: {kind} -->\n```bash\n{commands}\n```\n"


GOOD = (
    block("make", "make test")
    + block("run", "for part in a b; do\n  python tools/preprocess_data.py --input $part \\\n    --append-eod\ndone")
    + block("cluster", "torchrun --nproc_per_node 8 megachiar/pretrain.py --config configs/400m.yaml")
    + block("cluster", "sbatch slurm/pretrain_400m.sh --set training.steps=10 model.router.tau=0.5")
    + "See `configs/tiny.yaml` and `pytest tests/test_readme.py`.\n"
)


def test_a_good_readme_has_no_problem():
    assert problems(GOOD) == []
    assert [each.kind for each in blocks(GOOD)] == ["make", "run", "cluster", "cluster"]
    assert blocks(GOOD)[0].line == 5


@pytest.mark.parametrize(
    ("readme", "problem"),
    [
        ("```bash\nls\n```\n", "2: no marker"),
        ("```sh\nls\n```\n", "2: no marker"),
        (block("nothing", "ls"), "5: no marker, or an unknown one: nothing"),
        (block("make", "make no-such-target"), "no-such-target"),
        (block("make", "make test && rm -r x"), "not one make target: rm -r x"),
        (block("cluster", "if then"), "syntax error"),
        (block("cluster", "python tools/nothing.py"), "there is no tools/nothing.py"),
        (block("run", "cd x && python tools/generate.py runs/tiny --promt hi"), "tools/generate.py has no --promt"),
        (block("run", "python tools/generate.py x | python tools/evaluate.py --jsn"), "evaluate.py has no --jsn"),
        (block("cluster", "python -m megachiar.pretrain --config configs/nothing.yaml"), "no configs/nothing.yaml"),
        (block("cluster", "sbatch slurm/pretrain_400m.sh --set training.stepz=10"), "training.stepz"),
        (
            block("run", "python -m megachiar.pretrain --config configs/tiny.yaml --set training.steps=many --dry-run"),
            "training.steps",
        ),
        ("See `tools/nothing.py --help`.\n", "text: there is no tools/nothing.py"),
    ],
)
def test_each_flaw_is_seen(readme, problem):
    found = problems(GOOD + readme) if not readme.startswith(("```", "Text.\n")) else problems(readme)
    assert len(found) == 1 and problem in found[0], found


def clone(folder: Path) -> Path:
    """The working tree as a stranger would get it if it were committed now: nothing that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.timeout(1500)
def test_run_blocks_run_word_for_word(tmp_path):
    folder = clone(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = process_environment(PATH=path, PYTHONPATH=str(folder))
    del env["OMP_NUM_THREADS"]
    for commands in of_kind("run"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    assert (folder / "runs" / "tiny" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_for_real(tmp_path):
    """On a fresh clone with an empty home and package cache; it fails by itself if the bigram model is better."""
    folder = clone(tmp_path / "clone")
    (tmp_path / "home").mkdir()
    env = process_environment(HOME=str(tmp_path / "home"), PIP_CACHE_DIR=str(tmp_path / "home" / "cache"))
    for name in ("OMP_NUM_THREADS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VIRTUAL_ENV", "PYTHONPATH"):
        env.pop(name, None)
    (commands,) = of_kind("quickstart")
    done = subprocess.run(["bash", "-c", commands], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpolated bigram" in done.stderr and "A sample" in done.stderr
