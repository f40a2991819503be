"""The formulas of communication and activations, against a tensor-parallel group of real processes that are counted."""

from __future__ import annotations

import json

import pytest
from support import WORKERS, run_ranks, small_config, write_config, write_tokens

from megachiar.config import ModelConfig
from megachiar.planning.activations import head_activations, layer_activations
from megachiar.planning.communication import TokenPayload, end_payloads, layer_payload

WORKER = WORKERS / "costs_worker.py"
SP = "parallel.sequence=true"
# The worker routes the same positions of every sequence to attention. Both ranks hold as many: nothing is padded.
MODEL = {
    "num_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "meta_router": {"pool": "none"},
    "router": {"kind": "random", "attention_share": 0.5},
}
CASES = {
    "dense, sequence": ["model.kind=baseline", SP],
    "dense": ["model.kind=baseline"],
    "routed, sequence": [SP],
    "routed": [],
    "routed at 0.2, sequence": [SP, "model.router.attention_share=0.2"],
    "routed at 0.2": ["model.router.attention_share=0.2"],
    "keys of routed, sequence": [SP, "model.attention.keys=routed"],
    "keys of routed": ["model.attention.keys=routed"],
    "all DCT, sequence": [SP, "model.router.attention_share=0.0"],
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    write_tokens(folder / "train")
    config = small_config(folder, model=MODEL)
    del config["data"]["validation"]
    path = write_config(folder / "config.yaml", config)
    cases = {name: ["parallel.tensor_size=2", *sets] for name, sets in CASES.items()}
    run_ranks(2, WORKER, path, folder, json.dumps(cases))
    # (model's config, whether the group uses sequence parallelism, what the worker counted)
    return {
        name: (_model(sets), SP in sets, json.loads((folder / f"{name}.json").read_text()))
        for name, sets in CASES.items()
    }


def _model(sets: list[str]) -> ModelConfig:
    """Return the config of the model that the worker builds under these overrides."""
    fields = {"vocab_size": 64, "max_sequence_length": 32, **MODEL}
    if "model.kind=baseline" in sets:
        fields["kind"] = "baseline"
    if "model.attention.keys=routed" in sets:
        fields["attention"] = {"keys": "routed"}
    return ModelConfig.model_validate(fields)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_sent_as_the_table_says(counted, case):
    config, sequence, seen = counted[case]
    layers = [layer_payload(config, index, seen["share"], sequence) for index in range(config.num_layers)]
    expected = sum((*layers, *end_payloads(config, sequence)), TokenPayload(0, 0))
    tokens = seen["tokens"]
    assert seen["forward"]["rows"] == pytest.approx(4 * tokens * expected.forward, rel=1e-9)
    # Gradients of replicated matrices would be counted as rows too: without RBF mixing and gate there are none.
    assert seen["backward"]["rows"] == pytest.approx(4 * tokens * expected.backward, rel=1e-9)
    assert seen["forward"].get("routes", 0) == tokens * expected.route_bytes
    assert "routes" not in seen["backward"]


def test_a_token_of_dct_mixing_sends_no_query_and_no_result(counted):
    """A routed layer sends less than a layer with attention for every token, by what the other tokens do not send."""
    dense, half, few, none = (
        counted[case][2]
        for case in ("dense, sequence", "routed, sequence", "routed at 0.2, sequence", "all DCT, sequence")
    )
    for run in (half, few, none):
        saved = dense["forward"]["rows"] - run["forward"]["rows"]
        d, tokens = 64 * 4, run["tokens"]
        first_layer, routed = 2 * d * tokens, 4 * (1 - run["share"]) * d * tokens
        assert saved == pytest.approx(first_layer + routed, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_what_the_formula_says(counted, case):
    config, sequence, seen = counted[case]
    parts = [layer_activations(config, index, seen["share"]) for index in range(config.num_layers)]
    formula = sum(part.per_rank(2, sequence) for part in (*parts, head_activations(config)))
    assert formula == pytest.approx(seen["kept"], rel=0.2), f"{formula / seen['kept']:.3f}"
