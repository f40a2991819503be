"""Serve the demo of a run: the page of routes, live, on a port of this machine.

GET  /               the page
GET  /template.html  the page for a file, with MARKER where its record goes
POST /api/routes     {"text"}, or {"tokens", "prompt_tokens"} of a record -> {"record"} or {"error"}
POST /api/continue   {"text", "max_new_tokens", ...} -> lines of JSON: {"record"}, {"token"} ..., {"record"}
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from megachiar.errors import UserError
from megachiar.local_server import LocalHandler, LocalServer, Refused
from megachiar.viewer.demo_requests import DemoLimits, read_sampling, read_text, read_tokens
from megachiar.viewer.examples import EXAMPLES
from megachiar.viewer.open_run import OpenRun
from megachiar.viewer.page import as_data, build_page
from megachiar.viewer.words import with_words

MARKER = "MEGACHIAR-RECORD"
MOST_REQUESTS = 16
"""Requests for the model that may wait or run at a time."""
DEFECT = ("the demo", "met a defect of this program", "its terminal shows where")


class DemoPages(NamedTuple):
    """The pages of the demo, in UTF-8.

    Attributes:
        live: the page that talks to the server.
        template: a page for a file, with ``MARKER`` where its record goes.
    """

    live: bytes
    template: bytes


class DemoServer(LocalServer):
    """The server of the demo.

    Args:
        run: whose routes it shows.
        host: name or address to listen at.
        port: to listen at; 0 takes any free one.
        limits: of texts and of their continuations.
        allowed_hosts: more names by which a browser may reach the server.

    Raises:
        UserError: as ``LocalServer``.
    """

    def __init__(
        self, run: OpenRun, host: str, port: int, limits: DemoLimits, allowed_hosts: Sequence[str] = ()
    ) -> None:
        self.run, self.limits = run, limits
        self.places = threading.BoundedSemaphore(MOST_REQUESTS)
        self.pages = demo_pages(run, limits)
        super().__init__(host, port, DemoHandler, "demo", allowed_hosts)

    def stop(self) -> None:
        """End the requests that are running, each after its token, and close the port."""
        super().stop()
        for _ in range(MOST_REQUESTS):
            self.places.acquire(timeout=2)


class DemoHandler(LocalHandler):
    """Answer one request."""

    server: DemoServer

    def error_body(self, status: HTTPStatus, where: str, problem: str, remedy: str) -> dict[str, Any]:
        """Return what the page shows."""
        return _error(where, problem, remedy)

    def get(self, path: str) -> None:
        """Serve a page."""
        if path == "/":
            self.send_content(HTTPStatus.OK, self.server.pages.live, "text/html; charset=utf-8")
        elif path == "/template.html":
            self.send_content(HTTPStatus.OK, self.server.pages.template, "text/plain; charset=utf-8")
        elif path == "/favicon.ico":
            self.send_content(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "is for a page that is not there", "open /")

    def post(self, path: str) -> None:
        """Serve routes, or the continuation of a text."""
        if path not in ("/api/routes", "/api/continue"):
            raise Refused(HTTPStatus.NOT_FOUND, "is for a page that is not there", "open /")
        body = self.read_body('{"text": "..."}')
        if not self.server.places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "is one too many at a time", "try again in a moment")
        try:
            if path == "/api/routes":
                self._routes(body)
            else:
                self._continue(body)
        finally:
            self.server.places.release()

    def _routes(self, body: dict[str, Any]) -> None:
        run = self.server.run
        if "tokens" in body:
            tokens, prompt_tokens = read_tokens(run, body, self.server.limits)
        else:
            tokens = read_text(run, body, self.server.limits)
            prompt_tokens = len(tokens)
        record = run.record(run.routes(tokens, prompt_tokens))
        self.send_object(HTTPStatus.OK, {"record": with_words(record)})

    def _continue(self, body: dict[str, Any]) -> None:
        """Send what comes, line by line, until the client is gone or the server stops."""
        run, limits = self.server.run, self.server.limits
        tokens = read_text(run, body, limits, may_be_empty=True)
        events = run.continue_text(tokens, **read_sampling(body, limits))
        first = next(events)  # what is wrong with the text is an error, and no line
        self.start_answer(HTTPStatus.OK, "application/x-ndjson")
        try:
            for event in _chained(first, events):
                self._send_line(event)
                if self.server.stopping.is_set():
                    break
        except UserError as error:
            self._send_line(_error(error.where, error.problem, error.remedy))
        except OSError:
            raise
        except Exception:
            self._send_line(_error(*DEFECT))
            traceback.print_exc()

    def _send_line(self, event: dict[str, Any]) -> None:
        if "record" in event:
            event = {"record": with_words(event["record"])}
        self.wfile.write(f"{as_data(event)}\n".encode())
        self.wfile.flush()

    def send_object(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        """Send a JSON object, its numbers rounded."""
        self.send_content(status, as_data(value).encode(), "application/json")


def demo_pages(run: OpenRun, limits: DemoLimits) -> DemoPages:
    """Return the pages of the demo of ``run``."""
    header = run.header()
    title = f"Routes: {header['run']} at step {header['step']:,}"
    live = {
        "header": header,
        "examples": [{"title": name, "text": text} for name, text in EXAMPLES.items()],
        "defaults": {"max_new_tokens": min(60, limits.most_new_tokens), "temperature": 0.8, "seed": 0},
        "most_new_tokens": limits.most_new_tokens,
        "marker": MARKER,
    }
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return DemoPages(
        live=build_page(title, as_data({"live": live}), f"{policy}; connect-src 'self'").encode(),
        template=build_page(title, MARKER, policy).encode(),
    )


def _error(where: str, problem: str, remedy: str) -> dict[str, Any]:
    return {"error": {"where": where, "problem": problem, "remedy": remedy}}


def _chained(first: dict[str, Any], others: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from others
