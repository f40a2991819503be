"""Every command of README and docs/ works: each ```bash block says, in a comment above it, how it is tested.

<!-- test: run -->         commands that write: executed word for word in one clone of the working tree, before and
                           after the quickstart, the pages forwards and then backwards
<!-- test: read -->        commands that only read what the others wrote: executed word for word at the end
<!-- test: quickstart -->  a make target that is executed on a clone with an empty home (slow set)
<!-- test: make -->        a make target that exists; running it here would run these tests again
<!-- test: cluster -->     commands for GPUs, clusters or a network, and those whose like is executed elsewhere: parsed,
                           and all that they name must exist: paths, commands, flags, keys of a config

A command that a page names in its text, such as `megachiar inspect PREFIX --verify`, must exist with its flags, too.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from clones import clone, environment_of, put_small_corpus, run_shell
from support import ROOT, forked_python, process_environment

from megachiar.cli.main import COMMANDS
from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.options import CONFIG_KEY

README = ROOT / "README.md"
NOT_OURS = {"_build", "generated"}
PAGES = [README, *sorted(p for p in (ROOT / "docs").rglob("*.md") if not NOT_OURS & set(p.parts))]
LARGEST_README = 10_000  # bytes
KINDS = ("run", "read", "quickstart", "make", "cluster")
EXECUTED = ("run", "read")
BLOCK = re.compile(
    r"(?:<!-- test: (?P<kind>[\w-]+) -->\s*\n)?^```(?:bash|sh|shell|console)\n(?P<commands>.*?)^```", re.M | re.S
)
OUR_PATH = re.compile(r"(?:tools|slurm|configs|megachiar|tests|docs)/[\w./-]*|constraints\.txt")
TOOL = re.compile(r"tools/\w+\.py")
TRAINING = re.compile(r"megachiar\.pretrain|megachiar/pretrain\.py|slurm/pretrain_(?P<config>\w+)\.sh")
INLINE_COMMAND = re.compile(r"`(megachiar [^`\n]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


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


def of_kind(*kinds: str, pages: Sequence[Path] = PAGES) -> list[str]:
    return [block.commands for page in pages for block in blocks(page.read_text()) if block.kind in kinds]


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


def problems(readme: str, folder: Path = ROOT) -> list[str]:
    """What is wrong with the commands, paths and links of a page in ``folder``, without running them."""
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
    for command in INLINE_COMMAND.findall(readme):
        found += [f"text: {each}" for each in word_problems(shlex.split(command))]
    links = (
        path for path in LINK.findall(readme) if not NOT_OURS & set(Path(path).parts)
    )  # the site's build checks all
    found += [f"link: there is no {path}" for path in links if not (folder / path).exists()]
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
        yield from word_problems(words)


def word_problems(words: list[str]) -> Iterator[str]:
    """What is wrong with the words of one simple command from the name of our program on."""
    for number, word in enumerate(words):
        if word == "megachiar" and words[number + 1 :]:
            command, *arguments = words[number + 1 :]
            if command in COMMANDS:
                yield from argument_problems(command, arguments)
            elif command not in ("--help", "--version", "COMMAND"):
                yield f"megachiar has no command {command}"
            return
        if TRAINING.fullmatch(word) or TOOL.fullmatch(word):
            if "/" not in word or (ROOT / word).exists():
                yield from argument_problems(command_of(word), words[number + 1 :], word)
            return


def command_of(program: str) -> str:
    """The command of `megachiar` that a file is: a tool, or the way into training, also through a Slurm script."""
    if TRAINING.fullmatch(program):
        return "pretrain"
    (module,) = re.findall(r"from megachiar\.cli\.(\w+) import main", (ROOT / program).read_text())
    return module.rstrip("_").replace("_", "-")


@functools.cache
def help_of(*command: str) -> str:
    return forked_python("-m", "megachiar", *command, "--help").stdout


def argument_problems(command: str, arguments: list[str], program: str = "") -> Iterator[str]:
    """What is wrong with the arguments of a command; ``program`` is the file that it is started by, if any."""
    has_actions = command == "config" or (command == "corpus" and not "".join(arguments[:1]).startswith("-"))
    words = (command, *arguments[:1]) if has_actions and not program else (command,)
    known = set(re.findall(r"--[\w-]+", help_of(*words)))
    if not known:
        yield f"there is no megachiar {' '.join(words)}"
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known and not CONFIG_KEY.fullmatch(argument):
            yield f"megachiar {command} has no {flag}"
    yield from override_problems(program, arguments)


def override_problems(program: str, arguments: list[str]) -> Iterator[str]:
    """Load the config that a command names, or its Slurm script, with the overrides ``--set a.b=c`` and ``--a.b=c``."""
    by_script = TRAINING.fullmatch(program)
    config = f"configs/{by_script['config']}.yaml" if by_script and by_script["config"] else ""
    if "--config" in arguments:
        config = arguments[arguments.index("--config") + 1]
    overrides = [argument[2:] for argument in arguments if CONFIG_KEY.fullmatch(argument)]
    if "--set" in arguments:
        following = arguments[arguments.index("--set") + 1 :]
        overrides += itertools.takewhile(lambda argument: not argument.startswith("--"), following)
    if config.endswith(".yaml") and (ROOT / config).exists():
        try:
            load_config(ROOT / config, overrides)
        except UserError as error:
            yield str(error)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_problem(page):
    assert problems(page.read_text(), page.parent) == []


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.encode()) <= LARGEST_README
    linked = {ROOT / path for path in LINK.findall(text)}
    assert linked >= {page for page in PAGES[1:] if page.parent.name != "benchmarks" and page.name != "index.md"}


def test_the_readme_has_blocks_of_every_kind():
    found = blocks(README.read_text())
    assert {block.kind for block in found} == set(KINDS)
    assert sum("megachiar" in block.commands or "tools/" in block.commands for block in found) >= 4


def block(kind: str, commands: str) -> str:
    return f"Text.\n\n<!-- test: {kind} -->\n```bash\n{commands}\n```\n"


GOOD = (
    block("make", "make test")
    + block("run", "for part in a b; do\n  python tools/preprocess_data.py --input $part \\\n    --append-eod\ndone")
    + block("read", "megachiar inspect a --verify | head && megachiar pretrain --config c --training.steps=3 --dry-run")
    + block("cluster", "torchrun --nproc_per_node 8 megachiar/pretrain.py --config configs/400m.yaml")
    + block("cluster", "sbatch slurm/pretrain_400m.sh --set training.steps=10 model.router.tau=0.5")
    + block("cluster", "megachiar config show tiny | sed s:a:b: > c\nmegachiar --help\nmegachiar bench-data open")
    + "See `configs/tiny.yaml`, `pytest tests/test_readme.py`, `megachiar merge --output X` and `megachiar COMMAND`.\n"
)


def test_a_good_readme_has_no_problem():
    assert problems(GOOD) == []
    assert [each.kind for each in blocks(GOOD)] == ["make", "run", "read", *["cluster"] * 3]
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
        (block("run", "cd x && python tools/generate.py runs/tiny --promt hi"), "megachiar generate has no --promt"),
        (block("run", "python tools/generate.py x | python tools/evaluate.py --jsn"), "evaluate has no --jsn"),
        (block("cluster", "python -m megachiar.pretrain --config configs/nothing.yaml"), "no configs/nothing.yaml"),
        (block("cluster", "sbatch slurm/pretrain_400m.sh --set training.stepz=10"), "training.stepz"),
        (block("cluster", "megachiar pretrain --config configs/tiny.yaml --training.stepz=10"), "training.stepz"),
        (
            block("cluster", "megachiar plan --config configs/7b.yaml --gpus 64 --memory-gib 80 --set model.taus=1"),
            "model.taus",
        ),
        (block("run", "python -m megachiar genrate runs/tiny"), "megachiar has no command genrate"),
        (block("read", "cd x && megachiar generate runs/tiny --promt hi"), "megachiar generate has no --promt"),
        (block("cluster", "megachiar config init tiny --overwright"), "megachiar config has no --overwright"),
        (block("cluster", "megachiar config lst"), "there is no megachiar config lst"),
        ("See `megachiar inspct PREFIX`.\n", "text: megachiar has no command inspct"),
        ("See `megachiar inspect PREFIX --verfy`.\n", "text: megachiar inspect has no --verfy"),
        (
            block("run", "python -m megachiar.pretrain --config configs/tiny.yaml --set training.steps=many --dry-run"),
            "training.steps",
        ),
        ("See `tools/nothing.py --help`.\n", "text: there is no tools/nothing.py"),
        ("See [that](docs/nothing.md#part).\n", "link: there is no docs/nothing.md"),
    ],
)
def test_each_flaw_is_seen(readme, problem):
    found = problems(GOOD + readme) if not readme.startswith(("```", "Text.\n")) else problems(readme)
    assert len(found) == 1 and problem in found[0], found


def run_blocks(commands: Sequence[str], folder: Path, env: dict[str, str]) -> None:
    """Run blocks word for word, in order."""
    for block in commands:
        done = run_shell(block, folder, env)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def results(folder: Path) -> dict[str, int]:
    """Time of change of each dataset, tokenizer and checkpoint."""
    found = [path for path in (folder / "data").rglob("*") if path.suffix != ".yaml"]
    found += (folder / "runs").rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found if path.is_file()}


@pytest.mark.timeout(1500)
def test_blocks_run_word_for_word_before_and_after_the_quickstart_and_twice(tmp_path):
    folder = clone(tmp_path)
    put_small_corpus(folder)
    env = environment_of(folder)
    run_blocks(of_kind("run"), folder, env)
    assert (folder / "runs" / "mine" / "metrics.jsonl").exists()
    quickstart = run_shell("megachiar quickstart", folder, env)
    assert quickstart.returncode == 1 and "no better than the bigram model" in quickstart.stderr, quickstart.stderr
    before = results(folder)
    run_blocks(of_kind("run", pages=PAGES[::-1]), folder, env)
    run_blocks(of_kind("read"), folder, env)
    assert results(folder) == before, "what was done is not done again"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_for_real(tmp_path):
    """On a fresh clone with an empty home and package cache; it fails by itself if the bigram model is better.

    After it every block of the pages works, and the quickstart works again.
    """
    folder = clone(tmp_path / "clone")
    (tmp_path / "home").mkdir()
    env = process_environment(HOME=str(tmp_path / "home"), PIP_CACHE_DIR=str(tmp_path / "home" / "cache"))
    for name in ("OMP_NUM_THREADS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VIRTUAL_ENV", "PYTHONPATH"):
        env.pop(name, None)
    (commands,) = of_kind("quickstart")
    done = subprocess.run(["bash", "-c", commands], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpolated bigram" in done.stderr and "A sample" in done.stderr
    run_blocks(of_kind(*EXECUTED), folder, environment_of(folder))
    before = results(folder)
    again = subprocess.run(["bash", "-c", commands], cwd=folder, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "runs/tiny is finished" in again.stderr, again.stdout + again.stderr
    run_blocks(of_kind(*EXECUTED), folder, environment_of(folder))
    assert results(folder) == before, "what was done is not done again"
