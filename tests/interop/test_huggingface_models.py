"""The exported model computes what the run's model computes: every router, norm and choice of keys, and every cache."""

from __future__ import annotations

import pytest
import torch
from exported_runs import library
from model_cases import ROUTERS, VARIANTS, lively_model, small_model_config, token_batch

from megachiar.config.model import ModelConfig
from megachiar.inference.generation import generate
from megachiar.interop.huggingface_config import model_settings
from megachiar.model import ChiarFormer

transformers = library()
modeling = pytest.importorskip("megachiar.interop.modeling_chiar")

END = 3
PROMPTS = ([5, 9, 3, 11, 7, 2], [8, 1], [30])
SOME = ("threshold", "soft three", "random", "learned", "baseline", "threshold, keys of routed")
ROUTED_AS_GIVEN = ("soft", "soft three", "threshold all dct", "threshold all attention", "random", "random three")


def both(name: str, norm: str, dtype: torch.dtype, end: int | None = None):
    """Return the run's model of a variant and the library's, with the same weights; documents end with ``end``."""
    config: ModelConfig = small_model_config(norm=norm, **VARIANTS[name])
    ours = lively_model(config)
    ours.document_end = end
    running = {n: tensor.item() for n, tensor in ours.state_dict().items() if n.endswith(".value")}
    theirs = modeling.ChiarForCausalLM(modeling.ChiarConfig(**model_settings(config, running), document_end=end))
    weights = {f"model.{n}": tensor for n, tensor in ours.state_dict().items() if not n.endswith(".value")}
    theirs.double().load_state_dict(weights)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def logits_of(ours: ChiarFormer, tokens: torch.Tensor) -> torch.Tensor:
    """Return the run's logits; every sequence has number 0, which keys random routes."""
    with torch.no_grad():
        return ours(tokens, sample_ids=torch.zeros(len(tokens), dtype=torch.int64)).logits


