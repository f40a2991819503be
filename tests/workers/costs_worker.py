"""Run one forward and backward pass on one rank, and count every collective and every kept tensor.

    python costs_worker.py CONFIG OUTPUT_FOLDER JSON      JSON: {name: overrides}

``tests/planning/test_communication.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from megachiar import launch
from megachiar.config import load_config
from megachiar.engine.engine import start_process_group
from megachiar.model import build_model
from megachiar.topology import build_topology

SEQUENCES = 4


def main() -> None:
    config_path, output, cases = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    sent: Counter[str] = Counter()
    watch_collectives(sent)
    for name, sets in json.loads(cases).items():
        config = load_config(config_path, sets)
        topology = build_topology(config)
        if not dist.is_initialized():
            start_process_group(config, topology)
        group = topology.with_groups().tensor
        model = build_model(config.model, seed=1, group=group)
        report = measure(model, config.model.vocab_size, config.sequence_length, sent)
        if topology.is_main:
            Path(output, f"{name}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def measure(model: torch.nn.Module, vocab_size: int, length: int, sent: Counter[str]) -> dict:
    """Return payload bytes by pass and kind, kept values per token, and the share of tokens that took attention.

    The kinds are those of ``watch_collectives``. All sequences have one sample id, so that a random router routes the
    same positions of every sequence to attention.
    """
    tokens = torch.randint(vocab_size, (SEQUENCES, length + 1), generator=torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape != model.embedding.weight.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sent.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(tokens[:, :-1], tokens[:, 1:], torch.zeros(SEQUENCES, dtype=torch.long))
    forward = dict(sent)
    sent.clear()
    result.loss.backward()
    share = result.statistics.attention_share[1:-1].double()
    dist.all_reduce(share)
    return {
        "forward": forward,
        "backward": dict(sent),
        "kept": sum(kept.values()) / 4 / (SEQUENCES * length),
        "share": (share / dist.get_world_size()).mean().item(),
        "tokens": SEQUENCES * length,
    }


def watch_collectives(sent: Counter[str]) -> None:
    """Add the payload bytes of each collective to ``sent``: under rows (matrices), routes (bytes) or other."""

    def watch(name: str, factor: int, argument: int) -> None:
        call = getattr(dist, name)

        def counted(*arguments, **options):
            tensor = arguments[argument]
            kind = "routes" if tensor.dtype == torch.uint8 else "rows" if tensor.dim() == 2 else "other"
            if not options.get("uncounted"):
                sent[kind] += factor * tensor.numel() * tensor.element_size()
            return call(*arguments, **options)

        setattr(dist, name, counted)

    watch("all_gather_into_tensor", 1, 0)  # the payload is the whole result
    watch("reduce_scatter_tensor", 1, 1)  # the payload is the whole input
    watch("all_reduce", 2, 0)
    watch("broadcast", 1, 0)


if __name__ == "__main__":
    main()
