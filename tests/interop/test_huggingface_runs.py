"""A run goes to transformers and back: the tools of the library work with it, and what comes back is the run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_runs import TEXTS, library, tokenizer_file, write_run
from support import pretrain, write_config, write_tokens

from megachiar.checkpoint.reading import locate_checkpoint, read_weights
from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.inference.loading import load_for_inference
from megachiar.interop import huggingface_export
from megachiar.interop.huggingface_export import HuggingFaceOptions, export_huggingface
from megachiar.training.metrics import read_metrics

transformers = library()
export = importlib.import_module("megachiar.cli.export")
import_ = importlib.import_module("megachiar.cli.import_")

CLASSES = ("bad", "good", "neither")
ROUTERS = {
    "threshold": {"router": {"tau": 0.79}},
    "share": {"router": {"tau": 0.79, "target_share": 0.4}, "norm": "pre"},
    "learned": {"router": {"kind": "learned", "target_share": 0.4}},
    "three": {
        "router": {"operators": ["dct", "rbf", "attention"], "tau_low": 0.77, "tau_high": 0.82},
        "attention": {"keys": "routed"},
    },
    "hard": {"router": {"kind": "hard"}, "meta_router": {"pool": "none"}},
    "random": {"router": {"kind": "random", "attention_share": 0.4}},
    "baseline": {"kind": "baseline", "router": {}, "norm": "pre", "embedding_multiplier": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def spoken(folder) -> tuple[Path, Path]:
    """A run with a SentencePiece tokenizer, and its export in several files."""
    run = write_run(folder / "spoken", tokenizer_file(folder, "sentencepiece"))
    export.main([str(run), "--to", "hf", "--output", str(folder / "out"), "--shard-size", "0.0001", "--license", "mit"])
    return run, folder / "out"


def exported(run: Path, output: Path, **options) -> huggingface_export.HuggingFaceReport:
    report = export_huggingface(locate_checkpoint(run), output, HuggingFaceOptions(**options))
    assert report is not None
    return report


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(locate_checkpoint(run))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, second[name]), name


def test_an_export_has_the_files_of_the_library(spoken):
    _, output = spoken
    names = {path.name for path in output.iterdir()}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} <= names
    assert {"config.json", "generation_config.json", "modeling_chiar.py", "tokenizer_config.json"} <= names
    card = (output / "README.md").read_text()
    assert "license: mit" in card and "validation, valid | loss 3.2500, perplexity 25.79" in card
    assert "12,345 tokens" in card and str(output.parent) not in card + (output / "config.json").read_text()
    imported = [line for line in (output / "modeling_chiar.py").read_text().splitlines() if "import" in line]
    assert not any("megachiar" in line for line in imported if line.startswith(("import", "from")))


def test_the_pipeline_and_the_tokenizer_continue_a_text_as_the_run_does(spoken):
    from megachiar.inference.loaded_run import TextSampler

    run, output = spoken
    config, ours, _ = load_for_inference(run)
    sampler = TextSampler(locate_checkpoint(run), config, ours)
    pipe = transformers.pipeline("text-generation", model=str(output), trust_remote_code=True, device="cpu")
    assert pipe.tokenizer.padding_side == "left"
    for text in TEXTS:
        assert pipe.tokenizer(text)["input_ids"] == list(sampler.tokenizer.encode(text))
        expected, new = sampler(text, 12, temperature=0.0)
        found = pipe(text, max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert found == expected and new
    together = pipe(list(TEXTS), max_new_tokens=12, do_sample=False, batch_size=3)
    assert [item[0]["generated_text"] for item in together] == [sampler(text, 12, temperature=0.0)[0] for text in TEXTS]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_control_string_stays_text(kind, folder, tmp_path):
    run = write_run(tmp_path / "run", tokenizer_file(folder, kind))
    exported(run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    end = tokenizer.eos_token
    assert tokenizer.eos_token_id not in tokenizer(f"a {end} b {end}")["input_ids"]
    text = f"Über {end} 12 x\n\n  y"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_text_begins_with_the_token_that_documents_begin_with(kind, folder, tmp_path):
    from megachiar.inference.loaded_run import TextSampler

    run = write_run(tmp_path / "run", tokenizer_file(folder, kind), prepend_bos=True)
    exported(run, tmp_path / "out")
    config, ours, _ = load_for_inference(run)
    sampler = TextSampler(locate_checkpoint(run), config, ours)
    assert sampler.tokenizer.bos_id is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("jumps")["input_ids"] == sampler.start(list(sampler.tokenizer.encode("jumps")))
    pipe = transformers.pipeline("text-generation", model=str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    found = pipe("jumps over", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert found == sampler("jumps over", 8, temperature=0.0)[0]


@pytest.mark.parametrize("name", ROUTERS)
def test_a_run_comes_back_bit_for_bit(name, tmp_path, capsys):
    run = write_run(tmp_path / "run", model=ROUTERS[name])
    report = exported(run, tmp_path / "out")
    assert report.largest_difference < 1e-8
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert "fp32" not in capsys.readouterr().out
    assert_same_weights(run, tmp_path / "back")
    before, after = (load_config(path / "config.yaml") for path in (run, tmp_path / "back"))
    assert (before.model, before.task, before.optimizer) == (after.model, after.task, after.optimizer)
    assert before.training == after.training and before.sequence_length == after.sequence_length


def test_a_run_that_is_evaluated_comes_back_without_its_data_or_with_other_data(folder, tmp_path, capsys):
    validation = {"valid": str(tmp_path / "valid")}
    run = write_run(tmp_path / "run", training={"evaluate_every": 3}, data={"validation": validation})
    exported(run, tmp_path / "out")
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert "training.evaluate_every, 3 in the run, is left out" in capsys.readouterr().out
    assert load_config(tmp_path / "back" / "config.yaml").training.evaluate_every is None
    other = ["--set", f"data.validation.other={tmp_path / 'other'}"]
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "evaluated"), *other])
    assert "left out" not in capsys.readouterr().out
    assert load_config(tmp_path / "evaluated" / "config.yaml").training.evaluate_every == 3


def test_documents_that_keep_apart_do_so_in_the_library(folder, tmp_path):
    for name in ("threshold", "random", "baseline"):
        run = write_run(tmp_path / name, model=ROUTERS[name], document_mask=True)
        exported(run, tmp_path / f"{name}_out")
        import_.main([str(tmp_path / f"{name}_out"), "--output", str(tmp_path / f"{name}_back")])
        assert load_config(tmp_path / f"{name}_back" / "config.yaml").document_end == 2


def test_the_same_import_does_nothing_and_keeps_the_tokenizer(spoken, tmp_path, capsys):
    run, output = spoken
    words = [str(output), "--output", str(tmp_path / "back"), "--json"]
    import_.main(words)
    import_.main(words)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["written"] and not second["written"] and first["perplexity"] == pytest.approx(25.79, abs=0.01)
    record = "tokenizer_record.json"
    assert (tmp_path / "back" / record).read_text() == (run / record).read_text()
    with pytest.raises(UserError, match="holds another import"):
        import_.main([*words, "--set", "optimizer.learning_rate=1"])
    with pytest.raises(UserError, match="--tau: is for a checkpoint of the published code"):
        import_.main([*words, "--tau", "0.5"])


def further(folder: Path, start: Path, name: str) -> dict:
    """Return a config that trains a small model from ``start``."""
    model = load_config(start / "config.yaml").model.model_dump(mode="json")
    return {
        "model": model,
        "data": {"train": [{"path": str(folder / "train")}], "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 4, "threads": 1},
        "checkpoint": {"load_from": str(start), "load": "weights"},
        "logging": {"folder": str(folder / name), "every": 1, "tensorboard": False},
    }


def test_training_from_what_came_back_gives_the_losses_of_the_run_itself(tmp_path):
    run = write_run(tmp_path / "run", model=ROUTERS["share"])
    exported(run, tmp_path / "out")
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    write_tokens(tmp_path / "train", vocab_size=200)
    losses = []
    for start, name in ((run, "before"), (tmp_path / "back", "after")):
        pretrain(write_config(tmp_path / f"{name}.yaml", further(tmp_path, start, name)))
        losses.append([line["loss"] for line in read_metrics(tmp_path / name, "train")])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_checkpoint_of_another_layout_is_exported_whole(tmp_path):
    """Two tensor-parallel ranks under ZeRO write it, and a run of two stages starts from what came back."""
    write_tokens(tmp_path / "train", vocab_size=64)
    model = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_sequence_length": 32,
        "router": {"tau": 0.79},
    }
    config = {
        "model": model,
        "data": {"train": [{"path": str(tmp_path / "train")}]},
        "parallel": {"tensor_size": 2, "sequence": True},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "threads": 1},
        "logging": {"folder": str(tmp_path / "run"), "every": 1, "tensorboard": False},
    }
    pretrain(write_config(tmp_path / "run.yaml", config), ranks=2)
    exported(tmp_path / "run", tmp_path / "out")
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert_same_weights(tmp_path / "run", tmp_path / "back")
    config |= {"parallel": {"pipeline_size": 2}, "checkpoint": {"load_from": str(tmp_path / "back")}}
    config["logging"] = {"folder": str(tmp_path / "further"), "every": 1, "tensorboard": False}
    output = pretrain(write_config(tmp_path / "further.yaml", config), ranks=2)[0]
    assert f"weights from {tmp_path / 'back'}" in output


@pytest.mark.parametrize(("padding", "head"), [("masked", "linear"), ("counted", "mlp")])
def test_a_classifier_is_one_of_the_library(padding, head, tmp_path):
    task = {"kind": "classification", "classes": 3, "padding": padding, "head": head}
    run = write_run(tmp_path / "run", classes=CLASSES, task=task, data={"sequence_length": 20})
    exported(run, tmp_path / "out")
    config, ours, _ = load_for_inference(run)
    kind = transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    generator = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(400, (4, 20), generator=generator), torch.tensor([20, 9, 1, 14])
    real = torch.arange(20) < lengths[:, None]
    with torch.no_grad():
        wanted = ours(tokens.masked_fill(~real, -1), head="main", sample_ids=torch.zeros(4, dtype=torch.int64)).logits
        on_right = theirs(tokens, attention_mask=real.long(), labels=torch.tensor([0, 2, 1, 1]))
        on_left = theirs(
            torch.stack([row.roll(20 - int(n)) for row, n in zip(tokens, lengths, strict=True)]),
            attention_mask=real.flip(1).long(),
        )
    torch.testing.assert_close(on_right.logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(on_left.logits, wanted, rtol=0, atol=1e-5)
    assert on_right.loss.isfinite()
    import_.main([str(tmp_path / "out"), "--output", str(tmp_path / "back")])
    assert_same_weights(run, tmp_path / "back")
    assert load_config(tmp_path / "back" / "config.yaml").task == config.task
    assert "AutoModelForCausalLM" not in theirs.config.auto_map


def test_a_task_of_a_mixed_run_is_exported_by_its_name(tmp_path):
    review = {"kind": "classification", "data": "data/reviews", "global_batch_size": 4, "classes": 3, "head": "mlp"}
    run = write_run(tmp_path / "run", mixed={"group_size": 4, "tasks": {"reviews": review}})
    report = exported(run, tmp_path / "text")
    assert any("reviews" in name for name in report.left_out) and any("left out" in note for note in report.notes)
    exported(run, tmp_path / "reviews", task="reviews")
    import_.main([str(tmp_path / "reviews"), "--output", str(tmp_path / "back")])
    before, after = weights_of(run), weights_of(tmp_path / "back")
    assert torch.equal(before["classifiers.reviews.output.weight"], after["classifiers.main.output.weight"])
    with pytest.raises(UserError, match=r"--task poems: the run has no such task(.|\n)*main, reviews"):
        exported(run, tmp_path / "none", task="poems")


def test_the_trainer_fine_tunes_and_its_result_comes_back(spoken, tmp_path):
    _, output = spoken
    model = transformers.AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS * 4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path / "trainer"),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:3],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert np.isfinite(trainer.train().training_loss)
    assert trainer.predict(rows[:3]).predictions.shape[::2] == (3, model.config.vocab_size)
    assert not torch.equal(before["model.embedding.weight"], model.state_dict()["model.embedding.weight"])
    model.save_pretrained(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    import_.main([str(tmp_path / "tuned"), "--output", str(tmp_path / "back")])
    _, ours, _ = load_for_inference(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=0, atol=1e-5)


def test_a_language_model_that_was_fine_tuned_to_classify_comes_back(spoken, tmp_path):
    _, output = spoken
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(output, trust_remote_code=True, num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    import_.main([str(tmp_path / "tuned"), "--output", str(tmp_path / "back")])
    config, ours, _ = load_for_inference(tmp_path / "back")
    assert config.task.classes == 3
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, head="main").logits, model.eval()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("problem", ["classes", "regression"])
def test_fine_tuning_to_classify_does_not_depend_on_the_micro_batch(problem, spoken, tmp_path):
    """The library counts the examples of all micro-batches, and leaves it to the model to divide by them."""
    _, output = spoken
    tokenizer = transformers.AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    label = (lambda n: n % 3) if problem == "classes" else (lambda n: n / 2)
    rows = [{**tokenizer(TEXTS[n % 3]), "labels": label(n)} for n in range(4)]
    kind, losses = transformers.AutoModelForSequenceClassification, []
    for size in (4, 2):
        torch.manual_seed(0)
        model = kind.from_pretrained(output, trust_remote_code=True, num_labels=3 if problem == "classes" else 1)
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                str(tmp_path / "trainer"),
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0.1
