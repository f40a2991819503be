"""A run's one result: its test sets, read after the last step with the weights of its best checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import forked_python, pretrain, small_config, start_ranks, write_config, write_tokens

from megachiar.checkpoint.format import add_validation, checkpoint_name
from megachiar.config import load_config
from megachiar.config.identity import config_digest, deciding_keys
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.training.final_evaluation import attention_shares, choose_checkpoint, training_seconds
from megachiar.training.metrics import read_metrics
from megachiar.training.run_result import read_result

STEPS, BEST = 6, 2
MAIN = "from megachiar.console import run\nfrom megachiar.pretrain import main\nrun(main)\n"


def make_run(folder: Path, **more: dict) -> Path:
    """Write datasets and a config whose run saves and evaluates every second step."""
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    write_tokens(folder / "test", seed=2, documents=7)
    sections = {
        "data": {"test": {"held": str(folder / "test"), "again": str(folder / "valid2")}},
        "checkpoint": {"every": 2, "keep": None, "keep_best": "valid"},
        "training": {"steps": STEPS, "evaluate_every": 2, "evaluation_windows": 5},
    }
    write_tokens(folder / "valid2", seed=5, documents=2)
    for name, section in more.items():
        sections[name] = {**sections.get(name, {}), **section}
    return write_config(folder / "config.yaml", small_config(folder, **sections))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run, of which step 2 has by far the lowest loss on valid, and no result."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(make_run(folder))
    add_validation(folder / "run" / "checkpoints" / checkpoint_name(BEST), {"valid": 0.5})
    (folder / "run" / "results.json").unlink()
    return folder


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of that run; its datasets stay where they are."""
    shutil.copytree(trained / "run", tmp_path / "run")
    text = (trained / "config.yaml").read_text().replace(str(trained / "run"), str(tmp_path / "run"))
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return config


@pytest.fixture(scope="module")
def expected(trained) -> dict[str, dict]:
    """What ``megachiar evaluate`` measures, without an engine, with the weights of the best checkpoint."""
    checkpoint = trained / "run" / "checkpoints" / checkpoint_name(BEST)
    sets = [trained / "test", trained / "valid2"]
    done = forked_python("-m", "megachiar", "evaluate", checkpoint, "--data", *sets, "--json")
    return dict(zip(("held", "again"), json.loads(done.stdout)["datasets"].values(), strict=True))


LAYOUTS = {
    "1 process": (1, []),
    "tp 2, sequence": (2, ["parallel.tensor_size=2", "parallel.sequence=true"]),
    "pp 2": (2, ["parallel.pipeline_size=2"]),
    "dp 2, ZeRO 1": (2, []),
    "dp 2, ZeRO 3": (2, ["parallel.zero_stage=3"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_checkpoint_is_tested_in_every_layout(finished, expected, layout):
    ranks, overrides = LAYOUTS[layout]
    output = pretrain(finished, *overrides, ranks=ranks)[0]
    result = read_result(finished.parent / "run")
    assert (result.best.step, result.best.chosen_by, result.best.loss) == (BEST, "valid", 0.5)
    assert f"test, step {BEST}  held: tokens" in output and "lowest loss on valid" in output
    assert result.test.keys() == expected.keys()
    for name, measures in result.test.items():
        assert measures["complete"] and measures["tokens"] == expected[name]["tokens"]
        assert measures["loss"] == pytest.approx(expected[name]["loss"], rel=2e-6), name
    assert result.steps == STEPS and result.samples == STEPS * 8 and result.tokens == STEPS * 8 * 32
    evaluations = {r["step"]: r["loss"] for r in read_metrics(finished.parent / "run", "evaluation/valid")}
    assert result.validation["valid"].best["loss"] == evaluations[BEST] != evaluations[STEPS]
    assert result.validation["valid"].last["loss"] == evaluations[STEPS]
    assert result.config_digest == config_digest(load_config(finished))


def test_a_run_that_has_its_result_does_nothing(finished):
    pretrain(finished)
    file = finished.parent / "run" / "results.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    (output,) = pretrain(finished)
    assert "is finished" in output and "test, step" not in output
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "parameters": 1}))
    with pytest.raises(UserError, match=r"results\.json: is no result of a run: it was altered"):
        read_result(file.parent)
    pretrain(finished)
    assert file.read_bytes() == before[0], "a damaged one is made anew"
    (output,) = pretrain(finished, "data.test.again=null", "checkpoint.keep_best=null")
    assert "held: tokens" in output and read_result(file.parent).test.keys() == {"held"}
    assert read_result(file.parent).best.reason.startswith("the last checkpoint, since checkpoint.keep_best names no")


def test_another_learning_rate_of_a_finished_run_does_not_name_its_result(finished):
    """The weights are those of the first config, and so is the digest."""
    (output,) = pretrain(finished, "optimizer.learning_rate=0.5", "data.test.again=null")
    assert "held: tokens" in output
    digest = config_digest(load_config(finished, ["data.test.again=null"]))
    assert read_result(finished.parent / "run").config_digest == digest


def test_a_run_that_goes_on_is_measured_anew(finished):
    pretrain(finished)
    run = finished.parent / "run"
    before = (run / "results.json").read_bytes()
    (output,) = pretrain(finished, f"training.steps={STEPS + 2}")
    assert f"the result of the shorter run is now {run / f'results_step_{STEPS:08d}.json'}" in output
    assert (run / f"results_step_{STEPS:08d}.json").read_bytes() == before
    result = read_result(run)
    assert (result.steps, result.best.step) == (STEPS + 2, BEST)


