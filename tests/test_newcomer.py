"""A newcomer's path: quick start, export, transformers, lm-eval, a server, and the pages of the run."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import open_page, start_browser
from clones import clone, environment_of, put_small_corpus, run_shell
from local_tasks import TASKS, harness, write_tasks
from support import heed_ctrl_c

from megachiar.training.metrics import read_metrics

PROMPT = "To be, or not to be"
GREEDY = f"--prompt '{PROMPT}' --temperature 0 --max-new-tokens 12 --json"
IN_TRANSFORMERS = """
import sys

sys.modules["megachiar"] = None  # the export needs nothing of ours
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer([prompt], return_tensors="pt")
print(tokenizer.decode(model.generate(**batch, do_sample=False, max_new_tokens=12)[0], skip_special_tokens=True))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_newcomer_trains_exports_measures_serves_and_looks(tmp_path):
    harness()
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'megachiar[hf]'")
    folder = clone(tmp_path / "clone")
    put_small_corpus(folder)
    env = environment_of(folder)

    def shell(command: str, code: int = 0) -> str:
        done = run_shell(command, folder, env)
        assert done.returncode == code and "Traceback" not in done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    shell("megachiar quickstart", code=1)  # 4 steps are no better than a bigram model
    text = json.loads(shell(f"megachiar generate runs/tiny {GREEDY}"))["text"]
    shell("megachiar export runs/tiny --to hf --output exports/tiny --license mit")
    # The export works where it was moved to, and without megachiar.
    export = shutil.move(folder / "exports" / "tiny", tmp_path / "moved")
    theirs = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS, export, PROMPT], cwd=tmp_path, capture_output=True, text=True
    )
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout.removesuffix("\n") in (text, PROMPT + text), "the same greedy tokens"

    tasks = write_tasks(tmp_path / "tasks")
    named = ",".join(TASKS)
    shell(f"megachiar evaluate runs/tiny --tasks {named} --include-path {tasks} --output ours.json")
    model = f"--model hf --model_args pretrained={export},trust_remote_code=True,dtype=float32 --device cpu"
    shell(f"lm_eval run {model} --tasks {named} --include_path {tasks} --output_path theirs.json")
    (written,) = folder.glob("theirs_*.json")
    assert_same_measures(json.loads((folder / "ours.json").read_text()), json.loads(written.read_text()))

    with served(folder, env) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        parts = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts) == text.removeprefix(PROMPT)

    last = read_metrics(folder / "runs" / "tiny", "evaluation/valid")[-1]
    frame = shell("megachiar monitor runs/tiny --once")
    assert "finished" in frame and "4/4" in frame
    with start_browser() as browser, open_page(browser, (folder / "runs/tiny/index.html").as_uri()) as page:
        shown = page.locator("body").inner_text()
        assert "finished" in shown and f"{last['loss']:.4f}" in shown


def assert_same_measures(ours: dict, theirs: dict) -> None:
    for task in TASKS:
        found, expected = ours["results"][task], theirs["results"][task]
        numbers = {name: value for name, value in expected.items() if isinstance(value, float) and "stderr" not in name}
        assert numbers and {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4), task


@contextlib.contextmanager
def served(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Serve the run; yield the base URL that the command prints, and end it by Ctrl-C."""
    command = [sys.executable, "-m", "megachiar", "serve", "runs/tiny", "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
            assert found, line
            yield found[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
