"""The hard router learns which operator is better: from the published gradient, and as single switched tokens show."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import small_model_config

from megachiar.config.model import ModelConfig
from megachiar.model import ChiarFormer, build_model

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "published_hard_router.json").read_text())
"""What the published code computes in fp64, with fp64 rotary tables and the weights of ``published_weight``."""

NAMES = {  # published name -> ours, within a layer
    "dct_mix.w": "dct.filter",
    "dct_mix.norm": "dct.norm",
    "attn.out_proj": "attention.output",
    "attn.norm": "attention.norm",
    "ffn.0": "feed_forward.up",
    "ffn.3": "feed_forward.down",
    "ffn_norm": "feed_forward.norm",
    "router.gate_proj": "router.gate",
}


def published_weight(name: str) -> torch.Tensor:
    """Return the weight that the published model had under ``name``: legacy random numbers, which never change."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(tuple(RECORDED["shapes"][name])) * 0.3)


def our_names(name: str) -> list[str]:
    """Return the names of our parameters that hold a published one, in the order of its rows."""
    if name == "token_emb.weight":
        return ["embedding.weight"]
    if name.startswith("meta_router.gate_proj"):
        return [name.replace("meta_router.gate_proj", "layers.0.meta_router.gate")]
    if not name.startswith("layers."):
        return [name]
    _, index, rest = name.split(".", 2)
    parts = [rest]
    if rest.startswith("attn.qkv"):
        parts = [rest.replace("attn.qkv", f"attention.{part}") for part in ("query", "key_value")]
    else:
        for theirs, ours in NAMES.items():
            if rest.startswith(theirs):
                parts = [rest.replace(theirs, ours, 1)]
    if int(index) in (0, RECORDED["sizes"]["n_layers"] - 1):
        parts = [part.replace("dct.", "operator.").replace("attention.", "operator.") for part in parts]
    return [f"layers.{index}.{part}" for part in parts]


@pytest.fixture
def published() -> ChiarFormer:
    sizes = RECORDED["sizes"]
    config = ModelConfig(
        num_layers=sizes["n_layers"],
        hidden_size=sizes["d_model"],
        num_attention_heads=sizes["n_heads"],
        vocab_size=sizes["vocab_size"],
        max_sequence_length=sizes["max_seq_len"],
        dct={"gain": 2.0, "entropy_dc_weight": 2.0, "entropy_epsilon": 1e-8},
        meta_router={"pool": "batch"},
        router={"kind": "hard"},
    )
    model = build_model(config, seed=0, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in RECORDED["shapes"]:
            ours = [parameters.pop(ours) for ours in our_names(name)]
            for parameter, value in zip(ours, published_weight(name).split([len(p) for p in ours]), strict=True):
                parameter.copy_(value)
    assert not parameters
    return model


def test_the_gradient_is_the_published_one(published):
    tokens, routes = torch.tensor(RECORDED["tokens"]), {}
    for name, layer in published.named_modules():
        if name in RECORDED["routes"]:
            layer.router.register_forward_hook(lambda _, x, decision, n=name: routes.update({n: decision.operator}))
    output = published(tokens[:, :-1], tokens[:, 1:])
    output.loss.backward()
    assert {name: found.tolist() for name, found in routes.items()} == {
        name: np.ravel(operators).tolist() for name, operators in RECORDED["routes"].items()
    }
    assert output.loss.item() == pytest.approx(RECORDED["loss"], abs=1e-12)
    gradients = {name: parameter.grad for name, parameter in published.named_parameters()}
    for name, expected in RECORDED["gate_gradients"].items():
        (ours,) = our_names(name)
        torch.testing.assert_close(gradients[ours], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    for name, expected in RECORDED["gradient_norms"].items():
        found = torch.cat([gradients[ours].flatten() for ours in our_names(name)]).norm().item()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-13), name


TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()[200:]


def text_batch(sequences: int, length: int) -> torch.Tensor:
    """Return the bytes of a text as token ids (B, T)."""
    return torch.tensor(list(TEXT[: sequences * length])).view(sequences, length) % 128


@pytest.fixture(scope="module")
def trained() -> dict[str, ChiarFormer]:
    """Models that have read some text, by the gradient of their hard routers."""
    models = {}
    for gradient in ("published", "dct_only"):
        router: dict[str, Any] = {"kind": "hard", "hard_gradient": gradient}
        sizes = {"hidden_size": 64, "ffn_hidden_size": 256, "vocab_size": 128, "max_sequence_length": 32}
        config = small_model_config(**sizes, router=router)
        models[gradient] = model = build_model(config, seed=0, dtype=torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = text_batch(16, 33)
        for _ in range(60):
            optimizer.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
            optimizer.step()
    return models


def switch_tokens(model: ChiarFormer, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
    """Return, for each token, its operator, the predicted and the true change of the loss if it takes the other one."""
    router, seen = model.layers[layer].router, []
    switched: int | None = None

    def decide(_: Any, __: Any, decision: Any) -> Any:
        seen.append(decision)
        operator = decision.operator.clone()
        if switched is not None:
            operator[switched] = 1 - operator[switched]
        return dataclasses.replace(decision, operator=operator)

    handle = router.register_forward_hook(decide)
    try:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = model(inputs, targets).loss
        gates, operator = seen[0].gates, seen[0].operator
        (gradient,) = torch.autograd.grad(loss, gates)
        predicted = gradient.gather(1, 1 - operator[:, None]) - gradient.gather(1, operator[:, None])
        true = torch.empty(len(operator), dtype=torch.float64)
        with torch.no_grad():
            for switched in range(len(operator)):
                true[switched] = model(inputs, targets).loss - loss
    finally:
        handle.remove()
    return operator, predicted[:, 0], true


def test_the_gradient_tells_the_better_operator(trained):
    """A gradient that knows nothing of the other operator is right for half of the tokens."""
    layers = [switch_tokens(trained["published"], text_batch(4, 33), layer) for layer in (1, 2)]
    operator, predicted, true = (torch.cat(parts) for parts in zip(*layers, strict=True))
    agrees = (predicted.sign() == true.sign()).double()
    for taken in (0, 1):
        assert (operator == taken).sum() > 30 and agrees[operator == taken].mean() > 0.8


def test_dct_only_tells_it_for_the_tokens_that_attend_and_is_silent_for_others(trained):
    layers = [switch_tokens(trained["dct_only"], text_batch(4, 33), layer) for layer in (1, 2)]
    operator, predicted, true = (torch.cat(parts) for parts in zip(*layers, strict=True))
    attends = operator == 1
    assert attends.sum() > 30 and (~attends).sum() > 30 and (predicted[~attends] == 0).all()
    assert (predicted.sign() == true.sign())[attends].double().mean() > 0.8
