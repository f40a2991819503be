"""Make the errors that several readers of documents raise."""

from __future__ import annotations

from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.source import Source
from megachiar.errors import UserError


def too_large(source: Source, what: str, size: int, options: ReadOptions, remedy: str) -> UserError:
    """Return the error for a document that is too large for memory."""
    return UserError(
        source.name,
        f"the {what} has {size >> 20} MiB or more; documents may have {options.max_document_bytes >> 20} MiB",
        f"{remedy}raise --max-document-mib",
    )
