"""A classification is measured on its examples as training reads them, or the command refuses it and says why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled import write_examples
from support import forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.analysis.windows import spread_windows
from megachiar.config import RunConfig
from megachiar.data.sampling.examples import ExampleSet, LabelledSource
from megachiar.inference.loading import load_for_inference
from megachiar.model import ChiarFormer, build_model

LENGTH, EXAMPLES = 16, 120
"""Some of the examples are cut, and most are padded."""
LARGEST_ID = {"masked": 0.08, "counted": 0.35}
"""The largest share of the tokens that have one id; where padding counts, that is 0."""


@pytest.fixture(scope="module", params=["masked", "counted"])
def run(request, tmp_path_factory) -> Path:
    """The folder of a classification that has taken two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    examples = write_examples(folder / "examples", EXAMPLES, vocab_size=16, longest=24)
    write_tokens(folder / "text")
    config = small_config(
        folder,
        data={"train": [{"path": str(examples)}], "validation": {}, "sequence_length": LENGTH},
        task={"kind": "classification", "classes": 3, "padding": request.param},
        training={"steps": 2, "global_batch_size": 8, "micro_batch_size": 8},
    )
    pretrain(write_config(folder / "config.yaml", config))
    return folder / "run"


def examples_of(run: Path) -> ExampleSet:
    return ExampleSet(LabelledSource(run.parent / "examples", 3), LENGTH, task=0)


def tokens_that_count(config: RunConfig, dataset: ExampleSet) -> int:
    lengths = np.minimum(np.array(dataset.source.dataset.lengths), LENGTH)
    return int(lengths.sum()) if config.task.padding == "masked" else LENGTH * dataset.windows


def read_all(model: ChiarFormer, dataset: ExampleSet) -> torch.Tensor:
    """Return the attention share of each layer over all examples, as the log of training has it."""
    with torch.no_grad():
        inputs, labels, numbers = map(torch.from_numpy, spread_windows(dataset, EXAMPLES))
        return model(inputs, labels, numbers, head="main").statistics.attention_share


def command(*words: object) -> tuple[dict, str]:
    """Return the record that a command prints, and what it says on standard error, in one line."""
    done = forked_python("-m", "megachiar", *map(str, words), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), " ".join(done.stderr.split())


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_thresholds_of_layers_give_the_share_on_examples(run, share):
    found, said = command("calibrate", run, "--where", "layers", "--attention-share", share, "--sequences", EXAMPLES)
    config, trained, _ = load_for_inference(run)
    router = type(config.model.router)(**found["router"])
    model = build_model(config.model.model_copy(update={"router": router}), seed=0, heads=config.heads).eval()
    model.load_state_dict(trained.state_dict(), strict=False)
    dataset = examples_of(run)
    count = tokens_that_count(config, dataset)
    assert [place["tokens"] for place in found["places"]] == [count] * len(config.model.routed_layers)
    shares = read_all(model, dataset)[1:-1]
    told = [place["attention_share"] for place in found["places"]]
    assert shares.tolist() == pytest.approx(told, abs=1e-6)
    # 16 ids have few values of H, and half of the tokens of one id is the most that a threshold misses.
    assert shares.tolist() == pytest.approx([share] * len(shares), abs=0.5 * LARGEST_ID[config.task.padding])
    assert ("no threshold divides them" in said) == (max(abs(each - share) for each in told) > 0.01)


def test_the_embedding_is_counted_as_often_as_examples_have_tokens(run):
    (place,) = command("calibrate", run)[0]["places"]
    config, dataset = load_for_inference(run)[0], examples_of(run)
    assert place["tokens"] == tokens_that_count(config, dataset)


def test_flips_are_those_of_the_tokens_of_examples(run):
    config, dataset = load_for_inference(run)[0], examples_of(run)
    found, _ = command("flips", run, "--sequences", EXAMPLES)
    assert {layer["tokens"] for layer in found["layers"]} == {tokens_that_count(config, dataset)}


def test_data_without_labels_are_refused(run):
    for words in (["calibrate", run, "--where", "layers"], ["calibrate", run], ["flips", run]):
        done = forked_python("-m", "megachiar", *map(str, words), "--data", run.parent / "text")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "make a labelled dataset with" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ["analyze-routing", "RUN"],
        ["long-range", "RUN", "--data", "TEXT"],
        ["generate", "RUN", "--prompt", "a"],
        ["routes", "RUN", "--text", "a"],
    ],
    ids=lambda words: words[0],
)
def test_commands_for_text_refuse_a_classification(words, run):
    places = {"RUN": str(run), "TEXT": str(run.parent / "text")}
    done = forked_python("-m", "megachiar", *(places.get(word, word) for word in words))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "learns classes" in " ".join(done.stderr.split())
