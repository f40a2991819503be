"""What other stacks call keys of the model."""

from __future__ import annotations

from megachiar.config.foreign.row import HF, LITGPT, MEGATRON, NEOX, TITAN, ForeignKey

MODEL = (
    ForeignKey(
        "model_name model_config architectures model.name model.flavor model_type",
        f"{LITGPT}, {TITAN}, {HF}",
        "",
        "remove it: `model.kind` and the sizes beside it say what the model is",
    ),
    ForeignKey("n_layer n_layers num_hidden_layers", f"{LITGPT}, {TITAN}, {HF}", "model.num_layers"),
    ForeignKey("n_embd dim d_model", f"{LITGPT}, {TITAN}, {HF}", "model.hidden_size"),
    ForeignKey("n_head n_heads num_heads", f"{LITGPT}, {TITAN}, {HF}", "model.num_attention_heads"),
    ForeignKey("intermediate_size n_inner ffn_dim d_ff", f"{LITGPT}, {HF}", "model.ffn_hidden_size"),
    ForeignKey(
        "max_position_embeddings block_size n_positions n_ctx",
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
        "hidden_dropout attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob "
        "attention_probs_dropout_prob resid_dropout dropout_rate",
        f"{MEGATRON}, {NEOX}, {HF}",
        "model.dropout",
        "one probability for the embedding, the feed-forward and attention's weights",
    ),
    ForeignKey("init_method_std initializer_range", f"{MEGATRON}, {NEOX}, {HF}", "model.initializer_std"),
    ForeignKey(
        "scale_emb mup_embedding_multiplier mup_embedding_mult embedding_multiplier_scale",
        f"{HF}, {NEOX}, {MEGATRON}",
        "model.embedding_multiplier",
    ),
    ForeignKey(
        "scale_embeddings scale_embedding",
        f"{LITGPT}, {HF}",
        "model.embedding_multiplier",
        "true is the root of the hidden size, false is 1",
    ),
    ForeignKey(
        "embed_layernorm word_embeddings_layernorm layernorm_embedding",
        f"Megatron-DeepSpeed, {HF}",
        "",
        "remove it: the embedding has no norm; `model.embedding_multiplier` scales its rows",
    ),
    ForeignKey(
        "embedding_init_method_std",
        MEGATRON,
        "model.embedding_multiplier",
        "that deviation divided by `model.initializer_std`: the tied weight itself keeps the scale of the head",
    ),
    ForeignKey(
        "layernorm_epsilon norm_eps layer_norm_epsilon layer_norm_eps rms_norm_eps rms_norm_epsilon scalenorm_epsilon",
        f"{MEGATRON}, {NEOX}, {LITGPT}, {HF}",
        "model.norm_epsilon",
    ),
    ForeignKey(
        "rotary_base rotary_emb_base rope_theta", f"{MEGATRON}, {NEOX}, {TITAN}, {HF}", "model.attention.rope_base"
    ),
    ForeignKey(
        "norm normalization norm_class_name norm_type apply_layernorm_1p",
        f"{NEOX}, {MEGATRON}, {LITGPT}, {TITAN}",
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
        "swiglu activation activation_function hidden_act mlp_class_name mlp_type squared_relu gelu_approximate",
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
        "use_flash_attn attention_backend attn_implementation transformer_impl use_mcore_models",
        f"{MEGATRON}, {HF}",
        "precision.kernels",
        "auto takes the fastest kernels that the machine has",
    ),
    ForeignKey(
        "init_method output_layer_init_method",
        NEOX,
        "",
        "remove it: weights are drawn from a normal distribution, whose deviation is `model.initializer_std`",
    ),
    ForeignKey(
        "kv_channels head_dim head_size",
        f"{MEGATRON}, {HF}, {LITGPT}",
        "",
        "remove it: a head has `model.hidden_size` / `model.num_attention_heads` channels",
    ),
    ForeignKey(
        "disable_bias_linear add_bias_linear add_qkv_bias attention_bias mlp_bias lm_head_bias "
        "use_bias_in_attn_linear use_bias_in_norms",
        f"{MEGATRON}, {HF}, {LITGPT}, {NEOX}",
        "",
        "remove it: every linear layer but the output layer has a bias",
    ),
    ForeignKey(
        "gpt_j_residual parallel_residual use_parallel_residual",
        f"{NEOX}, {LITGPT}, {HF}",
        "",
        "remove it: the feed-forward always follows attention or mixing",
    ),
    ForeignKey(
        "rope_scaling rope_condense_ratio rotary_seq_len_interpolation_factor",
        f"{HF}, {LITGPT}, {MEGATRON}",
        "",
        "remove it: positions are never rescaled, and `model.attention.rope_base` is their one setting",
    ),
    ForeignKey(
        "sliding_window sparsity_config window_size attention_config",
        f"{HF}, {NEOX}, {MEGATRON}",
        "",
        "remove it: attention sees all earlier tokens; `model.router.operators` says which tokens attend",
    ),
    ForeignKey(
        "apply_query_key_layer_scaling no_query_key_layer_scaling attention_softmax_in_fp32 "
        "fp32_residual_connection fp16_lm_cross_entropy",
        f"{MEGATRON}, {NEOX}",
        "",
        "remove it: loss and spectral entropy are computed in fp32, and activations have the type of "
        "`precision.compute`",
    ),
    ForeignKey(
        "no_masked_softmax_fusion no_bias_gelu_fusion no_bias_swiglu_fusion no_bias_dropout_fusion "
        "no_rope_fusion scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion "
        "bias_gelu_fusion bias_dropout_fusion rope_fusion layernorm_fusion",
        f"{MEGATRON}, {NEOX}",
        "precision.kernels",
        "auto takes the fastest kernels that the machine has",
    ),
    ForeignKey(
        "use_cache pretraining_tp transformers_version converters",
        f"{HF}, {TITAN}",
        "",
        "remove it: it means nothing to this model",
    ),
    ForeignKey(
        "eos_token_id",
        HF,
        "data.document_end",
        "with `data.document_mask`, where no manifest says which token ends a document",
    ),
    ForeignKey(
        "bos_token_id pad_token_id",
        HF,
        "",
        "remove it: a sample has no padding and no token of its own at its beginning",
    ),
)
