"""Put tokens into the classes that routes are compared with: frequency, position, loss and kind of word.

Shapes: S = sequences, T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import unicodedata

import numpy as np

from megachiar.analysis.token_texts import token_classes
from megachiar.data.tokenizers.token_reader import TokenText, token_texts
from megachiar.data.tokenizers.tokenizer import Tokenizer

BINS = 8
"""Classes of frequency, position and loss."""

WORD_CLASSES = (
    "function word",
    "capitalised word",
    "other word",
    "piece of a word",
    "number",
    "punctuation",
    "whitespace",
    "other",
)
"""The kinds of tokens. They stand for parts of speech, as far as a list and the form of a token can tell them."""

_LISTS = (
    # articles and determiners
    "a an the this that these those each every either neither some any no all both few many much more most other "
    "another such what which whose "
    # pronouns
    "i me my mine myself we us our ours ourselves you your yours yourself thou thee thy thine he him his himself she "
    "her hers herself it its itself they them their theirs themselves who whom one "
    # prepositions
    "of in to for with on at by from up about into over after beneath under above below between among through during "
    "before behind against without within upon toward towards across around off out down near since until till than "
    # conjunctions
    "and or but nor so yet if because although though while whereas unless as whether when where why how "
    # auxiliary verbs
    "be am is are was were been being have has had having do does did doing hath doth art shall will would should can "
    "could may might must ought shalt wilt hast dost "
    # particles and adverbs of grammar
    "not there here then too very just only also even ever never"
)
FUNCTION_WORDS = frozenset(_LISTS.split())
"""English words that carry grammar rather than content, in lower case, those of early modern English among them."""


def frequency_classes(ids: np.ndarray, counts: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return a class (S, T) from 0 for each token: commonest ids first, and about as much of the text in each class.

    An id belongs to the class in which the middle of its share of the text lies, by falling count.

    Args:
        ids: (S, T) token ids.
        counts: (V,) how often each id occurs in the text.
        bins: number of classes.
    """
    order = np.argsort(-counts, kind="stable")
    sorted_counts = counts[order].astype(np.float64)
    middle = (np.cumsum(sorted_counts) - sorted_counts / 2) / max(sorted_counts.sum(), 1.0)
    classes = np.empty(len(counts), np.int64)
    classes[order] = np.minimum((middle * bins).astype(np.int64), bins - 1)
    return classes[ids]


def position_classes(shape: tuple[int, ...], bins: int = BINS) -> np.ndarray:
    """Return a class from 0 for each token of an array of ``shape`` (S, T): equal stretches of the sequence."""
    length = shape[1]
    return np.broadcast_to(np.arange(length) * min(bins, length) // length, shape)


def quantile_classes(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return a class from 0 for each of ``values``, in their shape: equally many in each; nan is in the last one."""
    finite = values[np.isfinite(values)]
    bounds = np.quantile(finite, np.linspace(0, 1, bins + 1)[1:-1]) if len(finite) else np.empty(0)
    return np.searchsorted(bounds, values, side="left").astype(np.int64)


def word_classes(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Return the kind of each token (S, T), as an index into ``WORD_CLASSES``."""
    classes = np.empty(ids.shape, np.int64)
    for row, sequence in enumerate(ids.tolist()):
        texts = token_texts(tokenizer, sequence)
        forms = token_classes(texts)
        kinds = [word_class(text, form) for text, form in zip(texts, forms, strict=True)]
        classes[row] = [WORD_CLASSES.index(kind) for kind in kinds]
    return classes


def word_class(token: TokenText, form: str) -> str:
    """Return the kind of a token, one of ``WORD_CLASSES``, from its text and its class in ``token_texts.CLASSES``."""
    if form in ("number", "punctuation", "whitespace"):
        return form
    if form in ("word start", "word part"):
        return "piece of a word"
    if form != "word":
        return "other"
    letters = token.text.strip()
    if letters.lower() in FUNCTION_WORDS:
        return "function word"
    first = next((letter for letter in letters if letter.isalpha()), "a")
    return "capitalised word" if unicodedata.category(first) in ("Lu", "Lt") else "other word"
