"""Whether a run can go on from a checkpoint: the same model, and data that may follow what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState
from megachiar.config import ModelConfig, RunConfig, load_config
from megachiar.data.sampling.history import Change, DataHistory
from megachiar.topology import LaunchError

# Model keys that may differ between a checkpoint and the run that loads it: they change no weight's meaning.
_FREE_MODEL_KEYS = {"dropout", "max_sequence_length", "initializer_std"}
_FREE_ROUTER_KEYS = {"tau", "tau_low", "tau_high", "attention_share", "rbf_share", "seed"}
_FREE_ROUTER_KEYS |= {"collapse_weight", "collapse_temperature"}


def check_same_model(checkpoint: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    """Check that weights of ``saved`` mean the same in ``wanted``.

    Raises:
        UserError: names every key that differs, with both values.
    """
    before, now = _binding_keys(saved), _binding_keys(wanted)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        raise LaunchError(
            checkpoint,
            "is of another model: "
            + ", ".join(f"model.{k} {before.get(k)!r} there, {now[k]!r} here" for k in different),
            "use the config the checkpoint was written with (config.yaml beside it), or another logging.folder",
        )


def _binding_keys(model: ModelConfig) -> dict[str, Any]:
    flat = {"ffn_hidden_size": model.ffn_size}
    for key, value in model.model_dump(mode="json").items():
        if isinstance(value, dict):
            free = _FREE_ROUTER_KEYS if key == "router" else {"init"} if key == "meta_router" else set()
            flat.update({f"{key}.{name}": v for name, v in value.items() if name not in free})
        elif key not in _FREE_MODEL_KEYS | set(flat):
            flat[key] = value
    return flat


def check_data(checkpoint: Path, state: CheckpointState, config: RunConfig, wanted: DataHistory) -> list[Change]:
    """What the run reads otherwise from now on than it did up to ``checkpoint``.

    Args:
        wanted: what ``config`` would read from the beginning.

    Raises:
        LaunchError: something changed that ``data.on_change`` does not allow, or that has no meaning in mid-run.
    """
    changes = state.data.changes(wanted, state.step)
    for change in changes:
        if not change.defined:
            remedy = "go on with the saved value, or start a new run from its weights alone with checkpoint.load_from"
        elif config.data.on_change == "refuse":
            remedy = (
                "set it back, or set data.on_change=continue: every source then goes on from where it is; or start a "
                "new run from its weights alone with checkpoint.load_from"
            )
        else:
            continue
        raise LaunchError(
            f"{checkpoint}: {change.key}",
            f"was {change.before} when it was saved and is {change.now} now: the order of samples would change",
            remedy,
        )
    return changes


def describe_mask_change(checkpoint: Path, config: RunConfig) -> list[str]:
    """Return a line where ``config`` keeps documents apart otherwise than the run did up to ``checkpoint``."""

    def mask(end: int | None) -> str:
        return "off" if end is None else f"at id {end}"

    before, now = load_config(checkpoint / CONFIG_FILE).document_end, config.document_end
    if before == now:
        return []
    return [f"data.document_mask was {mask(before)} up to here and is {mask(now)} from here on"]
