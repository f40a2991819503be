"""Compare, on one rank, models that are sharded over all ranks with the same models on one rank.

    python model_shards_worker.py FOLDER

Cases and layout are read from FOLDER/layout.json, and rank 0 writes the greatest deviations to FOLDER/measured.json.
``tests/model/test_shards.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_cases import lively_model, small_model_config, token_batch

from megachiar.model import ChiarFormer, ModelOutput, build_model
from megachiar.parallel.shard import shard_of
from megachiar.topology import TensorParallelGroup

SIZES = {"num_attention_heads": 6, "hidden_size": 36, "vocab_size": 30, "dropout": 0.1}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = json.loads((folder / "layout.json").read_text())
    group = TensorParallelGroup(rank, size, layout["sequence"], dist.group.WORLD)
    measured = {case: deviations(fields, group, layout["interval"]) for case, fields in layout["cases"].items()}
    everyone: list = [None] * size
    dist.all_gather_object(everyone, measured)
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(worst_of(everyone)))
    dist.destroy_process_group()


def deviations(fields: dict, group: TensorParallelGroup, interval: int | None) -> dict[str, float]:
    """Return the greatest difference in each result of a training pass between this rank's part and the whole model."""
    config = small_model_config(**SIZES | fields)
    whole = lively_model(config).train()
    part = build_model(config, seed=1, dtype=torch.float64, group=group, checkpoint_interval=interval).train()
    of_whole = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(_cut(of_whole[name], parameter, group))
    tokens = token_batch(3, 13, vocab_size=30)
    expected, output = run(whole, tokens), run(part, tokens)
    found = {
        name: _distance(getattr(output, name), getattr(expected, name))
        for name in ("loss", "regulariser", "token_losses")
    }
    for name, value in output.statistics._asdict().items():
        if group.shards_rows:  # statistics of a rank's rows; blocks are equal, so that their mean is that of all rows
            value = value.clone()
            dist.all_reduce(value)
            value /= group.size
        found[f"statistics {name}"] = _distance(value, getattr(expected.statistics, name)) / 1e6  # held in fp32
    for name, parameter in part.named_parameters():
        gradient = of_whole[name].grad
        assert gradient is not None, name
        found[f"gradient of {name}"] = _distance(parameter.grad, _cut(gradient, parameter, group))
    return found


def run(model: ChiarFormer, tokens: torch.Tensor) -> ModelOutput:
    output = model(tokens[:, :-1], tokens[:, 1:], torch.tensor([4, 9, 2]))
    (output.loss + output.regulariser).backward()
    return output


def worst_of(everyone: list[dict]) -> dict:
    """Return the greatest deviation over all ranks, by case and result."""
    return {
        case: {what: max(one[case][what] for one in everyone) for what in found} for case, found in everyone[0].items()
    }


def _cut(whole: torch.Tensor, parameter: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    shard = shard_of(parameter)
    return whole if shard is None else shard.part(whole, group.rank, group.size)


def _distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    undefined_in_both = value.isnan() & expected.isnan()
    return (value - expected).masked_fill(undefined_in_both, 0.0).abs().nan_to_num(torch.inf).max().item()


if __name__ == "__main__":
    main()
