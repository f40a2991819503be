"""What other stacks call keys of layout and number formats."""

from __future__ import annotations

from megachiar.config.foreign.row import DEEPSPEED, HF, LITGPT, MEGATRON, NEOX, TITAN, ForeignKey

PARALLEL = (
    ForeignKey(
        "tensor_model_parallel_size model_parallel_size tensor_parallel_degree tensor_parallel_size tp "
        "tp_size tp_degree",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "parallel.tensor_size",
    ),
    ForeignKey(
        "pipeline_model_parallel_size pipe_parallel_size pipeline_parallel_degree pipeline_parallel_size pp "
        "pp_size pp_degree num_stages",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "parallel.pipeline_size",
        "1 for no pipeline",
    ),
    ForeignKey("sequence_parallel", f"{MEGATRON}, {NEOX}", "parallel.sequence"),
    ForeignKey(
        "data_parallel_size data_parallel_replicate_degree dp dp_size dp_degree",
        f"{MEGATRON}, {TITAN}",
        "parallel.data_size",
        "it follows from the number of ranks where it is not given",
    ),
    ForeignKey(
        "data_parallel_shard_degree fsdp fsdp_config use_distributed_optimizer use_torch_fsdp2 "
        "fsdp_reshard_after_forward fsdp_transformer_layer_cls_to_wrap",
        f"{TITAN}, {HF}, {MEGATRON}",
        "parallel.zero_stage",
        "1 shards optimizer state over the replicas, 2 gradients as well, 3 parameters as well",
    ),
    ForeignKey("zero_optimization.stage", f"{DEEPSPEED}, {NEOX}", "parallel.zero_stage"),
    ForeignKey(
        "zero_optimization.offload_optimizer zero_optimization.offload_optimizer.device cpu_offload enable_cpu_offload "
        "optimizer_cpu_offload cpu_offload_params",
        f"{DEEPSPEED}, {TITAN}, {MEGATRON}",
        "parallel.offload_optimizer",
        "true or false; the weights that a step computes with and its activations stay on the GPU",
    ),
    ForeignKey(
        "zero_optimization", f"{DEEPSPEED}, {NEOX}", "deepspeed.zero_optimization", "a raw key stands below `deepspeed`"
    ),
    ForeignKey(
        "context_parallel_size context_parallel_degree cp cp_size context_parallel_rotate_method cp_comm_type",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "",
        "remove it: a sequence is never split over ranks; `parallel.sequence` shards what is outside attention",
    ),
    ForeignKey(
        "devices num_nodes num_gpus num_gpus_per_node global_num_gpus nnodes nproc_per_node hostfile "
        "launcher master_addr master_port local_rank",
        f"{LITGPT}, {NEOX}, {MEGATRON}, {HF}",
        "",
        "remove it: a run has the ranks that its launcher starts",
    ),
    ForeignKey(
        "distributed_backend ddp_backend",
        f"{MEGATRON}, {NEOX}, {HF}",
        "",
        "remove it: ranks on GPUs meet by NCCL, ranks on CPUs by gloo",
    ),
    ForeignKey(
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
        "pipeline_parallel_schedule pipeline_parallel_split_points pipeline_parallel_layers_per_stage "
        "pipe_partition_method",
        f"{MEGATRON}, {TITAN}, {NEOX}",
        "",
        "remove it: the schedule is always 1F1B, and layers are shared out by their cost over `parallel.pipeline_size`",
    ),
    ForeignKey(
        "pipeline_parallel_microbatch_size",
        TITAN,
        "training.micro_batch_size",
    ),
    ForeignKey(
        "overlap_grad_reduce overlap_param_gather ddp_bucket_size ddp_bucket_cap_mb",
        f"{MEGATRON}, {HF}",
        "deepspeed.zero_optimization",
        "overlap_comm, reduce_bucket_size and the like, as raw keys below it",
    ),
    ForeignKey(
        "ddp_find_unused_parameters ddp_broadcast_buffers",
        HF,
        "",
        "remove it: DeepSpeed sums the gradients, not torch's DDP",
    ),
    ForeignKey(
        "disable_loss_parallel enable_async_tensor_parallel no_async_tensor_model_parallel_allreduce "
        "output_layer_parallelism tp_comm_overlap",
        f"{TITAN}, {MEGATRON}, {NEOX}",
        "",
        "remove it: how a layer is split follows from `parallel.tensor_size` and `parallel.sequence`",
    ),
    ForeignKey(
        "no_cuda use_cpu use_mps_device",
        HF,
        "",
        "remove it: a run takes the GPUs that it sees, and CUDA_VISIBLE_DEVICES='' hides them",
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
        "half_precision_backend fp16_opt_level amp",
        HF,
        "",
        "remove it: nothing is cast on the way; all computes in `precision.compute`, with fp32 master weights",
    ),
    ForeignKey(
        "fp16.loss_scale",
        f"{DEEPSPEED}, {NEOX}",
        "precision.loss_scale",
        "dynamic in place of 0",
    ),
    ForeignKey(
        "initial_scale_power init_scale",
        f"{DEEPSPEED}, {NEOX}",
        "precision.initial_loss_scale",
        "2 to this power",
    ),
    ForeignKey(
        "hysteresis min_loss_scale min_scale loss_scale_raise_factor consecutive_hysteresis",
        f"{DEEPSPEED}, {NEOX}",
        "deepspeed.fp16",
        "a raw key below it",
    ),
    ForeignKey(
        "grad_accum_dtype accumulate_allreduce_grads_in_fp32",
        f"{DEEPSPEED}, {MEGATRON}",
        "precision.gradient_accumulation",
        "fp32 where it is not given",
    ),
    ForeignKey(
        "grad_reduce_in_fp32 fp32_allreduce mixed_precision_reduce",
        f"{MEGATRON}, {NEOX}, {TITAN}",
        "deepspeed.communication_data_type",
        "the type in which replicas exchange gradients, as a raw key below `deepspeed`: fp32, bf16 or fp16",
    ),
    ForeignKey(
        "dynamic_loss_scale",
        NEOX,
        "precision.loss_scale",
        "dynamic",
    ),
    ForeignKey(
        "fp8 fp8_format fp8_recipe fp8_hybrid float8 enable_fsdp_float8_all_gather quantize",
        f"{MEGATRON}, {TITAN}, {LITGPT}",
        "",
        "remove it: there is no 8-bit format; `precision.compute` is bf16, fp16 or fp32",
    ),
    ForeignKey(
        "deterministic deterministic_mode full_determinism cudnn_deterministic",
        f"{TITAN}, {MEGATRON}, {HF}",
        "",
        "remove it: `training.seed` fixes weights, order of samples and dropout",
    ),
)
