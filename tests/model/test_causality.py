"""What a logit may depend on: the tokens up to its own of its own sequence, and nothing else."""

from __future__ import annotations

import pytest
import torch
from model_cases import VARIANTS, lively_model, small_model_config, token_batch

from megachiar.model.kv_cache import DecodingCache, SequenceCache

CASES = [(name, "causal") for name in VARIANTS] + [("threshold", "none"), ("soft three", "none")]


def case_model(variant: str, pool: str, **fields):
    return lively_model(small_model_config(**VARIANTS[variant], meta_router={"pool": pool}, **fields)).eval()


@torch.no_grad()
def change_of_logits(model, tokens: torch.Tensor, position: int) -> torch.Tensor:
    """Largest change (T,) of each position's logits when token ``position`` of the first sequence becomes another."""
    other = tokens.clone()
    other[0, position] = (other[0, position] + 7) % model.config.vocab_size
    return (model(other).logits - model(tokens).logits).abs().amax((0, 2))


@pytest.mark.parametrize("norm", ("post", "pre"))
@pytest.mark.parametrize(("variant", "pool"), CASES)
def test_a_later_token_changes_no_earlier_logit(variant, pool, norm):
    model, tokens = case_model(variant, pool, norm=norm), token_batch(2, 12)
    for position in (0, 1, 5, 6, 10, 11):
        change = change_of_logits(model, tokens, position)
        assert change[:position].max() <= 1e-12 if position else True
        assert change[position] > 1e-3, "the token itself must matter, or this test shows nothing"
    assert change_of_logits(model, tokens, 3)[4:].max() > 1e-6, "later logits must see it"


def test_pooling_over_the_batch_leaks_later_tokens_and_other_sequences_into_every_logit():
    """``pool: batch`` is the published form: here stands what it does, and why it is not the default."""
    model, tokens = case_model("threshold", "batch"), token_batch(2, 12)
    assert change_of_logits(model, tokens, 11)[:11].min() > 1e-6
    with torch.no_grad():
        alone, together = model(tokens[:1]).logits, model(tokens).logits[:1]
    assert (alone - together).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(("variant", "pool"), CASES)
@torch.no_grad()
def test_a_sequence_has_the_same_logits_alone_and_in_any_batch(variant, pool):
    """With its number, which keys the routes of a random router."""
    model, tokens = case_model(variant, pool), token_batch(5, 12)
    alone = model(tokens[2:3], sample_ids=torch.tensor([2])).logits[0]
    for companions in ([2, 0], [4, 3, 2, 1, 0], [2, 2, 2]):
        got = model(tokens[companions], sample_ids=torch.tensor(companions)).logits[companions.index(2)]
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", ([12], [1] * 12, [5, 1, 1, 4, 1]), ids=str)
@pytest.mark.parametrize(("variant", "pool"), CASES)
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_a_full_forward_pass(variant, pool, parts):
    model, tokens = case_model(variant, pool), token_batch(3, 12)
    cache = DecodingCache([SequenceCache() for _ in tokens])
    pieces = [model(part, cache=cache).logits for part in tokens.split(parts, 1)]
    assert cache.lengths == (12, 12, 12)
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, rtol=0, atol=1e-10)
