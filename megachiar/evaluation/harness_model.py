"""The model of a run as lm-evaluation-harness asks it. This module imports the harness: look for it first.

Texts are cut, joined and begun exactly as the harness's own ``hf`` model does with an export of the run:

    loglikelihood            context + continuation, the last max_sequence_length + 1 tokens
    loglikelihood_rolling    a whole text, in windows; the first follows the token that begins or ends documents
    generate_until           the last max_sequence_length - max_gen_toks tokens of the context
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megachiar.errors import UserError
from megachiar.evaluation.completions import Completion, complete
from megachiar.evaluation.continuations import ALONE, Continuation, ContinuationScore, Ranks, score_continuations
from megachiar.evaluation.text_model import TextModel, no_chat_template
from megachiar.inference.sampling import Sampling
from megachiar.request_fields import Setting, read_number

MAX_NEW_TOKENS = 256
"""New tokens of a text whose task names no number, as the harness's ``hf`` model has it."""
SAMPLING = {
    "temperature": Setting(1.0, False, 0, math.inf),
    "top_k": Setting(None, True, 0, math.inf),
    "top_p": Setting(None, False, math.ulp(0), 1),
}
"""Limits of a task's settings of its draws. A ``top_k`` of 0 stands for all tokens, as in transformers."""
SERVED = {"do_sample", *SAMPLING}
"""Settings of a task's ``generation_kwargs``, beside ``until`` and the number of tokens."""


class HarnessModel(TemplateLM):
    """A run's model behind the interface of the harness.

    Args:
        text_model: that is asked.
        batch_size: texts of one forward pass.
        ranks: that share the requests. All of them ask for the same ones; the harness itself knows of one process.
        seed: of tasks that sample.
        progress: is called with what this rank does, how much of it is done, and of how much.
        together: is called on all ranks before the same batches, with the number of texts done, and once before
            texts are continued.
    """

    def __init__(
        self,
        text_model: TextModel,
        batch_size: int,
        ranks: Ranks = ALONE,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        together: Callable[[int], None] = lambda done: None,
    ):
        super().__init__()
        self._text_model, self._batch_size, self._ranks = text_model, batch_size, ranks
        self._seed, self._progress, self._together = seed, progress, together
        self._device = next(text_model.model.parameters()).device
        self._scored: Sequence[Any] = ()

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text."""
        return self._text_model.end

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without a context follows."""
        return self._text_model.prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self._text_model.longest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; with ``add_special_tokens`` False without a token that begins documents."""
        return self._text_model.encode(string, begins=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse: a pretrained model has no chat template.

        Raises:
            UserError: always.
        """
        raise no_chat_template()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return logarithm and greediness of each continuation behind its context."""
        self._scored = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the logarithm of the probability of each whole text."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                context, tokens = make_disjoint_window(window)
                windows.append(Continuation(context, tokens))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(windows), strict=True):
            sums[owner] += score.logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        wanted = []
        for asked, ((context, continuation), before, tokens) in zip(self._scored, requests, strict=True):
            if not tokens or len(tokens) > self.max_length:
                what = "has no token of its own" if not tokens else f"has {len(tokens):,} tokens"
                shown = repr(continuation[:60])
                problem = f"the continuation {shown} of {context[-60:]!r} {what}; the model reads {self.max_length:,}"
                raise UserError(f"task {asked.task_name}", problem, "leave it out, or mend its doc_to_target")
            # Spaces go with the continuation: a context of spaces alone leaves none.
            wanted.append(Continuation(before or [self.prefix_token_id], tokens))
        return [(score.logprob, score.is_greedy) for score in self._score(wanted)]

    def _score(self, wanted: Sequence[Continuation]) -> list[ContinuationScore]:
        def before_batch(done: int) -> None:
            self._together(done)
            self._progress("scores texts", done, len(wanted))

        return score_continuations(self._text_model.model, wanted, self._batch_size, self._ranks, before_batch)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each context up to its first stop string."""
        completions, stops = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            completion = self._completion(f"task {request.task_name}", number, context, settings)
            completions.append(completion)
            stops.append(list(completion.stops))

        def before_batch(done: int) -> None:
            self._progress("continues texts", done, len(completions))

        self._together(0)
        found = complete(self._text_model, completions, self._batch_size, self._ranks, before_batch)
        texts = [
            postprocess_generated_text(generation=text, stop=stop, think_end_token=None)
            for text, stop in zip(found, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def check(self, tasks: Mapping[str, Any]) -> None:
        """Check before the first request that tasks ask for nothing that is not served.

        Raises:
            UserError: one does, leaves no room for its context, or runs what the model writes.
        """
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                problem = "is marked as unsafe: it runs the code that a model writes"
                remedy = "leave it out, or give an export of the run to `lm_eval run --confirm_run_unsafe_code`"
                raise UserError(f"task {name}", problem, remedy)
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"task {name}", "asks about images, and the model reads text alone", "leave it out")
            if task.get_config("output_type") == "generate_until":
                self._completion(f"task {name}", 0, "a", task.get_config("generation_kwargs") or {})

    def _completion(self, where: str, number: int, context: str, settings: dict[str, Any]) -> Completion:
        """Return what a request of the task ``where`` asks for; ``number`` seeds its draws."""
        known, stops, most = self._read_settings(where, settings)
        if not 0 < most < self.max_length:
            problem = f"max_gen_toks is {most:,}, and the model reads {self.max_length:,} tokens, new ones included"
            change = "lower" if most > 0 else "to 1 or more"
            raise UserError(where, problem, f"set generation_kwargs.max_gen_toks in its YAML file {change}")
        if not_served := sorted(set(known) - SERVED):
            problem = f"generation_kwargs has {', '.join(not_served)}, which is not served"
            raise UserError(where, problem, f"remove it; served are until, max_gen_toks, {', '.join(sorted(SERVED))}")
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        if not known.get("do_sample"):
            return Completion(prompt, most, stops)
        name = f"{where}: generation_kwargs."
        temperature, top_k, top_p = (read_number(name + key, known.get(key), SAMPLING[key]) for key in SAMPLING)
        assert temperature is not None, "it has a default"
        return Completion(
            prompt, most, stops, Sampling(temperature, int(top_k) if top_k else None, top_p, self._seed + number)
        )

    def _read_settings(self, where: str, settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], int]:
        """Return a task's ``generation_kwargs`` without stop strings and number of tokens, and these two.

        Raises:
            UserError: they are of another type.
        """
        remedy = "mend it in its YAML file"
        try:
            known: dict[str, Any] = {**normalize_gen_kwargs(settings, MAX_NEW_TOKENS)}
        except (TypeError, ValueError) as error:
            raise UserError(where, f"generation_kwargs cannot be read: {error}", remedy) from None
        stops = handle_stop_sequences(known.pop("until", None), eos=self._text_model.end_text)
        if wrong := [stop for stop in stops if not isinstance(stop, str)]:
            raise UserError(where, f"generation_kwargs.until has {wrong[0]!r:.50}, which is no text", remedy)
        return known, tuple(stop for stop in stops if stop), known.pop("max_gen_toks")


class Rehearsal(HarnessModel):
    """Reads requests as the model does, and says nothing of them: what cannot be asked is found in no time."""

    def _score(self, wanted: Sequence[Continuation]) -> list[ContinuationScore]:
        return [ContinuationScore(0.0, True) for _ in wanted]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return an empty text for each context."""
        for number, request in enumerate(requests):
            self._completion(f"task {request.task_name}", number, *request.args)
        return [""] * len(requests)
