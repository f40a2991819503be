"""Ranks that differ are named before anything is saved: in config, data, weights, routes or samples."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

from megachiar.engine.weight_digests import digest
from megachiar.training.odd_ranks import describe_ranks, odd_groups

LAYOUTS = {
    "dp 4, ZeRO 0": ["parallel.zero_stage=0", "training.micro_batch_size=1"],
    "dp 4, ZeRO 2, bf16": ["parallel.zero_stage=2", "precision.compute=bf16", "training.micro_batch_size=1"],
    "tp 2, dp 2, ZeRO 3": ["parallel.tensor_size=2", "parallel.zero_stage=3"],
    "tp 2, pp 2, sequence": ["parallel.tensor_size=2", "parallel.pipeline_size=2", "parallel.sequence=true"],
}
# layout: [(altered rank, start of a tensor's name, what the message says)]
ALTERED = {
    "dp 4, ZeRO 0": [(2, "layers.1.attention", "differs on rank 2 on .* from ranks 0, 1, 3 on [^;]*$")],
    "dp 4, ZeRO 2, bf16": [(3, "embedding", "differs on rank 3 on .* from ranks 0, 1, 2 on [^;]*$")],
    "tp 2, dp 2, ZeRO 3": [
        (1, "layers.2.dct", "differs on rank 1 on .* from ranks 0, 2, 3 on [^;]*$"),
        (0, "layers.2.feed_forward.up.weight", "differs on rank 2 on .* from rank 0 on .* either may be"),
        (3, "routes of layers.2", "differs on rank 3 on .* from rank 2 on .* either may be"),
    ],
    "tp 2, pp 2, sequence": [
        (2, "embedding", "differs on rank 2 on .* from rank 0 on .* either may be"),
        (1, "routes of layers.1", "differs on rank 1 on .* from rank 0 on .* either may be"),
    ],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    """Return what the comparison said on each rank, by layout."""
    folder = tmp_path_factory.mktemp("compare")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1)
    config = write_config(folder / "config.yaml", small_config(folder))
    layouts = {
        name: {"set": overrides, "alter": [[rank, start] for rank, start, _ in ALTERED[name]]}
        for name, overrides in LAYOUTS.items()
    }
    run_ranks(4, WORKERS / "compare_ranks_worker.py", config, folder / "report.json", json.dumps(layouts))
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_agree_are_passed(report, layout):
    for rank in report:
        found = rank[layout]
        assert (found["before the first step"], found["unaltered"], found["restored"]) == (None, None, None)
        assert any(name.startswith("layers.") for name in found["names"])


@pytest.mark.parametrize(
    ("layout", "index"), [(layout, index) for layout, cases in ALTERED.items() for index in range(len(cases))]
)
def test_one_flipped_bit_is_named_on_every_rank(report, layout, index):
    _, start, message = ALTERED[layout][index]
    said = {rank[layout]["altered"][index] for rank in report}
    assert len(said) == 1
    text = said.pop()
    assert text is not None
    assert text.startswith(f"after step 1: {start}")
    assert re.search(message, text.splitlines()[0]), text


@pytest.mark.parametrize(("layout", "checked"), [("dp 4, ZeRO 0", False), ("tp 2, pp 2, sequence", True)])
def test_ranks_of_one_replica_read_the_same_samples(report, layout, checked):
    for rank in report:
        said = rank[layout]["other samples"]
        if checked:
            assert "samples of the last step: differs on rank 1" in said
        else:
            assert said is None  # each rank is a replica of its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_flipped_bit_changes_the_digest(dtype, size):
    whole = torch.randint(0, 255, (size * 8 + 8,), dtype=torch.uint8)
    for offset in (0, torch.empty((), dtype=dtype).element_size()):  # a parameter may begin anywhere in a flat buffer
        held = whole[offset : offset + size * torch.empty((), dtype=dtype).element_size()].view(dtype)
        before = digest(held).item()
        assert digest(held.clone()).item() == before
        for bit in torch.randint(0, held.numel() * held.element_size() * 8, (50,)).tolist():
            index = offset + bit // 8
            whole[index] ^= 1 << bit % 8
            assert digest(held).item() != before
            whole[index] ^= 1 << bit % 8


def test_digests_know_places_and_lengths():
    assert digest(torch.tensor([1.0, 2.0, 3.0])).item() != digest(torch.tensor([3.0, 2.0, 1.0])).item()
    assert digest(torch.zeros(8)).item() != digest(torch.zeros(16)).item()
    signs = torch.ones(64)
    signs[[3, 40]] = -1.0  # two flipped bits of the same weight must not cancel
    assert digest(torch.ones(64)).item() != digest(signs).item()


def test_chunks_do_not_change_a_digest(monkeypatch):
    tensor = torch.randn(1001)
    before = digest(tensor).item()
    monkeypatch.setattr("megachiar.engine.weight_digests._CHUNK_WORDS", 7)
    assert digest(tensor).item() == before


def test_the_largest_group_is_the_usual_one():
    assert odd_groups("aabca") == ([("b", [2]), ("c", [3])], ("a", [0, 1, 4]))
    assert odd_groups("ab") == ([("b", [1])], ("a", [0]))
    assert odd_groups("aaa") == ([], ("a", [0, 1, 2]))
    assert describe_ranks([3], ["x"] * 4) == "rank 3 on x"
    assert describe_ranks(list(range(12)), [f"n{i}" for i in range(12)]) == (
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more on n0, n1 and 10 more hosts"
    )


@pytest.mark.parametrize(
    ("overrides", "stopped_after"),
    [
        (["parallel.zero_stage=0", "reliability.check_every=null"], 6),  # the save finds it
        (["parallel.zero_stage=1", "reliability.check_every=1"], 5),  # the next step would restore it and hide it
    ],
)
def test_a_weight_that_changes_in_a_run_stops_it_before_the_next_save(overrides, stopped_after, tmp_path):
    write_tokens(tmp_path / "train")
    sections = {"training": {"steps": 8, "micro_batch_size": 4}, "checkpoint": {"every": 3}}
    config = small_config(tmp_path, data={"validation": {}}, **sections)
    path = write_config(tmp_path / "config.yaml", config)
    worker = WORKERS / "altered_rank_worker.py"
    output, _ = run_ranks(2, worker, "5", "--config", path, "--set", *overrides, codes=(2,))
    assert f"after step {stopped_after}: embedding.weight: differs on rank 1" in output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
