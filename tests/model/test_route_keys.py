"""The coins of a random router: what they depend on, how near a run comes to its share, and that they are independent.

Bounds are 4.5 standard deviations of independent coins: of one number, chance exceeds them 7 times in a million.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from model_cases import lively_model, small_model_config, token_batch

from megachiar.analysis.windows import spread_windows
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.inference.generation import generate
from megachiar.inference.loaded_run import model_score
from megachiar.model.batch_layout import lay_out
from megachiar.model.router import Router
from megachiar.topology import SINGLE_RANK
from megachiar.training.evaluation import evaluate

LIMIT = 4.5
SHARE, LENGTH, SAMPLES, LAYERS = 0.58, 128, 4096, 6
END = 0


def coins(sample_ids: torch.Tensor, length: int = LENGTH, seed: int = 0, tokens: torch.Tensor | None = None):
    """Return whether each token attends, (routed layers, B, T) float64; with ``tokens``, document by document."""
    router = {"kind": "random", "attention_share": SHARE, "seed": seed}
    config = small_model_config(num_layers=LAYERS, hidden_size=4, router=router)
    end = END if tokens is not None else None
    layout = lay_out(config, sample_ids, length, tokens=tokens, document_end=end)
    rows = torch.zeros(layout.num_rows, 4)
    routers = (Router(config, index, SINGLE_RANK) for index in config.routed_layers)
    return torch.stack([router(rows, layout).operator.double().view(-1, length) for router in routers])


def deviation(count: int) -> float:
    """Standard deviation of the mean of so many independent coins."""
    return math.sqrt(SHARE * (1 - SHARE) / count)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    return coins(torch.arange(SAMPLES))


def test_the_share_over_many_samples_is_that_of_independent_coins(drawn):
    """Over half a million tokens it is within 0.0031; a pattern of 128 positions for all samples was 0.07 off."""
    bound = LIMIT * deviation(SAMPLES * LENGTH)
    assert bound < 0.0031
    assert (drawn.mean((1, 2)) - SHARE).abs().max() < bound
    for part in (slice(0, 64), slice(1000, 1064)):  # as it is after 64 samples, anywhere in a run
        assert (drawn[:, part].mean((1, 2)) - SHARE).abs().max() < LIMIT * deviation(64 * LENGTH)


def test_no_position_and_no_sample_has_a_share_of_its_own(drawn):
    assert (drawn.mean(1) - SHARE).abs().max() < LIMIT * deviation(SAMPLES), "positions"
    # The shares of samples scatter as those of coins do: a sum of squares that has a chi-squared distribution.
    squares = ((drawn.mean(2) - SHARE) / deviation(LENGTH)).square().sum(1)
    assert (squares - SAMPLES).abs().max() < LIMIT * math.sqrt(2 * SAMPLES)


def test_coins_of_layers_samples_neighbours_and_seeds_are_independent(drawn):
    pairs = {
        "layers": (drawn[:-1], drawn[1:]),
        "samples": (drawn[:, :-1], drawn[:, 1:]),
        "neighbours": (drawn[:, :, :-1], drawn[:, :, 1:]),
        "a sample and the next position": (drawn[:, :-1, 1:], drawn[:, 1:, :-1]),
        "a layer and the next sample": (drawn[:-1, 1:], drawn[1:, :-1]),
        "seeds": (drawn, coins(torch.arange(SAMPLES), seed=1)),
    }
    for name, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < LIMIT / math.sqrt(one.numel()), name


def test_a_coin_is_a_function_of_seed_layer_sample_and_position():
    ids = torch.tensor([7, 3, 2**40])
    drawn = coins(ids)
    assert drawn.equal(coins(ids))
    assert drawn[:, 1:2].equal(coins(ids[1:2])) and drawn[..., :50].equal(coins(ids, length=50))
    assert not drawn[:, 0].equal(drawn[:, 1]) and not drawn[0].equal(drawn[1])
    assert not drawn.equal(coins(ids, seed=1))


# Documents -----------------------------------------------------------------------------------------------------------


def texts(samples: int, seed: int = 0, ids: int = 50) -> torch.Tensor:
    """Return samples of documents of 20 tokens in the mean, whose words are as frequent as those of a language."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, ids)
    words = generator.choice(np.arange(1, ids), (samples, LENGTH), p=shares / shares.sum())
    words[generator.random(words.shape) < 0.05] = END
    return torch.from_numpy(words)


