"""Tasks measure the same numbers of a run, of its export in the harness's own model, and of a published checkpoint."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from exported_runs import VOCABULARY, library, tokenizer_file, write_run
from local_tasks import TASKS, harness, write_tasks
from published_files import long_content, long_weight, save
from support import python, run_command

from megachiar.errors import UserError
from megachiar.evaluation import harness_tasks
from megachiar.evaluation.continuations import Continuation, Ranks, score_continuations
from megachiar.evaluation.harness_tasks import TaskSettings, load_tasks
from megachiar.evaluation.measure import MeasureOptions, measure_tasks
from megachiar.inference.loading import load_for_inference

harness()
library()
evaluate = importlib.import_module("megachiar.cli.evaluate")
export = importlib.import_module("megachiar.cli.export")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A run whose SentencePiece tokenizer begins each text with a token."""
    folder = tmp_path_factory.mktemp("spoken")
    return write_run(folder / "run", tokenizer_file(folder, "sentencepiece"), prepend_bos=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A run whose texts begin with no token."""
    folder = tmp_path_factory.mktemp("bare")
    return write_run(folder / "run", tokenizer_file(folder, "huggingface"))


def ours(run: Path, tasks: Path, **settings: Any) -> dict[str, Any]:
    """Return our results of the five tasks, with samples."""
    return measure_tasks(
        run,
        TaskSettings(TASKS, tasks, **settings),
        MeasureOptions(log_samples=True),
        print,
        lambda what, done, total: None,
    )


def exported(run: Path) -> Path:
    export.main([str(run), "--to", "hf", "--output", str(run.parent / "hf")])
    return run.parent / "hf"


def rounded(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the results of each task, as the harness's table prints them; of perplexities above 100 fewer digits."""
    return {
        task: {
            key: f"{value:.4f}" if value < 100 else f"{value:.6g}"
            for key, value in measures.items()
            if isinstance(value, float)
        }
        for task, measures in results["results"].items()
    }


def replies(results: dict[str, Any]) -> list[Any]:
    """Return each reply of the model: a logarithm with whether it is greedy, a logarithm, or a text."""
    return [
        reply[0]
        for task in TASKS
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        for reply in sample["resps"]
    ]


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Assert that two results print the same numbers and have the same replies, logarithms within 1e-4."""
    assert rounded(first) == rounded(second)
    assert len(replies(first)) == len(replies(second)) > 100
    for one, other in zip(replies(first), replies(second), strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            (logprob, *greedy), (other_logprob, *other_greedy) = (
                reply if isinstance(reply, (list, tuple)) else [reply] for reply in (one, other)
            )
            assert float(logprob) == pytest.approx(float(other_logprob), abs=1e-4)
            assert [str(value) for value in greedy] == [str(value) for value in other_greedy]


def by_hf_model(folder: Path, tasks: Path) -> dict[str, Any]:
    """Return the results of the harness's own model of transformers, in this process."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=8)
    loaded = load_tasks(TaskSettings(TASKS, tasks))
    return simple_evaluate(model=model, tasks=loaded.top, task_manager=loaded.manager, log_samples=True)


def by_lm_eval(folder: Path, tasks: Path, output: Path) -> dict[str, Any]:
    """Return the results of the command of the harness."""
    done = run_command(
        Path(sys.executable).with_name("lm_eval"),
        *("run", "--model", "hf", "--tasks", ",".join(TASKS), "--include_path", tasks, "--device", "cpu"),
        *("--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32", "--batch_size", "8"),
        *("--output_path", output / "theirs.json", "--log_samples"),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = output.glob("theirs_*.json")
    results = json.loads(written.read_text())
    results["samples"] = {
        task: [json.loads(line) for line in next(output.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()]
        for task in TASKS
    }
    return results


def test_measures_are_those_of_the_exported_model(spoken, tasks):
    results = ours(spoken, tasks)
    assert set(results["results"]) == set(TASKS) and results["config"]["step"] == 7
    assert_same(results, by_hf_model(exported(spoken), tasks))


@pytest.mark.slow
@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_measures_are_those_of_the_command_lm_eval(kind, prepend_bos, tasks, tmp_path):
    run = write_run(tmp_path / "run", tokenizer_file(tmp_path, kind), prepend_bos=prepend_bos)
    output = tmp_path / "ours.json"
    done = python(
        *("-m", "megachiar", "evaluate", run, "--tasks", ",".join(TASKS), "--include-path", tasks),
        *("--output", output, "--log-samples"),
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    results["samples"] = {
        task: [json.loads(line) for line in (tmp_path / f"ours_samples_{task}.jsonl").read_text().splitlines()]
        for task in TASKS
    }
    assert_same(results, by_lm_eval(exported(run), tasks, tmp_path))


@pytest.mark.slow
def test_measures_of_a_published_checkpoint_are_those_of_its_export(tasks, tmp_path):
    run = imported(tmp_path)
    assert_same(ours(run, tasks), by_lm_eval(exported(run), tasks, tmp_path))


def imported(folder: Path) -> Path:
    """Return a run that was imported from a checkpoint of the published code, of 400 ids and 256 tokens.

    It is the baseline: the published CHIAR models have the gate that sees later tokens, and are refused.
    """
    content = long_content("baseline")
    table = long_weight("token_emb.weight", (VOCABULARY, content["model"]["token_emb.weight"].shape[1]))
    content["model"] |= {"token_emb.weight": table, "lm_head.weight": table}
    content["cfg"] |= {"vocab_size": VOCABULARY}
    file = save(folder / "published.pt", content)
    tokenizer = tokenizer_file(folder, "huggingface")
    importlib.import_module("megachiar.cli.import_").main(
        [str(file), "--output", str(folder / "run"), "--tokenizer", str(tokenizer)]
    )
    return folder / "run"


def test_continuations_are_scored_as_one_by_one(spoken):
    """Long and short ones, cut ones and ones that share a row, in any batch and on any number of ranks."""
    _, model, _ = load_for_inference(spoken)
    generator = torch.Generator().manual_seed(5)
    draw = lambda count: torch.randint(4, 400, (count,), generator=generator).tolist()  # noqa: E731
    shared = draw(12)
    requests = [Continuation(draw(before), draw(after)) for before, after in ((1, 1), (30, 4), (90, 20), (2, 64))]
    requests += [Continuation(shared, [7]), Continuation(shared, [9]), Continuation(shared[:8], [*shared[8:], 7])]
    expected = []
    for context, tokens in requests:
        text = torch.tensor([*context, *tokens][-65:])
        logits = model(text[None, :-1], sample_ids=torch.zeros(1, dtype=torch.int64)).logits[0, -len(tokens) :].double()
        expected.append((-F.cross_entropy(logits, text[-len(tokens) :], reduction="sum").item(), logits))
    for batch_size in (1, 3, 8):
        scores = score_continuations(model, requests, batch_size)
        for score, (logprob, logits), (_, tokens) in zip(scores, expected, requests, strict=True):
            assert score.logprob == pytest.approx(logprob, abs=1e-4)
            assert score.is_greedy == (logits.argmax(-1).tolist() == list(tokens))
    parts: list[Any] = []
    for rank in (0, 1):  # what each rank gives to the others; it has not theirs yet
        with pytest.raises(KeyError):
            score_continuations(model, requests, 2, Ranks(rank, 2, lambda value: parts.append(value) or []))
    assert all(parts) and not parts[0].keys() & parts[1].keys()
    assert score_continuations(model, requests, 2, Ranks(0, 2, lambda value: parts)) == score_continuations(
        model, requests, 2
    )


def test_ranks_ask_together_equally_often(spoken, tasks):
    """They break an evaluation off by a sum over all of them: one that asked more often than another would hang."""
    from megachiar.data.tokenizers.tokenizer import load_tokenizer
    from megachiar.evaluation.harness_model import HarnessModel
    from megachiar.evaluation.text_model import TextModel

    config, model, _ = load_for_inference(spoken)
    text_model = TextModel("run", config, model, load_tokenizer(next((spoken / "tokenizer").glob("*.model"))))
    calls = []
    for rank in range(3):
        seen: list[int] = []
        ranks = Ranks(rank, 3, lambda value: [{number: value.get(number, "") for number in range(4)}])
        asked = HarnessModel(text_model, 1, ranks, together=seen.append)
        requests = [_Request((text, {"until": [], "max_gen_toks": 1 + 9 * count})) for count, text in enumerate("abcd")]
        asked.generate_until(requests)
        calls.append(seen)
    assert calls[0] == calls[1] == calls[2] == [0]


class _Request:
    task_name = "a"

    def __init__(self, args: tuple[Any, ...]):
        self.args = args


def test_greedy_continuations_are_known_as_such(spoken):
    _, model, _ = load_for_inference(spoken)
    context = [1, 50, 60, 70]
    text = list(context)
    for _ in range(5):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    (likeliest, other) = score_continuations(
        model, [Continuation(context, text[4:]), Continuation(context, [*text[4:8], (text[8] + 1) % 400])], 2
    )
    assert likeliest.is_greedy and not other.is_greedy


def test_the_command_prints_a_table_and_writes_results(spoken, tasks, tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ("--include-path", str(tasks), "--limit", "3", "--num-fewshot", "2", "--output", str(output))
    evaluate.main([str(spoken), "--tasks", "which_word", "which_end,say_it", *options, "--log-samples"])
    printed = capsys.readouterr()
    rows = [line.split("|") for line in printed.out.splitlines() if line.startswith("|which_end")]
    results = json.loads(output.read_text())
    assert f"{results['results']['which_end']['acc,none']:.4f}" == rows[0][7].strip()
    assert results["n-samples"]["say_it"] == {"original": 12, "effective": 3}
    assert results["n-shot"] == {"which_word": 2, "which_end": 2, "say_it": 2}
    assert len((tmp_path / "results_samples_say_it.jsonl").read_text().splitlines()) == 3
    assert "Traceback" not in printed.err and "it/s" not in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "which_end", "--data", "x"], "--data: is given with --tasks"),
        (["--include-path", "x"], "--include-path: is given without --tasks"),
        (["--tasks", "which_end", "--log-samples"], "--log-samples: is given without --output"),
        (["--tasks", "which_end", "--limit", "2.5"], "--limit 2.5: is no whole number"),
        (["--tasks", "which_end", "--output", "/no/such/x.json"], "/no/such is no folder"),
        (["--tasks", "which_end", "--include-path", "/no/such"], "/no/such: is no folder of tasks"),
        (["--tasks", "which_end", "--apply-chat-template"], "--apply-chat-template: a pretrained model has no chat"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, spoken):
    with pytest.raises(UserError) as raised:
        evaluate.main([str(spoken), *options])
    assert message in str(raised.value)


def test_an_unknown_task_is_answered_with_near_names(spoken, tasks, monkeypatch):
    from lm_eval import tasks as of_harness

    real = of_harness.TaskManager
    monkeypatch.setattr(  # the harness's own 14,000 tasks take many seconds to list
        of_harness, "TaskManager", lambda include_path, include_defaults=True: real(None, include_path, False)
    )
    with pytest.raises(UserError, match=r"--tasks which_wrd: .* no such task\n.*near names are which_word"):
        ours_of(spoken, "which_wrd", tasks)


def ours_of(run: Path, name: str, tasks: Path) -> dict[str, Any]:
    return measure_tasks(run, TaskSettings([name], tasks), MeasureOptions(), print, lambda what, done, total: None)


def test_data_that_is_not_to_be_had_is_one_message(spoken, tmp_path, monkeypatch):
    import datasets

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/riddles' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    write_tasks(tmp_path)
    with pytest.raises(UserError, match=r"--tasks say_it: its data is not on this machine.*Couldn't reach"):
        ours_of(spoken, "say_it", tmp_path)


def test_a_missing_file_of_a_task_is_one_message(spoken, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "say_it.jsonl").unlink()
    with pytest.raises(UserError, match=r"--tasks say_it: cannot be loaded: .*say_it.jsonl"):
        ours_of(spoken, "say_it", tmp_path)


def test_a_text_that_leaves_no_room_for_the_answer_is_refused(spoken, tmp_path):
    write_tasks(tmp_path)
    path = tmp_path / "say_it.yaml"
    path.write_text(path.read_text().replace("max_gen_toks: 12", "max_gen_toks: 64"))
    with pytest.raises(UserError, match=r"task say_it: max_gen_toks is 64, and the model reads 64 tokens"):
        ours_of(spoken, "say_it", tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_gen_toks: 0", "task say_it: max_gen_toks is 0, and the model reads 64 tokens"),
        ("max_gen_toks: many", "task say_it: generation_kwargs cannot be read: .*'many'"),
        ("until: [7]", "task say_it: generation_kwargs.until has 7, which is no text"),
        ("temperature: -1.0", "task say_it: generation_kwargs.temperature: -1.0 is not at least 0"),
        ("top_k: -1", "task say_it: generation_kwargs.top_k: -1 is not at least 0"),
        ("top_p: 0", "task say_it: generation_kwargs.top_p: 0 is not above 0 and at most 1"),
    ],
)
def test_settings_out_of_their_limits_are_refused(setting, message, spoken, tmp_path):
    settings = {"max_gen_toks": 12, "do_sample": True, **yaml.safe_load(setting)}
    change(write_tasks(tmp_path) / "say_it.yaml", generation_kwargs=settings)
    with pytest.raises(UserError, match=message):
        ours_of(spoken, "say_it", tmp_path)


def change(path: Path, **keys: Any) -> None:
    """Set keys of a YAML file."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}, sort_keys=False))


def test_a_top_k_of_0_takes_all_tokens_as_in_transformers(spoken, tmp_path):
    write_tasks(tmp_path)
    answers = []
    for settings in ({}, {"top_k": 0}, {"top_k": 1}):
        change(tmp_path / "say_it.yaml", generation_kwargs={"max_gen_toks": 12, "do_sample": True, **settings})
        results = measure_tasks(
            spoken, TaskSettings(["say_it"], tmp_path), MeasureOptions(log_samples=True), print, lambda *_: None
        )
        answers.append([sample["resps"] for sample in results["samples"]["say_it"]])
    assert answers[0] == answers[1] != answers[2]


def test_a_context_of_spaces_alone_follows_the_token_that_ends_texts(bare, tmp_path):
    """The harness takes spaces at the end of a context for the beginning of the continuation."""
    write_tasks(tmp_path)
    found = []
    for context, delimiter in (("   ", ""), ("", "   ")):
        change(tmp_path / "which_end.yaml", doc_to_text=context, target_delimiter=delimiter)
        results = measure_tasks(
            bare, TaskSettings(["which_end"], tmp_path), MeasureOptions(log_samples=True), print, lambda *_: None
        )
        found.append([sample["resps"] for sample in results["samples"]["which_end"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("say_it", {"unsafe_code": True}, "task say_it: is marked as unsafe: it runs the code"),
        ("which_word", {"num_fewshot": 40}, "--tasks which_word: cannot be measured: ValueError: Sample larger than"),
        ("whole_text", {"doc_to_target": ""}, "--tasks whole_text: cannot be measured: ZeroDivisionError"),
        ("last_word", {"doc_to_target": "", "target_delimiter": ""}, "task last_word: the continuation '' .* no token"),
    ],
)
def test_a_task_that_cannot_be_measured_is_one_message_that_names_it(task, keys, message, bare, tmp_path):
    change(write_tasks(tmp_path) / f"{task}.yaml", **keys)
    with pytest.raises(UserError, match=message):
        ours_of(bare, task, tmp_path)


def test_an_error_of_the_model_is_not_taken_for_one_of_the_task(bare, tasks, monkeypatch):
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("megachiar.evaluation.harness_model.score_continuations", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours_of(bare, "which_end", tasks)


def test_without_the_library_one_message_says_what_to_install(spoken, monkeypatch):
    import importlib.metadata as metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"--tasks: needs the package lm-eval.*\n.*pip install 'megachiar\[eval\]'"):
        evaluate.main([str(spoken), "--tasks", "which_end"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"kind": "classification", "classes": 2}}, "learns classes, and tasks ask for the probability"),
        ({"model": {"meta_router": {"pool": "batch"}}}, "model.meta_router.pool is batch: the gate of layer 1"),
    ],
)
def test_models_that_cannot_be_asked_are_refused(sections, message, tasks, tmp_path):
    classes = ("no", "yes") if "task" in sections else None
    run = write_run(tmp_path / "run", tokenizer_file(tmp_path, "huggingface"), classes, **sections)
    with pytest.raises(UserError, match=message):
        ours_of(run, "which_end", tasks)


def test_sampled_answers_are_the_same_each_time(spoken, tmp_path):
    write_tasks(tmp_path)
    path = tmp_path / "say_it.yaml"
    path.write_text(path.read_text().replace("do_sample: false", "do_sample: true\n  temperature: 1.0"))
    settings, options = TaskSettings(["say_it"], tmp_path), MeasureOptions(log_samples=True)
    first, second = (
        [
            sample["resps"]
            for sample in measure_tasks(spoken, settings, options, print, lambda *_: None)["samples"]["say_it"]
        ]
        for _ in range(2)
    )
    assert first == second and len({str(reply) for reply in first}) > 4


def test_the_names_of_missing_data_are_those_of_the_libraries():
    """``_MEANS_NO_DATA`` names exceptions, so that the libraries need not be imported to look for them."""
    import datasets.exceptions
    import huggingface_hub.errors

    places = (datasets.exceptions, huggingface_hub.errors, __builtins__)
    for name in harness_tasks._MEANS_NO_DATA:
        assert any(hasattr(place, name) or (isinstance(place, dict) and name in place) for place in places), name
