"""A run that is open shows the routes that it takes, also those of a text that it continues token by token."""

from __future__ import annotations

import threading

import pytest
import torch
from routed_runs import TEXT, make_run

from megachiar.analysis.route_trace import record_routes
from megachiar.errors import UserError
from megachiar.viewer.open_run import open_run

SAMPLING = {"temperature": 0.9, "top_k": None, "top_p": None, "seed": 4}


def silent(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder / "run", log=silent)


def continued(run, prompt, count, **sampling):
    return list(run.continue_text(prompt, count, **(SAMPLING | sampling)))


def ids_of(record) -> list[int]:
    return [token["id"] for token in record["tokens"]]


def test_a_step_can_be_chosen(folder):
    assert open_run(folder / "run", log=silent).state.step == 2
    first = open_run(folder / "run", 1, log=silent)
    assert first.state.step == 1
    checkpoint = folder / "run" / "checkpoints" / "step_00000001"
    assert open_run(checkpoint, 1, log=silent).state.step == 1
    newest = open_run(folder / "run", 2, log=silent)
    assert not torch.equal(first.model.embedding.weight, newest.model.embedding.weight)


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [
        ("run", 7, r"--step 7: .*run has no checkpoint of this step\n.*it has 1, 2"),
        ("run/checkpoints/step_00000001", 2, "is one checkpoint, of another step"),
        ("nothing", 2, "no such folder"),
    ],
)
def test_a_step_that_is_not_there_is_said_with_those_that_are(folder, path, step, message):
    with pytest.raises(UserError, match=message):
        open_run(folder / path, step, log=silent)


@pytest.mark.parametrize("text", ["", "\udcff"])
def test_what_is_no_text_is_refused(run, text):
    with pytest.raises(UserError, match=r"--text: (has no tokens|has bytes that are no UTF-8)"):
        run.encode(text, "--text")


def test_a_continuation_is_what_generate_draws_with_the_routes_of_a_plain_pass(run):
    prompt = run.encode("the quick brown", "--text")
    first, *tokens, last = continued(run, prompt, 9)
    _, drawn = run.sampler("the quick brown", 9, **SAMPLING)
    assert ids_of(first["record"]) == prompt
    assert [event["token"]["id"] for event in tokens] == drawn and len(drawn) == 9
    record = last["record"]
    assert ids_of(record) == [*prompt, *drawn] and record["prompt_tokens"] == len(prompt)
    plain = run.record(run.routes([*prompt, *drawn]))
    for shown, other in zip(record["tokens"], plain["tokens"], strict=True):
        assert shown["operator"] == other["operator"] and shown["class"] == other["class"]
        assert shown["entropy"] == pytest.approx(other["entropy"], abs=1e-6)
        assert shown["loss"] == other["loss"]
    for event, shown in zip(tokens, record["tokens"][len(prompt) :], strict=True):
        same = ("id", "text", "operator", "entropy", "meta_gate", "gates")
        assert [event["token"][key] for key in same] == [shown[key] for key in same]


def test_routes_past_the_longest_sequence_are_those_of_the_passes(run):
    """The model reads the last half again; each token has the routes of the pass in which it was first read."""
    prompt = run.encode(TEXT, "--text")
    with record_routes(run.model) as passes:
        run.sampler(TEXT, 40, **SAMPLING)
    record = continued(run, prompt, 40)[-1]["record"]
    new = record["tokens"][len(prompt) :]
    assert len(new) == 40
    expected = [each.operator[:, 0, -1].tolist() for each in passes[1:]]  # the last token is read by no pass there
    assert [token["operator"] for token in new[:-1]] == expected
    assert sum(each.operator.shape[2] > 1 for each in passes) > 1, "it was read again"
    kept = [place for window in record["windows"] for place in range(window["kept"], window["stop"])]
    assert kept == list(range(len(record["tokens"])))
    assert all(window["stop"] - window["start"] <= 32 for window in record["windows"])


def test_the_end_of_a_document_ends_the_text(run, monkeypatch):
    prompt = run.encode("the quick", "--text")
    drawn = run.sampler("the quick", 12, **SAMPLING)[1]
    place = next(place for place in range(3, 12) if drawn[place] not in drawn[:place])
    monkeypatch.setattr(run.sampler, "end", drawn[place])
    _, *tokens, last = continued(run, prompt, 12)
    assert [event["token"]["id"] for event in tokens] == drawn[:place]
    assert ids_of(last["record"]) == [*prompt, *drawn[:place]]


def test_an_empty_prompt_begins_a_document(run):
    first, *tokens, last = continued(run, [], 3)
    assert ids_of(first["record"]) == [run.sampler.end] and first["record"]["tokens"][0]["class"] == "control"
    assert len(tokens) == 3 and len(last["record"]["tokens"]) == 4


def test_threads_get_the_same_as_one_after_another(run):
    prompts = [run.encode(text, "--text") for text in ("the old ships", "a lazy dog", "12 foxes jump")]
    alone = [continued(run, prompt, 12, seed=seed) for seed, prompt in enumerate(prompts)]
    together: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda s=seed, p=prompt: together.update({s: continued(run, p, 12, seed=s)}))
        for seed, prompt in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(3)] == alone


def test_a_gate_over_the_batch_reads_the_text_anew_for_each_token(folder):
    run = open_run(make_run(folder, name="batch", meta_router={"pool": "batch"}), log=silent)
    prompt = run.encode("the quick", "--text")
    drawn = run.sampler("the quick", 6, **SAMPLING)[1]
    record = continued(run, prompt, 6)[-1]["record"]
    assert ids_of(record) == [*prompt, *drawn] and len(drawn) == 6
    for count, shown in enumerate(record["tokens"][len(prompt) :], len(prompt) + 1):
        then = run.record(run.routes(ids_of(record)[:count]))["tokens"][-1]
        assert shown["operator"] == then["operator"]
        assert shown["entropy"] == pytest.approx(then["entropy"], abs=1e-6)
