"""The FLOP and memory formulas against counters that watch the real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from model_cases import ROUTERS, THREE, small_model_config, token_batch
from torch.utils.flop_counter import FlopCounterMode

from megachiar.config import load_config
from megachiar.config.model import ModelConfig
from megachiar.model import build_model
from megachiar.model.static_shapes import use_static_shapes
from megachiar.planning.activations import head_activations, layer_activations
from megachiar.planning.flops import forward_flops_per_token, layer_flops_per_token, training_flops_per_token

CONFIGS = Path(__file__).parents[2] / "configs"
SEQUENCES, LENGTH = 2, 96
WIDE = {"hidden_size": 64, "ffn_hidden_size": None, "num_layers": 6, "vocab_size": 300, "max_sequence_length": LENGTH}


def wide_config(**fields) -> ModelConfig:
    return small_model_config(**WIDE | fields)


class Protocol(FlopCounterMode):
    """PyTorch's counter with formulas for what it does not know: transforms, and attention on a CPU."""

    def __init__(self):
        aten = torch.ops.aten

        def transform(x, dims, *_, out_shape=None, **__):  # input or output holds d real numbers in each row
            rows, d = math.prod(x[:-1]), max(x[-1], out_shape[-1])
            return rows * 2.5 * d * math.log2(d)

        def attention(q, k, *_, **__):
            return 4 * math.prod(q) * k[2]

        def attention_backward(_, q, k, *__, **___):
            return 8 * math.prod(q) * k[2]

        mapping = {
            aten._fft_r2c: transform,
            aten._fft_c2r: transform,
            aten._fft_c2c: transform,
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        }
        super().__init__(display=False, custom_mapping=mapping)


def counted_flops(config: ModelConfig, interval: int | None = None, preferred: int = 0) -> tuple[float, float, float]:
    """Return the FLOPs per token that a forward and backward pass executes, and the shares of attention and RBF mixing.

    Attention's kernel is counted with all T keys of every query, masked ones too. A hard router sends all tokens to the
    operator ``preferred``.
    """
    model = build_model(config, seed=0, checkpoint_interval=interval).train()
    for name, bias in model.named_parameters():
        if name.endswith(".router.gate.bias"):
            bias.data[preferred] = 100
    tokens = token_batch(SEQUENCES, LENGTH + 1, config.vocab_size)
    with Protocol() as counter:
        # One sample, as it were: a random router takes the same positions in all sequences, so that nothing is padded.
        output = model(tokens[:, :-1], tokens[:, 1:], torch.zeros(SEQUENCES, dtype=torch.long))
        (output.loss + output.regulariser).backward()
    shares = (s.mean().item() for s in (output.statistics.attention_share, output.statistics.rbf_share))
    return counter.get_total_flops() / (SEQUENCES * LENGTH), *shares


HALF = {"kind": "random", "attention_share": 0.5}
THIRDS = {"kind": "random", "operators": THREE, "attention_share": 0.4, "rbf_share": 0.3}
COUNTED = {
    "baseline": {"kind": "baseline"},
    "half": {"router": HALF},
    "a tenth": {"router": {"kind": "random", "attention_share": 0.1, "seed": 2}},
    "all dct": {"router": {"tau": 1.0}},
    "all attention": {"router": {"tau": 0.0}},
    "keys of routed": {"router": HALF, "attention": {"keys": "routed"}},
    "keys of a tenth": {"router": {"kind": "random", "attention_share": 0.1}, "attention": {"keys": "routed"}},
    "soft": {"router": ROUTERS["soft"]},
    "soft three": {"router": ROUTERS["soft three"]},
    "three": {"router": THIRDS},
    "hard, all dct": {"router": {"kind": "hard"}},
    "hard, all attention": {"router": {"kind": "hard"}},
    "hard three, all dct": {"router": {"kind": "hard", "operators": THREE}, "norm": "pre"},
    "hard dct only, all dct": {"router": {"kind": "hard", "hard_gradient": "dct_only"}},
    "hard dct only, all attention": {"router": {"kind": "hard", "hard_gradient": "dct_only"}, "norm": "pre"},
    "regularised": {"router": {"tau": 1.0, "collapse_weight": 0.1}},
    "hashed, all dct": {"router": {"kind": "hashed", "tau": 1.0}},
    "hashed, all attention": {"router": {"kind": "hashed", "tau": 0.0}, "norm": "pre"},
    "hashed, regularised": {"router": {"kind": "hashed", "tau": 1.0, "collapse_weight": 0.1}},
    "learned": {"router": {"kind": "learned", "target_share": 0.5, "explore": 1.0}},
    "learned, pre": {"router": {"kind": "learned", "target_share": 0.5, "explore": 1.0}, "norm": "pre"},
    "pre": {"router": HALF, "norm": "pre"},
    "gate over the batch": {"router": HALF, "meta_router": {"pool": "batch"}},
    "no gate": {"router": HALF, "meta_router": {"pool": "none"}},
    "narrow feed-forward": {"router": HALF, "ffn_hidden_size": 64},
    "wide": {"router": HALF, "hidden_size": 256, "num_layers": 4},
}


