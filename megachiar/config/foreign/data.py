"""What other stacks call keys of data."""

from __future__ import annotations

from megachiar.config.foreign.row import HF, LITGPT, MEGATRON, NEOX, TITAN, ForeignKey

DATA = (
    ForeignKey(
        "seq_length seq_len max_seq_length max_seq_len",
        f"{MEGATRON}, {NEOX}, {TITAN}, {LITGPT}, {HF}",
        "data.sequence_length",
    ),
    ForeignKey(
        "data_path train_data_path train_data_paths train_data_weights dataset dataset_path dataset_name "
        "data_args_path train_file",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}",
        "data.train",
        "a list of sources, each `- {path: PREFIX, weight: 1}`",
    ),
    ForeignKey(
        "valid_data_path valid_data_paths valid_data_weights validation_file eval_dataset validation.dataset",
        f"{MEGATRON}, {NEOX}, {TITAN}, {HF}",
        "data.validation",
        "a name and a prefix for each set",
    ),
    ForeignKey(
        "test_data_path test_data_paths test_data_weights test_file",
        f"{MEGATRON}, {NEOX}, {HF}",
        "data.test",
        "a name and a prefix for each set, which are read after the last step",
    ),
    ForeignKey(
        "split", f"{MEGATRON}, {NEOX}", "", "remove it: `megachiar preprocess --split` makes a dataset of each part"
    ),
    ForeignKey(
        "tokenizer_path tokenizer_model tokenizer_name_or_path tokenizer_name tokenizer_dir tokenizer_type "
        "hf_assets_path vocab_file "
        "merge_file",
        f"{MEGATRON}, {NEOX}, {TITAN}, {LITGPT}, {HF}",
        "data.tokenizer",
        "a file or folder; the datasets' manifests name it where this key is not given",
    ),
    ForeignKey(
        "reset_attention_mask",
        f"{MEGATRON}, {NEOX}",
        "data.document_mask",
    ),
    ForeignKey(
        "reset_position_ids",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: rotary positions are relative, so that there is nothing to reset where a document begins",
    ),
    ForeignKey(
        "eod_mask_loss",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: there is no such key, the loss counts every token, those that end a document too",
    ),
    ForeignKey(
        "num_workers dataloader_num_workers",
        f"{MEGATRON}, {NEOX}, {HF}",
        "",
        "remove it: there are no worker processes, each rank reads `data.prefetch` micro-batches ahead",
    ),
    ForeignKey("dataloader_prefetch_factor", HF, "data.prefetch", "micro-batches that each rank reads ahead"),
    ForeignKey(
        "data_impl mmap_warmup dataloader_type data_cache_path dataset_impl num_dataset_builder_threads "
        "no_create_attention_mask_in_dataloader no_mmap_bin_files dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_drop_last",
        f"{NEOX}, {MEGATRON}, {HF}",
        "",
        "remove it: datasets are always memory-mapped, and no index is built; `data.order` names the order",
    ),
    ForeignKey(
        "group_by_length length_column_name remove_unused_columns label_names pack_impl label_data_paths "
        "mask_before_token pad_to_max_length",
        f"{HF}, {NEOX}",
        "",
        "remove it: a sample is always `data.sequence_length` consecutive tokens, without padding",
    ),
    ForeignKey(
        "weight_by_num_documents weighted_sampler_alpha blend_weights",
        NEOX,
        "data.train",
        "each source has its own weight, `- {path: PREFIX, weight: 1}`",
    ),
    ForeignKey(
        "ignore_data_skip",
        HF,
        "",
        "remove it: a run always goes on where it stopped in its data",
    ),
)
