"""What a dataset's manifest says of its tokenizer holds wherever the dataset or a run on it is read.

The tokenizer here can be guessed wrongly in every way: its folder holds a tokenizer.json too, no token of it is known
to end documents, and there are holes among its ids, which end below the model's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import indexed_oracle as oracle
import pytest
import torch
from support import forked_python, pretrain, replace_in_config, small_config, write_config
from text_helpers import train, write_jsonl

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.data.storage.files import manifest_path
from megachiar.data.storage.manifest import read_manifest, write_manifest
from megachiar.data.tokenizers.recorded import keep_tokenizer, load_as_recorded, read_kept_record
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError
from megachiar.inference.generation import generate
from megachiar.inference.loaded_run import TextSampler
from megachiar.inference.loading import load_for_inference
from megachiar.training.run_tokenizer import run_tokenizer

END = "~"
KIND = ("--tokenizer-kind", "gpt2", "--eod-token", END)
VOCABULARY = 384


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE without control tokens, as tokenizer.json and, with holes, as GPT-2's files."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the fox", "a dog"] * 5, vocab_size=270, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    moved = {token: index + 20 * (index > 200) for token, index in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(moved))
    return folder


def tool(name: str, *arguments: object, code: int = 0) -> str:
    done = forked_python(f"tools/{name}.py", *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr + done.stdout
    return done.stdout if code == 0 else " ".join(done.stderr.split())


def preprocess(prefix: Path, texts: list[str], tokenizer: Path, *arguments: str) -> Path:
    corpus = write_jsonl(prefix.with_suffix(".jsonl"), texts)
    arguments = ("--tokenizer", tokenizer, *arguments, "--append-eod", "--workers", "1", "--output-prefix", prefix)
    tool("preprocess_data", "--input", corpus, *arguments)
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run on documents of few tokens, so that it soon learns to end them; ``alien``: of another tokenizer."""
    folder = tmp_path_factory.mktemp("recorded")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for name in ("train", "valid"):
        preprocess(folder / name, ["the fox", "a dog"] * 150, tokenizer, *KIND)
    preprocess(folder / "alien", ["the fox", "a dog"] * 150, tokenizer, *KIND[:1], "huggingface", "--eod-token", "!")
    config = small_config(folder, training={"steps": 80}, optimizer={"learning_rate": 1e-2})
    config["model"] |= {"vocab_size": VOCABULARY, "norm": "pre"}
    pretrain(write_config(folder / "config.yaml", config))
    return folder


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A copy of the run folder, far from its data and tokenizer, which cannot be reached from it."""
    shutil.copytree(folder / "run", tmp_path / "run")
    forget(tmp_path / "run", folder)
    return tmp_path / "run"


def forget(run: Path, folder: Path) -> None:
    """Let the configs of a run name its data where there is nothing."""
    for checkpoint in run.glob("checkpoints/step_*"):
        replace_in_config(checkpoint, str(folder), "/nowhere")


def end_of(folder: Path) -> int:
    return load_tokenizer(folder / "tokenizer", "gpt2").encode(END)[0]


def test_the_run_folder_keeps_what_the_manifest_says(folder):
    record, kept = read_manifest(folder / "train").tokenizer, read_kept_record(folder / "run")
    assert record.kind == "gpt2" and record.eod_id == end_of(folder)
    assert kept == replace(record, file="tokenizer/tokenizer")
    assert {path.name for path in (folder / "run" / kept.file).iterdir()} == {"vocab.json", "merges.txt"}


def test_a_run_ends_its_texts_with_the_token_it_was_trained_with(folder, run):
    for place in (folder / "run", run):
        sampling = ("--num-samples", 3, "--temperature", 0.2, "--json")
        samples = tool("generate", place, "--prompt", "the", *sampling).splitlines()
        assert {json.loads(line)["text"] for line in samples} == {"the fox"}


def test_an_empty_prompt_begins_a_document(folder, run):
    assert load_tokenizer(folder / "tokenizer", "gpt2").eod_id is None
    (sample,) = tool("generate", run, "--json", "--temperature", 0, "--max-new-tokens", 4).splitlines()
    assert json.loads(sample)["text"] in ("the fox", "a dog")


def test_ids_without_a_token_are_never_sampled(folder, run):
    """As good as uniform sampling, of a model with 384 ids of which the tokenizer has 270."""
    config, model, _ = load_for_inference(run)
    sampler = TextSampler(locate_checkpoint(run), config, model)
    sampler.end = None
    known = set(sampler.tokenizer.known_ids())
    assert len(known) < sampler.tokenizer.vocab_size < VOCABULARY
    _, new = sampler("the", 400, temperature=1e4)
    assert len(new) == 400 and set(new) <= known
    free = generate(model, [1], 400, temperature=1e4)
    assert not set(free) <= known and max(free) >= sampler.tokenizer.vocab_size, "or this test shows nothing"


@pytest.mark.parametrize("temperature", (0, 1))
def test_an_id_without_a_token_is_not_sampled_even_if_it_is_the_likeliest(folder, run, temperature):
    config, model, _ = load_for_inference(run)
    sampler = TextSampler(locate_checkpoint(run), config, model)
    unknown = sorted(set(range(VOCABULARY)) - set(sampler.tokenizer.known_ids()))
    with torch.no_grad():
        model.embedding.weight[unknown] = 100 * model.norm.weight + 100 * model.norm.bias
    for top in ({}, {"top_k": 3}, {"top_p": 0.5}):
        _, new = sampler("the", 20, temperature=temperature, **top)
        assert not set(new) & set(unknown)


def test_a_padded_sentencepiece_vocabulary_is_sampled_from(tmp_path):
    """The library ends the process with an error where an id is beyond its vocabulary."""
    tokenizer = train(tmp_path, "sentencepiece", 320)
    preprocess(tmp_path / "train", ["the quick brown fox"] * 40, tokenizer)
    config = small_config(tmp_path, training={"steps": 1}, data={"validation": {}})
    config["model"] |= {"vocab_size": 1024}
    pretrain(write_config(tmp_path / "config.yaml", config))
    sampled = tool("generate", tmp_path / "run", "--prompt", "the", "--temperature", 100, "--max-new-tokens", 100)
    assert sampled.startswith("the")


def test_an_older_run_folder_is_read_by_the_manifest_or_as_it_was(folder, run):
    """One without a record: while its data is there that tells, afterwards the names of the files do."""
    older = run.parent / "older"
    shutil.copytree(folder / "run", older)
    for place in (older, run):
        (place / "tokenizer_record.json").unlink()
    config = load_for_inference(older)[0]
    assert run_tokenizer(locate_checkpoint(older), config).eod_id == end_of(folder)
    forgotten = run_tokenizer(locate_checkpoint(run), load_for_inference(run)[0])
    assert (forgotten.kind, forgotten.eod_id) == ("gpt2", None)
    # What a manifest says of another tokenizer by now does not touch the copy that is kept.
    shutil.copytree(older, run.parent / "moved")
    for checkpoint in (run.parent / "moved").glob("checkpoints/step_*"):
        replace_in_config(checkpoint, f"{folder}/train", f"{folder}/alien")
    assert run_tokenizer(locate_checkpoint(run.parent / "moved"), config).fingerprint == forgotten.fingerprint


def test_a_kept_copy_that_was_changed_or_is_lost_is_named(folder, run):
    kept = run / "tokenizer" / "tokenizer"
    (kept / "merges.txt").write_text("#version: 0.2\n")
    assert "tokenizer_record.json: made with the gpt2 tokenizer" in tool("generate", run, "--prompt", "a", code=2)
    (kept / "merges.txt").unlink()
    assert "merges.txt" in tool("generate", run, "--prompt", "a", code=2)
    shutil.rmtree(kept)
    assert "no tokenizer of this run was found" in tool("generate", run, "--prompt", "a", code=2)
    (run / "tokenizer_record.json").write_text('{"kind": 3}')
    assert "is no record of a tokenizer: kind" in tool("generate", run, "--prompt", "a", code=2)


@pytest.mark.parametrize("name", ("evaluate", "calibrate_tau", "routing_flips", "analyze_routing"))
def test_a_dataset_of_another_tokenizer_is_not_measured(folder, run, name):
    for place in (folder / "run", run):
        refused = tool(name, place, "--data", folder / "alien", code=2)
        assert "alien.json: made with tokenizer" in refused and "the run's tokenizer" in refused
        if name != "analyze_routing":  # it needs more windows than this text has
            tool(name, place, "--data", folder / "valid")


def test_a_run_does_not_go_on_with_data_of_another_tokenizer(folder, run):
    config = folder / "config.yaml"
    data = [f"data.train=[{{path: {folder / 'alien'}}}]", "data.validation={}", "data.on_change=continue"]
    sets = [*data, f"logging.folder={run}", "training.steps=81"]
    refused = " ".join(pretrain(config, *sets, codes=(2,))[0].split())
    assert "tokenizer_record.json: the run was trained with tokenizer" in refused and refused.count("error:") == 1


def test_weights_of_another_tokenizer_are_named(folder, tmp_path):
    sets = [f"logging.folder={tmp_path}", "training.steps=1", f"checkpoint.load_from={folder / 'run'}"]
    text = "was trained with another tokenizer"
    assert text not in " ".join(pretrain(folder / "config.yaml", *sets)[0].split())
    shutil.rmtree(tmp_path)
    alien = [f"data.train=[{{path: {folder / 'alien'}}}]", "data.validation={}"]
    assert text in " ".join(pretrain(folder / "config.yaml", *sets, *alien)[0].split())


def test_inspection_reads_kind_and_end_from_the_manifest(folder):
    def shown(*arguments: object) -> str:
        return json.loads(tool("inspect_dataset", *arguments, "--json"))["shown"]["text"]

    assert shown(folder / "train", "--document", 0) == "the fox"
    assert shown(folder / "train", "--document", 0, "--tokenizer", folder / "tokenizer") == "the fox"
    step = ("--config", folder / "config.yaml", "--step", 1, "--json")
    for tokenizer in ((), ("--tokenizer", folder / "tokenizer")):
        assert "the foxa dog" in json.loads(tool("inspect_dataset", *step, *tokenizer))["samples"][0]["text"]


def test_a_merge_keeps_the_record(folder, tmp_path):
    tool("merge_datasets", folder / "train", folder / "valid", "--output", tmp_path / "whole")
    merged = read_manifest(tmp_path / "whole").tokenizer
    assert merged == replace(read_manifest(folder / "train").tokenizer, file=str(folder / "tokenizer"))
    sets = [f"data.train=[{{path: {tmp_path / 'whole'}}}]", "training.steps=1", f"logging.folder={tmp_path / 'run'}"]
    pretrain(folder / "config.yaml", *sets)
    assert read_kept_record(tmp_path / "run").eod_id == end_of(folder)


def test_a_manifest_behind_the_first_source_tells_the_tokenizer(folder, tmp_path):
    """The first source is Megatron's, without a manifest."""
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"train{suffix}", tmp_path / f"bare{suffix}")
    train = f"data.train=[{{path: {tmp_path / 'bare'}}}, {{path: {folder / 'train'}}}]"
    pretrain(folder / "config.yaml", train, "training.steps=1", f"logging.folder={tmp_path / 'run'}")
    assert read_kept_record(tmp_path / "run").kind == "gpt2"


