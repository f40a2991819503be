"""Export a run for transformers when it is finished, as ``checkpoint.export_hf`` asks.

Rank 0 does it after the last save and the test sets. A run that is started again when it is finished makes up for an
export that is missing; one that went on to more steps replaces that of its earlier end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.config import RunConfig
from megachiar.interop.huggingface_export import HuggingFaceOptions, export_huggingface
from megachiar.interop.huggingface_library import check_library
from megachiar.training.final_evaluation import choose_checkpoint

KEY, FOLDER = "checkpoint.export_hf", "hf"


def check_export(config: RunConfig) -> None:
    """Check before a run starts that its end will find the library.

    Raises:
        UserError: transformers is missing or too old.
    """
    if config.checkpoint.export_hf is not None:
        check_library(KEY)


def export_finished(config: RunConfig, log: Callable[[str], None]) -> None:
    """Export the checkpoint that ``checkpoint.export_hf`` names to ``RUN/hf``; null exports nothing.

    Args:
        config: of the finished run.
        log: prints a line of the log, in rich's markup.

    Raises:
        UserError: the checkpoint is damaged, the disk refuses the export, or the exported model is not the run's.
    """
    asked = config.checkpoint.export_hf
    if asked is None:
        return
    checkpoint = choose_checkpoint(config).path if asked == "best" else locate_checkpoint(config.logging.folder)
    folder: Path = config.logging.folder / FOLDER
    report = export_huggingface(locate_checkpoint(checkpoint), folder, HuggingFaceOptions(replace=True), asked_by=KEY)
    if report is not None:
        log(f"exported step {report.step:,} for transformers: {escape(str(folder))}")
