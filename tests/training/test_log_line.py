"""The log's line of a step says the share of attention in routed layers; the metrics have that of every layer."""

from __future__ import annotations

import re

import pytest
from support import pretrain, small_config, write_config, write_tokens

from megachiar.training.metrics import read_metrics


@pytest.mark.parametrize("kind", ("chiar", "baseline"))
def test_attention_and_entropy_are_means_over_routed_layers(tmp_path, kind):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path, model={"kind": kind, "num_layers": 5}, training={"steps": 2}, logging={"every": 1})
    config["logging"]["folder"] = str(tmp_path / "run")
    (output,) = pretrain(write_config(tmp_path / "config.yaml", config))
    lines = [" ".join(line.split()) for line in output.splitlines() if re.match(r"step\s+\d+/2", line)]
    records = read_metrics(tmp_path / "run", "train")
    assert len(lines) == len(records) == 2, output
    for line, record in zip(lines, records, strict=True):
        shares = record["attention_share"]
        assert len(shares) == len(record["entropy"]) == 5
        if kind == "baseline":
            assert shares == [1.0] * 5 and "attention" not in line
            continue
        assert (shares[0], shares[-1]) == (0.0, 1.0) and 0 < sum(shares[1:4]) < 3
        assert (
            f" attention {sum(shares[1:4]) / 3:.0%} in routed layers H {sum(record['entropy'][1:4]) / 3:.4f} " in line
        )
