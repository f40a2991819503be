"""Serve the demo of a run: the page of routes, live, on a port of this machine.

    GET  /               the page
    GET  /template.html  the page for a file, with MARKER where its record goes
    POST /api/routes     {"text"}, or {"tokens", "prompt_tokens"} of a record -> {"record"} or {"error"}
    POST /api/continue   {"text", "max_new_tokens", ...} -> lines of JSON: {"record"}, {"token"} ..., {"record"}

A request is answered only if it names this machine as its host, and comes from no other page: a browser would else let
any page that the user has open read the answers (cross-site requests, DNS rebinding). There is no password.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from megachiar.errors import UserError
from megachiar.viewer.demo_requests import DemoLimits, read_sampling, read_text, read_tokens
from megachiar.viewer.examples import EXAMPLES
from megachiar.viewer.open_run import OpenRun
from megachiar.viewer.page import as_data, build_page
from megachiar.viewer.words import with_words

MARKER = "MEGACHIAR-RECORD"
LARGEST_BODY = 2**20
"""Bytes of a request; what is larger is not read."""
MOST_REQUESTS = 16
"""Requests for the model that may wait or run at a time."""
SECONDS_TO_SEND = 30
"""How long a client may be silent while it sends or takes data."""
DEFECT = ("the demo", "met a defect of this program", "its terminal shows where")


class Refused(Exception):
    """A request that is not served.

    Args:
        status: of the answer.
        problem: in words.
        remedy: what the reader can do.
    """

    def __init__(self, status: HTTPStatus, problem: str, remedy: str = ""):
        super().__init__(problem)
        self.status, self.problem, self.remedy = status, problem, remedy


class DemoPages(NamedTuple):
    """The pages of the demo, in UTF-8.

    Attributes:
        live: the page that talks to the server.
        template: a page for a file, with ``MARKER`` where its record goes.
    """

    live: bytes
    template: bytes


class DemoServer(ThreadingHTTPServer):
    """The server of the demo; ``serve_forever`` runs it, and ``stop`` ends what it does.

    Args:
        run: whose routes it shows.
        host: name or address to listen at.
        port: to listen at; 0 takes any free one.
        limits: of texts and of their continuations.
        allowed_hosts: more names by which a browser may reach the server.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self, run: OpenRun, host: str, port: int, limits: DemoLimits, allowed_hosts: Sequence[str] = ()
    ) -> None:
        self.run, self.limits = run, limits
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in allowed_hosts)}
        self.stopping = threading.Event()
        self.places = threading.BoundedSemaphore(MOST_REQUESTS)
        self.pages = demo_pages(run, limits)
        try:
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), port), DemoHandler)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
        self.is_local = is_loopback(str(self.server_address[0]))
        if not self.is_local:
            self.hosts.add(socket.gethostname().lower())

    def server_bind(self) -> None:
        """Take the port. The base class would also ask DNS for the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open in a browser on this machine."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = "127.0.0.1" if self.address_family == socket.AF_INET else "::1"
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def stop(self) -> None:
        """End the requests that are running, each after its token, and close the port."""
        self.stopping.set()
        self.server_close()
        for _ in range(MOST_REQUESTS):
            self.places.acquire(timeout=2)

    def is_known_host(self, name: str) -> bool:
        """Return whether a request may name the server ``name``: no name that another site's owner can point here."""
        return name in self.hosts or (not self.is_local and _is_address(name))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where a client has gone; print the traceback of a defect of ours, as the base class does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class DemoHandler(BaseHTTPRequestHandler):
    """Answer one request."""

    server: DemoServer
    server_version = "megachiar"
    sys_version = ""
    timeout = SECONDS_TO_SEND

    def do_GET(self) -> None:
        """Serve a page."""
        self._guarded(self._get)

    def do_POST(self) -> None:
        """Serve routes, or the continuation of a text."""
        self._guarded(self._post)

    def log_message(self, format: str, *values: Any) -> None:
        """Log nothing: the texts of users stay theirs."""

    def _guarded(self, serve: Callable[[], None]) -> None:
        try:
            self._check_sender()
            serve()
        except Refused as error:
            self._send_error(error.status, "the request", error.problem, error.remedy)
        except UserError as error:
            self._send_error(HTTPStatus.UNPROCESSABLE_ENTITY, error.where, error.problem, error.remedy)
        except OSError:  # the client is gone
            raise
        except Exception:
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, *DEFECT)
            raise

    def _check_sender(self) -> None:
        """Refuse requests for another host, and those that another site's page makes."""
        host = self.headers.get("Host", "")
        name = urlsplit(f"//{host}").hostname if _is_plain(host) else None
        if name is None or not self.server.is_known_host(name):
            remedy = "open the URL that `megachiar demo` prints, or start it with --allow-host NAME"
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"is for the host {host[:100]!r}, not for this one", remedy)
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(HTTPStatus.FORBIDDEN, "comes from a page of another site")

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            self._send(HTTPStatus.OK, self.server.pages.live, "text/html; charset=utf-8")
        elif path == "/template.html":
            self._send(HTTPStatus.OK, self.server.pages.template, "text/plain; charset=utf-8")
        elif path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "is for a page that is not there", "open /")

    def _post(self) -> None:
        path = urlsplit(self.path).path
        if path not in ("/api/routes", "/api/continue"):
            raise Refused(HTTPStatus.NOT_FOUND, "is for a page that is not there", "open /")
        body = self._read_body()
        if not self.server.places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "is one too many at a time", "try again in a moment")
        try:
            if path == "/api/routes":
                self._routes(body)
            else:
                self._continue(body)
        finally:
            self.server.places.release()

    def _read_body(self) -> dict[str, Any]:
        """Return the JSON object of the request."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "has no JSON", "send Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "does not say how long it is", "send Content-Length")
        if len(length) > 12 or int(length) > LARGEST_BODY:
            self.close_connection = True
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"is larger than {LARGEST_BODY:,} bytes", "shorten it")
        content = self.rfile.read(int(length))
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "is no JSON object", 'send {"text": "..."}')
        return body

    def _routes(self, body: dict[str, Any]) -> None:
        run = self.server.run
        if "tokens" in body:
            tokens, prompt_tokens = read_tokens(run, body, self.server.limits)
        else:
            tokens = read_text(run, body, self.server.limits)
            prompt_tokens = len(tokens)
        record = run.record(run.routes(tokens, prompt_tokens))
        self._send_json(HTTPStatus.OK, {"record": with_words(record)})

    def _continue(self, body: dict[str, Any]) -> None:
        """Send what comes, line by line, until the client is gone or the server stops."""
        run, limits = self.server.run, self.server.limits
        tokens = read_text(run, body, limits, may_be_empty=True)
        events = run.continue_text(tokens, **read_sampling(body, limits))
        first = next(events)  # what is wrong with the text is an error, and no line
        self._start(HTTPStatus.OK, "application/x-ndjson")
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

    def _send_error(self, status: HTTPStatus, where: str, problem: str, remedy: str) -> None:
        self._send_json(status, _error(where, problem, remedy))

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, as_data(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self._start(status, kind, len(content))
        self.wfile.write(content)

    def _start(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        """Send the status and the headers; without a length the connection ends where the answer does."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()


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


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address ``host``."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_plain(host: str) -> bool:
    """Return whether a Host header is a name or address with a port, and nothing more."""
    try:
        return not set(host) & set("/@?#\\ ") and (urlsplit(f"//{host}").port or 0) >= 0
    except ValueError:
        return False


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    """Return the message for an address at which the server cannot listen."""
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port {port}", "is taken by another program", "give another one; --port 0 takes a free one")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"--port {port}", "is one that only root may open", "give one above 1023, or 0 for a free one")
    problem = f"is no name or address of this machine ({error.strerror or error})"
    return UserError(f"--host {host}", problem, "leave it out, or give 0.0.0.0 to listen at all addresses")


def _chained(first: dict[str, Any], others: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from others
