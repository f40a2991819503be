"""What other stacks call keys of optimizer, schedule and training."""

from __future__ import annotations

from megachiar.config.foreign.row import DEEPSPEED, HF, LITGPT, MEGATRON, NEOX, OLMO, TITAN, ForeignKey

OPTIMIZER = (
    ForeignKey(
        "lr warmup_max_lr max_lr peak_lr", f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {TITAN}", "optimizer.learning_rate"
    ),
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
        "optimizer.kind",
        "adamw or muon",
    ),
    ForeignKey(
        "optim_args sgd_momentum adam_w_mode torch_adam",
        f"{HF}, {MEGATRON}, {DEEPSPEED}",
        "",
        "remove it: the optimizer is AdamW or Muon, and `optimizer.implementation` says whose AdamW",
    ),
    ForeignKey("muon_momentum", MEGATRON, "optimizer.muon.momentum"),
    ForeignKey("muon_use_nesterov", MEGATRON, "optimizer.muon.nesterov"),
    ForeignKey("muon_num_ns_steps", MEGATRON, "optimizer.muon.ns_steps"),
    ForeignKey("muon_fp32_matmul_prec", MEGATRON, "optimizer.muon.ns_dtype", "fp32 or bf16"),
    ForeignKey(
        "muon_scale_mode muon_extra_scale_factor",
        MEGATRON,
        "optimizer.muon.adjust_lr_fn",
        "match_rms_adamw has Megatron's spectral with a factor of 0.2",
    ),
    ForeignKey(
        "muon_split_qkv muon_tp_mode",
        MEGATRON,
        "",
        "remove it: query, key and value are always apart, and always whole under tensor parallelism",
    ),
    ForeignKey(
        "start_weight_decay end_weight_decay weight_decay_incr_style",
        MEGATRON,
        "optimizer.weight_decay",
        "one value for the whole run",
    ),
    ForeignKey(
        "decay_norm_and_bias",
        OLMO,
        "optimizer.decay_all",
        "DCT filters and gates decay with it too",
    ),
    ForeignKey(
        "early_step_in_backward use_precision_aware_optimizer",
        f"{TITAN}, {MEGATRON}",
        "",
        "remove it: the step follows the backward pass, on fp32 master weights",
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
        "lr_decay_style lr_scheduler_type decay_type lr_wsd_decay_style scheduler.type",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {DEEPSPEED}",
        "schedule.kind",
        "cosine, linear, constant or wsd",
    ),
    ForeignKey(
        "lr_decay_iters lr_decay_steps decay_iters",
        f"{MEGATRON}, {NEOX}",
        "schedule.decay_steps",
        "the length of the run where it is not given",
    ),
    ForeignKey(
        "lr_decay_samples", MEGATRON, "schedule.decay_steps", "the samples divided by `training.global_batch_size`"
    ),
    ForeignKey(
        "lr_warmup_iters lr_warmup_steps warmup_num_steps warmup_iters num_warmup_steps",
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
        "decay_ratio lr_wsd_decay_iters lr_wsd_decay_samples",
        f"{TITAN}, {MEGATRON}",
        "schedule.wsd_decay_fraction",
        "the share of the steps that the decay takes, with `schedule.kind`: wsd",
    ),
    ForeignKey(
        "lr_decay_fraction",
        NEOX,
        "schedule.decay_steps",
        "this share of the steps, as a whole number",
    ),
    ForeignKey(
        "lr_warmup_init",
        MEGATRON,
        "",
        "remove it: the first step has `optimizer.learning_rate` / `schedule.warmup_steps`",
    ),
    ForeignKey(
        "lr_scheduler_kwargs",
        HF,
        "",
        "remove it: the section `schedule` has keys of its own for what it holds",
    ),
    ForeignKey(
        "override_opt_param_scheduler use_checkpoint_opt_param_scheduler override_lr_scheduler "
        "use_checkpoint_lr_scheduler",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: the schedule is that of the config, and no checkpoint holds it",
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
        "train_micro_batch_size_per_gpu per_device_train_batch_size local_batch_size",
        f"{DEEPSPEED}, {NEOX}, {HF}, {TITAN}",
        "training.micro_batch_size",
    ),
    ForeignKey(
        "batch_size",
        f"{LITGPT}, {HF}",
        "training.micro_batch_size",
        "that of one rank; `training.global_batch_size` is all ranks', and `evaluation.batch_size` that of tasks",
    ),
    ForeignKey(
        "gradient_accumulation_steps gas",
        f"{DEEPSPEED}, {NEOX}, {HF}",
        "training.global_batch_size",
        "`training.micro_batch_size` times the replicas times this; the accumulation follows from the three",
    ),
    ForeignKey(
        "rampup_batch_size batch_size_warmup",
        MEGATRON,
        "training.global_batch_size",
        "one size; a run that goes on with `data.on_change` continue may have another one",
    ),
    ForeignKey(
        "eval_interval eval_steps eval.interval validation.freq",
        f"{MEGATRON}, {NEOX}, {HF}, {LITGPT}, {TITAN}",
        "training.evaluate_every",
    ),
    ForeignKey(
        "eval_iters eval.max_iters validation.steps",
        f"{MEGATRON}, {NEOX}, {LITGPT}, {TITAN}",
        "training.evaluation_windows",
        "windows of `data.sequence_length` tokens in all, not batches",
    ),
    ForeignKey(
        "per_device_eval_batch_size eval_micro_batch_size_per_gpu validation.local_batch_size eval_accumulation_steps",
        f"{HF}, {NEOX}, {TITAN}",
        "",
        "remove it: evaluation takes `training.micro_batch_size`",
    ),
    ForeignKey(
        "do_train do_eval do_predict do_test eval_strategy evaluation_strategy save_strategy logging_strategy",
        HF,
        "",
        "remove it: `training.evaluate_every`, `checkpoint.every` and `logging.every` are counted in steps",
    ),
    ForeignKey(
        "recompute_granularity recompute_method recompute_num_layers recompute_activations checkpoint_activations "
        "checkpoint_num_layers gradient_checkpointing activation_checkpointing activation_checkpoint "
        "selective_ac_option",
        f"{MEGATRON}, {NEOX}, {DEEPSPEED}, {HF}, {TITAN}",
        "training.activation_checkpoint_interval",
        "1 keeps the input of each layer and computes the rest once more, null keeps all activations",
    ),
    ForeignKey(
        "distribute_saved_activations contiguous_checkpointing checkpoint_in_cpu partition_activations "
        "synchronize_each_layer",
        f"{MEGATRON}, {NEOX}, {DEEPSPEED}",
        "",
        "remove it: what `training.activation_checkpoint_interval` keeps is never sharded or moved",
    ),
    ForeignKey(
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo compile.enable",
        f"{HF}, {TITAN}",
        "training.compile",
        "inductor",
    ),
    ForeignKey("data_seed random_seed", HF, "training.seed", "one seed for weights, order of samples and dropout"),
    ForeignKey("distributed_timeout_minutes", MEGATRON, "training.communication_timeout_s", "60 times as many seconds"),
    ForeignKey(
        "ddp_timeout train_timeout_seconds init_timeout_seconds", f"{HF}, {TITAN}", "training.communication_timeout_s"
    ),
    ForeignKey(
        "exit_interval exit_duration_in_mins exit_signal_handler max_time",
        f"{MEGATRON}, {NEOX}, {LITGPT}",
        "",
        "remove it: SIGTERM or SIGUSR1 lets a run save and stop, and a run with more `training.steps` goes on",
    ),
    ForeignKey(
        "initial_validation final_validation eval_delay eval_on_start",
        f"{LITGPT}, {HF}",
        "",
        "remove it: a run is evaluated every `training.evaluate_every` steps and at its end",
    ),
    ForeignKey(
        "load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only",
        HF,
        "",
        "remove it: `checkpoint.keep` keeps the newest, not the best; metrics.jsonl has the losses of all evaluations",
    ),
    ForeignKey(
        "gc_freq manual_gc manual_gc_interval empty_unused_memory_level torch_empty_cache_steps",
        f"{TITAN}, {MEGATRON}, {HF}",
        "",
        "remove it: there is nothing to set for memory that is given back",
    ),
    ForeignKey(
        "label_smoothing_factor neftune_noise_alpha",
        HF,
        "",
        "remove it: the loss is the plain cross entropy, and embeddings have `model.dropout` alone",
    ),
    ForeignKey(
        "auto_find_batch_size",
        HF,
        "",
        "remove it: `megachiar plan` finds the largest `training.micro_batch_size` that fits",
    ),
)