SLOW = (
    "import pathlib, sys, time\n"
    "mark = pathlib.Path(sys.argv.pop())\n"
    "from megachiar.engine import engine\n"
    "score = engine.Engine.evaluate\n"
    "def scoring(*arguments):\n"
    "    mark.touch()\n"
    "    time.sleep(1)\n"
    "    return score(*arguments)\n"
    "engine.Engine.evaluate = scoring\n" + MAIN
)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_that_was_stopped_in_its_test_makes_up_for_it(finished, expected, name):
    program, mark = finished.parent / "slow.py", finished.parent / "tests"
    program.write_text(SLOW)
    processes = start_ranks(2, program, "--config", finished, mark)
    until = time.monotonic() + 120
    while not mark.exists():
        assert processes[0].poll() is None and time.monotonic() < until
        time.sleep(0.02)
    for process in processes if name == "SIGKILL" else processes[1:]:
        process.send_signal(getattr(signal, name))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not (finished.parent / "run" / "results.json").exists()
    if name == "SIGTERM":
        assert [process.returncode for process in processes] == [EXIT_STOPPED] * 2
        assert "before the test was done: it is made up for" in outputs[0]
    pretrain(finished)
    assert read_result(finished.parent / "run").test["held"]["loss"] == pytest.approx(expected["held"]["loss"], 2e-6)


def test_a_limit_of_time_does_not_keep_a_run_from_its_result(finished):
    """A start that has nothing else to do takes the time that the test needs."""
    pretrain(finished, "training.stop_after=0.001s")
    assert read_result(finished.parent / "run").best.step == BEST


def test_the_test_sets_are_not_read_before_the_last_step_is_saved(tmp_path):
    """An id that no model has is found where it is read: after the last save."""
    config = make_run(tmp_path)
    with IndexedDatasetBuilder(tmp_path / "test", np.uint16) as builder:
        builder.add_document(np.full(50, 99, np.uint16))
    (output,) = pretrain(config, codes=[2])
    assert f"saved {tmp_path}/run/checkpoints/{checkpoint_name(STEPS)}" in output
    assert "test.bin: token 0 (document 0) is id 99" in output.replace("\n", " ")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_damaged_best_checkpoint_is_one_message(finished):
    (weights,) = (finished.parent / "run" / "checkpoints" / checkpoint_name(BEST)).glob("weights*")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (output,) = pretrain(finished, codes=[2])
    assert "is not a whole checkpoint" in output and "Traceback" not in output


def test_without_a_checkpoint_there_is_nothing_to_test(tmp_path):
    config = load_config(make_run(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint to test"):
        choose_checkpoint(config)


def test_text_that_the_run_has_seen_is_no_test_set(tmp_path):
    path = make_run(tmp_path)
    for seen, key in (("train", "data.train"), ("valid", "data.validation.valid")):
        with pytest.raises(UserError, match=rf"data\.test\.held: is {tmp_path / seen}, which is {key} too"):
            load_config(path, [f"data.test.held={tmp_path / seen}"])
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tmp_path / 'valid'}{suffix}", f"{tmp_path / 'copy'}{suffix}")
        (tmp_path / f"link{suffix}").symlink_to(f"{tmp_path / 'valid'}{suffix}")
    (output,) = pretrain(path, f"data.test.held={tmp_path / 'link'}", "training.steps=1")
    assert "data.test.held holds the same tokens as data.validation.valid: the run is chosen by what tests it" in output


def test_the_digest_is_that_of_what_decides_the_result(tmp_path):
    path = make_run(tmp_path)
    config = load_config(path)
    digest = config_digest(config)

    def other(*overrides: str) -> str:
        return config_digest(load_config(path, overrides))

    same = ["logging.folder=elsewhere", "parallel.zero_stage=3", "checkpoint.every=1", "training.threads=2"]
    for override in (
        *same,
        "data.prefetch=9",
        "precision.kernels=torch",
        "model.dropout=0.0",
        "optimizer.epsilon=1e-8",
    ):
        assert other(override) == digest, override
    for override in ("optimizer.learning_rate=1e-3", "training.seed=5", "model.router.tau=0.8", "training.steps=7"):
        assert other(override) != digest, override
    assert other("data.test.again=null") != digest and other("checkpoint.keep_best=null") != digest
    by_tokens = load_config(path, [f"training.tokens={STEPS * 8 * 32}"])
    resolved = write_config(tmp_path / "resolved.yaml", by_tokens.model_dump(mode="json"))
    assert config_digest(load_config(resolved)) == config_digest(by_tokens)
    assert "training.steps" not in deciding_keys(by_tokens) and "training.tokens" in deciding_keys(by_tokens)


def test_seconds_and_shares_are_those_of_the_records():
    """20 tokens at 10 a second and 30 at 5: 2 + 6 seconds. A tenth of 11 records are 2."""
    assert training_seconds([]) is None
    records = [{"samples": 20, "samples_per_second": 10.0}, {"samples": 50, "samples_per_second": 5.0}]
    assert training_seconds(records) == pytest.approx(8.0)
    assert attention_shares([], 8) == (None, None)
    shares = [{"step": n, "attention_share": [0.0, n / 100, 1.0]} for n in range(1, 12)]
    assert attention_shares(shares, 11) == ([0.0, pytest.approx(0.105), 1.0], 10)
    assert attention_shares(shares, 7) == ([0.0, pytest.approx(0.065), 1.0], 6), "the tested step is an earlier one"
