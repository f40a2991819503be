"""Write the page that shows routes: one HTML file with all that it needs, which loads nothing from anywhere.

Its content security policy allows its own script and style alone, by their hashes. A text enters it as JSON in which no
character can end the element that holds it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from megachiar.data.storage.files import write_atomically
from megachiar.errors import UserError, disk_errors
from megachiar.viewer.words import with_words

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

GENERATOR = b'<meta name="generator" content="megachiar routes">'
"""What tells a page of ours from another file."""
MOST_TOKENS = 20_000
"""Longest text of a page; a browser needs seconds for more."""
DIGITS = 6
"""Digits behind the point of a number on a page."""


def check_page(path: Path, generator: bytes = GENERATOR, what: str = "page of routes") -> None:
    """Check that a page may be written to ``path``: nothing is there, or a page of its kind.

    Args:
        path: of the page.
        generator: what a page of its kind has in its first lines.
        what: the kind, as an error calls it.

    Raises:
        UserError: another file is there, or the folder is missing.
    """
    with disk_errors(path, "write"):
        if not path.parent.is_dir():
            raise UserError(path, "there is no such folder", f"make it first: mkdir -p {path.parent}")
        if path.is_dir():
            raise UserError(path, "is a folder", "name a file in it")
        if path.exists():
            with open(path, "rb") as file:
                is_ours = generator in file.read(2000)
            if not is_ours:
                raise UserError(path, f"exists already and is no {what}", "name another file, or move it away")


def write_page(path: Path, record: dict[str, Any]) -> None:
    """Write the page of a record, see ``OpenRun.record``, whole or not at all.

    Raises:
        UserError: the text is too long for a page, or the file cannot be written.
    """
    if len(record["tokens"]) > MOST_TOKENS:
        problem = f"the text has {len(record['tokens']):,} tokens, and a page holds {MOST_TOKENS:,}"
        raise UserError(path, problem, "give a shorter text, or take --json")
    write_atomically(path, static_page(record).encode())


def static_page(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    title = f"Routes: {record['run']} at step {record['step']:,}"
    return build_page(title, as_data(with_words(record)), "default-src 'none'; base-uri 'none'; form-action 'none'")


def build_page(title: str, data: str, policy: str, parts: Mapping[str, str] | None = None) -> str:
    """Return the page.

    Args:
        title: of the window, any text.
        data: JSON as ``as_data`` writes it.
        policy: content security policy, to which script and style are added.
        parts: the page with places for the others, style and script; None for those of the page of routes.
    """
    parts = assets() if parts is None else parts
    sources = f"; style-src {source_of(parts['style'])}; script-src {source_of(parts['script'])}"
    filled = {"title": html.escape(title), "record": data, "policy": policy + sources}
    return Template(parts["page"]).substitute(filled, style=parts["style"], script=parts["script"])


def as_data(value: Any, digits: int | None = DIGITS) -> str:
    """Return ``value`` as JSON that may stand in an HTML element: without <, > and &, in ASCII.

    Numbers are rounded to so many digits behind the point; None leaves them as they are.
    """
    kept = value if digits is None else rounded(value, digits)
    text = json.dumps(kept, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def rounded(value: Any, digits: int) -> Any:
    """Return ``value`` with its numbers rounded to so many digits behind the point."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    return [rounded(inner, digits) for inner in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def assets() -> dict[str, str]:
    """Return page, style and script as they lie beside this file."""
    return parts_of("megachiar.viewer", "page.html", "page.css", ("page.js", "panels.js", "live.js"))


def parts_of(package: str, page: str, style: str, scripts: Sequence[str]) -> dict[str, str]:
    """Return the parts of a page by the names that ``build_page`` has for them, those that all pages share included.

    Args:
        package: that has the files.
        page: with the places ``$title``, ``$policy``, ``$style``, ``$record`` and ``$script``.
        style: after the shared ones.
        scripts: after the shared one, in order.
    """
    folder, shared = files(package), files("megachiar.viewer")
    script = "\n".join([_text(shared, "elements.js"), *(_text(folder, name) for name in scripts)])
    return {
        "page": _text(folder, page),
        "style": base_style() + _text(shared, "parts.css") + _text(folder, style),
        "script": f'"use strict";\n(() => {{\n{script}}})();',
    }


def base_style() -> str:
    """Return the style that all pages of the project share: colours in light and dark, letters, the body."""
    return _text(files("megachiar.viewer"), "base.css")


def _text(folder: Traversable, name: str) -> str:
    """Return the text of a file of a package."""
    return (folder / name).read_text("utf-8")


def source_of(content: str) -> str:
    """Return how a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
