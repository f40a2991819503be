"""The keys that configs and command lines of other stacks have most often all get an answer."""

from __future__ import annotations

import pytest
import yaml

from megachiar.config import ConfigError, parse_config

MEGATRON = """
num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels group-query-attention num-query-groups
max-position-embeddings position-embedding-type use-rotary-position-embeddings rotary-percent rotary-base
make-vocab-size-divisible-by normalization norm-epsilon swiglu squared-relu untie-embeddings-and-output-weights
disable-bias-linear attention-dropout hidden-dropout weight-decay start-weight-decay clip-grad adam-beta1 adam-beta2
adam-eps micro-batch-size global-batch-size rampup-batch-size recompute-granularity recompute-method
recompute-num-layers distribute-saved-activations train-iters train-samples log-interval exit-interval
exit-duration-in-mins tensorboard-dir no-masked-softmax-fusion no-bias-gelu-fusion use-flash-attn transformer-impl
use-mcore-models optimizer dataloader-type sequence-parallel seed init-method-std lr lr-decay-style lr-decay-iters
lr-decay-samples lr-warmup-fraction lr-warmup-iters min-lr override-opt-param-scheduler save save-interval
no-save-optim load no-load-optim no-load-rng finetune ckpt-format fp16 bf16 loss-scale initial-loss-scale
min-loss-scale loss-scale-window hysteresis accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32
tensor-model-parallel-size pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage overlap-grad-reduce
overlap-param-gather use-distributed-optimizer context-parallel-size expert-model-parallel-size distributed-backend
distributed-timeout-minutes local-rank eval-iters eval-interval data-path split train-data-path data-cache-path
vocab-size vocab-file merge-file seq-length tokenizer-type tokenizer-model reset-position-ids reset-attention-mask
eod-mask-loss num-workers log-params-norm log-throughput log-timers-to-tensorboard timing-log-level wandb-project
wandb-exp-name fp8-format
"""
NEOX = """
pipe-parallel-size model-parallel-size num-layers hidden-size num-attention-heads seq-length max-position-embeddings
norm layernorm-epsilon rms-norm-epsilon pos-emb rotary-pct no-weight-tying gpt-j-residual output-layer-parallelism
scaled-upper-triang-masked-softmax-fusion bias-gelu-fusion init_method output_layer_init_method min_lr
zero_optimization.stage batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gas data-impl
mmap-warmup split num_workers checkpoint-activations checkpoint-num-layers partition-activations
synchronize-each-layer gradient_clipping weight-decay hidden-dropout attention-dropout attention-config fp16.enabled
fp16.loss_scale fp16.hysteresis fp16.min_loss_scale precision.fp32_allreduce train-iters lr-decay-iters lr-decay-style
lr-decay-fraction warmup distributed-backend checkpoint-factor checkpoint-scale extra-save-iters eval-interval
eval-iters log-interval steps_per_print keep-last-n-checkpoints wall_clock_breakdown log-grad-norm data-path
train-data-paths train-data-weights valid-data-paths test-data-paths weight-by-num-documents vocab-file merge-file
tokenizer_type save load finetune tensorboard-dir log-dir use_wandb wandb_host wandb_project wandb_group launcher
hostfile num_gpus activation mlp_type use_bias_in_attn_linear make_vocab_size_divisible_by seed
"""
HF = """
output_dir overwrite_output_dir do_train do_eval do_predict eval_strategy evaluation_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay
learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps log_level logging_dir logging_strategy
logging_first_step logging_steps save_strategy save_steps save_total_limit save_safetensors save_only_model no_cuda
use_cpu seed data_seed bf16 fp16 fp16_opt_level half_precision_backend tf32 local_rank ddp_backend
dataloader_drop_last eval_steps dataloader_num_workers dataloader_pin_memory run_name disable_tqdm
remove_unused_columns load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_config
deepspeed label_smoothing_factor optim optim_args group_by_length report_to ddp_find_unused_parameters push_to_hub
resume_from_checkpoint hub_model_id gradient_checkpointing auto_find_batch_size full_determinism ddp_timeout
torch_compile torch_compile_backend include_tokens_per_second neftune_noise_alpha vocab_size hidden_size
num_hidden_layers num_attention_heads num_key_value_heads intermediate_size ffn_dim d_model n_embd n_layer n_head
n_positions n_ctx hidden_act activation_function hidden_dropout_prob attention_probs_dropout_prob attention_dropout
resid_pdrop embd_pdrop max_position_embeddings initializer_range rms_norm_eps layer_norm_eps tie_word_embeddings
rope_theta rope_scaling attention_bias mlp_bias head_dim use_cache torch_dtype bos_token_id eos_token_id
sliding_window model_type architectures
"""
TITAN = """
job.dump_folder job.print_config profiling.enable_profiling profiling.save_traces_folder profiling.profile_freq
profiling.enable_memory_snapshot metrics.log_freq metrics.enable_tensorboard metrics.disable_color_printing
metrics.save_tb_folder metrics.enable_wandb model.name model.flavor model.tokenizer_path model.hf_assets_path
model.converters model.norm_type optimizer.name optimizer.lr optimizer.beta1 optimizer.beta2 optimizer.eps
optimizer.early_step_in_backward lr_scheduler.warmup_steps lr_scheduler.decay_ratio lr_scheduler.decay_type
lr_scheduler.min_lr_factor training.dataset training.dataset_path training.local_batch_size training.seq_len
training.max_norm training.enable_cpu_offload training.mixed_precision_param training.mixed_precision_reduce
training.gc_freq training.deterministic parallelism.data_parallel_replicate_degree
parallelism.data_parallel_shard_degree parallelism.fsdp_reshard_after_forward parallelism.tensor_parallel_degree
parallelism.disable_loss_parallel parallelism.enable_async_tensor_parallel parallelism.pipeline_parallel_degree
parallelism.pipeline_parallel_schedule parallelism.pipeline_parallel_microbatch_size
parallelism.context_parallel_degree parallelism.expert_parallel_degree checkpoint.enable_checkpoint checkpoint.folder
checkpoint.interval checkpoint.initial_load_path checkpoint.initial_load_model_only checkpoint.last_save_model_only
checkpoint.export_dtype checkpoint.async_mode checkpoint.keep_latest_k checkpoint.load_step
checkpoint.exclude_from_loading activation_checkpoint.selective_ac_option compile.enable
float8.enable_fsdp_float8_all_gather comm.init_timeout_seconds comm.train_timeout_seconds validation.freq
validation.steps validation.dataset validation.local_batch_size
"""
LITGPT = """
model_name model_config out_dir initial_checkpoint_dir train.save_interval train.log_interval train.lr_warmup_steps
train.lr_warmup_fraction train.epochs train.max_tokens train.max_steps train.max_time train.max_seq_length
train.tie_embeddings train.max_norm train.min_lr train.learning_rate train.weight_decay train.beta1 train.beta2
eval.interval eval.max_iters eval.initial_validation eval.final_validation optimizer.class_path optimizer.init_args.lr
devices num_nodes tokenizer_dir logger_name seed block_size padded_vocab_size padding_multiple n_layer n_head n_embd
head_size n_query_groups rotary_percentage parallel_residual lm_head_bias norm_class_name norm_eps mlp_class_name
gelu_approximate intermediate_size rope_condense_ratio n_expert max_iters warmup_iters decay_iters lr_decay_iters
weight_decay grad_clip
"""
SHORT = "parallel.tp parallel.dp parallel.pp parallel.cp logging.wandb logging.report_to training.num_warmup_steps"
STACKS = {"Megatron-LM": MEGATRON, "GPT-NeoX": NEOX, "HF": HF, "torchtitan": TITAN, "litgpt": LITGPT, "short": SHORT}


