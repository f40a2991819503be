"""Load an export as its users do, and compare it with the run: logits, and what greedy decoding generates.

Both models compute in fp64. In fp32 a router's entropy may round to the other side of its threshold, and a whole token
would differ without a fault; in fp64 it practically never does. Each model takes 8 bytes a parameter meanwhile.

Shapes: B = sequences, T = tokens of a sequence, V = vocabulary, C = classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachiar.config import RunConfig
from megachiar.config.tasks import RunTask
from megachiar.errors import UserError
from megachiar.inference.generation import generate
from megachiar.inference.loading import load_model
from megachiar.model import ChiarFormer

LENGTHS, NEW_TOKENS = (48, 31, 1), 16
TOLERANCE = 1e-8
"""The largest difference of logits, relative to the largest of them."""


@dataclass(frozen=True)
class Examples:
    """What both models read.

    Attributes:
        texts: ids of sequences of different lengths.
        known: bool (V,), ids that the tokenizer has.
        end: the id that ends a text; None if there is none.
    """

    texts: list[list[int]]
    known: torch.Tensor
    end: int | None


def make_examples(config: RunConfig, known: torch.Tensor, end: int | None, longest: int) -> Examples:
    """Draw texts of at most ``longest`` ids that the tokenizer has; where documents are kept apart, some end."""
    ids, generator = known.nonzero().flatten(), torch.Generator().manual_seed(0)
    texts = []
    for length in sorted({min(length, longest) for length in LENGTHS}, reverse=True):
        text = ids[torch.randint(len(ids), (length,), generator=generator)].tolist()
        if config.document_end is not None and length > 4:
            text[length // 3] = text[length // 3 + 1] = config.document_end
        texts.append(text)
    return Examples(texts, known, end)


def check_language_model(transformers: Any, folder: Path, checkpoint: Path, examples: Examples) -> float:
    """Compare logits and greedy tokens of single texts, and of all texts as one batch.

    Returns:
        The largest difference of logits.

    Raises:
        UserError: they do not match.
    """
    theirs = _load(transformers.AutoModelForCausalLM, folder)
    config, ours, _ = load_model(checkpoint, "cpu", torch.float64)
    largest = 0.0
    for text in examples.texts:
        tokens = torch.tensor([text])
        with torch.inference_mode():
            wanted, found = ours(tokens).logits, theirs(input_ids=tokens).logits
        largest = max(largest, _compare(folder, "logits", wanted, found))
    prompts = [text[: max(1, config.model.max_sequence_length - NEW_TOKENS)] for text in examples.texts]
    count = min(NEW_TOKENS, config.model.max_sequence_length - max(map(len, prompts)))
    if count < 1:
        return largest
    together = _generate(theirs, prompts, count)
    for prompt, of_batch in zip(prompts, together, strict=True):
        wanted = _own_tokens(ours, prompt, count, examples)
        for found, how in ((_generate(theirs, [prompt], count)[0], "alone"), (of_batch, "in a batch")):
            if _until(found, examples.end) != wanted:
                raise _mismatch(folder, f"greedy decoding {how} gives {found[:8]}, and the run {wanted[:8]}")
    return largest


def check_classifier(
    transformers: Any, folder: Path, checkpoint: Path, task: RunTask, examples: Examples, length: int
) -> float:
    """Compare the logits of classes, of single texts and of all texts as one batch; arguments as above.

    Args:
        task: whose head is exported.
        length: tokens that the run fills a sequence up to.
    """
    theirs = _load(transformers.AutoModelForSequenceClassification, folder)
    _, ours, _ = load_model(checkpoint, "cpu", torch.float64)
    ids, mask = _batch(examples.texts, on_left=False)
    with torch.inference_mode():
        together = theirs(input_ids=ids, attention_mask=mask).logits
    largest = 0.0
    for text, of_batch in zip(examples.texts, together, strict=True):
        filled = torch.tensor([text + [-1] * (length - len(text))])
        with torch.inference_mode():
            wanted = ours(filled, head=task.name).logits
            found = theirs(input_ids=torch.tensor([text])).logits
        largest = max(largest, _compare(folder, "logits", wanted, found))
        _compare(folder, "logits in a batch", wanted, of_batch[None])
    return largest


def _load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).double().eval()


def _own_tokens(model: ChiarFormer, prompt: list[int], count: int, examples: Examples) -> list[int]:
    return generate(model, prompt, count, temperature=0.0, eod_id=examples.end, known_ids=examples.known)


def _batch(texts: list[list[int]], on_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts of different lengths as ids (B, T), filled up with 0, and the mask (B, T) of what is real."""
    longest = max(map(len, texts))
    rows, masks = [], []
    for text in texts:
        empty = [0] * (longest - len(text))
        rows.append([*empty, *text] if on_left else [*text, *empty])
        masks.append([*empty, *[1] * len(text)] if on_left else [*[1] * len(text), *empty])
    return torch.tensor(rows), torch.tensor(masks)


def _generate(model: Any, texts: list[list[int]], count: int) -> list[list[int]]:
    """Return the new ids of each text, which greedy decoding of all of them together gives."""
    ids, mask = _batch(texts, on_left=True)
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return found[:, ids.shape[1] :].tolist()


def _until(ids: list[int], end: int | None) -> list[int]:
    """Return the ids before the first one that ends the text."""
    return ids[: ids.index(end)] if end in ids else ids


def _compare(folder: Path, what: str, wanted: torch.Tensor, found: torch.Tensor) -> float:
    if wanted.shape != found.shape:
        raise _mismatch(folder, f"{what} have shape {tuple(found.shape)}, and the run's {tuple(wanted.shape)}")
    difference = (wanted - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise _mismatch(folder, f"{what} differ by {difference:.3g}")
    return difference


def _mismatch(folder: Path, problem: str) -> UserError:
    remedy = "nothing was exported; report it with the run's config and the versions of torch and transformers"
    return UserError(folder, f"the exported model is not the run's: {problem}", remedy)


@contextlib.contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """Keep the library's warnings and progress bars out of the output of a command."""
    logging = transformers.utils.logging
    before, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shows_bars:
            logging.enable_progress_bar()
