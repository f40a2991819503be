"""Serve a run by OpenAI's completions protocol.

    GET  /health              {"status": "ok", ...}
    GET  /v1/models           the one model
    POST /v1/completions      {"model", "prompt", "max_tokens", ...} -> {"choices": [{"text", ...}]}, or with
                              "stream": true server-sent events, each a piece of a choice, and "[DONE]"

An error is ``{"error": {"message", "type", "param", "code"}}``: 400 names the field, 404 an unknown model or path, 429
says that too many texts wait, and 503 that the server ends. A client that has gone frees its places at the next token.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from megachiar.data.tokenizers.tokenizer import Tokenizer
from megachiar.inference.choice import Choice
from megachiar.inference.completion_request import CompletionLimits, CompletionRequest, read_request
from megachiar.inference.engine import Request
from megachiar.inference.service import Busy, Service, Stopped, Submission
from megachiar.local_server import LocalHandler, LocalServer, Refused

SECONDS_BETWEEN_LOOKS = 0.25
"""How often a thread that waits for a token looks whether its client is still there."""
ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
PATHS = "the paths are /v1/completions, /v1/models and /health"


class ServedModel(NamedTuple):
    """The model of a server.

    Attributes:
        name: by which clients ask for it.
        created: when its checkpoint was written, in seconds since 1970.
        tokenizer: of the model.
        end: id that ends a text, and that replaces an empty prompt; None if nothing names such a token.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    end: int | None