def nested(words: str) -> dict:
    mapping: dict = {}
    for word in words.split():
        *parents, name = word.split(".")
        node = mapping
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = 1
    return mapping


@pytest.mark.parametrize("stack", STACKS)
def test_every_common_key_is_answered(stack):
    mapping = yaml.safe_load(yaml.safe_dump(nested(STACKS[stack])))
    with pytest.raises(ConfigError) as caught:
        parse_config(mapping, "config")
    said = {problem.key: f"{problem.message} | {problem.remedy}" for problem in caught.value.problems}
    assert [key for key, text in said.items() if "is not a known key |" in text] == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("parallel.tp", "`parallel.tensor_size`"),
        ("parallel.pp", "`parallel.pipeline_size`"),
        ("parallel.dp", "`parallel.data_size`"),
        ("wandb_project", "`logging.wandb.project`"),
        ("wandb_exp_name", "`logging.wandb.name`"),
        ("mlflow", "`logging.mlflow`"),
        ("profile_ranks", "`profiling.ranks`"),
        ("profile_step_start", "`profiling.steps`: the first and the last step"),
        ("model.ffn_dim", "`model.ffn_hidden_size`"),
        ("model.hidden_dropout_prob", "`model.dropout`"),
        ("schedule.warmup_iters", "`schedule.warmup_steps`"),
        ("schedule.decay_iters", "`schedule.decay_steps`"),
        ("lr_decay_iters", "`schedule.decay_steps`"),
    ],
)
def test_a_word_is_answered_with_our_key(word, said):
    with pytest.raises(ConfigError) as caught:
        parse_config(nested(word), "config")
    (remedy,) = [problem.remedy for problem in caught.value.problems if problem.key == word]
    assert said in remedy