def test_a_source_without_ends_does_not_tell_which_token_ends_a_document(folder, tmp_path):
    """Its manifest has the tokenizer's own end, which nothing was trained on."""
    corpus = write_jsonl(tmp_path / "endless.jsonl", ["the fox", "a dog"] * 150)
    arguments = ("--tokenizer", folder / "tokenizer", *KIND[:2], "--eod-token", "!", "--workers", "1")
    tool("preprocess_data", "--input", corpus, *arguments, "--output-prefix", tmp_path / "endless")
    assert read_manifest(tmp_path / "endless").tokenizer.eod_id != end_of(folder)
    for number, names in enumerate(
        ((tmp_path / "endless", folder / "train"), (folder / "train", tmp_path / "endless"))
    ):
        train = "data.train=[" + ", ".join(f"{{path: {name}}}" for name in names) + "]"
        run = tmp_path / f"run{number}"
        pretrain(folder / "config.yaml", train, "training.steps=1", f"logging.folder={run}")
        assert read_kept_record(run).eod_id == end_of(folder)


def test_a_tokenizer_that_is_gone_is_recorded_until_it_is_put_back(folder, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"train{suffix}", tmp_path / f"train{suffix}")
    run, data = tmp_path / "run", f"data.train=[{{path: {tmp_path / 'train'}}}]"
    sets = [data, "data.validation={}", f"logging.folder={run}"]
    output = " ".join(pretrain(folder / "config.yaml", *sets, "training.steps=1")[0].split())
    assert "no tokenizer is known (tokenizer of the manifest is gone)" in output
    assert "no tokenizer of this run was found" in tool("generate", run, code=2)
    shutil.copytree(folder / "tokenizer", run / "tokenizer" / "tokenizer")
    pretrain(folder / "config.yaml", *sets, "training.steps=2")
    assert json.loads(tool("generate", run, "--json"))["prompt"] == ""
    assert read_kept_record(run).eod_id == end_of(folder)


