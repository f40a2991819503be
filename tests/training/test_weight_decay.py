"""``optimizer.decay_all``: weight decay for every parameter, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name
from megachiar.checkpoint.reading import read_weights
from megachiar.config import load_config
from megachiar.model import build_model

RATE, DECAY = 1e-3, 0.5
LAYOUTS = {
    "1 process, ZeRO 0": (1, ["parallel.zero_stage=0"]),
    "tp 2, sequence": (2, ["parallel.tensor_size=2", "parallel.sequence=true"]),
    "pp 2": (2, ["parallel.pipeline_size=2"]),
    "dp 2, ZeRO 2, offload": (2, ["parallel.zero_stage=2", "parallel.offload_optimizer=true"]),
    "dp 2, ZeRO 3": (2, ["parallel.zero_stage=3"]),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decay")
    write_tokens(folder / "train")
    config = small_config(folder, training={"steps": 1}, schedule={"warmup_steps": 0, "kind": "constant"})
    del config["data"]["validation"]
    # AdamW divides by the gradient's size: a large epsilon keeps noise of the layout out where there is next to none.
    config["optimizer"] = {"learning_rate": RATE, "weight_decay": DECAY, "epsilon": 1e-4}
    return write_config(folder / "config.yaml", config)


def weights_after_a_step(config: Path, name: str, ranks: int, *overrides: str) -> dict[str, torch.Tensor]:
    folder = config.parent / name.replace(" ", "_")
    pretrain(config, f"logging.folder={folder}", *overrides, ranks=ranks)
    return read_weights(folder / "checkpoints" / checkpoint_name(1))


@pytest.fixture(scope="module")
def usual(config) -> dict[str, torch.Tensor]:
    """The weights after a step in which vectors do not decay."""
    return weights_after_a_step(config, "usual", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decay_takes_its_share_of_every_parameter(config, usual, layout):
    """AdamW's decay is apart from its step: beside the step each weight loses RATE * DECAY of what it was."""
    ranks, overrides = LAYOUTS[layout]
    after = weights_after_a_step(config, layout, ranks, "optimizer.decay_all=true", *overrides)
    loaded = load_config(config)
    before = dict(build_model(loaded.model, seed=loaded.training.seed).named_parameters())
    vectors = [name for name, weight in before.items() if weight.ndim < 2]
    assert {"layers.0.operator.filter", "norm.weight"} <= set(vectors)
    for name, weight in before.items():
        lost = RATE * DECAY * weight.detach() if name in vectors else torch.zeros_like(weight)
        torch.testing.assert_close(usual[name] - after[name], lost, rtol=1e-3, atol=2e-7, msg=f"{layout}: {name}")
    assert any(before[name].abs().min() > 0.5 for name in vectors), "a weight of 1 loses 5e-4, and no less is seen"
