"""Read and write the published code's checkpoints: what its scripts give ``torch.save``.

    train.py                        step, model, val_ppl, cfg   cfg: what the script has set on its config object, and
                                                                nothing of the config's class
    train_all.py --dataset mixed    step, model, val_ppl
    train_all.py --dataset lra_*    step, model, test_acc
    calibrate_tau.py                reads model["token_emb.weight"]
    qualitative.py                  reads model and val_ppl
    app.py of the demo              reads model, val_ppl and cfg, of which it takes the keys that its config has

``model`` is a state dict. A file that is a state dict itself is read too. Only tensors and plain values are loaded: no
code of a file runs.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megachiar.data.storage.files import sync_folder, temporary_path
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError, disk_error, disk_errors
from megachiar.interop.published_names import BACKBONE

_CODE = re.compile(r"GLOBAL ([\w.]+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_ANOTHER = "give a checkpoint that a training script of the published code has written"
_LARGEST_STEP = 10**15


@dataclass(frozen=True)
class PublishedFile:
    """The content of a published checkpoint.

    Attributes:
        path: of the file.
        tensors: the state dict, on the CPU.
        cfg: what the training script has set of its config; empty where it saves none.
        step: optimizer steps taken; 0 where the file does not say.
        perplexity: on the validation set; None where the file does not say.
        accuracy: of a classifier on its test set, in percent; None where the file does not say.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    cfg: dict[str, Any]
    step: int
    perplexity: float | None = None
    accuracy: float | None = None

    @property
    def prefix(self) -> str:
        """What stands before the names of embedding and layers."""
        return BACKBONE if any(name.startswith(BACKBONE) for name in self.tensors) else ""

    def setting(self, name: str, *kinds: type) -> Any:
        """Return a value of ``cfg``; None where it has none.

        Raises:
            UserError: the value is of none of ``kinds``.
        """
        value = self.cfg.get(name)
        if value is not None and type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(self.path, f"cfg has {name} {value!r}, which is no {wanted}", _ANOTHER)
        return value


def read_published(path: Path) -> PublishedFile:
    """Read a checkpoint of the published code.

    Raises:
        UserError: it is none, it is damaged, or reading it would run code.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise UserError(path, f"holds a {type(content).__name__}, and no model", _ANOTHER)
    tensors = content.get("model", content)
    if not isinstance(tensors, Mapping) or not tensors:
        raise UserError(path, "holds no model", _ANOTHER)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    cfg = content.get("cfg") or {}
    if not isinstance(cfg, Mapping):
        raise UserError(path, f"has a {type(cfg).__name__} as cfg, and no settings by name", _ANOTHER)
    step = 0 if tensors is content else content.get("step", 0)
    if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
        raise UserError(path, f"is of step {step!r}, which is no number of steps", _ANOTHER)
    perplexity = _number_between(content.get("val_ppl"), 1, sys.float_info.max)
    accuracy = _number_between(content.get("test_acc"), 0, 100)
    return PublishedFile(path, dict(tensors), dict(cfg), step, perplexity, accuracy)


def _number_between(value: Any, least: float, most: float) -> float | None:
    """Return a number that is one, and within its limits; else None."""
    return float(value) if isinstance(value, float | int) and least <= value <= most else None


def _load(path: Path) -> Any:
    """Return what ``torch.save`` has written to ``path``, without running any code that it names."""
    with disk_errors(path, "read"):
        check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in another protocol than torch's own
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes many kinds of errors
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch makes of a file that is cut off
            raise disk_error(path, error, "read") from error
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    """Return the error for a file that torch cannot read; torch's own message advises to run the code of a file."""
    text = str(error)
    code = _CODE.search(text)
    if isinstance(error, pickle.UnpicklingError) and code is not None:
        return UserError(
            path,
            f"names {code[1]}, which is neither a tensor nor a plain value: reading it would run code",
            "have whoever made the file save state dict and settings alone, as the published code does",
        )
    if isinstance(error, pickle.UnpicklingError):
        reason = match[1] if (match := _REASON.search(text)) else "it is no pickle of tensors"
    elif isinstance(error, RuntimeError):
        reason = text.splitlines()[0].split(". ")[0][:200]
    else:
        reason = "it is neither a zip file nor a pickle"
    return UserError(path, f"is no checkpoint that torch can read: {reason}", f"{_ANOTHER}, or a whole copy of it")


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise UserError(path, f"holds a {type(tensor).__name__} under {name!r}, and no tensor by name", _ANOTHER)
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not is_plain:
        kind = f"{tensor.layout} of {tensor.dtype} on {tensor.device}".replace("torch.", "")
        raise UserError(path, f"{name} is {kind}, and no plain tensor of floating-point numbers", _ANOTHER)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(path, f"{name} has shape {tuple(tensor.shape)}, and fewer numbers than that", _ANOTHER)


def write_published(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a checkpoint of the published code, whole or not at all.

    Returns:
        Whether it was written; a file with the same content stays as it is.

    Raises:
        UserError: another file has that name, or the disk refuses the new one.
    """
    temporary = temporary_path(path)
    with disk_errors(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            _save(temporary, dict(content))
            if path.exists():
                if _same_content(path, temporary):
                    return False
                raise UserError(path, "exists already, with another content", "name another file, or remove this one")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    return True


def _save(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:  # a name would become a part of the file's content
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _same_content(one: Path, other: Path) -> bool:
    if not one.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        while block := first.read(1 << 24):
            if block != second.read(1 << 24):
                return False
    return True
