"""Fetch a tokenizer from the Hugging Face hub by its name, ``hf:NAME`` or ``hf:NAME@REVISION``.

The files come into the cache that the library ``huggingface_hub`` keeps for all programs of a user, so that they are
fetched once and are there without a network:

    models--OWNER--NAME/refs/REVISION          the commit that a branch or tag meant when it was fetched last
    models--OWNER--NAME/snapshots/COMMIT/      the files of that commit

A revision is a branch (``main`` where none is named), a tag or a commit. The path of a fetched file holds the commit.
So ``hub_origin`` reads from the path where a tokenizer came from, and that is what a manifest records.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megachiar.errors import UserError

HUB_PREFIX = "hf:"
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
REVISION = re.compile(r"\w[\w./-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--(.+)")
DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
"""Files that say how a vocabulary is used; they are fetched first, so that no vocabulary is there without them."""
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
HOW_TO_GO_OFFLINE = "set HF_ENDPOINT to a mirror, or copy the cache of a machine with a network and set HF_HUB_CACHE"


def is_hub_name(path: Path | str) -> bool:
    """Return whether ``path`` names a tokenizer on the hub, such as ``hf:openai-community/gpt2``."""
    return str(path).startswith(HUB_PREFIX)


def local_tokenizer(path: Path | str) -> Path:
    """Return the folder of a tokenizer that is named on the hub, fetched where it is needed; other paths as they are.

    Where the hub cannot be reached, the files of an earlier fetch serve.

    Args:
        path: ``hf:NAME``, ``hf:NAME@REVISION``, or a file or folder.

    Raises:
        UserError: the name is malformed, the hub has no such tokenizer, or it cannot be reached and nothing was fetched
            before.
    """
    if not is_hub_name(path):
        return Path(path)
    name, revision = _split(str(path))
    described = _snapshot(str(path), name, revision, DESCRIPTIONS)
    folder = _snapshot(str(path), name, described.name, VOCABULARIES)  # of the commit that was found first
    if not any((folder / file).exists() for file in VOCABULARIES):
        wanted = ", ".join(VOCABULARIES)
        raise UserError(path, f"holds no tokenizer: none of {wanted} is there", "name the repository of a tokenizer")
    return folder


def cached_tokenizer(path: str) -> Path | None:
    """Return the folder of a tokenizer on the hub if an earlier fetch left it in the cache; never use the network.

    Args:
        path: what ``hub_origin`` returned.
    """
    from huggingface_hub import snapshot_download

    try:
        name, revision = _split(path)
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the library has an error of its own for each reason; none of them can be mended here
        return None
    return folder if any((folder / file).exists() for file in VOCABULARIES) else None


def hub_origin(path: Path) -> str | None:
    """Return ``hf:NAME@COMMIT`` for a file or folder in the hub's cache; None for any other path."""
    folder = path if COMMIT.fullmatch(path.name) else path.parent
    found = SNAPSHOT.fullmatch(folder.parent.parent.name)
    if found is None or folder.parent.name != "snapshots" or not COMMIT.fullmatch(folder.name):
        return None
    return f"{HUB_PREFIX}{found[1].replace('--', '/', 1)}@{folder.name}"


def _split(path: str) -> tuple[str, str]:
    """Return name and revision of ``hf:NAME@REVISION``; the revision is ``main`` where none is named.

    Raises:
        UserError: either is malformed.
    """
    name, at, revision = path.removeprefix(HUB_PREFIX).partition("@")
    if not NAME.fullmatch(name) or (at and not REVISION.fullmatch(revision)):
        raise UserError(
            path, "is no name on the hub", "write hf:OWNER/NAME or hf:OWNER/NAME@REVISION, a branch, tag or commit"
        )
    return name, revision or "main"


def _snapshot(path: str, name: str, revision: str, files: Sequence[str]) -> Path:
    """Return the folder of a commit with those of ``files`` that it has.

    Raises:
        UserError: there is no such repository or revision, or it cannot be fetched and was not fetched before.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError as error:
        remedy = f"accept its terms at huggingface.co/{name}, and give your token: `hf auth login`, or HF_TOKEN"
        raise UserError(path, "is gated: the hub gives it to accounts that accepted its terms", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the name; a private one needs your token: `hf auth login`, or HF_TOKEN"
        raise UserError(path, f"the hub has no repository {name!r}", remedy) from error
    except errors.RevisionNotFoundError as error:
        problem = f"the repository {name!r} has no revision {revision!r}"
        raise UserError(path, problem, "name a branch, a tag or a whole commit of 40 digits") from error
    except Exception as error:  # no network, a proxy, a full disk: each version of the library raises others
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        problem = f"cannot be fetched, and is not in the cache: {reason}"
        raise UserError(path, problem, f"check the network; without one, {HOW_TO_GO_OFFLINE}") from error