def padded(prompts, side: str = "left") -> dict[str, torch.Tensor]:
    """Return prompts of different lengths as one batch, filled up with id 17, which is a token like any other."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        empty = longest - len(prompt)
        rows.append([17] * empty + prompt if side == "left" else prompt + [17] * empty)
        masks.append([0] * empty + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * empty)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def new_tokens(theirs, prompts, **how) -> list[list[int]]:
    batch = padded(prompts)
    found = theirs.generate(**batch, max_new_tokens=9, pad_token_id=0, **{"do_sample": False, **how})
    return found[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_runs(name, norm, end):
    ours, theirs = both(name, norm, torch.float32, end)
    tokens = token_batch(3, 14)
    with torch.no_grad():
        found = theirs(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits_of(ours, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_gives_the_runs_tokens_alone_and_in_a_batch(name, norm):
    """The run decodes one text at a time, with its own cache."""
    ours, theirs = both(name, norm, torch.float32)
    expected = [generate(ours, prompt, 9, temperature=0.0) for prompt in PROMPTS]
    assert [new_tokens(theirs, [prompt])[0] for prompt in PROMPTS] == expected
    assert new_tokens(theirs, PROMPTS) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_static_cache_gives_what_a_dynamic_one_gives(name):
    _, theirs = both(name, "post", torch.float32, END)
    assert new_tokens(theirs, PROMPTS, cache_implementation="static") == new_tokens(theirs, PROMPTS)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_on_any_side_changes_nothing(name, side, end):
    _, theirs = both(name, "post", torch.float64, end)
    batch = padded(PROMPTS, side)
    with torch.no_grad():
        together = theirs(**batch).logits
        for row, mask, prompt in zip(together, batch["attention_mask"].bool(), PROMPTS, strict=True):
            alone = theirs(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(row[mask], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_in_pieces_gives_the_logits_of_the_whole_text(name, end):
    _, theirs = both(name, "post", torch.float64, end)
    tokens = token_batch(2, 14)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        whole = theirs(tokens).logits
        pieces = [theirs(part, past_key_values=cache, use_cache=True).logits for part in tokens.split((6, 1, 4, 3), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_is_within_rounding(name, norm):
    """A route may fall to the other side of a threshold; then the whole token differs, and those that attend to it."""
    ours, theirs = both(name, norm, torch.bfloat16)
    tokens = token_batch(4, 14)
    with torch.no_grad():
        found, wanted = theirs(tokens).logits.float(), logits_of(ours, tokens).float()
    difference = (found - wanted).abs().amax(-1) / wanted.abs().amax()
    same = difference < 0.03
    assert same.float().mean() > (0.99 if name in ROUTED_AS_GIVEN or name == "baseline" else 0.7), difference


@pytest.mark.parametrize("name", SOME)
def test_beam_search_and_sampling_run_with_both_caches(name):
    _, theirs = both(name, "post", torch.float32)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with_dynamic, with_static = (
        new_tokens(theirs, PROMPTS, cache_implementation=kind, **beams) for kind in (None, "static")
    )
    assert with_dynamic == with_static == new_tokens(theirs, PROMPTS, use_cache=False, **beams)
    assert len(with_dynamic) == 2 * len(PROMPTS)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(new_tokens(theirs, PROMPTS, do_sample=True, temperature=0.8, top_p=0.9))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ("threshold", "random", "baseline"))
def test_drafts_of_another_model_or_of_the_prompt_change_no_token(name):
    """The library crops the cache where a draft was wrong."""
    _, theirs = both(name, "post", torch.float32)
    _, drafts = both("threshold", "pre", torch.float32)
    for model in (theirs, drafts):  # earlier versions draft with models alone that have an end, as exports do
        model.generation_config.eos_token_id = 29
    expected = new_tokens(theirs, PROMPTS[:1])
    assert new_tokens(theirs, PROMPTS[:1], assistant_model=drafts) == expected
    assert new_tokens(theirs, PROMPTS[:1], assistant_model=theirs) == expected
    (found,) = new_tokens(theirs, PROMPTS[:1], prompt_lookup_num_tokens=3)
    assert [found[: len(expected[0])]] == expected  # earlier versions keep what a draft has beyond the end


def test_beams_of_a_batch_are_those_of_single_texts():
    _, theirs = both("threshold", "post", torch.float64)
    single = [new_tokens(theirs, [prompt], num_beams=4)[0] for prompt in PROMPTS]
    assert new_tokens(theirs, PROMPTS, num_beams=4) == single


TAUGHT = [name for name in ROUTERS if "regularised" not in name and "learned" not in name]


@pytest.mark.parametrize("name", TAUGHT)
def test_gradients_are_the_runs(name):
    """Fine-tuning follows the gradient that pretraining follows, that of a hard router's gates included.

    It leaves out regularisers, and the head of a learned router.
    """
    ours, theirs = both(name, "post", torch.float64)
    ours.train()
    theirs.train()
    tokens = token_batch(2, 12)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    ours(tokens, targets, torch.zeros(2, dtype=torch.int64)).loss.backward()
    found = theirs(tokens, labels=tokens)
    torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), targets.flatten()).backward()
    for parameter, tensor in ours.named_parameters():
        grad = theirs.get_parameter(f"model.{parameter}").grad
        wanted = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        grad = torch.zeros_like(tensor) if grad is None else grad
        assert (grad - wanted).norm() <= 1e-6 * wanted.norm() + 1e-12, parameter


def test_the_loss_of_labels_is_the_runs():
    ours, theirs = both("threshold", "post", torch.float32)
    tokens = token_batch(3, 12)
    targets = torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], 1)
    with torch.no_grad():
        assert theirs(tokens, labels=tokens).loss.item() == pytest.approx(ours(tokens, targets).loss.item(), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    _, theirs = both("threshold three", "post", torch.float64)
    theirs.train()
    tokens = token_batch(2, 12)
    theirs(tokens, labels=tokens).loss.backward()
    before = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    theirs.gradient_checkpointing_enable()
    theirs(tokens, labels=tokens).loss.backward()
    for n, p in theirs.named_parameters():
        if n in before:
            torch.testing.assert_close(p.grad, before[n], rtol=1e-9, atol=1e-12, msg=n)


def test_hidden_states_tuples_and_last_logits():
    _, theirs = both("threshold", "post", torch.float32)
    tokens = token_batch(2, 8)
    with torch.no_grad():
        whole = theirs(tokens, output_hidden_states=True)
        last = theirs(tokens, logits_to_keep=1).logits
        as_tuple = theirs(tokens, return_dict=False, use_cache=False)
    assert len(whole.hidden_states) == 5 and whole.hidden_states[0].shape == (2, 8, 32)
    assert torch.equal(as_tuple[0], whole.logits)
    torch.testing.assert_close(last, whole.logits[:, -1:])


def test_what_the_model_cannot_do_is_an_error():
    _, theirs = both("threshold", "post", torch.float32)
    tokens = token_batch(1, 4)
    with pytest.raises(ValueError, match="reads input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        theirs(tokens, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="position_ids are not those of the attention mask"):
        theirs(tokens, position_ids=torch.tensor([[0, 1, 0, 1]]))
    theirs(tokens, position_ids=torch.arange(4)[None])
