"""Check whether a run can continue from a checkpoint: with the same model, and on which data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, read_state
from megachiar.config import ModelConfig, RunConfig, load_config
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import Change
from megachiar.topology import LaunchError

# These model keys may differ between a checkpoint and the run that loads it: they change no weight's meaning.
_FREE_MODEL_KEYS = {"dropout", "max_sequence_length", "initializer_std"}
_FREE_ROUTER_KEYS = {"tau", "tau_low", "tau_high", "attention_share", "rbf_share", "seed"}
_FREE_ROUTER_KEYS |= {"collapse_weight", "collapse_temperature", "explore"}
# Of these only whether they are set: a checkpoint then holds what follows them, and another value goes on from there.
_FOLLOWED_ROUTER_KEYS = ("target_share", "anneal_steps")


def read_compatible(
    checkpoint: Path, wanted: ModelConfig, is_own: bool, *, weights_only: bool = False
) -> CheckpointState:
    """Return the record of a checkpoint whose weights the model ``wanted`` can load.

    Args:
        checkpoint: that is to be loaded.
        wanted: the model of the run that loads it.
        is_own: whether the checkpoint lies in the folder of that run; else ``checkpoint.load_from`` names it.
        weights_only: whether a new run takes the weights alone. It may hold a share of attention, or anneal its
            routers, where the run of the checkpoint did not, or the other way round.

    Raises:
        UserError: the checkpoint is damaged.
        LaunchError: it holds another model.
    """
    state = read_state(checkpoint)
    saved = load_config(checkpoint / CONFIG_FILE).model
    if weights_only:
        saved, wanted = _without_running_numbers(saved), _without_running_numbers(wanted)
    check_same_model(checkpoint, saved, wanted, is_own)
    return state


def _without_running_numbers(model: ModelConfig) -> ModelConfig:
    """Return the model whose routers follow no share, if a fixed threshold can take the place of one that moves."""
    if model.router.kind == "learned":
        router = model.router.model_copy(update={"anneal_steps": 0})
    else:
        router = model.router.model_copy(update={"target_share": None, "anneal_steps": 0})
    return model.model_copy(update={"router": router})


def check_same_model(checkpoint: Path, saved: ModelConfig, wanted: ModelConfig, is_own: bool) -> None:
    """Check that the weights of model ``saved`` mean the same in model ``wanted``; ``is_own`` as ``read_compatible``.

    Raises:
        LaunchError: keys differ. The message names each of them with both values.
    """
    before, now = _binding_keys(saved), _binding_keys(wanted)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        raise LaunchError(
            checkpoint,
            "holds another model than the config: "
            + "; ".join(
                f"model.{k} is {before.get(k)!r} in the checkpoint and {now[k]!r} in the config" for k in different
            ),
            "set these keys as the checkpoint has them (its config.yaml), or "
            + ("name another logging.folder" if is_own else "leave checkpoint.load_from out to start fresh"),
        )


def check_same_tasks(checkpoint: Path, saved: RunConfig, wanted: RunConfig, is_own: bool) -> None:
    """Check that a run that goes on from a checkpoint learns the same tasks; ``is_own`` as ``read_compatible``.

    Raises:
        LaunchError: its tasks differ. The message names both.
    """
    before, now = (_describe_tasks(config) for config in (saved, wanted))
    if before != now:
        raise LaunchError(
            checkpoint,
            f"is of a run that learns {before}, and this one learns {now}",
            f"set task and mixed.tasks as they were, or {weights_alone(checkpoint, is_own)}",
        )


def check_same_optimizer(checkpoint: Path, saved: RunConfig, wanted: RunConfig, is_own: bool) -> None:
    """Check that a run that goes on from a checkpoint keeps its optimizer; ``is_own`` as ``read_compatible``.

    Raises:
        LaunchError: the optimizer is of another kind, whose moments the checkpoint does not hold.
    """
    before, now = saved.optimizer.kind, wanted.optimizer.kind
    if before != now:
        raise LaunchError(
            checkpoint,
            f"has the optimizer state of {before}, but optimizer.kind is {now}",
            f"set optimizer.kind to {before}, or {weights_alone(checkpoint, is_own)}",
        )


def _describe_tasks(config: RunConfig) -> str:
    kinds = {True: "a language model", False: "classes"}
    names = [
        f"{task.name} ({kinds[task.head is None]}"
        + (f": {task.head.classes}, head {task.head.kind})" if task.head is not None else ")")
        for task in config.tasks
    ]
    return ", ".join(names)


def _binding_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the values that fix what weights mean, by key under ``model``, such as ``router.kind``."""
    flat = {"ffn_hidden_size": model.ffn_size}
    for key, value in model.model_dump(mode="json").items():
        if isinstance(value, dict):
            free = _FREE_ROUTER_KEYS if key == "router" else {"init"} if key == "meta_router" else set()
            if key == "router":
                value = value | {name: "set" if value[name] else "not set" for name in _FOLLOWED_ROUTER_KEYS}
            flat.update({f"{key}.{name}": v for name, v in value.items() if name not in free})
        elif key not in _FREE_MODEL_KEYS | set(flat):
            flat[key] = value
    return flat


def check_data(
    checkpoint: Path, state: CheckpointState, config: RunConfig, wanted: DataHistory, is_own: bool
) -> list[Change]:
    """Return how the data of ``config`` differs from what the run read up to ``checkpoint``.

    Args:
        checkpoint: named in errors.
        state: the checkpoint's record.
        config: of the run that continues.
        wanted: what ``config`` would read if the run were new.
        is_own: as ``read_compatible``.

    Raises:
        LaunchError: a value changed that ``data.on_change`` does not allow to change, or that no run can change.
    """
    changes = state.data.changes(wanted, state.step)
    for change in changes:
        if not change.defined:
            remedy = "set it back"
        elif config.data.on_change == "refuse":
            remedy = "set it back, or set data.on_change to continue: every source then continues from where it is"
        else:
            continue
        raise LaunchError(
            f"{checkpoint}: {change.key}",
            f"was {change.before} when it was saved and is {change.now} now: the order of samples would change",
            f"{remedy}, or {weights_alone(checkpoint, is_own)}",
        )
    return changes


def changed_keys(before: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return each key whose value differs between two configs, with both values; a key that one lacks is None there."""
    old, new = before.flat(), now.flat()
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def weights_alone(checkpoint: Path, is_own: bool) -> str:
    """Return how a run takes nothing but the weights of a checkpoint; ``is_own`` as ``read_compatible``."""
    if is_own:
        return f"start a new run in another logging.folder, with checkpoint.load_from: {checkpoint}"
    return "set checkpoint.load to weights, which loads nothing else"
