"""The engine continues many texts as if each were alone, and what it keeps of them is counted."""

from __future__ import annotations

import math
import random

import pytest
import torch
from model_cases import KEYS_OF_ROUTED, ROUTERS, lively_model, small_model_config

from megachiar.inference.engine import Engine, Generation, Request, why_uncached
from megachiar.inference.generation import generate
from megachiar.inference.sampling import Sampling
from megachiar.model.kv_cache import DecodingCache, SequenceCache

CASES = {
    "baseline": {"kind": "baseline"},
    **{name: {"router": ROUTERS[name]} for name in ("threshold", "random", "hashed", "soft", "hard", "learned")},
    **{name: {"router": ROUTERS[name]} for name in ("threshold three", "soft three", "hard three", "random three")},
    **{
        f"{name}, keys of routed": {"router": ROUTERS[name]} | KEYS_OF_ROUTED
        for name in ("threshold", "random", "hashed", "hard dct only", "threshold all dct")
    },
    "no gate": {"router": ROUTERS["threshold"], "meta_router": {"pool": "none"}},
    "gate over the batch": {"router": ROUTERS["threshold"], "meta_router": {"pool": "batch"}},
}
NORMS = ("post", "pre")
END = 3


def case_model(case: str, norm: str = "post", dtype: torch.dtype = torch.float32, **fields):
    return lively_model(small_model_config(**CASES[case], norm=norm, **fields), dtype=dtype).eval()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(31) for _ in range(length)] for length in lengths]


def finish(engine: Engine) -> None:
    while not engine.is_idle:
        engine.step()


def new_of(generation: Generation) -> list[int]:
    return generation.tokens[len(generation.request.prompt) :]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", [case for case in CASES if "over the batch" not in case])
@torch.no_grad()
def test_decoding_sequences_of_different_lengths_equals_teacher_forcing(case, norm):
    """Each sequence is read in pieces of its own; then all go on together, token by token."""
    model = case_model(case, norm)
    texts = prompts_of([16, 13, 14, 11], seed=1)
    whole = [model(torch.tensor([text]), sample_ids=torch.tensor([n])).logits[0] for n, text in enumerate(texts)]
    caches = [SequenceCache() for _ in texts]
    for number, read in enumerate((8, 5, 6, 3)):
        logits = model(
            torch.tensor([texts[number][:read]]),
            sample_ids=torch.tensor([number]),
            cache=DecodingCache([caches[number]]),
        ).logits[0]
        torch.testing.assert_close(logits, whole[number][:read], rtol=1e-5, atol=1e-5)
    order = [2, 0, 3, 1]
    for step in range(8):
        cache = DecodingCache(caches[n] for n in order)
        places = list(cache.lengths)
        tokens = torch.tensor([[texts[n][place]] for n, place in zip(order, places, strict=True)])
        logits = model(tokens, sample_ids=torch.tensor(order), cache=cache, last_logits=True).logits
        assert cache.lengths == tuple(place + 1 for place in places) and logits.shape[1] == 1
        for n, place, row in zip(order, places, logits[:, 0], strict=True):
            torch.testing.assert_close(row, whole[n][place], rtol=1e-5, atol=1e-5)
        random.Random(step).shuffle(order)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_different_lengths_equals_single_texts(case, temperature):
    """Texts join when a place is free and leave at different times; some go past the longest sequence."""
    model = case_model(case)
    requests = [
        Request(prompt, count, Sampling(temperature, top_k=20, top_p=0.9, seed=n), sample_id=n)
        for n, (prompt, count) in enumerate(
            zip(prompts_of([3, 20, 1, 7, 7, 12, 2]), [30, 5, 18, 9, 1, 14, 0], strict=True)
        )
    ]
    engine = Engine(model, most_running=3)
    generations = [engine.add(request) for request in requests]
    finish(engine)
    for request, generation in zip(requests, generations, strict=True):
        settings = request.sampling._asdict()
        alone = generate(model, request.prompt, request.max_new_tokens, **settings, sample_id=request.sample_id)
        assert new_of(generation) == alone and len(alone) == request.max_new_tokens
        assert generation.finish == "length"
    assert engine.cache_bytes == 0


@pytest.mark.parametrize("case", ("threshold", "random", "hashed", "threshold, keys of routed", "gate over the batch"))
def test_documents_end_in_a_batch_as_they_do_alone(case):
    model = case_model(case)
    model.document_end = END
    with torch.no_grad():
        model.embedding.weight[END] *= 3
    prompts = [[5, END, 9, 4], [END], [7, 8], [1, END, END, 2, 6]]
    engine = Engine(model, most_running=4)
    generations = [engine.add(Request(prompt, 25, Sampling(1.0, seed=n))) for n, prompt in enumerate(prompts)]
    finish(engine)
    for n, generation in enumerate(generations):
        assert new_of(generation) == generate(model, prompts[n], 25, seed=n)
    assert any(END in new_of(generation) for generation in generations), "a document must end"


def test_texts_that_join_and_leave_change_nothing_for_others():
    model = case_model("random", attention={"keys": "routed"}, max_sequence_length=64)
    expected = generate(model, [3, 1, 4], 40, seed=5)
    engine, draw, others = Engine(model, most_running=4), random.Random(0), []
    watched = engine.add(Request([3, 1, 4], 40, Sampling(seed=5)))
    while watched.finish is None:
        if draw.random() < 0.4:
            others.append(engine.add(Request(prompts_of([draw.randint(1, 30)])[0], draw.randint(1, 30))))
        if others and draw.random() < 0.3:
            engine.cancel(others.pop(draw.randrange(len(others))))
        engine.step()
    assert new_of(watched) == expected and len(others) > 3


