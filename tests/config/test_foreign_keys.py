"""An unknown key that is another stack's word for one of ours is answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from megachiar.config import ConfigError, RunConfig, load_config, parse_config
from megachiar.config.foreign_keys import TABLE, WORDS, foreign_key
from megachiar.config.typed_sections import section_class

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def own_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> set[str]:
    """Every key of a config with dots, sections included."""
    found = set()
    for name, field in section.model_fields.items():
        found.add(f"{prefix}{name}")
        inner = section_class(field.annotation)
        if inner is not None:
            found |= own_keys(inner, f"{prefix}{name}.")
    return found


OWN = own_keys()


def answers(mapping: dict) -> dict[str, str]:
    """Key -> message and remedy of each problem of a mapping."""
    with pytest.raises(ConfigError) as caught:
        parse_config(mapping, "config")
    return {p.key: f"{p.message} | {p.remedy}" for p in caught.value.problems}


def targets(text: str) -> list[str]:
    return re.findall(r"`(\w+(?:\.\w+)*)`", text)


def test_every_key_that_the_table_names_is_one_of_ours():
    assert len(TABLE) > 60 and len(WORDS) > 180
    for row in TABLE:
        for key in [*row.ours.split(), *targets(row.how)]:
            assert key in OWN or key.split(".")[0] == "deepspeed", f"{row.words}: {key}"
        assert row.ours or row.how, row.words


def test_no_word_stands_twice_or_hides_a_key_of_ours_without_saying_so():
    words = [word for row in TABLE for word in row.words.split()]
    assert len(words) == len(set(words)) and all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", word) for word in words)
    leaves = {key.split(".")[-1]: key for key in OWN}
    for word in words:
        if word in leaves:  # the same word for another thing: the answer names our key of that name as well
            row = WORDS[word]
            assert leaves[word] in [*row.ours.split(), *targets(row.how)] or word == "load", word


@pytest.mark.parametrize(
    "word",
    [
        "eod_mask_loss",
        "reset_position_ids",
        "num_workers",
        "ignore_data_skip",
        "overwrite_output_dir",
        "lr_warmup_init",
        "rope_scaling",
        "pipeline_parallel_schedule",
        "partition_activations",
        "load_best_model_at_end",
        "init_method",
        "pad_token_id",
        "fp16_opt_level",
        "attention_config",
        "auto_find_batch_size",
        "eval_on_start",
    ],
)
def test_a_word_for_what_no_key_of_ours_does_is_not_answered_with_a_key(word):
    row = foreign_key((word,))
    assert row.ours == "" and row.how.startswith("remove it: ")


@pytest.mark.parametrize("row", [row for row in TABLE if row.ours], ids=lambda row: row.words.split()[0])
def test_a_key_that_is_offered_does_what_the_word_asks_for(row):
    """Where the explanation says that nothing does it, there is no key to offer."""
    assert not re.search(r"\b(always|never|nothing|there (is|are) no)\b", row.how), row.how


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.words.split()[0])
def test_a_word_is_answered_flat_nested_and_with_dashes(row):
    for word in row.words.split():
        *parents, name = word.split(".")
        path = (*parents, name.replace("_", "-"))
        assert foreign_key(path) is foreign_key((*("some", "where"), *path)) is row
        mapping: dict = {}
        node = mapping
        for parent in parents:
            node = node.setdefault(parent, {})
        node[path[-1]] = 1
        answer = answers(mapping)[".".join(path)]
        for key in row.ours.split():
            assert f"`{key}`" in answer


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("seq_length=2048", "use `data.sequence_length`"),
        ("model.seq-length=2048", "use `data.sequence_length`"),
        ("training.train-iters=100", "use `training.steps`"),
        ("max_steps=100", "use `training.steps`"),
        ("training.gradient_accumulation_steps=4", "`training.micro_batch_size` times the replicas"),
        ("training.per_device_train_batch_size=4", "use `training.micro_batch_size`"),
        ("parallel.tensor-model-parallel-size=2", "use `parallel.tensor_size`"),
        ("pipe-parallel-size=2", "use `parallel.pipeline_size`"),
        ("model.hidden_dropout=0.1", "use `model.dropout`"),
        ("optimizer.lr=0.1", "use `optimizer.learning_rate`"),
        ("optimizer.min_lr=0.1", "use `schedule.minimum_learning_rate`"),
        ("optimizer.weight-decay=0.1", "use `optimizer.weight_decay`"),
        ("optimizer.clip-grad=1.0", "use `optimizer.clip_gradient_norm`: null in place of 0"),
        ("training.max_grad_norm=1.0", "use `optimizer.clip_gradient_norm`"),
        ("bf16=true", "use `precision.compute`: bf16"),
        ("precision.fp16=true", "use `precision.compute`: fp16"),
        ("checkpoint.save-interval=500", "use `checkpoint.every`"),
        ("training.save_steps=500", "use `checkpoint.every`"),
        ("training.gradient_checkpointing=true", "use `training.activation_checkpoint_interval`: 1 keeps"),
        ("model.n_layer=12", "use `model.num_layers`"),
        ("training.learning_rate=0.1", "is not a known key at this place | use `optimizer.learning_rate`"),
        ("micro_batch_size=8", "use `training.micro_batch_size`"),
        ("training.every=8", "use `checkpoint.every` or `logging.every`"),
        ("training.stepz=8", "did you mean `steps`? Known: steps, tokens"),
        ("training.xyzzy=8", "| remove it. Known: steps"),
        ("model.ruter={tau: 0.5, kind: soft}", "did you mean `router`?"),
        ("trainin={steps: 3}", "did you mean `training`?"),
    ],
)
def test_an_unknown_key_of_a_config_gets_its_remedy(override, remedy):
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    (problem,) = caught.value.problems
    assert problem.key == override.split("=")[0]
    assert remedy in f"{problem.message} | {problem.remedy}"


# What people paste: the keys and values of such configs, as their stacks write them.
NEOX = """
"pipe-parallel-size": 4
"model-parallel-size": 2
"num-layers": 44
"hidden-size": 6144
"num-attention-heads": 64
"seq-length": 2048
"max-position-embeddings": 2048
"norm": layernorm
"pos-emb": rotary
"no-weight-tying": true
optimizer: {type: Adam, params: {lr: 0.97e-4, betas: [0.9, 0.95], eps: 1.0e-8}}
min_lr: 0.97e-5
zero_optimization: {stage: 1, allgather_bucket_size: 1260000000, overlap_comm: true}
train_micro_batch_size_per_gpu: 4
gradient_accumulation_steps: 32
"checkpoint-activations": true
gradient_clipping: 1.0
"weight-decay": 0.01
"hidden-dropout": 0
fp16: {enabled: true, loss_scale: 0, loss_scale_window: 1000, initial_scale_power: 12}
"train-iters": 150000
"lr-decay-style": cosine
warmup: 0.01
"save-interval": 500
"eval-interval": 1000
"log-interval": 2
save: ./20B_checkpoints
"""
NEOX_ANSWERS = {
    "pipe-parallel-size": "parallel.pipeline_size",
    "model-parallel-size": "parallel.tensor_size",
    "num-layers": "model.num_layers",
    "hidden-size": "model.hidden_size",
    "num-attention-heads": "model.num_attention_heads",
    "seq-length": "data.sequence_length",
    "max-position-embeddings": "model.max_sequence_length",
    "norm": "model.norm",
    "pos-emb": None,
    "no-weight-tying": None,
    "optimizer.type": "optimizer.kind",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.epsilon",
    "min_lr": "schedule.minimum_learning_rate",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization": "deepspeed.zero_optimization",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "checkpoint-activations": "training.activation_checkpoint_interval",
    "gradient_clipping": "optimizer.clip_gradient_norm",
    "weight-decay": "optimizer.weight_decay",
    "hidden-dropout": "model.dropout",
    "fp16.enabled": "precision.compute",
    "fp16.loss_scale": "precision.loss_scale",
    "fp16.loss_scale_window": "precision.loss_scale_window",
    "fp16.initial_scale_power": "precision.initial_loss_scale",
    "train-iters": "training.steps",
    "lr-decay-style": "schedule.kind",
    "warmup": "schedule.warmup_steps",
    "save-interval": "checkpoint.every",
    "eval-interval": "training.evaluate_every",
    "log-interval": "logging.every",
    "save": "logging.folder",
}
TITAN = """
metrics: {log_freq: 10, enable_tensorboard: true, save_tb_folder: tb}
optimizer: {name: AdamW, lr: 3e-4, eps: 1e-8}
lr_scheduler: {warmup_steps: 200, decay_ratio: 0.8, decay_type: linear, lr_min: 0.1}
training: {local_batch_size: 1, seq_len: 8192, max_norm: 1.0, steps: 1000, dataset: c4}
parallelism: {data_parallel_shard_degree: -1, tensor_parallel_degree: 8, pipeline_parallel_degree: 2,
              context_parallel_degree: 1}
