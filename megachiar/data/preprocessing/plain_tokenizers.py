"""Make tokenizers that learn no pieces: one token for each byte, or one for each word between spaces.

Both are files ``tokenizer.json`` of the ``tokenizers`` library, so that they load as every other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megachiar.data.tokenizers.gpt2_files import GPT2_EOD

BYTES = 256
BYTE_VOCABULARY = BYTES + 1
UNKNOWN_WORD = "<unk>"


def byte_tokenizer() -> bytes:
    """Return the file of a tokenizer whose id of a byte is the byte's value; 256 is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: value for value, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([GPT2_EOD])
    return tokenizer.to_str(pretty=True).encode() + b"\n"


def _letters() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies, by the byte's value.

    Bytes that print in Latin-1 stand for themselves; the others take the characters from 256 on, in order.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(value if value in printed else next(others)) for value in range(BYTES)]


def word_tokenizer(texts: Iterable[str], vocab_size: int | None) -> bytes:
    """Return the file of a tokenizer with an id for each word between spaces.

    0 is a word that the vocabulary lacks, 1 the end of a document. The words follow, the most frequent first, and of
    equally frequent ones in the order of their characters.

    Args:
        texts: the texts whose words are counted.
        vocab_size: the most tokens of the vocabulary, those two included; None takes all words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    splitter = pre_tokenizers.WhitespaceSplit()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    special = [UNKNOWN_WORD, GPT2_EOD]
    words = sorted(counts.keys() - set(special), key=lambda word: (-counts[word], word))
    kept = words if vocab_size is None else words[: max(0, vocab_size - len(special))]
    vocabulary = {word: index for index, word in enumerate([*special, *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([GPT2_EOD])
    return tokenizer.to_str(pretty=True).encode() + b"\n"