def test_a_text_may_be_cancelled_at_any_time():
    engine = Engine(case_model("threshold"), most_running=1)
    running, waiting = engine.add(Request([1], 9)), engine.add(Request([2], 9))
    engine.step()
    engine.cancel(waiting)
    engine.cancel(running)
    engine.cancel(running)
    assert engine.is_idle and engine.step() == [] and engine.cache_bytes == 0


def test_the_end_of_a_text_is_no_token_of_it():
    model = case_model("threshold")
    whole = generate(model, [1], 12, temperature=0)
    end = whole[5]
    engine = Engine(model)
    generation = engine.add(Request([1], 12, Sampling(0.0), end=end))
    finish(engine)
    assert generation.finish == "stop" and new_of(generation) == whole[: whole.index(end)]


def test_logprobs_are_of_the_distribution_at_temperature_one():
    model = case_model("threshold")
    known = torch.arange(31) != 7
    engine = Engine(model, known)
    request = Request([1, 2, 3], 8, Sampling(0.5, seed=2), top_logprobs=4, scores_prompt=True)
    generation, scores = engine.add(request), []
    while generation.finish is None:
        scores += [drawn.score for drawn in engine.step()]
    text = generation.tokens
    with torch.no_grad():
        probabilities = model(torch.tensor([text])).logits[0].double().softmax(-1)
    all_scores = [*generation.prompt_scores, *scores]
    assert [score.token for score in all_scores] == text and all_scores[0].logprob is None
    for place in range(1, len(text)):
        score, row = all_scores[place], probabilities[place - 1]
        assert math.exp(score.logprob) == pytest.approx(row[text[place]].item(), rel=1e-5)
        best = row.masked_fill(~known, 0).topk(4)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [math.exp(logprob) for _, logprob in score.top] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("case", ("baseline", "threshold", "random, keys of routed", "soft"))
def test_bf16_decodes_what_a_full_pass_in_bf16_does_but_for_rounding(case):
    model = case_model(case, dtype=torch.bfloat16)
    text = prompts_of([16])[0]
    cache = DecodingCache([SequenceCache()])
    with torch.no_grad():
        routes: dict[str, torch.Tensor] = {}
        whole = model(torch.tensor([text]), routes=routes).logits[0].float()
        parts = []
        for place, token in enumerate(text):  # the same routes, which rounding could change
            taken = {name: route[place : place + 1] for name, route in routes.items()}
            parts.append(model(torch.tensor([[token]]), cache=cache, routes=taken).logits[0].float())
    error = (torch.cat(parts) - whole).abs().max() / whole.abs().max()
    assert error < 0.05
    engine = Engine(model, most_running=2)
    for n in range(3):
        engine.add(Request([1 + n], 20))
    finish(engine)


def test_why_a_model_has_no_cache_is_said():
    assert why_uncached(case_model("threshold")) is None
    reason = why_uncached(case_model("gate over the batch"))
    assert reason is not None and "model.meta_router.pool is batch" in reason and "\n" not in reason


# Memory --------------------------------------------------------------------------------------------------------------


def cache_after(model, length: int) -> SequenceCache:
    cache = SequenceCache()
    with torch.no_grad():
        model(torch.tensor(prompts_of([length])), cache=DecodingCache([cache]))
    return cache


def test_a_token_without_attention_has_no_entry():
    """Counted from the routes that the pass took, not from the cache's own numbers."""
    fields = {"max_sequence_length": 256, "num_layers": 6}
    model = case_model("random, keys of routed", **fields)
    cache = cache_after(model, 256)
    for index in range(1, 5):
        attending = int((model.layers[index].last_routes == 1).sum())
        assert cache.buffers[f"layers.{index}.attention"].count == attending < 256
    assert cache.buffers["layers.5.attention"].count == 256
    assert set(cache.buffers) == {f"layers.{index}.attention" for index in range(1, 6)}


def test_routed_keys_at_half_the_share_take_less_than_three_fifths_of_a_dense_cache():
    router = {"kind": "random", "attention_share": 0.5, "seed": 5}
    fields = {"max_sequence_length": 256, "num_layers": 6}
    model = lively_model(small_model_config(router=router, **KEYS_OF_ROUTED, **fields), dtype=torch.float32).eval()
    dense = lively_model(small_model_config(kind="baseline", **fields), dtype=torch.float32).eval()
    exact_dense = 2 * 6 * 256 * 32 * 4  # keys and values, layers, positions, channels, bytes
    assert exact_dense <= cache_after(dense, 256).num_bytes < 1.15 * exact_dense
    assert cache_after(model, 256).num_bytes < 0.6 * exact_dense


def test_a_buffer_grows_seldom():
    """Not a token at a time: a step of decoding writes in place."""
    model = case_model("baseline", max_sequence_length=512)
    cache = SequenceCache()
    sizes = set()
    with torch.no_grad():
        for _ in range(300):
            model(torch.tensor([[1]]), cache=DecodingCache([cache]))
            sizes.add(cache.num_bytes)
    assert len(sizes) < 20