class CompletionsServer(LocalServer):
    """The server.

    Args:
        model: that it serves.
        service: that continues texts; it ends with the server.
        host: name or address to listen at.
        port: to listen at; 0 takes any free one.
        limits: of one request.
        allowed_hosts: more names by which clients may reach the server.

    Raises:
        UserError: as ``LocalServer``.
    """

    request_queue_size = 512
    most_connections = 512

    def __init__(
        self,
        model: ServedModel,
        service: Service,
        host: str,
        port: int,
        limits: CompletionLimits,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        self.model, self.service, self.limits = model, service, limits
        super().__init__(host, port, CompletionsHandler, "serve", allowed_hosts)

    def stop(self) -> None:
        """End the service, whose clients are told so, and close the port."""
        super().stop()
        self.service.stop()
        self.wait_for_answers()


class CompletionsHandler(LocalHandler):
    """Answer one request."""

    server: CompletionsServer
    user_error_status = HTTPStatus.BAD_REQUEST

    def error_body(self, status: HTTPStatus, where: str, problem: str, remedy: str) -> dict[str, Any]:
        """Return an error in the protocol's form; ``param`` is the field of a request that is wrong."""
        message = f"{where}: {problem}" + (f"; {remedy}" if remedy else "")
        is_field = status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND) and where != "the request"
        kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        code = "model_not_found" if is_field and status == HTTPStatus.NOT_FOUND else None
        return {"error": {"message": message, "type": kind, "param": where if is_field else None, "code": code}}

    def get(self, path: str) -> None:
        """Say what is served, and how much there is to do."""
        model, service = self.server.model, self.server.service
        card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "megachiar"}
        if path == "/health":
            state = {"status": "ok", "model": model.name, "texts": service.texts, "cache_bytes": service.cache_bytes}
            self.send_object(HTTPStatus.OK, state)
        elif path == "/v1/models":
            self.send_object(HTTPStatus.OK, {"object": "list", "data": [card]})
        elif path == f"/v1/models/{model.name}":
            self.send_object(HTTPStatus.OK, card)
        else:
            raise Refused(HTTPStatus.NOT_FOUND, f"is for {path[:100]}, which is not there", PATHS)

    def post(self, path: str) -> None:
        """Complete prompts."""
        if path != "/v1/completions":
            raise Refused(HTTPStatus.NOT_FOUND, f"is for {path[:100]}, which is not there", PATHS)
        model = self.server.model
        body = self.read_body(f'{{"model": "{model.name}", "prompt": "..."}}')
        if isinstance(name := body.get("model"), str) and name != model.name:
            remedy = f"this server has {model.name}"
            self.send_problem(HTTPStatus.NOT_FOUND, "model", f"there is no model {name[:100]!r}", remedy)
            return
        request = read_request(body, model.name, model.tokenizer, model.end, self.server.limits)
        texts = [(prompt, number) for prompt in request.prompts for number in range(request.choices)]
        choices = [Choice(i, prompt, request, model.tokenizer) for i, (prompt, _) in enumerate(texts)]
        try:
            submission = self.server.service.submit([_text_request(*text, request, model.end) for text in texts])
        except Busy:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS, "is one too many: all places are taken", "try again in a moment"
            ) from None
        except Stopped:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "comes while the server ends") from None
        try:
            self._answer(request, choices, submission)
        finally:
            self.server.service.cancel(submission)

    def _answer(self, request: CompletionRequest, choices: Sequence[Choice], submission: Submission) -> None:
        """Send the choices: as they come, or when all are complete."""
        pieces = self._pieces(choices, submission)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.model.name}
        head |= {"object": "text_completion"}
        if request.streams:
            self._send_stream(request, choices, pieces, head)
            return
        try:
            answers = _joined(choices, pieces)
        except Stopped:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "was not finished: the server ends") from None
        self.send_object(HTTPStatus.OK, head | {"choices": answers, "usage": _usage(request, choices)})

    def _pieces(self, choices: Sequence[Choice], submission: Submission) -> Iterator[dict[str, Any]]:
        """Yield what comes, choice by choice, until all are complete.

        Raises:
            ConnectionAbortedError: the client is gone.
            Stopped: the server ends.
        """
        left = {choice.index for choice in choices}
        while left:
            event = submission.next_event(SECONDS_BETWEEN_LOOKS)
            if self.client_is_gone():
                raise ConnectionAbortedError
            if event is None or event.number not in left:
                continue
            choice = choices[event.number]
            yield choice.read(event)
            if choice.finish is not None:
                left.discard(choice.index)
                self.server.service.cancel(submission, choice.index)

    def _send_stream(
        self,
        request: CompletionRequest,
        choices: Sequence[Choice],
        pieces: Iterator[dict[str, Any]],
        head: dict[str, Any],
    ) -> None:
        """Send pieces as server-sent events."""
        self.start_answer(HTTPStatus.OK, "text/event-stream; charset=utf-8")
        self.wfile.flush()
        usage: dict[str, Any] = {"usage": None} if request.with_usage else {}
        try:
            for piece in pieces:
                tokens = piece["logprobs"]["tokens"] if piece["logprobs"] is not None else ()
                if piece["text"] or tokens or piece["finish_reason"] is not None:
                    self._send_event(head | {"choices": [piece]} | usage)
        except Stopped:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            self._send_event(self.error_body(status, "the request", "was not finished: the server ends", ""))
            return
        if request.with_usage:
            self._send_event(head | {"choices": [], "usage": _usage(request, choices)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def _text_request(prompt: Sequence[int], number: int, request: CompletionRequest, end: int | None) -> Request:
    """Return what the engine is asked for choice ``number`` of a prompt."""
    return Request(
        prompt,
        request.max_tokens,
        request.sampling._replace(seed=request.sampling.seed + number),
        end=end,
        top_logprobs=request.logprobs,
        scores_prompt=request.echo and request.logprobs is not None,
    )


def _joined(choices: Sequence[Choice], pieces: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each choice as one object, of all its pieces."""
    answers: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        answer = answers.setdefault(piece["index"], piece)
        if answer is piece:
            continue
        answer["text"] += piece["text"]
        answer["finish_reason"] = piece["finish_reason"]
        for name, values in (piece["logprobs"] or {}).items():
            if values is not None:
                answer["logprobs"][name] += values
    return [answers[choice.index] for choice in choices]


def _usage(request: CompletionRequest, choices: Sequence[Choice]) -> dict[str, int]:
    """Return how many tokens were read and generated; a prompt of several choices counts once."""
    prompt_tokens = sum(map(len, request.prompts))
    new_tokens = sum(choice.new_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
