"""Say in words what a record of routes shows: the same words on a terminal and on a page."""

from __future__ import annotations

from typing import Any

NAMES = {"dct": "DCT mixing", "rbf": "RBF mixing", "attention": "attention"}
"""Operators as a reader calls them."""


def how_it_routes(record: dict[str, Any], layer: dict[str, Any]) -> str:
    """Return what decides about the operator of a token in ``layer``, one of the record's layers."""
    if not layer["routed"]:
        (taken,) = (name for name, share in layer["shares"].items() if share)
        return f"{NAMES[taken]} for every token"
    bounds = " and ".join(f"{bound:.4f}" for bound in layer["bounds"])
    return f"{record['router']} router" + (f", threshold {bounds}" if bounds else "")


def notes(record: dict[str, Any]) -> list[str]:
    """Return what a reader has to know of the record to read it rightly."""
    found = []
    if (count := len(record["windows"])) > 1:
        longest, second = record["max_sequence_length"], record["windows"][1]
        found.append(
            f"The text was read in {count:,} windows of at most {longest:,} tokens, the model's longest sequence. Each "
            f"window after the first reads the {second['kept'] - second['start']:,} tokens before its own again."
        )
    if record["router"] == "soft":
        found.append("A soft router computes all operators. Colours show the largest gate, and shares are mean gates.")
    if record["router"] == "random":
        found.append("A random router is a control: it throws a coin for each token, and H decides nothing.")
    if record["router"] == "hashed":
        found.append(
            "A hashed router is a control: it decides by H of the channels in another order. The H that is shown, of "
            "the channels as they are, decides nothing."
        )
    if record["router"] == "learned":
        found.append(
            "A learned router predicts what attention is worth to a token from its hidden state, of which H is a part."
        )
    return found


def with_words(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record as a page takes it, with the words for its layers and its notes."""
    layers = [{**layer, "how": how_it_routes(record, layer)} for layer in record["layers"]]
    return {**record, "layers": layers, "words": {"names": NAMES, "notes": notes(record)}}