checkpoint: {enable_checkpoint: false, folder: checkpoint, interval: 500}
activation_checkpoint: {mode: selective, selective_ac_option: op}
compile: {enable: false, components: [model, loss]}
"""
TITAN_ANSWERS = {
    "metrics.log_freq": "logging.every",
    "metrics.enable_tensorboard": "logging.tensorboard",
    "optimizer.name": "optimizer.kind",
    "optimizer.lr": "optimizer.learning_rate",
    "lr_scheduler.warmup_steps": "schedule.warmup_steps",
    "lr_scheduler.decay_ratio": "schedule.wsd_decay_fraction",
    "lr_scheduler.decay_type": "schedule.kind",
    "lr_scheduler.lr_min": "schedule.minimum_learning_rate",
    "training.local_batch_size": "training.micro_batch_size",
    "training.seq_len": "data.sequence_length",
    "training.max_norm": "optimizer.clip_gradient_norm",
    "training.dataset": "data.train",
    "parallelism.data_parallel_shard_degree": "parallel.zero_stage",
    "parallelism.tensor_parallel_degree": "parallel.tensor_size",
    "parallelism.pipeline_parallel_degree": "parallel.pipeline_size",
    "parallelism.context_parallel_degree": None,
    "checkpoint.enable_checkpoint": None,
    "checkpoint.folder": "logging.folder",
    "checkpoint.interval": "checkpoint.every",
    "activation_checkpoint": "training.activation_checkpoint_interval",
    "compile.enable": "training.compile",
}
LITGPT = """
model_name: tiny-llama-1.1b
out_dir: out/pretrain/tiny-llama
precision: bf16-mixed
initial_checkpoint_dir: null
train: {save_interval: 1000, log_interval: 1, global_batch_size: 512, micro_batch_size: 4, lr_warmup_steps: 2000,
        max_tokens: 3000000000000, max_seq_length: 2048, tie_embeddings: false, max_norm: 1.0, min_lr: 4.0e-05}
