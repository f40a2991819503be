"""The site: `make docs`. Every warning is an error there, so that a link that leads nowhere ends the build."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import generated_pages

project = "megachiar"
copyright = "the megachiar authors"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "megachiar"
exclude_patterns = ["_build"]


def setup(app: Sphinx) -> None:
    """Write the page that is not committed before Sphinx looks for its sources."""
    generated_pages.write_messages()
