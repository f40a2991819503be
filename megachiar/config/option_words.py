"""An option of a command line that names a key of a config, in our words or in another stack's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megachiar.config.foreign_keys import foreign_key, normalized
from megachiar.config.typed_sections import config_keys

OPTIONS = {
    "preprocess": {
        "json_keys": "use --text-key",
        "jsonl_keys": "use --text-key",
        "json_key": "use --text-key",
        "partitions": "use --shard K/N and --merge-shards N",
        "num_workers": "use --workers",
        "split_sentences": "remove it: a document is never cut into sentences",
        "keep_newlines": "remove it: a text is kept as it is",
        "ftfy": "remove it: a text is kept as it is",
    },
    "tokenizer": {
        "json_keys": "use --text-key",
        "model_prefix": "use --output",
        "model_type": "use --algorithm",
        "num_threads": "remove it: the number of threads would change the tokenizer",
    },
    "merge": {
        "input": "leave it out: `megachiar merge data/part0 data/part1 --output data/whole`",
        "output_prefix": "use --output",
    },
    "evaluate": {"batch": "use --batch-size", "eval_batch_size": "use --batch-size"},
    "routes": {"prompt": "use --text", "output": "use --html"},
    "demo": {"share": "use --host 0.0.0.0", "server_port": "use --port", "server_name": "use --host"},
    "generate": {"max_length": "use --max-new-tokens", "n": "use --num-samples"},
}
"""Command -> what other tools call its options, with what to do."""


class MeantKey(NamedTuple):
    """The keys of a config that an unknown option may stand for.

    Attributes:
        keys: the dotted keys of a config that it can mean; empty where there is nothing to set.
        stacks: whose word it is; empty for ours.
        how: how the value translates, or why there is nothing to set; empty where the value stays as it is.
    """

    keys: Sequence[str]
    stacks: str = ""
    how: str = ""


def meant_key(option: str) -> MeantKey | None:
    """Return what ``option``, such as ``--train-iters``, means in a config; None if no stack calls anything so."""
    row = foreign_key([option])
    if row is not None:
        return MeantKey(row.ours.split(), row.stacks, row.how)
    keys = config_keys().get(normalized(option))
    return MeantKey(keys) if keys else None