def test_coins_of_documents_have_the_share_over_many_documents():
    """Documents that begin alike are alike for a while: the first tokens count less than as many coins."""
    tokens = texts(2000)
    drawn = coins(torch.arange(len(tokens)), tokens=tokens)
    opens = torch.nn.functional.pad(tokens[:, :-1] == END, (1, 0), value=True)
    prefixes = torch.stack([opens.roll(later, 1) for later in range(4)]).any(0)
    later = drawn[:, ~prefixes]  # of hardly any document there is a second one with the same five tokens
    assert (later.mean(1) - SHARE).abs().max() < LIMIT * 1.1 * deviation(later.shape[1])
    assert (drawn.mean((1, 2)) - SHARE).abs().max() < 0.02
    assert abs(correlation(later[:-1], later[1:])) < LIMIT / math.sqrt(later[1:].numel())


def test_a_coin_of_a_document_is_a_function_of_the_document_so_far():
    tokens = texts(2)
    tokens[1] = tokens[0]
    drawn = coins(torch.tensor([3, 900]), tokens=tokens)
    assert drawn[:, 0].equal(drawn[:, 1]), "the sample does not matter"
    start = int((tokens[0] == END).nonzero()[0]) + 1
    assert drawn[:, :1, start:].equal(coins(torch.tensor([0]), LENGTH - start, tokens=tokens[:1, start:]))
    changed = tokens[:1].clone()
    changed[0, start + 1] = 1 + changed[0, start + 1] % 40
    differs = coins(torch.tensor([3]), tokens=changed)[:, 0] != drawn[:, 0]
    assert not differs[:, : start + 1].any(), "what comes later does not matter"
    end = start + int((changed[0, start:] == END).nonzero()[0]) + 1
    assert not differs[:, end:].any(), "nor does another document"
    one = coins(torch.tensor([0]), 90, tokens=torch.full((1, 90), 7))[0, 0]
    assert 0.3 < one.mean() < 0.85, "equal tokens at other positions have other coins"


# Evaluation, tools, generation ---------------------------------------------------------------------------------------


def random_model(**fields):
    router = {"kind": "random", "attention_share": 0.5}
    return lively_model(small_model_config(router=router, **fields), dtype=torch.float32).eval()


@pytest.fixture
def dataset(tmp_path) -> ValidationSet:
    from support import write_tokens

    write_tokens(tmp_path / "valid", documents=6, vocab_size=31)
    return ValidationSet(tmp_path / "valid", 16)


def test_a_validation_set_takes_the_same_routes_in_any_batch_size_and_on_any_number_of_ranks(dataset):
    score = model_score(random_model(), torch.device("cpu"))
    whole = evaluate(score, dataset, dataset.windows).loss
    for batch in (1, 3, 8):
        assert evaluate(score, dataset, batch).loss == pytest.approx(whole, rel=1e-6)
    shares = [partial(evaluate, score, dataset, 2, rank=rank, ranks=2) for rank in range(2)]
    parts: list[list[float]] = []
    for share in shares:
        share(reduce_sum=lambda values: parts.append(values) or values)
    nats, targets = np.sum(parts, 0)
    assert nats / targets == pytest.approx(whole, rel=1e-6)


def test_windows_that_are_spread_over_a_text_keep_their_numbers(dataset):
    model, device = random_model(), torch.device("cpu")
    spread = spread_windows(dataset, 3)
    with torch.no_grad():
        output = model(*(torch.from_numpy(part) for part in spread))
    for window, loss in zip(spread.numbers.tolist(), output.token_losses, strict=True):
        nats, _ = model_score(model, device)(*dataset.batch(window, window + 1), window)
        assert loss.double().sum().item() == pytest.approx(nats.item(), rel=1e-6)


def test_generation_takes_the_routes_of_its_number():
    model = random_model(max_sequence_length=24)
    texts_of = {}
    for number in (0, 6):
        text = [3, 14]
        new = generate(model, text, 20, temperature=0, sample_id=number)
        for token in new:
            with torch.no_grad():
                logits = model(torch.tensor([text]), sample_ids=torch.tensor([number])).logits
            assert token == logits[0, -1].argmax()
            text.append(token)
        texts_of[number] = text
    assert texts_of[0] != texts_of[6]
    assert generate(model, [3, 14], 20, temperature=0) == texts_of[0][2:]


def test_equal_tokens_take_other_routes_in_another_sample():
    model, tokens = random_model(), token_batch(1, 16).expand(2, -1)
    with torch.no_grad():
        one, other = model(tokens, sample_ids=torch.tensor([0, 1])).logits
    assert (one - other).abs().max() > 1e-3
