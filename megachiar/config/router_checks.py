"""Checks of the section ``model.router:``, among the checks over several keys."""

from __future__ import annotations

from collections.abc import Iterator

from megachiar.config.errors import Problem
from megachiar.config.model import ModelConfig

OPERATOR_SETS = (("dct", "attention"), ("dct", "rbf", "attention"))


def router(model: ModelConfig) -> Iterator[Problem]:
    """Check that the router has the thresholds or shares that its kind reads, and no others."""
    if model.kind == "baseline":
        return
    r = model.router
    if r.operators not in OPERATOR_SETS:
        allowed = " or ".join(str(list(s)) for s in OPERATOR_SETS)
        yield Problem("model.router.operators", f"is {list(r.operators)}", f"use {allowed}")
        return
    three = len(r.operators) == 3
    needed: list[str] = []
    if r.has_thresholds:
        needed = ["tau_low", "tau_high"] if three else ["tau"]
    elif r.kind == "random":
        needed = ["attention_share", "rbf_share"] if three else ["attention_share"]
    elif r.kind == "learned":
        needed = ["target_share"]
    holds_share = r.has_thresholds and not three
    for name in ("tau", "tau_low", "tau_high", "attention_share", "rbf_share", "target_share"):
        given = getattr(r, name) is not None
        what = f"kind {r.kind} with operators {list(r.operators)}"
        if name in needed and not given and not (name == "tau" and r.target_share is not None):
            yield Problem(f"model.router.{name}", f"is missing: {what} needs it", f"set {name}")
        elif given and name not in needed and not (name == "target_share" and holds_share):
            yield Problem(f"model.router.{name}", f"has no effect: {what} does not read it", "remove it")
    wrong_lists = list(_threshold_lists(model))
    yield from wrong_lists
    if three and r.has_thresholds and r.tau_low is not None and r.tau_high is not None and not wrong_lists:
        for layer in model.routed_layers:
            low, high = model.threshold("tau_low", layer), model.threshold("tau_high", layer)
            if low > high:
                yield Problem(
                    "model.router.tau_low", f"{low} is above tau_high {high} (layer {layer + 1})", "swap them"
                )
                break
    if r.kind == "random" and three and (total := (r.attention_share or 0) + (r.rbf_share or 0)) > 1:
        yield Problem("model.router.rbf_share", f"attention_share + rbf_share is {total}, above 1", "lower one")
    yield from _combinations(model)


def _combinations(model: ModelConfig) -> Iterator[Problem]:
    """Check that the other keys are of use to the kind of router, and that the kind can do what they ask."""
    r = model.router
    three = len(r.operators) == 3
    if r.collapse_weight and (r.kind in ("random", "learned") or r.target_share is not None):
        why = "a random router has nothing to regularise" if r.kind == "random" else "target_share holds the shares"
        yield Problem("model.router.collapse_weight", f"is {r.collapse_weight}: {why}", "set it to 0")
    if r.kind == "learned" and three:
        yield Problem(
            "model.router.operators",
            f"is {list(r.operators)}: a learned router chooses between two operators",
            "set it to [dct, attention]",
        )
    if r.kind == "learned" and model.attention.keys == "routed":
        yield Problem(
            "model.attention.keys",
            "is routed: a learned router knows what a token's own attention is worth, not what its keys are to others",
            "set it to all",
        )
    if r.anneal_steps and r.target_share is None and (r.kind != "random" or three):
        remedy = "remove it" if r.kind == "random" else "set target_share or remove it"
        yield Problem("model.router.anneal_steps", "has no effect without target_share", remedy)
    if r.kind != "learned" and r.explore != type(r).model_fields["explore"].default:
        yield Problem("model.router.explore", f"has no effect: kind {r.kind} explores nothing", "remove it")
    if r.kind == "hard" and r.hard_gradient == "published" and model.attention.keys == "routed":
        yield Problem(
            "model.router.hard_gradient",
            "is published: it needs the attention of tokens that give no keys with attention.keys: routed",
            "set it to dct_only, or attention.keys to all",
        )
    if r.hard_gradient == "dct_only" and (r.kind != "hard" or three):
        yield Problem(
            "model.router.hard_gradient",
            f"is dct_only: it is for kind hard with the operators dct and attention, and this is {r.kind} with "
            f"{list(r.operators)}",
            "remove it",
        )
    if r.kind == "soft" and model.attention.keys == "routed":
        yield Problem(
            "model.attention.keys",
            "is routed with a soft router, which sends every token through attention",
            "set it to all, or choose another router.kind",
        )


def _threshold_lists(model: ModelConfig) -> Iterator[Problem]:
    routed = len(model.routed_layers)
    for name in ("tau", "tau_low", "tau_high"):
        value = getattr(model.router, name)
        if isinstance(value, tuple) and len(value) != routed:
            yield Problem(
                f"model.router.{name}",
                f"has {len(value)} values for {routed} routed layers (2..{model.num_layers - 1})",
                f"give one number or {routed}",
            )