eval: {interval: 1000, max_iters: 100}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 4e-4, weight_decay: 0.1, betas: [0.9, 0.95]}}
devices: auto
tokenizer_dir: checkpoints/meta-llama/Llama-2-7b-hf
logger_name: tensorboard
seed: 42
"""
LITGPT_ANSWERS = {
    "model_name": None,
    "out_dir": "logging.folder",
    "initial_checkpoint_dir": "checkpoint.load_from",
    "train.save_interval": "checkpoint.every",
    "train.global_batch_size": "training.global_batch_size",
    "train.lr_warmup_steps": "schedule.warmup_steps",
    "train.max_tokens": "training.tokens",
    "train.max_seq_length": "data.sequence_length",
    "train.tie_embeddings": None,
    "train.max_norm": "optimizer.clip_gradient_norm",
    "train.min_lr": "schedule.minimum_learning_rate",
    "eval.interval": "training.evaluate_every",
    "eval.max_iters": "training.evaluation_windows",
    "optimizer.class_path": "optimizer.kind",
    "optimizer.init_args.lr": "optimizer.learning_rate",
    "optimizer.init_args.weight_decay": "optimizer.weight_decay",
    "devices": None,
    "tokenizer_dir": "data.tokenizer",
    "logger_name": "logging.tensorboard",
    "seed": "training.seed",
}
DEEPSPEED = """
bf16: {enabled: true}
zero_optimization: {stage: 2, offload_optimizer: {device: cpu, pin_memory: true}, overlap_comm: true}
optimizer: {type: AdamW, params: {lr: 1e-4, weight_decay: 0.1}}
scheduler: {type: WarmupDecayLR, params: {warmup_min_lr: 1e-8, warmup_max_lr: 1e-4, warmup_num_steps: 100,
            total_num_steps: 1000}}
