"""Open a run and put a server in front of it, as the command line of ``megachiar serve`` says."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megachiar.checkpoint.reading import locate_step
from megachiar.inference.completion_request import CompletionLimits
from megachiar.inference.completions_server import CompletionsServer, ServedModel
from megachiar.inference.engine import Engine, why_uncached
from megachiar.inference.loaded_run import TextSampler, default_device
from megachiar.inference.loading import load_model
from megachiar.inference.service import Service
from megachiar.model.dtypes import DTYPES


def open_server(options: argparse.Namespace, *, log: Callable[[str], None]) -> CompletionsServer:
    """Return the server, which listens already.

    Args:
        options: of the command line.
        log: is told of each checkpoint that is passed over, and of what makes the run slow.

    Raises:
        UserError: there is no such checkpoint, no tokenizer of the run, or the port cannot be opened.
    """
    checkpoint = locate_step(options.run, options.step, log=log)
    config, model, _ = load_model(checkpoint, default_device(), DTYPES.get(options.dtype))
    sampler = TextSampler(checkpoint, config, model)
    if (reason := why_uncached(model)) is not None:
        log(reason)
    engine = Engine(model, sampler.known, most_running=options.max_running)
    service = Service(engine, options.max_running + options.max_waiting)
    name = options.model_name or options.run.resolve().name
    limits = CompletionLimits(config.model.max_sequence_length, options.max_tokens)
    served = ServedModel(name, int(checkpoint.stat().st_mtime), sampler.tokenizer, sampler.end)
    try:
        return CompletionsServer(served, service, options.host, options.port, limits, options.allow_host)
    except BaseException:
        service.stop()
        raise
