"""With data.document_mask no operator mixes tokens of two documents, and the log says where documents end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from model_cases import KEYS_OF_ROUTED, ROUTERS, lively_model, small_model_config, token_batch
from support import pretrain, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.errors import UserError
from megachiar.inference.engine import last_document
from megachiar.inference.generation import generate
from megachiar.model.batch_layout import find_document_starts

END = 3
CASES = {
    "baseline": {"kind": "baseline"},
    **{name: {"router": ROUTERS[name]} for name in ("threshold", "threshold three", "soft three", "hard three")},
    **{name: {"router": ROUTERS[name]} for name in ("random", "random three", "hashed")},
    "keys of routed": {"router": ROUTERS["threshold"]} | KEYS_OF_ROUTED,
    "no gate": {"router": ROUTERS["threshold"], "meta_router": {"pool": "none"}},
}


def masked_model(**fields):
    model = lively_model(small_model_config(**fields)).eval()
    model.document_end = END
    return model


def packed_documents() -> torch.Tensor:
    """Return two samples, (2, 14): the first has documents of 4, 3, 1 and 6 tokens, the second one document."""
    tokens = token_batch(2, 14)
    tokens[tokens == END] = END + 1
    tokens[0, [3, 6, 7]] = END
    return tokens


def test_a_document_begins_after_the_token_that_ends_the_one_before():
    starts = find_document_starts(packed_documents(), END)
    assert starts[0].tolist() == [0] * 4 + [4] * 3 + [7] + [8] * 6
    assert starts[1].tolist() == [0] * 14
    ends = torch.full((1, 3), END)
    assert find_document_starts(ends, END).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("norm", ("post", "pre"))
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_document_has_the_logits_it_has_alone(case, norm):
    """Rotary positions count from the start of the sample, but only their differences within a document matter."""
    model, tokens = masked_model(**CASES[case], norm=norm), packed_documents()
    logits = model(tokens).logits
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 14)):
        alone = model(tokens[:1, start:end], sample_ids=torch.tensor([5])).logits[0]
        torch.testing.assert_close(logits[0, start:end], alone, rtol=0, atol=1e-10)
    behind = torch.cat([tokens[:1, 4:8], tokens[:1, :4], tokens[:1, 8:]], 1)  # the documents in another order
    moved = model(behind, sample_ids=torch.tensor([9])).logits[0]
    torch.testing.assert_close(moved[4:8], logits[0, :4], rtol=0, atol=1e-10)
    model.document_end = None
    unmasked = model(tokens).logits
    if "random" not in case:  # without documents a coin is of its sample
        torch.testing.assert_close(logits[:, :4], unmasked[:, :4], rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[1], unmasked[1], rtol=0, atol=1e-10)
    assert (logits[0, 5:] - unmasked[0, 5:]).abs().max() > 1e-4, "documents must matter, or this test shows nothing"


def test_no_gradient_crosses_documents():
    model, tokens = masked_model(**CASES["threshold three"]), packed_documents()[:1]
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) or inputs[0].retain_grad())
    model(tokens, tokens.roll(-1, 1).where(torch.arange(14) >= 8, -100)).loss.backward()
    assert seen[0].grad[:8].abs().max() <= 1e-14 and seen[0].grad[8:].abs().min() > 0


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [([1], [1]), ([1, END], [1, END]), ([1, END, 2], [2]), ([END, END], [END]), ([1, END, 2, END], [2, END])],
)
def test_generation_reads_the_last_document(text, read):
    assert last_document(text, END) == read
    assert last_document(text, None) == text


@pytest.mark.parametrize("case", ("threshold", "random", "hashed"))
@torch.no_grad()
def test_greedy_generation_takes_what_a_full_pass_finds_likeliest(case):
    """The text goes over several documents: the token that ends one is likely here, and does not end the generation."""
    model = masked_model(**CASES[case])
    model.embedding.weight[END] *= 5 if case == "random" else 3
    text = [5, END, 9, 4]
    got = generate(model, text, 12, temperature=0)
    for token in got:
        assert token == model(torch.tensor([text])).logits[0, -1].argmax()
        text.append(token)
    assert END in got[:-1], "a document must end, or this test shows nothing"


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_tokens(tmp_path / "train", vocab_size=12)
    write_tokens(tmp_path / "valid", seed=1, documents=4, vocab_size=12)
    return tmp_path


def losses(folder, name: str, *overrides: str, ranks: int = 1) -> np.ndarray:
    config = small_config(folder, training={"steps": 3}, logging={"folder": str(folder / name)})
    pretrain(write_config(folder / f"{name}.yaml", config), *overrides, ranks=ranks)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return np.array([record["loss"] for record in map(json.loads, lines) if "loss" in record])


def test_the_mask_changes_a_run_and_is_the_same_in_a_pipeline(folder):
    mask = ("data.document_mask=true", f"data.document_end={END}")
    plain, masked = losses(folder, "plain"), losses(folder, "masked", *mask)
    assert np.abs(plain - masked).max() > 1e-4
    piped = losses(folder, "piped", *mask, "parallel.pipeline_size=2", ranks=2)
    np.testing.assert_allclose(piped, masked, rtol=0, atol=2e-6)


def test_a_run_that_cannot_know_where_documents_end_is_refused(folder):
    path = write_config(folder / "config.yaml", small_config(folder))
    output = pretrain(path, "data.document_mask=true", codes=(2,))[0]
    assert "which token ends a document" in " ".join(output.split()) and "Traceback" not in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.document_end=3"], "without data.document_mask"),
        (["data.document_mask=true", "data.document_end=64"], "outside model.vocab_size 64"),
    ],
)
def test_an_end_that_means_nothing_is_refused(folder, overrides, message):
    path = write_config(folder / "config.yaml", small_config(folder))
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)
