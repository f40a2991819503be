"""``configs/published``: the published training as it was, as far as keys can state it.

The numbers come from running the published code: ``count_parameters`` of its models, and its ``get_lr``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from labelled import write_examples
from page_commands import page_commands
from support import ROOT, process_environment, write_tokens

from megachiar.config import RunConfig, load_config
from megachiar.config.shipped import shipped_configs
from megachiar.model import build_model
from megachiar.training.schedule import learning_rate

PUBLISHED = {name: path for name, path in shipped_configs().items() if name.startswith("published/")}
PARAMETERS = {"400m": 400_043_009, "400m_baseline": 404_159_488, "17m": 15_764_225, "17m_baseline": 16_025_344}
PARAMETERS |= {"listops": 401_102_859, "imdb": 401_094_659, "mixed": 400_055_309}
# get_lr(step, warmup=1000, total=18000, max_lr=1e-4), in which step counts the steps taken.
PUBLISHED_RATES = {500: 5e-05, 999: 9.99e-05, 1000: 1e-4, 1001: 9.999999915476572e-05, 9000: 5.5067283793433455e-05}


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(PUBLISHED[f"published/{name}"], overrides)


@pytest.mark.parametrize("name", PARAMETERS)
def test_they_have_the_published_number_of_parameters(name):
    config = load(name)
    assert build_model(config.model, seed=0, device="meta", heads=config.heads).parameter_count() == PARAMETERS[name]


@pytest.mark.parametrize("name", [name.removeprefix("published/") for name in PUBLISHED])
def test_each_states_what_the_published_code_does(name):
    config = load(name)
    model, optimizer, training = config.model, config.optimizer, config.training
    assert (model.norm, model.dropout, model.max_sequence_length) == ("post", 0.1, 256)
    assert (model.dct.gain, model.dct.entropy_dc_weight, model.dct.entropy_epsilon) == (2.0, 2.0, 1e-8)
    assert (model.meta_router.pool, model.meta_router.init) == ("batch", "published")
    assert optimizer.decay_all and (optimizer.weight_decay, optimizer.betas) == (0.01, (0.9, 0.95))
    batch = 128 if config.task.kind == "language_model" else 8
    assert (training.global_batch_size, config.precision.compute) == (batch, "fp16")
    assert config.checkpoint.keep_best is None and list(config.data.test) == ["test"], "the last weights are tested"
    assert str(config.logging.folder) == f"runs/published/{name}"


def test_the_schedule_is_the_published_one_but_for_one_step_of_the_warm_up():
    """Step N of a run is the published step N - 1 of the warm-up, whose first step has a learning rate of 0."""
    config = load("400m", "training.epochs=null", "training.steps=18000")
    for taken, rate in PUBLISHED_RATES.items():
        ours = learning_rate(config, taken + 1)
        if taken < config.schedule.warmup_steps:
            assert learning_rate(config, taken) == pytest.approx(rate, rel=1e-12)
            assert ours == pytest.approx(rate + 1e-7, rel=1e-9)
        else:
            assert ours == pytest.approx(rate, rel=1e-12)
    assert learning_rate(config, 1) == pytest.approx(1e-7)


def test_classifications_and_mixed_training_are_the_published_ones():
    """``train_cls`` warms up over a twentieth of its steps, at 5e-5; ``train_mixed`` draws for micro-batches of 8."""
    for name, classes, examples in (("imdb", 2, 25_000), ("listops", 10, 96_000)):
        config = load(name)
        assert (config.task.classes, config.task.head, config.task.padding) == (classes, "mlp", "counted")
        assert config.schedule.warmup_steps == examples // 8 * 4 // 20
        assert (config.optimizer.learning_rate, config.training.epochs) == (5e-5, 4)
    mixed = load("mixed").mixed
    assert (mixed.probability, mixed.group_size) == (0.25, 8)
    assert {(task.global_batch_size, task.weight, task.loss_weight) for task in mixed.tasks.values()} == {(8, 1, 1)}


def test_the_page_makes_all_their_data_without_tokens_that_end_documents():
    """``data/wikitext.py`` joins the lines of the text and adds no token; ``data/lra.py`` cuts reviews to 256."""
    made = {}
    for command in page_commands("reproducing.md", "## Data"):
        if "--output-prefix" in command:
            made[command.split("--output-prefix ")[1].split()[0]] = command
    for name in PUBLISHED:
        config = load(name.removeprefix("published/"))
        tasks = [path for task in config.mixed.tasks.values() for path in (task.data, task.validation, task.test)]
        for prefix in filter(None, (*config.data.prefixes, *tasks)):
            assert "--append-eod" not in made[str(prefix)]
            assert ("--max-text-tokens 256" in made[str(prefix)]) == ("imdb" in str(prefix))


# count_parameters of the published models with --small; those of lra_imdb and lra_listops with --baseline as well.
SMALL = {"wikitext-2": 15_764_225, "imdb": 15_830_531, "listops": 15_832_587, "mixed": 15_767_309}
SMALL_BASELINES = {"wikitext-2": 16_025_344, "imdb": 16_091_650, "listops": 16_093_706}


@pytest.mark.parametrize("name", SMALL)
def test_the_commands_for_small_models_are_the_published_ones(name):
    """They state what ``SmallConfig`` does for ``train_all.py --small``."""
    commands = page_commands("reproducing.md", "### The small models of `train_all.py`")
    (command,) = (each for each in commands if f"configs/published/{name}.yaml" in each)
    overrides = command.split("--set ")[1].split()
    small = load(name, *overrides)
    assert (small.model.num_layers, small.model.hidden_size, small.model.num_attention_heads) == (4, 256, 4)
    assert small.model.router.tau == (0.8935 + 0.8973) / 2
    assert str(small.logging.folder) == f"runs/published/{name}_small"
    assert build_model(small.model, seed=0, device="meta", heads=small.heads).parameter_count() == SMALL[name]
    if name in SMALL_BASELINES:
        baseline = load(name, *overrides, "model.kind=baseline")
        count = build_model(baseline.model, seed=0, device="meta", heads=baseline.heads).parameter_count()
        assert count == SMALL_BASELINES[name]
    training = small.training
    if small.task.kind == "classification":
        batch, plain = max(8, 32 // 4), load(name)
        assert (training, small.schedule) == (plain.training, plain.schedule)
        assert training.global_batch_size == batch
    else:
        assert (training.global_batch_size, training.epochs, training.evaluate_every) == (32 * 4, 10, 500)
        assert small.schedule.warmup_steps == 500
    if name == "mixed":
        sizes = {task: of.global_batch_size for task, of in small.mixed.tasks.items()}
        assert (small.mixed.group_size, sizes) == (32, {"wikitext-2": 32, "imdb": 8, "listops": 8})


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "published/mixed" else pytest.mark.slow) for n in PUBLISHED]
)
def test_a_dry_run_takes_them_with_their_data(name, tmp_path):
    data = tmp_path / "data" / "published"
    for text in ("wikitext-103", "wikitext-2"):
        (data / text).mkdir(parents=True)
        for part in ("train", "valid", "test"):
            write_tokens(data / text / part, documents=8, vocab_size=50257, seed=len(part))
    for text, classes in (("imdb", "01"), ("listops", "0123456789")):
        (tmp_path / "data" / "published" / text).mkdir(parents=True)
        for part in ("train", "valid", "test"):
            write_examples(
                tmp_path / "data" / "published" / text / part, classes=classes, vocab_size=50257, seed=len(part)
            )
    command = [sys.executable, "-m", "megachiar", "pretrain", "--config", str(PUBLISHED[name]), "--dry-run"]
    env = process_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "start: fresh" in done.stdout and "not checked" not in done.stdout
