"""What other stacks call keys of checkpoints and logs."""

from __future__ import annotations

from megachiar.config.foreign.row import DEEPSPEED, HF, LITGPT, MEGATRON, NEOX, TITAN, ForeignKey

CHECKPOINT = (
    ForeignKey(
        "save_interval save_steps checkpoint_factor extra_save_iters checkpoint_scale checkpoint.interval",
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
        "enable_checkpoint save_optimizer no_save_optim no_save_rng no_load_rng save_only_model "
        "last_save_model_only exclude_from_loading",
        f"{TITAN}, {NEOX}, {MEGATRON}, {HF}",
        "",
        "remove it: a run always saves whole checkpoints, every `checkpoint.every` steps and at its end",
    ),
    ForeignKey(
        "ckpt_step load_step load_iteration iteration",
        f"{MEGATRON}, {TITAN}, {NEOX}",
        "checkpoint.resume",
        "the step of this run to go back to; `checkpoint.load_from` takes the folder of a step of another run",
    ),
    ForeignKey(
        "ckpt_format dist_ckpt_format save_safetensors export_dtype initial_load_in_hf last_save_in_hf",
        f"{MEGATRON}, {HF}, {TITAN}",
        "",
        "remove it: a checkpoint always holds safetensors of fp32 weights by name",
    ),
    ForeignKey(
        "overwrite_output_dir",
        HF,
        "",
        "remove it: nothing is overwritten; name another `logging.folder` to begin anew",
    ),
    ForeignKey(
        "use_checkpoint_args exit_on_missing_checkpoint",
        MEGATRON,
        "",
        "remove it: the config is the file, and a `checkpoint.load_from` that is missing is an error",
    ),
    ForeignKey(
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo",
        HF,
        "",
        "remove it: a run is never uploaded; it stays below `logging.folder`",
    ),
)
LOGGING = (
    ForeignKey(
        "save output_dir out_dir dump_folder log_dir work_dir logging_dir checkpoint.folder",
        f"{MEGATRON}, {NEOX}, {HF}, {LITGPT}, {TITAN}",
        "logging.folder",
        "the run folder; checkpoints, metrics and curves are below it",
    ),
    ForeignKey(
        "log_interval logging_steps log_freq tensorboard_log_interval steps_per_print",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}, {LITGPT}, {DEEPSPEED}",
        "logging.every",
    ),
    ForeignKey(
        "tensorboard_dir enable_tensorboard save_tb_folder report_to logger_name",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}, {LITGPT}",
        "logging.tensorboard",
        "true or false; the event files lie in the run folder",
    ),
    ForeignKey("wandb_project", f"{MEGATRON}, {NEOX}", "logging.wandb.project"),
    ForeignKey("wandb_entity wandb_team", f"{MEGATRON}, {NEOX}", "logging.wandb.entity"),
    ForeignKey("wandb_group", NEOX, "logging.wandb.group"),
    ForeignKey(
        "wandb_exp_name wandb_run_name run_name",
        f"{MEGATRON}, {NEOX}, {HF}",
        "logging.wandb.name",
        "`logging.mlflow.name` and `logging.trackio.name` are those of the other trackers",
    ),
    ForeignKey(
        "wandb use_wandb enable_wandb", f"{NEOX}, {TITAN}, {LITGPT}", "logging.wandb", "{} or its keys; null for none"
    ),
    ForeignKey("mlflow", HF, "logging.mlflow", "{} or its keys; null for none"),
    ForeignKey("trackio trackio_space_id", HF, "logging.trackio", "{} or its keys; it keeps runs on this machine"),
    ForeignKey(
        "wandb_host wandb_init_all_ranks wandb_save_dir",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: the host is that of `wandb login --host`, rank 0 alone writes, and files are in the run folder",
    ),
    ForeignKey(
        "comet_project neptune",
        f"{NEOX}, {HF}",
        "",
        "remove it: the trackers are `logging.tensorboard`, `logging.wandb`, `logging.mlflow` and `logging.trackio`",
    ),
    ForeignKey(
        "wall_clock_breakdown", f"{DEEPSPEED}, {NEOX}", "deepspeed.wall_clock_breakdown", "a raw key below `deepspeed`"
    ),
    ForeignKey(
        "log_params_norm log_throughput log_timers_to_tensorboard log_memory_to_tensorboard "
        "log_num_zeros_in_grad log_validation_ppl_to_tensorboard log_learning_rate_to_tensorboard "
        "log_loss_scale_to_tensorboard log_grad_norm log_param_norm log_optimizer_states "
        "timing_log_level tensorboard_queue_size include_tokens_per_second include_num_input_tokens_seen "
        "logging_first_step log_level disable_tqdm disable_color_printing",
        f"{MEGATRON}, {NEOX}, {HF}, {TITAN}",
        "",
        "remove it: every line of `logging.every` has loss, learning rate, gradient norm, speed and memory",
    ),
    ForeignKey(
        "profile profiler use_pytorch_profiler profile_step_start profile_step_end profile_freq enable_profiling",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "profiling.steps",
        "the first and the last step, such as [50, 55]; null for none",
    ),
    ForeignKey("profile_ranks", MEGATRON, "profiling.ranks", "a list of ranks"),
    ForeignKey(
        "enable_memory_snapshot record_memory_history memory_breakdown",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "profiling.memory",
        "true or false, for the steps of `profiling.steps`",
    ),
    ForeignKey(
        "save_traces_folder memory_snapshot_path profile_backward save_memory_snapshot_folder",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "",
        "remove it: traces and snapshots are in the folder profile of `logging.folder`, backward passes included",
    ),
    ForeignKey(
        "print_config",
        TITAN,
        "",
        "remove it: `megachiar pretrain --dry-run` prints the resolved config",
    ),
)
