"""The routes of one fixed text through a run's model: where the run keeps its model in memory, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megachiar.analysis.text_routes import TextRoutes, describe_layers, describe_tokens, text_routes
from megachiar.config import RunConfig
from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.engine.engine import Engine
from megachiar.training.run_data import RunData
from megachiar.viewer.words import NAMES, how_it_routes

TEXT = "In 1998 the old man said that three ships, 42 cats and a letter from London would come home before the rain."
_MOST_TOKENS = 256
_BY_COMMAND = "`megachiar page RUN` shows them from a checkpoint"


def routes_of_engine(engine: Engine, data: RunData) -> dict[str, Any]:
    """Return the routes of ``TEXT`` through the model that this rank trains, or why there are none.

    The pass is one of evaluation: it changes no weight, no counter and no draw of the run.
    """
    config = engine.config
    reason = _why_not(config, data.tokenizer)
    if reason is None and engine.topology.model_size > 1:
        reason = f"the model is shared out among ranks; {_BY_COMMAND}"
    if reason is None and config.parallel.zero_stage == 3:
        reason = f"ZeRO 3 shares the weights out among ranks; {_BY_COMMAND}"
    if reason is not None or data.tokenizer is None:
        return {"note": reason}
    model = engine.deepspeed.module
    was_training = model.training
    model.eval()
    try:
        return _described(text_routes(model, data.tokenizer, _ids(data.tokenizer)), config, None)
    finally:
        model.train(was_training)


def routes_of_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the routes of ``TEXT`` through the newest checkpoint of a run.

    Raises:
        UserError: there is no whole checkpoint, or no tokenizer of the run.
    """
    from megachiar.viewer.open_run import open_run

    run = open_run(folder, log=lambda line: None)
    reason = _why_not(run.config, run.sampler.tokenizer)
    if reason is not None:
        return {"note": reason}
    return _described(run.routes(_ids(run.sampler.tokenizer)), run.config, run.state.step)


def _why_not(config: RunConfig, tokenizer: Tokenizer | None) -> str | None:
    if not config.model.routed_layers:
        return "no layer of this model routes"
    if tokenizer is None:
        return "no tokenizer of the run is known, so that no text can be shown"
    return None


def _ids(tokenizer: Tokenizer) -> list[int]:
    return [int(token) for token in tokenizer.encode(TEXT)][:_MOST_TOKENS]


def _described(routes: TextRoutes, config: RunConfig, step: int | None) -> dict[str, Any]:
    """Return what the page shows of routes; ``step`` is that of the weights, None for those of the run's step."""
    router = config.model.router.kind
    layers = describe_layers(routes)
    return {
        "note": None,
        "step": step,
        "operators": list(routes.trace.operators),
        "names": NAMES,
        "layers": [{**layer, "how": how_it_routes({"router": router}, layer)} for layer in layers],
        "tokens": [
            {key: token[key] for key in ("text", "control", "operator", "entropy")} for token in describe_tokens(routes)
        ],
    }