@pytest.mark.parametrize("interval", (None, 2))
@pytest.mark.parametrize("case", COUNTED)
def test_flops_are_those_a_counter_sees(monkeypatch, case, interval):
    """Transforms are FFTs."""
    monkeypatch.setattr("megachiar.kernels.dct.FFT_FROM", 0)
    config = wide_config(**COUNTED[case])
    counted, *shares = counted_flops(config, interval, preferred=int("all attention" in case))
    if "soft" in case:  # a soft router reports weights of operators, but every token takes all of them
        shares = [1.0, 0.0]
    formula = training_flops_per_token(config, LENGTH, *shares, count_masked=True, recomputed=interval is not None)
    if interval and config.norm == "pre":  # nothing needs the last product of a recomputed group a second time
        formula -= 2 * config.hidden_size * config.ffn_size * config.num_layers / interval
    assert formula == pytest.approx(counted, rel=0.01), f"{formula / counted:.4f} of what is executed"


def test_chunks_of_queries_execute_what_causal_counting_counts(monkeypatch):
    """With chunks of one query the kernel reads no masked key. Half of the tokens take attention."""
    monkeypatch.setattr("megachiar.kernels.dct.FFT_FROM", 0)
    monkeypatch.setattr("megachiar.kernels.cpu_attention.LEAF", 1)
    config = wide_config(router=HALF)
    counted, share, _ = counted_flops(config)
    # The last layer has another kernel, which counts all keys.
    masked = layer_flops_per_token(config, 5, LENGTH, 1.0, count_masked=True).products
    masked -= layer_flops_per_token(config, 5, LENGTH, 1.0).products
    assert training_flops_per_token(config, LENGTH, share) + 3 * masked == pytest.approx(counted, rel=0.01)


def test_causal_counting_leaves_out_the_masked_half():
    config = wide_config(kind="baseline")
    seen, all_keys = (forward_flops_per_token(config, LENGTH, 1.0, count_masked=m) for m in (False, True))
    assert seen.products / all_keys.products == pytest.approx((LENGTH + 1) / 2 / LENGTH)
    assert all_keys.total - seen.total == pytest.approx(all_keys.products - seen.products)
    assert training_flops_per_token(config, LENGTH, 1.0) == pytest.approx(3 * seen.total)


@pytest.mark.parametrize(
    ("count_masked", "savings"), [(True, (9.1, 13.0, 23.2, 37.3)), (False, (8.4, 10.5, 17.2, 30.4))]
)
def test_savings_of_the_400m_model_when_half_of_all_tokens_take_attention(count_masked, savings):
    """The savings are those of the whole model, in percent of the baseline, at T = 256, 1024, 4096 and 16384."""
    model, baseline = (load_config(CONFIGS / f"{name}.yaml").model for name in ("400m", "400m_baseline"))
    for length, expected in zip((256, 1024, 4096, 16384), savings, strict=True):
        routed = forward_flops_per_token(model, length, 0.5, count_masked=count_masked).total
        dense = forward_flops_per_token(baseline, length, 1.0, count_masked=count_masked).total
        assert 100 * (1 - routed / dense) == pytest.approx(expected, abs=0.06)


def test_flops_fall_with_the_attention_share_and_parts_add_up():
    config = wide_config()
    flops = [forward_flops_per_token(config, LENGTH, share) for share in (0.2, 0.5, 0.9)]
    assert flops[0].total < flops[1].total < flops[2].total
    assert flops[0].spectral > flops[1].spectral > flops[2].spectral
    for f in flops:
        assert f.total == pytest.approx(f.attention + f.spectral + f.gates + f.feed_forward + f.head)
        assert f.operators == f.attention + f.spectral + f.gates


