"""A run whose length is given in epochs is the run of the steps that they make, in whatever reads its config."""

from __future__ import annotations

import math

import pytest
import yaml
from support import forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.data.storage.reader import IndexedDataset
from megachiar.topology import LaunchError
from megachiar.training.epochs import resolve_epochs
from megachiar.training.metrics import read_metrics
from megachiar.training.run_data import check_max_epochs, open_data

LENGTH, BATCH = 32, 8


@pytest.fixture
def config(tmp_path):
    """Half an epoch of two sources; the second is five times as long as the first and has a third of the samples."""
    write_tokens(tmp_path / "train", documents=6)
    write_tokens(tmp_path / "large", documents=30, seed=2)
    write_tokens(tmp_path / "valid", documents=4, seed=1)
    sections = small_config(tmp_path, checkpoint={"every": 1, "keep": None})
    sections["data"]["train"] = [{"path": str(tmp_path / name)} for name in ("train", "large")]
    sections["data"]["train"][0]["weight"] = 2.0
    del sections["training"]["steps"]
    sections["training"]["epochs"] = 0.5
    return write_config(tmp_path / "config.yaml", sections)


def samples_of_a_pass(folder) -> int:
    return sum((IndexedDataset(folder / name).tokens.size - 1) // LENGTH for name in ("train", "large"))


def rows(folder) -> list[tuple]:
    return [(r["step"], r["loss"], r["learning_rate"]) for r in read_metrics(folder, "train")]


def test_a_run_of_epochs_is_the_run_of_their_steps_and_its_config_has_both(config, tmp_path):
    steps = math.ceil(samples_of_a_pass(tmp_path) / 2 / BATCH)
    assert 5 <= steps < 15
    output = " ".join(pretrain(config, ranks=2)[0].split())
    assert f"{steps} steps of 8 x 32" in output and "from training.epochs 0.5" in output
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert (written["steps"], written["tokens"], written["epochs"]) == (steps, None, 0.5)
    other = tmp_path / "other"
    pretrain(config, f"training.steps={steps}", f"logging.folder={other}", ranks=2)
    assert rows(tmp_path / "run") == rows(other) and len(rows(other)) == steps, "the schedule's end included"


def test_a_finished_run_names_its_key_and_goes_on_with_more(config, tmp_path):
    pretrain(config, "training.epochs=0.2", "schedule.decay_steps=100")
    first = len(rows(tmp_path / "run"))
    output = " ".join(pretrain(config, "training.epochs=0.2", "schedule.decay_steps=100")[0].split())
    assert f"is at step {first} of training.steps {first}. To train it further raise training.epochs" in output
    pretrain(config, f"training.tokens={(first + 2) * BATCH * LENGTH}", "schedule.decay_steps=100")
    assert [row[0] for row in rows(tmp_path / "run")] == list(range(1, first + 3))
    output = pretrain(tmp_path / "run" / "config.yaml")[0]  # the resolved config reads back as the same run
    assert "raise training.tokens" in " ".join(output.split())


def test_megatrons_order_is_that_of_the_steps(config, tmp_path):
    order = "data.order=megatron"
    epochs = resolve_epochs(load_config(config, [order]))
    steps = load_config(config, [order, f"training.steps={epochs.steps}"])
    ours, theirs = (open_data(each).training for each in (epochs, steps))
    assert ours.samples == theirs.samples == epochs.steps * BATCH
    assert (ours.batch(range(16)) == theirs.batch(range(16))).all()
    assert epochs.sample_order == steps.sample_order


@pytest.mark.parametrize("order", ["keyed", "megatron"])
def test_as_many_epochs_as_are_allowed_are_not_too_many(tmp_path, config, order):
    """Though the last step reads a little more; one epoch more is refused."""
    alone = [f"data.train=[{{path: {tmp_path / 'train'}}}]", f"data.order={order}", "data.max_epochs=3"]
    for epochs in (3, 2.5):
        loaded = resolve_epochs(load_config(config, [*alone, f"training.epochs={epochs}"]))
        assert loaded.steps * BATCH > epochs * ((IndexedDataset(tmp_path / "train").tokens.size - 1) // LENGTH)
        check_max_epochs(loaded, open_data(loaded))
    loaded = resolve_epochs(load_config(config, [*alone, "training.epochs=4"]))
    with pytest.raises(LaunchError, match=r"passed over 4\.00 times, more than data\.max_epochs 3"):
        check_max_epochs(loaded, open_data(loaded))


def test_steps_that_epochs_do_not_make_are_refused(config, tmp_path):
    loaded = resolve_epochs(load_config(config))
    assert resolve_epochs(loaded) == loaded
    with pytest.raises(LaunchError, match=r"training\.steps: is 3, but training\.epochs 0\.5 make \d+ of \d+ samples"):
        resolve_epochs(loaded.with_steps(3))


def test_a_missing_or_short_source_is_one_message(config, tmp_path):
    (output,) = pretrain(config, f"data.train.1.path={tmp_path / 'nowhere'}", codes=(2,))
    assert "nowhere.idx" in output and output.count("error:") == 1 and "Traceback" not in output
    with pytest.raises(LaunchError, match=r"train\.bin: .* tokens, but one sample of sequence length"):
        resolve_epochs(load_config(config, ["model.max_sequence_length=4096"]))


def test_a_dry_run_and_an_inspection_know_the_steps_where_the_data_is(config, tmp_path):
    steps = resolve_epochs(load_config(config)).steps
    done = forked_python("-m", "megachiar.pretrain", "--config", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"steps: {steps}\n" in done.stdout and "epochs: 0.5" in done.stdout
    assert f"{steps * BATCH * LENGTH:,} in {steps} steps, from training.epochs 0.5" in done.stdout
    done = forked_python("-m", "megachiar", "inspect", "--config", config, "--step", str(steps), "--json")
    assert done.returncode == 0, done.stderr
    sets = ["--set", f"data.train.0.path={tmp_path / 'elsewhere'}"]
    done = forked_python("-m", "megachiar.pretrain", "--config", config, "--dry-run", *sets)
    assert done.returncode == 0, done.stderr
    assert "0.5 epochs of data.train, which is not on this machine" in done.stdout and "steps: null" in done.stdout