def test_a_record_without_an_end_takes_the_tokenizers_own(tmp_path):
    tokenizer = load_tokenizer(train(tmp_path, "huggingface"))
    prefix = oracle.write(tmp_path / "a", [[[1, 2, 3]]])
    manifest = oracle.make_manifest(prefix, kind="huggingface", fingerprint=tokenizer.fingerprint, eod_id=None)
    write_manifest(prefix, manifest)
    read = json.loads(manifest_path(prefix).read_text())
    del read["tokenizer"]["eod_id"], read["seal"]
    manifest_path(prefix).write_text(json.dumps(read))
    found = load_as_recorded(tokenizer.path, read_manifest(prefix).tokenizer, manifest_path(prefix))
    assert found.eod_id == tokenizer.eod_id is not None


def test_another_tokenizer_than_the_recorded_is_refused(folder, tmp_path):
    record, where = read_manifest(folder / "train").tokenizer, manifest_path(folder / "train")
    assert load_as_recorded(folder / "tokenizer", record, where).eod_id == record.eod_id
    with pytest.raises(UserError, match=r"but the one given is none: .*needs vocab\.json"):
        load_as_recorded(train(tmp_path, "sentencepiece"), record, where)
    with pytest.raises(UserError, match="but the one given has sha256"):
        load_as_recorded(folder / "tokenizer", replace(record, kind="huggingface"), where)
    with pytest.raises(UserError, match="there is no such tokenizer"):
        load_as_recorded(tmp_path / "nowhere", record, where)


def test_a_tokenizer_can_be_kept_where_it_is(folder, run):
    """A run may name its own copy as data.tokenizer."""
    kept = read_kept_record(run)
    tokenizer = load_as_recorded(run / kept.file, kept, run)
    keep_tokenizer(tokenizer, run)
    assert load_as_recorded(run / read_kept_record(run).file, kept, run).fingerprint == tokenizer.fingerprint
    single = load_tokenizer(train(run, "sentencepiece"))
    keep_tokenizer(single, run)
    again = load_tokenizer(run / read_kept_record(run).file)
    keep_tokenizer(again, run)
    assert load_tokenizer(run / read_kept_record(run).file).fingerprint == single.fingerprint