# Memory --------------------------------------------------------------------------------------------------------------


def kept_values(config: ModelConfig, sequences: int = 8, static_shapes: bool = False) -> tuple[float, float]:
    """Return the values that autograd keeps, and the attention share of the routed layers.

    Each storage is counted once, and weights are not counted.
    """
    model = build_model(config, seed=0)
    if static_shapes:
        use_static_shapes(model)
    left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out and tensor.shape != model.embedding.weight.shape:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = token_batch(sequences, LENGTH + 1, config.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens[:, :-1], tokens[:, 1:])
    share = output.statistics.attention_share[1:-1].mean().item()
    return sum(storage.nbytes() for storage in kept.values()) / 4, share


MEMORY_CASES = {
    "baseline": {"kind": "baseline"},
    "share 0.5": {"router": {"kind": "random", "attention_share": 0.5}},
    "share 0": {"router": {"tau": 1.0}},
    "share 1": {"router": {"tau": 0.0}},
    "threshold": {"router": {"tau": 0.82}},
    "keys of routed": {"router": {"kind": "random", "attention_share": 0.5}, "attention": {"keys": "routed"}},
    "keys of routed, tau": {"router": {"tau": 0.82}, "attention": {"keys": "routed"}},
    "three": {"router": {"operators": THREE, "tau_low": 0.8, "tau_high": 0.84}},
    "three without rbf rows": {"router": {"operators": THREE, "tau_low": 0.82, "tau_high": 0.82}},
    "soft": {"router": ROUTERS["soft"]},
    "hard": {"router": ROUTERS["hard"]},
    "hard three": {"router": ROUTERS["hard three"]},
    "hard dct only": {"router": ROUTERS["hard dct only"]},
    "regularised": {"router": {"tau": 0.82, "collapse_weight": 0.1}},
    "hashed": {"router": {"kind": "hashed", "tau": 0.82}},
    "hashed, regularised": {"router": {"kind": "hashed", "tau": 0.82, "collapse_weight": 0.1}},
    "learned": {"router": {"kind": "learned", "target_share": 0.5, "explore": 0.3}},
    "learned, all explored": {"router": {"kind": "learned", "target_share": 0.5, "explore": 1.0}},
    "gate over the batch": {"router": {"tau": 0.82}, "meta_router": {"pool": "batch"}},
    "no gate": {"router": {"tau": 0.82}, "meta_router": {"pool": "none"}},
    "pre": {"router": {"tau": 0.82}, "norm": "pre"},
    "narrow feed-forward": {"router": {"tau": 0.82}, "ffn_hidden_size": 64},
}


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_kept_values_are_those_autograd_keeps(case, dropout):
    config = wide_config(**MEMORY_CASES[case], dropout=dropout)
    kept, share = kept_values(config)
    kept /= 8 * LENGTH
    parts = [layer_activations(config, index, share) for index in range(config.num_layers)]
    formula = sum(part.per_rank(1, False) for part in (*parts, head_activations(config)))
    assert formula == pytest.approx(kept, rel=0.2), f"{formula / kept:.3f} of what is kept at share {share:.2f}"


STATIC_CASES = ("share 0.5", "share 0", "share 1", "keys of routed", "keys of routed, tau", "regularised", "hashed")


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("norm", ("post", "pre"))
@pytest.mark.parametrize("case", STATIC_CASES)
def test_kept_values_of_static_shapes_are_those_autograd_keeps(case, norm, dropout):
    """A second batch, twice as large, leaves out what does not grow with tokens: DCT mixing as matrices."""
    config = wide_config(**MEMORY_CASES[case], norm=norm, dropout=dropout)
    small, large = (kept_values(config, sequences, static_shapes=True)[0] for sequences in (4, 8))
    kept = (large - small) / (4 * LENGTH)
    parts = [layer_activations(config, index, 0.9, static_shapes=True) for index in range(config.num_layers)]
    formula = sum(part.per_rank(1, False) for part in (*parts, head_activations(config)))
    # Single numbers of rows: a part in 40 of a layer's d = 64. The entropy with a gradient is counted high.
    within = 0.05 if "regularised" in case else 0.02
    assert formula == pytest.approx(kept, rel=within), f"{formula / kept:.3f} of what is kept"