train_batch_size: 256
gradient_accumulation_steps: 8
steps_per_print: 2000
activation_checkpointing: {partition_activations: true, cpu_checkpointing: false}
wall_clock_breakdown: false
"""
DEEPSPEED_ANSWERS = {
    "bf16.enabled": "precision.compute",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization": "deepspeed.zero_optimization",
    "scheduler.type": "schedule.kind",
    "scheduler.params.warmup_min_lr": "schedule.minimum_learning_rate",
    "scheduler.params.warmup_max_lr": "optimizer.learning_rate",
    "scheduler.params.warmup_num_steps": "schedule.warmup_steps",
    "scheduler.params.total_num_steps": "training.steps",
    "train_batch_size": "training.global_batch_size",
    "steps_per_print": "logging.every",
    "activation_checkpointing.partition_activations": "training.activation_checkpoint_interval",
    "wall_clock_breakdown": "deepspeed.wall_clock_breakdown",
}
HF = """
output_dir: out
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
learning_rate: 3e-4
weight_decay: 0.1
adam_beta2: 0.95
max_grad_norm: 1.0
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_ratio: 0.03
logging_steps: 10
save_steps: 500
save_total_limit: 3
eval_strategy: steps
eval_steps: 500
bf16: true
gradient_checkpointing: true
report_to: tensorboard
seed: 42
"""
HF_ANSWERS = {
    "output_dir": "logging.folder",
    "per_device_train_batch_size": "training.micro_batch_size",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta2": "optimizer.betas",
    "max_grad_norm": "optimizer.clip_gradient_norm",
    "num_train_epochs": "training.epochs",
    "lr_scheduler_type": "schedule.kind",
    "warmup_ratio": "schedule.warmup_steps",
    "logging_steps": "logging.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_strategy": "training.evaluate_every",
    "eval_steps": "training.evaluate_every",
    "bf16": "precision.compute",
    "gradient_checkpointing": "training.activation_checkpoint_interval",
    "report_to": "logging.tensorboard",
    "seed": "training.seed",
}
# A command line of Megatron-LM as a mapping.
MEGATRON = """
tensor-model-parallel-size: 2
pipeline-model-parallel-size: 2
sequence-parallel: true
num-layers: 24
seq-length: 1024
micro-batch-size: 4
global-batch-size: 16
lr: 0.00015
train-iters: 500000
lr-decay-iters: 320000
lr-decay-style: cosine
min-lr: 1.0e-5
weight-decay: 1e-2
lr-warmup-fraction: .01
clip-grad: 1.0
use-distributed-optimizer: true
recompute-granularity: full
recompute-num-layers: 1
data-path: my_text_document
vocab-file: gpt2-vocab.json
split: 949,50,1
eval-iters: 10
"""
MEGATRON_ANSWERS = {
    "tensor-model-parallel-size": "parallel.tensor_size",
    "pipeline-model-parallel-size": "parallel.pipeline_size",
    "sequence-parallel": "parallel.sequence",
    "num-layers": "model.num_layers",
    "micro-batch-size": "training.micro_batch_size",
    "global-batch-size": "training.global_batch_size",
    "lr": "optimizer.learning_rate",
    "lr-decay-iters": "schedule.decay_steps",
    "lr-warmup-fraction": "schedule.warmup_steps",
    "use-distributed-optimizer": "parallel.zero_stage",
    "recompute-granularity": "training.activation_checkpoint_interval",
    "data-path": "data.train",
    "vocab-file": "data.tokenizer",
    "split": None,
    "eval-iters": "training.evaluation_windows",
}
EXCERPTS = {
    "GPT-NeoX": (NEOX, NEOX_ANSWERS),
    "torchtitan": (TITAN, TITAN_ANSWERS),
    "litgpt": (LITGPT, LITGPT_ANSWERS),
    "DeepSpeed": (DEEPSPEED, DEEPSPEED_ANSWERS),
    "HF": (HF, HF_ANSWERS),
    "Megatron-LM": (MEGATRON, MEGATRON_ANSWERS),
}


@pytest.mark.parametrize("stack", EXCERPTS)
def test_a_config_of_another_stack_is_answered_key_by_key(stack, tmp_path):
    text, expected = EXCERPTS[stack]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = {problem.key: f"{problem.message} | {problem.remedy}" for problem in caught.value.problems}
    for key, ours in expected.items():
        assert key in found, f"{key}: {sorted(found)}"
        assert "remove it" in found[key] if ours is None else f"`{ours}`" in found[key], found[key]
    unanswered = [key for key, text in found.items() if "is not a known key |" in text]
    assert set(unanswered) <= {"compile.components"}, unanswered
    for name in yaml.safe_load(text):
        inside = [key for key in found if key.split(".")[0] == name]
        assert inside, f"nothing was said about {name}"


def test_the_place_of_a_nested_word_is_its_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text() + "fp16:\n  enabled: true\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(ConfigError, match=rf"config\.yaml:{line}: fp16\.enabled: .*DeepSpeed"):
        load_config(path)


def test_a_section_that_is_a_value_is_told_its_keys():
    with pytest.raises(ConfigError, match=r"write keys below `precision:`: compute, "):
        load_config(TINY, ["precision=bf16-true"])
