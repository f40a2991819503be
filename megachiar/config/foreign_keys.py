"""What other stacks call our keys: the words of their configs and command lines, each with our key for it.

The table answers an unknown key of a config with the key that means the same here, and says how the value translates
where it does not stay as it is. The words are those of the stacks' own documentation:

    Megatron-LM   megatron/training/arguments.py        torchtitan  torchtitan/config/job_config.py
    GPT-NeoX      configs/neox_arguments.md             litgpt      config_hub/pretrain/*.yaml
    DeepSpeed     docs: DeepSpeed Configuration JSON    HF          TrainingArguments, a model's config.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ForeignKey(NamedTuple):
    """One thing that other stacks configure.

    Attributes:
        words: what they call it, separated by spaces, with underscores for dashes. A dotted word is the end of a path:
            ``eval.interval`` is the key ``interval`` below ``eval``.
        stacks: whose words these are.
        ours: our keys, separated by spaces; empty where there is nothing to set.
        how: how the value translates, or why there is nothing to set; empty where the value stays as it is.
    """

    words: str
    stacks: str
    ours: str
    how: str = ""


MEGATRON, NEOX, DEEPSPEED, TITAN, HF, LITGPT = "Megatron-LM", "GPT-NeoX", "DeepSpeed", "torchtitan", "HF", "litgpt"
MODEL = (
    ForeignKey(
        "model_name model.name model.flavor model_type",
        f"{LITGPT}, {TITAN}, {HF}",
        "",
        "remove it: `model.kind` and the sizes beside it say what the model is",
    ),
    ForeignKey("n_layer n_layers num_hidden_layers", f"{LITGPT}, {TITAN}, {HF}", "model.num_layers"),
    ForeignKey("n_embd dim d_model", f"{LITGPT}, {TITAN}, {HF}", "model.hidden_size"),
    ForeignKey("n_head n_heads", f"{LITGPT}, {TITAN}, {HF}", "model.num_attention_heads"),
    ForeignKey("intermediate_size n_inner", f"{LITGPT}, {HF}", "model.ffn_hidden_size"),
    ForeignKey(
        "max_position_embeddings block_size n_positions",
        f"{MEGATRON}, {NEOX}, {LITGPT}, {HF}",
        "model.max_sequence_length",
    ),
    ForeignKey(
        "padded_vocab_size make_vocab_size_divisible_by padding_multiple",
        f"{MEGATRON}, {NEOX}, {LITGPT}",
        "model.vocab_size",
        "the number of rows with their padding",
    ),
    ForeignKey(
        "hidden_dropout attention_dropout resid_pdrop embd_pdrop attn_pdrop",
        f"{MEGATRON}, {NEOX}, {HF}",
        "model.dropout",
        "one probability for the embedding, the feed-forward and attention's weights",
    ),
    ForeignKey("init_method_std initializer_range", f"{MEGATRON}, {NEOX}, {HF}", "model.initializer_std"),
    ForeignKey(
        "layernorm_epsilon norm_eps layer_norm_epsilon layer_norm_eps",
        f"{MEGATRON}, {NEOX}, {LITGPT}, {HF}",
        "model.norm_epsilon",
    ),
    ForeignKey(
        "rotary_base rotary_emb_base rope_theta", f"{MEGATRON}, {NEOX}, {TITAN}, {HF}", "model.attention.rope_base"
    ),
    ForeignKey(
        "norm normalization norm_class_name",
        f"{NEOX}, {MEGATRON}, {LITGPT}",
        "",
        "remove it: every norm is a LayerNorm, and `model.norm` says where it stands (post or pre)",
    ),
    ForeignKey(
        "pos_emb position_embedding_type no_position_embedding use_rotary_position_embeddings rotary_pct "
        "rotary_percent rotary_percentage",
        f"{NEOX}, {MEGATRON}, {LITGPT}",
        "",
        "remove it: attention always has rotary embedding, over all channels of a head",
    ),
    ForeignKey(
        "no_weight_tying untie_embeddings_and_output_weights tie_word_embeddings tie_embeddings",
        f"{NEOX}, {MEGATRON}, {LITGPT}, {HF}",
        "",
        "remove it: the output layer always shares the embedding's weights",
    ),
    ForeignKey(
        "group_query_attention num_query_groups n_query_groups num_key_value_heads n_kv_heads",
        f"{MEGATRON}, {LITGPT}, {TITAN}, {HF}",
        "",
        "remove it: each of the `model.num_attention_heads` heads has keys and values of its own",
    ),
    ForeignKey(
        "swiglu activation activation_function hidden_act",
        f"{MEGATRON}, {NEOX}, {HF}",
        "",
        "remove it: the feed-forward always has GELU",
    ),
    ForeignKey(
        "num_experts n_expert expert_model_parallel_size expert_parallel_degree moe_router_topk",
        f"{MEGATRON}, {LITGPT}, {TITAN}",
        "",
        "remove it: there are no experts; `model.router.operators` are what tokens are routed to",
    ),
    ForeignKey(
        "use_flash_attn attention_backend attn_implementation attention_config",
        f"{MEGATRON}, {NEOX}, {HF}",
        "precision.kernels",
        "auto takes the fastest kernels that the machine has",
    ),
)
DATA = (
    ForeignKey(
        "seq_length seq_len max_seq_length max_seq_len",
        f"{MEGATRON}, {NEOX}, {TITAN}, {LITGPT}, {HF}",
        "data.sequence_length",
    ),
    ForeignKey(
        "data_path train_data_path train_data_paths train_data_weights dataset dataset_path dataset_name",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}",
        "data.train",
        "a list of sources, each `- {path: PREFIX, weight: 1}`",
    ),
    ForeignKey(
        "valid_data_path valid_data_paths valid_data_weights",
        f"{MEGATRON}, {NEOX}",
        "data.validation",
        "a name and a prefix for each set",
    ),
    ForeignKey(
        "test_data_path test_data_paths test_data_weights",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: `megachiar evaluate --data PREFIX` measures a test set after training",
    ),
    ForeignKey(
        "split", f"{MEGATRON}, {NEOX}", "", "remove it: `megachiar preprocess --split` makes a dataset of each part"
    ),
    ForeignKey(
        "tokenizer_path tokenizer_model tokenizer_name_or_path tokenizer_name tokenizer_dir tokenizer_type vocab_file "
        "merge_file",
        f"{MEGATRON}, {NEOX}, {TITAN}, {LITGPT}, {HF}",
        "data.tokenizer",
        "a file or folder; the datasets' manifests name it where this key is not given",
    ),
    ForeignKey(
        "reset_attention_mask reset_position_ids eod_mask_loss",
        f"{MEGATRON}, {NEOX}",
        "data.document_mask",
    ),
    ForeignKey(
        "num_workers dataloader_num_workers dataloader_prefetch_factor",
        f"{MEGATRON}, {NEOX}, {HF}",
        "data.prefetch",
        "micro-batches that each rank reads ahead; there are no worker processes",
    ),
    ForeignKey(
        "data_impl mmap_warmup dataloader_type data_cache_path",
        f"{NEOX}, {MEGATRON}",
        "",
        "remove it: datasets are always memory-mapped, and no index is built; `data.order` names the order",
    ),
)
PARALLEL = (
    ForeignKey(
        "tensor_model_parallel_size model_parallel_size tensor_parallel_degree tensor_parallel_size",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "parallel.tensor_size",
    ),
    ForeignKey(
        "pipeline_model_parallel_size pipe_parallel_size pipeline_parallel_degree pipeline_parallel_size",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "parallel.pipeline_size",
        "1 for no pipeline",
    ),
    ForeignKey("sequence_parallel", f"{MEGATRON}, {NEOX}", "parallel.sequence"),
    ForeignKey(
        "data_parallel_size data_parallel_replicate_degree",
        f"{MEGATRON}, {TITAN}",
        "parallel.data_size",
        "it follows from the number of ranks where it is not given",
    ),
    ForeignKey(
        "data_parallel_shard_degree fsdp fsdp_config use_distributed_optimizer",
        f"{TITAN}, {HF}, {MEGATRON}",
        "parallel.zero_stage",
        "1 shards optimizer state over the replicas, 2 gradients as well, 3 parameters as well",
    ),
    ForeignKey("zero_optimization.stage", f"{DEEPSPEED}, {NEOX}", "parallel.zero_stage"),
    ForeignKey(
        "zero_optimization.offload_optimizer zero_optimization.offload_optimizer.device cpu_offload enable_cpu_offload "
        "optimizer_cpu_offload",
        f"{DEEPSPEED}, {TITAN}, {MEGATRON}",
        "parallel.offload_optimizer",
        "true or false",
    ),
    ForeignKey(
        "zero_optimization", f"{DEEPSPEED}, {NEOX}", "deepspeed.zero_optimization", "a raw key stands below `deepspeed`"
    ),
    ForeignKey(
        "context_parallel_size context_parallel_degree",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "",
        "remove it: a sequence is never split over ranks; `parallel.sequence` shards what is outside attention",
    ),
    ForeignKey(
        "devices num_nodes num_gpus",
        f"{LITGPT}, {NEOX}",
        "",
        "remove it: a run has the ranks that its launcher starts",
    ),
    ForeignKey(
        "distributed_backend ddp_backend",
        f"{MEGATRON}, {NEOX}, {HF}",
        "",
        "remove it: ranks on GPUs meet by NCCL, ranks on CPUs by gloo",
    ),
)
PRECISION = (
    ForeignKey("bf16 bf16.enabled", f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {HF}", "precision.compute", "bf16; else fp32"),
    ForeignKey("fp16 fp16.enabled", f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {HF}", "precision.compute", "fp16; else fp32"),
    ForeignKey(
        "mixed_precision_param params_dtype torch_dtype dtype",
        f"{TITAN}, {MEGATRON}, {HF}",
        "precision.compute",
        "bf16, fp16 or fp32",
    ),
    ForeignKey(
        "fp16.loss_scale",
        f"{DEEPSPEED}, {NEOX}",
        "precision.loss_scale",
        "dynamic in place of 0",
    ),
    ForeignKey(
        "initial_scale_power",
        f"{DEEPSPEED}, {NEOX}",
        "precision.initial_loss_scale",
        "2 to this power",
    ),
    ForeignKey("hysteresis min_loss_scale", f"{DEEPSPEED}, {NEOX}", "deepspeed.fp16", "a raw key below it"),
    ForeignKey(
        "grad_accum_dtype accumulate_allreduce_grads_in_fp32 grad_reduce_in_fp32 fp32_allreduce mixed_precision_reduce",
        f"{DEEPSPEED}, {MEGATRON}, {NEOX}, {TITAN}",
        "precision.gradient_accumulation",
        "fp32 where it is not given",
    ),
)
OPTIMIZER = (
    ForeignKey("lr warmup_max_lr", f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {TITAN}", "optimizer.learning_rate"),
    ForeignKey(
        "adam_beta1 adam_beta2 beta1 beta2",
        f"{MEGATRON}, {TITAN}, {LITGPT}, {HF}",
        "optimizer.betas",
        "a list of both, such as [0.9, 0.95]",
    ),
    ForeignKey("adam_eps adam_epsilon eps", f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {TITAN}, {HF}", "optimizer.epsilon"),
    ForeignKey(
        "clip_grad max_grad_norm gradient_clipping max_norm grad_clip",
        f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {TITAN}, {HF}, {LITGPT}",
        "optimizer.clip_gradient_norm",
        "null in place of 0",
    ),
    ForeignKey(
        "optim optimizer.type optimizer.name optimizer.class_path optimizer_type",
        f"{HF}, {DEEPSPEED}, {NEOX}, {TITAN}, {LITGPT}",
        "",
        "remove it: the optimizer is always AdamW, and `optimizer.implementation` says whose",
    ),
)
SCHEDULE = (
    ForeignKey("min_lr warmup_min_lr", f"{MEGATRON}, {NEOX}, {LITGPT}, {DEEPSPEED}", "schedule.minimum_learning_rate"),
    ForeignKey(
        "lr_min min_lr_factor min_lr_rate",
        f"{TITAN}, {HF}",
        "schedule.minimum_learning_rate",
        "this share of `optimizer.learning_rate`",
    ),
    ForeignKey(
        "lr_decay_style lr_scheduler_type decay_type scheduler.type",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {DEEPSPEED}",
        "schedule.kind",
        "cosine, linear, constant or wsd",
    ),
    ForeignKey(
        "lr_decay_iters lr_decay_steps",
        f"{MEGATRON}, {NEOX}",
        "schedule.decay_steps",
        "the length of the run where it is not given",
    ),
    ForeignKey(
        "lr_decay_samples", MEGATRON, "schedule.decay_steps", "the samples divided by `training.global_batch_size`"
    ),
    ForeignKey(
        "lr_warmup_iters lr_warmup_steps warmup_num_steps",
        f"{MEGATRON}, {LITGPT}, {DEEPSPEED}",
        "schedule.warmup_steps",
    ),
    ForeignKey(
        "lr_warmup_samples", MEGATRON, "schedule.warmup_steps", "the samples divided by `training.global_batch_size`"
    ),
    ForeignKey(
        "warmup lr_warmup_fraction warmup_ratio",
        f"{NEOX}, {MEGATRON}, {HF}",
        "schedule.warmup_steps",
        "this share of the steps, as a whole number",
    ),
    ForeignKey(
        "decay_ratio lr_wsd_decay_iters",
        f"{TITAN}, {MEGATRON}",
        "schedule.wsd_decay_fraction",
        "the share of the steps that the decay takes, with `schedule.kind`: wsd",
    ),
)
TRAINING = (
    ForeignKey(
        "train_iters max_steps max_iters total_num_steps",
        f"{MEGATRON}, {NEOX}, {HF}, {LITGPT}, {DEEPSPEED}",
        "training.steps",
    ),
    ForeignKey(
        "train_samples",
        MEGATRON,
        "training.tokens",
        "the samples times `data.sequence_length`",
    ),
    ForeignKey("max_tokens", LITGPT, "training.tokens"),
    ForeignKey("num_train_epochs train_epochs", f"{HF}, {NEOX}", "training.epochs"),
    ForeignKey("train_batch_size", f"{DEEPSPEED}, {NEOX}", "training.global_batch_size"),
    ForeignKey(
        "train_micro_batch_size_per_gpu per_device_train_batch_size local_batch_size batch_size",
        f"{DEEPSPEED}, {NEOX}, {HF}, {TITAN}",
        "training.micro_batch_size",
    ),
    ForeignKey(
        "gradient_accumulation_steps gas",
        f"{DEEPSPEED}, {NEOX}, {HF}",
        "training.global_batch_size",
        "`training.micro_batch_size` times the replicas times this; the accumulation follows from the three",
    ),
    ForeignKey(
        "rampup_batch_size",
        MEGATRON,
        "training.global_batch_size",
        "one size; a run that goes on with `data.on_change` continue may have another one",
    ),
    ForeignKey(
        "eval_interval eval_steps eval.interval", f"{MEGATRON}, {NEOX}, {HF}, {LITGPT}", "training.evaluate_every"
    ),
    ForeignKey(
        "eval_iters eval.max_iters",
        f"{MEGATRON}, {NEOX}, {LITGPT}",
        "training.evaluation_windows",
        "windows of `data.sequence_length` tokens in all, not batches",
    ),
    ForeignKey(
        "per_device_eval_batch_size eval_micro_batch_size_per_gpu",
        f"{HF}, {NEOX}",
        "",
        "remove it: evaluation takes `training.micro_batch_size`",
    ),
    ForeignKey(
        "do_train do_eval eval_strategy evaluation_strategy save_strategy logging_strategy",
        HF,
        "",
        "remove it: `training.evaluate_every`, `checkpoint.every` and `logging.every` are counted in steps",
    ),
    ForeignKey(
        "recompute_granularity recompute_method recompute_num_layers recompute_activations checkpoint_activations "
        "checkpoint_num_layers partition_activations synchronize_each_layer gradient_checkpointing "
        "activation_checkpointing activation_checkpoint selective_ac_option",
        f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {HF}, {TITAN}",
        "training.activation_checkpoint_interval",
        "1 keeps the input of each layer and computes the rest once more, null keeps all activations",
    ),
    ForeignKey("torch_compile torch_compile_backend compile.enable", f"{HF}, {TITAN}", "training.compile", "inductor"),
    ForeignKey("data_seed", HF, "training.seed", "one seed for weights, order of samples and dropout"),
    ForeignKey("distributed_timeout_minutes", MEGATRON, "training.communication_timeout_s", "60 times as many seconds"),
    ForeignKey("ddp_timeout train_timeout_seconds", f"{HF}, {TITAN}", "training.communication_timeout_s"),
)
CHECKPOINT = (
    ForeignKey(
        "save_interval save_steps checkpoint_factor checkpoint.interval",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {LITGPT}",
        "checkpoint.every",
    ),
    ForeignKey("async_mode async_save", f"{TITAN}, {MEGATRON}", "checkpoint.asynchronous"),
    ForeignKey("keep_last_n_checkpoints save_total_limit keep_latest_k", f"{NEOX}, {HF}, {TITAN}", "checkpoint.keep"),
    ForeignKey(
        "load resume_from_checkpoint initial_load_path initial_checkpoint_dir pretrained_checkpoint",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {LITGPT}",
        "checkpoint.load_from",
        "the checkpoint of another run; a run goes on from its own without being told",
    ),
    ForeignKey(
        "finetune no_load_optim initial_load_model_only",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "checkpoint.load",
        "weights or all",
    ),
    ForeignKey(
        "enable_checkpoint save_optimizer",
        f"{TITAN}, {NEOX}",
        "",
        "remove it: a run always saves whole checkpoints, every `checkpoint.every` steps and at its end",
    ),
)
LOGGING = (
    ForeignKey(
        "save output_dir out_dir dump_folder log_dir logging_dir checkpoint.folder",
        f"{MEGATRON}, {NEOX}, {HF}, {LITGPT}, {TITAN}",
        "logging.folder",
        "the run folder; checkpoints, metrics and curves are below it",
    ),
    ForeignKey(
        "log_interval logging_steps log_freq steps_per_print",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {LITGPT}, {DEEPSPEED}",
        "logging.every",
    ),
    ForeignKey(
        "tensorboard_dir enable_tensorboard save_tb_folder report_to logger_name",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}, {LITGPT}",
        "logging.tensorboard",
        "true or false; the event files lie in the run folder",
    ),
    ForeignKey(
        "wandb_project wandb_exp_name wandb_group wandb_team use_wandb enable_wandb run_name",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}",
        "",
        "remove it: curves are written by `logging.tensorboard`, and metrics.jsonl in the run folder has them as text",
    ),
    ForeignKey(
        "wall_clock_breakdown", f"{DEEPSPEED}, {NEOX}", "deepspeed.wall_clock_breakdown", "a raw key below `deepspeed`"
    ),
)
TABLE = (*MODEL, *DATA, *PARALLEL, *PRECISION, *OPTIMIZER, *SCHEDULE, *TRAINING, *CHECKPOINT, *LOGGING)
WORDS = {word: foreign for foreign in TABLE for word in foreign.words.split()}


def foreign_key(path: Sequence[str]) -> ForeignKey | None:
    """Return the row for the key at ``path``, at whatever level it stands; None where no stack calls anything so."""
    names = [normalized(name) for name in path]
    return next((WORDS[word] for first in range(len(names)) if (word := ".".join(names[first:])) in WORDS), None)


def normalized(name: str) -> str:
    """Return ``name`` as the table writes it: ``--seq-length`` is ``seq_length``."""
    return name.lstrip("-").replace("-", "_").lower()
