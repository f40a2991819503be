"""Each setting of the sampling has its effect, and generation continues past the longest sequence of the model."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import VARIANTS, lively_model, small_model_config
from text_helpers import train

from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError
from megachiar.inference.generation import generate
from megachiar.inference.loaded_run import TextSampler
from megachiar.inference.sampling import sample
from megachiar.model.kv_cache import DecodingCache, SequenceCache


def draws(logits: list[float], count: int = 4000, **settings) -> torch.Tensor:
    """Return the share of each token among ``count`` samples."""
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    tokens = [sample(torch.tensor(logits), **settings, generator=generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def assert_shares(got: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=0, atol=0.03)
    assert not got[torch.tensor(expected) == 0].any()


LOGITS = [0.4, 0.1, 0.2, 0.3]  # probabilities, not in order, so that indices must be mapped back


def test_samples_follow_the_softmax():
    assert_shares(draws(torch.tensor(LOGITS).log().tolist()), LOGITS)


def test_temperature_sharpens_and_zero_takes_the_likeliest():
    logits = torch.tensor(LOGITS).log()
    assert_shares(draws(logits.tolist(), temperature=0.5), (2 * logits).softmax(-1).tolist())
    assert_shares(draws(logits.tolist(), 50, temperature=0), [1, 0, 0, 0])


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 1e30}, {"temperature": math.inf}]
)
def test_an_unknown_id_is_never_drawn(settings):
    known = torch.tensor([False, True, True, True])
    shares = draws(torch.tensor(LOGITS).log().tolist(), **settings, known_ids=known)
    assert shares[0] == 0 and (shares > 0).sum() >= 2
    if settings == {"top_k": 3}:
        assert_shares(shares, [0, 1 / 6, 2 / 6, 3 / 6])
    assert_shares(draws(LOGITS, 50, temperature=0, known_ids=known), [0, 0, 0, 1])


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    assert_shares(draws([-300.0, 90.0, 80.0, -torch.inf], 50, temperature=temperature), [0, 1, 0, 0])
    assert_shares(draws([-4.0, -300.0, -5.0, -300.0], 50, temperature=temperature), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [1, 0, 0, 0]), (2, [4 / 7, 0, 0, 3 / 7]), (4, LOGITS), (99, LOGITS)]
)
def test_top_k_keeps_the_k_likeliest(top_k, expected):
    assert_shares(draws(torch.tensor(LOGITS).log().tolist(), top_k=top_k), expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-6, [1, 0, 0, 0]), (0.5, [4 / 7, 0, 0, 3 / 7]), (0.75, [4 / 9, 0, 2 / 9, 3 / 9]), (1.0, LOGITS)],
)
def test_top_p_keeps_the_likeliest_that_make_it_up(top_p, expected):
    assert_shares(draws(torch.tensor(LOGITS).log().tolist(), top_p=top_p), expected)


def test_top_p_is_of_what_top_k_leaves():
    assert_shares(draws(torch.tensor(LOGITS).log().tolist(), top_k=2, top_p=0.5), [1, 0, 0, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_takes_the_argmax_of_full_forward_passes(variant):
    model = lively_model(small_model_config(**VARIANTS[variant])).eval()
    prompt, longest = [3, 14, 15], model.config.max_sequence_length
    new = generate(model, prompt, longest - len(prompt), temperature=0)
    text = prompt + new
    with torch.no_grad():
        argmax = model(torch.tensor([text])).logits[0].argmax(-1).tolist()
    assert new == argmax[len(prompt) - 1 : -1]


def test_past_the_longest_sequence_the_last_half_is_read_anew():
    model = lively_model(small_model_config(max_sequence_length=8)).eval()
    text = [5, 6]
    new = generate(model, text, 40, temperature=0)
    start = 0
    for token in new:  # the same choice without a cache
        if len(text) - start > 8:
            start = len(text) - 4
        with torch.no_grad():
            assert token == int(model(torch.tensor([text[start:]])).logits[0, -1].argmax())
        text.append(token)
    assert len(new) == 40


def test_of_a_long_prompt_the_end_is_read():
    model = lively_model(small_model_config(max_sequence_length=8)).eval()
    prompt = list(range(20))
    assert generate(model, prompt, 1, temperature=0) == generate(model, prompt[-8:], 1, temperature=0)


def test_a_model_of_one_position_still_generates():
    assert len(generate(lively_model(small_model_config(max_sequence_length=1)).eval(), [1, 2], 5)) == 5


def test_samples_depend_on_the_seed_alone():
    model = lively_model(small_model_config()).eval()
    first = generate(model, [1], 30, temperature=1.0, seed=1)
    torch.manual_seed(123)
    assert generate(model, [1], 30, temperature=1.0, seed=1) == first
    assert generate(model, [1], 30, temperature=1.0, seed=2) != first


def test_the_end_of_document_token_ends_the_text_and_is_left_out():
    model = lively_model(small_model_config()).eval()
    whole = generate(model, [1], 12, temperature=0)
    end = whole[5]
    assert generate(model, [1], 12, temperature=0, eod_id=end) == whole[: whole.index(end)]


def test_a_gate_over_the_batch_has_the_whole_text_read_for_each_token():
    model = lively_model(small_model_config(meta_router={"pool": "batch"}, max_sequence_length=8)).eval()
    text, new = [1, 2], generate(model, [1, 2], 12, temperature=0)
    for token in new:
        with torch.no_grad():
            assert token == int(model(torch.tensor([text[-8:]])).logits[0, -1].argmax())
        text.append(token)
    assert len(new) == 12


def test_a_gate_over_the_batch_refuses_a_cache():
    model = lively_model(small_model_config(meta_router={"pool": "batch"})).eval()
    with pytest.raises(UserError, match=r"model.meta_router.pool.*batch"):
        model(torch.tensor([[1]]), cache=DecodingCache([SequenceCache()]))


def test_a_text_begins_as_the_documents_of_the_data(tmp_path):
    """Where documents begin with a token, a prompt is read after it, and an empty one is that token alone."""
    sampler = object.__new__(TextSampler)  # without a model: only the first ids are asked for
    sampler.tokenizer, sampler.end = load_tokenizer(train(tmp_path, "sentencepiece"), prepend_bos=True), 2
    begin = sampler.tokenizer.bos_id
    assert begin == 1 and sampler.start([7, 8]) == [begin, 7, 8] and sampler.start([]) == [begin]
    sampler.tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert sampler.start([7, 8]) == [7, 8] and sampler.start([]) == [2]
