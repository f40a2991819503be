"""Small models for the tests of the model, with every router and every number of operators."""

from __future__ import annotations

from typing import Any

import torch

from megachiar.config.model import ModelConfig
from megachiar.model import ChiarFormer, build_model

TWO, THREE = ("dct", "attention"), ("dct", "rbf", "attention")
MIDDLE, LOW, HIGH = 0.79, 0.77, 0.82  # of H for d = 32
ROUTERS: dict[str, dict[str, Any]] = {
    "threshold": {"tau": MIDDLE},
    "threshold all dct": {"tau": 1.0},
    "threshold all attention": {"tau": 0.0},
    "threshold per layer": {"tau": (0.74, 0.83)},
    "threshold three": {"operators": THREE, "tau_low": LOW, "tau_high": HIGH},
    "threshold three without rbf": {"operators": THREE, "tau_low": MIDDLE, "tau_high": MIDDLE},
    "threshold three all rbf": {"operators": THREE, "tau_low": 0.0, "tau_high": 1.0},
    "threshold regularised": {"tau": MIDDLE, "collapse_weight": 0.3},
    "threshold three regularised": {"operators": THREE, "tau_low": LOW, "tau_high": HIGH, "collapse_weight": 0.3},
    "soft": {"kind": "soft"},
    "soft three": {"kind": "soft", "operators": THREE, "collapse_weight": 0.3},
    "hard": {"kind": "hard"},
    "hard dct only": {"kind": "hard", "hard_gradient": "dct_only"},
    "hard three": {"kind": "hard", "operators": THREE, "collapse_weight": 0.3},
    "random": {"kind": "random", "attention_share": 0.4, "seed": 5},
    "random all dct": {"kind": "random", "attention_share": 0.0},
    "random all attention": {"kind": "random", "attention_share": 1.0},
    "random three": {"kind": "random", "operators": THREE, "attention_share": 0.3, "rbf_share": 0.4},
    "hashed": {"kind": "hashed", "tau": MIDDLE, "seed": 5},
    "hashed three": {"kind": "hashed", "operators": THREE, "tau_low": LOW, "tau_high": HIGH},
    "hashed regularised": {"kind": "hashed", "tau": (0.77, 0.81), "collapse_weight": 0.3},
    "threshold of a share": {"tau": (0.78, 0.8), "target_share": 0.4},
    "learned": {"kind": "learned", "target_share": 0.4, "explore": 0.3},
    "learned all explored": {"kind": "learned", "target_share": 0.4, "explore": 1.0},
}
VARIANTS: dict[str, dict[str, Any]] = {"baseline": {"kind": "baseline"}}
VARIANTS |= {name: {"router": router} for name, router in ROUTERS.items()}
SCALED = {"embedding_multiplier": 5.0}
VARIANTS |= {"embedding multiplier": SCALED, "baseline, embedding multiplier": SCALED | {"kind": "baseline"}}
KEYS_OF_ROUTED = {"attention": {"keys": "routed"}}
VARIANTS |= {
    f"{name}, keys of routed": {"router": ROUTERS[name]} | KEYS_OF_ROUTED
    for name in ("threshold", "threshold all dct", "threshold all attention", "hard dct only", "random", "hashed")
}


def small_model_config(**fields: Any) -> ModelConfig:
    """Return the config of a model with 4 layers, 2 of them routed, and d = 32; ``fields`` replace fields of it."""
    base: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 31,
        "max_sequence_length": 16,
        "router": {"tau": MIDDLE},
    }
    return ModelConfig.model_validate(base | fields)


def lively_model(config: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float64) -> ChiarFormer:
    """Return a model whose weights all differ from their neutral start, so that no gradient is zero by accident."""
    model = build_model(config, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else 0.15
            parameter += spread * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model.to(dtype)


def token_batch(sequences: int = 3, length: int = 12, vocab_size: int = 31, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))
