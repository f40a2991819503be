"""A small HTTP server for one model: what the demo and the completions API have in common.

A request is answered only if it names this machine as its host, and comes from no other page: a browser would else let
any page that the user has open read the answers (cross-site requests, DNS rebinding). There is no password.

A connection has a thread and one request. There are at most ``most_connections`` of them; one more is told so.

``serve_until_ctrl_c`` ends the process itself. Python's own end would abort it while a thread is in a forward pass: the
thread wakes in torch's C++, may not go on, and C++ then ends the process with SIGABRT.
"""

from __future__ import annotations

import errno
import io
import ipaddress
import json
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import urlsplit

from megachiar.errors import UserError

LARGEST_BODY = 2**20
"""Bytes of a request; what is larger is not read."""
SECONDS_TO_SEND = 30
"""How long a client may take to send its request, and may be silent while it takes the answer."""
SECONDS_TO_END = 2
"""How long the end of a server waits for the last words of its answers."""
DEFECT = ("the server", "met a defect of this program", "its terminal shows where")


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


class LocalServer(ThreadingHTTPServer):
    """A server at a port of this machine; ``serve_forever`` runs it, and ``stop`` ends it.

    Args:
        host: name or address to listen at.
        port: to listen at; 0 takes any free one.
        handler: that answers requests.
        command: the name of the command that starts it, for messages.
        allowed_hosts: more names by which clients may reach the server.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    most_connections = 256

    def __init__(
        self, host: str, port: int, handler: type[LocalHandler], command: str, allowed_hosts: Sequence[str] = ()
    ) -> None:
        self.command = command
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in allowed_hosts)}
        self.stopping = threading.Event()
        self._connections = threading.BoundedSemaphore(self.most_connections)
        try:
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), port), handler)
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
        """The address to open on this machine."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = "127.0.0.1" if self.address_family == socket.AF_INET else "::1"
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def stop(self) -> None:
        """Tell what runs to end, and close the port."""
        self.stopping.set()
        self.server_close()

    def wait_for_answers(self) -> None:
        """Wait a little until the threads that answer have ended."""
        until = time.monotonic() + SECONDS_TO_END
        for _ in range(self.most_connections):  # who has all places is alone
            if not self._connections.acquire(timeout=max(0.0, until - time.monotonic())):
                return

    def is_known_host(self, name: str) -> bool:
        """Return whether a request may name the server ``name``: no name that another site's owner can point here."""
        return name in self.hosts or (not self.is_local and _is_address(name))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, if one is free."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        request.setblocking(False)  # no client can hold this thread up
        try:
            request.send(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        except OSError:
            pass
        finally:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where a client has gone; print the traceback of a defect of ours, as the base class does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _RequestReader(io.RawIOBase):
    """Reads a connection for ``SECONDS_TO_SEND`` all in all.

    Raises:
        TimeoutError: the time is over.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._until = connection, time.monotonic() + SECONDS_TO_SEND

    def readable(self) -> bool:
        """Return that it reads."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come, and wait for it if nothing has."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(SECONDS_TO_SEND)


class LocalHandler(BaseHTTPRequestHandler):
    """Answer one request; a subclass has ``get`` and ``post``, and says how it writes an error."""

    server: LocalServer
    server_version = "megachiar"
    sys_version = ""
    timeout = SECONDS_TO_SEND
    user_error_status = HTTPStatus.UNPROCESSABLE_ENTITY

    def setup(self) -> None:
        """Read the request within its time, however slowly a client sends it."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_RequestReader(self.connection))

    def get(self, path: str) -> None:
        """Answer a GET of ``path``."""
        raise NotImplementedError

    def post(self, path: str) -> None:
        """Answer a POST to ``path``."""
        raise NotImplementedError

    def error_body(self, status: HTTPStatus, where: str, problem: str, remedy: str) -> dict[str, Any]:
        """Return what tells a client of an error."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Serve a page."""
        self._guarded(self.get)

    def do_POST(self) -> None:
        """Serve an answer to a JSON object."""
        self._guarded(self.post)

    def log_message(self, format: str, *values: Any) -> None:
        """Log nothing: the texts of users stay theirs."""

    def _guarded(self, serve: Callable[[str], None]) -> None:
        try:
            self._check_sender()
            serve(urlsplit(self.path).path)
        except Refused as error:
            self.send_problem(error.status, "the request", error.problem, error.remedy)
        except UserError as error:
            self.send_problem(self.user_error_status, error.where, error.problem, error.remedy)
        except OSError:  # the client is gone
            raise
        except Exception:
            self.send_problem(HTTPStatus.INTERNAL_SERVER_ERROR, *DEFECT)
            raise

    def _check_sender(self) -> None:
        """Refuse requests for another host, and those that another site's page makes."""
        host = self.headers.get("Host", "")
        name = urlsplit(f"//{host}").hostname if _is_plain(host) else None
        if name is None or not self.server.is_known_host(name):
            command = self.server.command
            remedy = f"open the URL that `megachiar {command}` prints, or start it with --allow-host NAME"
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"is for the host {host[:100]!r}, not for this one", remedy)
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(HTTPStatus.FORBIDDEN, "comes from a page of another site")

    def read_body(self, example: str) -> dict[str, Any]:
        """Return the JSON object of the request; ``example`` is one that would do.

        Raises:
            Refused: it is too large, or no JSON object.
        """
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
            raise Refused(HTTPStatus.BAD_REQUEST, "is no JSON object", f"send {example}")
        return body

    def client_is_gone(self) -> bool:
        """Return whether the client has closed its connection, without waiting."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def send_problem(self, status: HTTPStatus, where: str, problem: str, remedy: str) -> None:
        """Send an error."""
        self.send_object(status, self.error_body(status, where, problem, remedy))

    def send_object(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        """Send a JSON object."""
        self.send_content(status, json.dumps(value).encode(), "application/json")

    def send_content(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        """Send an answer of the type ``kind``."""
        self.start_answer(status, kind, len(content))
        self.wfile.write(content)

    def start_answer(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        """Send the status and the headers; without a length the connection ends where the answer does."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            self.send_header("Retry-After", "1")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()


def serve_until_ctrl_c(server: LocalServer, say_ready: Callable[[], None], say: Callable[[str], None]) -> NoReturn:
    """Serve until Ctrl-C, say "stopped" and end the process with exit code 0; a second Ctrl-C ends it at once.

    SIGTERM, by which service managers end a program, does the same, unless somebody handles it already.

    Args:
        server: that has its port already.
        say_ready: tells the user where it is.
        say: prints a line.
    """
    numbers = [signal.SIGINT]
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        numbers.append(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say_ready()
        server.serve_forever()
    except KeyboardInterrupt:  # the way to end it, and no failure
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        server.stop()
        say("stopped")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


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
