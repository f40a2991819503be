"""The demo is a real process that answers over HTTP, refuses what it must, and is used in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import background, open_page, start_browser
from routed_runs import TEXT, make_run
from support import ROOT, forked_python, heed_ctrl_c, process_environment

from megachiar.viewer.open_run import open_run


@contextlib.contextmanager
def demo(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Start the command; yield its process, and the host and the port of the URL that it prints."""
    command = [sys.executable, "-m", "megachiar", "demo", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=process_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        for _ in range(2):  # a warning may come first
            line = process.stderr.readline()
            if url := re.search(r"http://\[?([\w.:]+?)\]?:(\d+)/", line):
                break
        assert url and "Ctrl-C" in line, line
        yield process, url[1], int(url[2])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def port(folder) -> Iterator[int]:
    with demo(folder / "run", "--port", 0, "--max-tokens", 300, "--max-new-tokens", 200) as (_, host, port):
        assert host == "127.0.0.1"
        yield port


@pytest.fixture(scope="module")
def browser():
    with start_browser() as started:
        yield started


def ask(
    port: int, path: str, body: Any = None, *, method: str = "POST", host: str = "127.0.0.1", **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Send a request; return status, answer and response. Underscores in names of headers become hyphens."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json"} | sent)
    response = connection.getresponse()
    answer = response.read().decode()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(answer) if is_json else answer, response


def lines(port: int, **body: Any) -> list[dict[str, Any]]:
    status, answer, _ = ask(port, "/api/continue", body)
    assert status == 200, answer
    return [json.loads(line) for line in answer.splitlines()]


def test_it_answers_with_the_routes_of_the_text(folder, port):
    status, answer, response = ask(port, "/api/routes", {"text": TEXT})
    run = open_run(folder / "run", log=print)
    expected = run.record(run.routes(run.encode(TEXT, "text")))
    assert status == 200 and response.headers["Cache-Control"] == "no-store"
    for shown, token in zip(answer["record"]["tokens"], expected["tokens"], strict=True):
        assert shown["operator"] == token["operator"] and shown["text"] == token["text"]
        assert shown["entropy"] == pytest.approx(token["entropy"], abs=1e-5)


def test_a_continuation_comes_line_by_line(port):
    first, *tokens, last = lines(port, text="the quick", max_new_tokens=7, temperature=0.5, seed=3)
    assert first["record"]["prompt_tokens"] == len(first["record"]["tokens"])
    assert len(tokens) == 7 and all("token" in token for token in tokens)
    assert [token["token"]["id"] for token in tokens] == [token["id"] for token in last["record"]["tokens"][-7:]]
    again = lines(port, text="the quick", max_new_tokens=7, temperature=0.5, seed=3)
    assert again[-1] == last
    assert lines(port, text="the quick", max_new_tokens=7, temperature=0.5, seed=4)[-1] != last
    assert "control" in lines(port, text="", max_new_tokens=2)[0]["record"]["tokens"][0]


def test_tokens_of_a_record_are_read_again(port):
    *_, last = lines(port, text="the quick", max_new_tokens=5)
    ids = [token["id"] for token in last["record"]["tokens"]]
    _, answer, _ = ask(port, "/api/routes", {"tokens": ids, "prompt_tokens": last["record"]["prompt_tokens"]})
    for token, other in zip(answer["record"]["tokens"], last["record"]["tokens"], strict=True):
        assert token["operator"] == other["operator"] and token["class"] == other["class"]
    assert answer["record"]["prompt_tokens"] == last["record"]["prompt_tokens"] == len(ids) - 5


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/routes", {"text": "x y " * 400}, 422, r"has [\d,]+ tokens, and the demo reads 300 at most"),
        ("/api/routes", {"text": ""}, 422, "has no tokens"),
        ("/api/routes", {"text": "\ud800"}, 422, "no UTF-8"),
        ("/api/routes", {"text": 7}, 422, "is missing, or is no text"),
        ("/api/routes", {}, 422, "is missing, or is no text"),
        ("/api/routes", {"tokens": [1, "2"], "prompt_tokens": 1}, 422, "is no list of ids"),
        ("/api/routes", {"tokens": [1, True], "prompt_tokens": 1}, 422, "is no list of ids"),
        ("/api/routes", {"tokens": [1, 10**9], "prompt_tokens": 1}, 422, "tokenizer does not have"),
        ("/api/routes", {"tokens": [1, -1], "prompt_tokens": 1}, 422, "tokenizer does not have"),
        ("/api/routes", {"tokens": [1], "prompt_tokens": 2}, 422, "is not 0 to 1"),
        ("/api/routes", {"tokens": [5] * 501, "prompt_tokens": 2}, 422, "reads 500 at most"),
        ("/api/continue", {"text": "a", "max_new_tokens": 0}, 422, "at least 1 and at most 200"),
        ("/api/continue", {"text": "a", "max_new_tokens": 201}, 422, "at least 1 and at most 200"),
        ("/api/continue", {"text": "a", "max_new_tokens": 1.5}, 422, "no whole number"),
        ("/api/continue", {"text": "a", "temperature": -1}, 422, "at least 0"),
        ("/api/continue", {"text": "a", "temperature": "hot"}, 422, "no number"),
        ("/api/continue", {"text": "a", "top_p": 0}, 422, "above 0 and at most 1"),
        ("/api/continue", {"text": "a", "top_k": True}, 422, "no whole number"),
        ("/api/continue", {"text": "a", "seed": 2**63}, 422, "at most 4,611,686,018,427,387,904"),
        ("/api/continue", b'{"text": "a", "temperature": NaN}', 422, "no number"),
        ("/api/routes", b"{", 400, "no JSON object"),
        ("/api/routes", b"[1]", 400, "no JSON object"),
        ("/api/routes", b"\xff", 400, "no JSON object"),
        ("/api/routes", b"[" * 100_000, 400, "no JSON object"),
        ("/api/routes", b'{"text": ' + b"9" * 10_000 + b"}", 400, "no JSON object"),
        ("/api/nothing", {"text": "a"}, 404, "not there"),
    ],
)
def test_a_wrong_request_is_one_message(port, path, body, status, message):
    found, answer, _ = ask(port, path, body)
    error = answer["error"]
    assert found == status and re.search(message, error["problem"]), error
    assert error["where"] and error["remedy"]


def test_a_huge_body_is_not_read(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST /api/routes HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {10**12}\r\n\r\n".encode())
        answer = connection.recv(65536).decode()
    assert " 413 " in answer.splitlines()[0]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Transfer-Encoding: chunked", 411),
        ("Content-Length: -1", 411),
        ("Content-Length: ²", 411),
        ("X-Nothing: 1", 411),
        (f"Content-Length: {'9' * 5000}", 413),
    ],
)
def test_a_body_without_a_length_is_refused(port, header, status):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = f"POST /api/routes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.recv(65536).decode()
    assert f" {status} " in answer.splitlines()[0]


@pytest.mark.parametrize("path", ["/", "/template.html", "/api/routes"])
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "a@localhost",
        "localhost/x",
        "[::1",
    ],
)
def test_another_hosts_name_is_refused(port, path, host):
    """What a browser sends after a name that another site owns was made to point here (DNS rebinding)."""
    method = "POST" if path.startswith("/api") else "GET"
    status, answer, _ = ask(port, path, {"text": "a"}, method=method, Host=host.format(port=port))
    assert status == 421 and "--allow-host" in answer["error"]["remedy"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:9999", "[::1]:{port}"])
def test_this_machines_names_and_forwarded_ports_are_served(port, host):
    assert ask(port, "/", method="GET", Host=host.format(port=port))[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_a_page_of_another_site_is_refused(port, origin):
    status, answer, _ = ask(port, "/api/routes", {"text": "a"}, Origin=origin)
    assert status == 403 and "another site" in answer["error"]["problem"]
    host = f"127.0.0.1:{port}"
    assert ask(port, "/api/routes", {"text": "a"}, Host=host, Origin=f"http://{host}")[0] == 200


def test_a_form_of_another_site_cannot_send_json(port):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(port, "/api/routes", {"text": "a"}, Content_Type=kind)[0] == 415


def test_pages_may_not_be_framed_and_load_nothing_from_elsewhere(port):
    status, page, response = ask(port, "/", method="GET")
    assert status == 200 and response.headers["X-Frame-Options"] == "DENY"
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert ask(port, "/nothing", method="GET")[0] == 404
    assert ask(port, "/", method="PUT")[0] == 501


def test_many_at_a_time_are_served_and_get_their_own_answer(port):
    texts = [f"Document {number}: the quick brown fox" for number in range(10)]
    alone = [ask(port, "/api/routes", {"text": text})[1] for text in texts]
    together: dict[str, Any] = {}

    def read(text: str) -> None:
        together[text] = ask(port, "/api/routes", {"text": text})[1]

    continued = threading.Thread(target=lambda: together.update(long=lines(port, text="the fox", max_new_tokens=60)))
    threads = [continued, *(threading.Thread(target=read, args=(text,)) for text in texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[text] for text in texts] == alone
    assert together["long"] == lines(port, text="the fox", max_new_tokens=60)


def test_a_client_that_goes_away_ends_its_text_and_nothing_else(port):
    for _ in range(20):  # more than may run at a time
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            body = json.dumps({"text": "the fox", "max_new_tokens": 200}).encode()
            head = "POST /api/continue HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.recv(10)
    deadline = time.monotonic() + 60
    while (status := ask(port, "/api/routes", {"text": "a"})[0]) == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status == 200


def test_a_taken_port_is_one_message(folder, port):
    done = forked_python("-m", "megachiar", "demo", folder / "run", "--port", port)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: --port {port}: is taken by another program" in done.stderr and "--port 0" in done.stderr


@pytest.mark.parametrize(("host", "message"), [("192.0.2.1", "no name or address"), ("no.such.invalid", "no name or")])
def test_a_host_of_another_machine_is_one_message(folder, host, message):
    done = forked_python("-m", "megachiar", "demo", folder / "run", "--port", "0", "--host", host)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def post(host: str, port: int, path: str, **body: Any) -> socket.socket:
    """Send a request, and leave its answer unread."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("state", ["idle", "generating", "in a long forward pass"])
def test_ctrl_c_ends_it_cleanly(folder, state):
    """A thread in a forward pass would make Python's own end a crash: only the last state outlasts the wait for it."""
    with demo(folder / "run", "--port", 0, "--max-new-tokens", 100_000, "--max-tokens", 10**6) as (process, host, port):
        connections = []
        if state == "generating":
            connections = [post(host, port, "/api/continue", text="the fox", max_new_tokens=100_000)]
            assert connections[0].recv(10)
        elif state != "idle":
            connections = [post(host, port, "/api/routes", text="the fox " * 60_000)]
            time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == "stopped\n"
        for connection in connections:
            connection.close()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def test_other_machines_are_served_on_demand_by_address_and_by_names_that_are_allowed(folder):
    with demo(folder / "run", "--port", 0, "--host", "0.0.0.0", "--allow-host", "demo.lab") as (_, _, port):
        for host, status in (("10.1.2.3", 200), (socket.gethostname(), 200), ("demo.lab", 200), ("evil.lab", 421)):
            assert ask(port, "/", method="GET", Host=host)[0] == status, host


def test_in_a_browser(folder, port, browser, tmp_path):
    """A text is routed and continued: colours are those of the routes, and the page that is saved shows them, too."""
    with open_page(browser, f"http://127.0.0.1:{port}/", offline=False, accept_downloads=True) as page:
        page.wait_for_selector("#t0")
        assert page.locator("#input").input_value()
        page.fill("#input", "the old ships sail home")
        page.click("#route")
        page.wait_for_function("() => document.getElementById('status').textContent.endsWith('tokens.')")
        _, answer, _ = ask(port, "/api/routes", {"text": "the old ships sail home"})
        check_colours(page, answer["record"])

        page.fill("#max_new_tokens", "12")
        page.fill("#temperature", "0.5")
        page.click("#continue")
        page.wait_for_function("() => document.getElementById('status').textContent.startsWith('12 new tokens,')")
        record = lines(port, text="the old ships sail home", max_new_tokens=12, temperature=0.5, seed=0)[-1]["record"]
        check_colours(page, record)
        assert page.locator("#tokens .new").count() == 12
        assert "12 of them generated" in page.locator("#stats").inner_text()

        with page.expect_download() as saved:
            page.click("#save-html")
        saved.value.save_as(tmp_path / "saved.html")
        with page.expect_download() as saved:
            page.click("#save-json")
        saved.value.save_as(tmp_path / "saved.json")
    assert [t["id"] for t in json.loads((tmp_path / "saved.json").read_text())["tokens"]] == [
        t["id"] for t in record["tokens"]
    ]
    with open_page(browser, (tmp_path / "saved.html").as_uri()) as page:
        check_colours(page, record)


def check_colours(page: Any, record: dict[str, Any]) -> None:
    legend = {name: background(page, f"#legend [data-op={name}]") for name in record["operators"]}
    for layer in (1, 2):
        page.locator("#layer").fill(str(layer + 1))
        tokens = page.locator("#tokens [role=option]")
        colours = tokens.evaluate_all("all => all.map(token => getComputedStyle(token).backgroundColor)")
        assert colours == [legend[record["operators"][t["operator"][layer]]] for t in record["tokens"]]


STOP_AT_THE_FIRST_TOKEN = """() => new Promise(done => {
    const observer = new MutationObserver(() => {
        if (document.querySelector(".new")) {
            observer.disconnect();
            document.getElementById("stop").click();
            done();
        }
    });
    observer.observe(document.getElementById("tokens"), {childList: true, subtree: true});
    document.getElementById("continue").click();
})"""


def test_a_stop_in_a_browser(folder, browser):
    """The page clicks the stop itself at the first new token: a small model is done before a test could click."""
    with (
        demo(folder / "run", "--port", 0, "--max-new-tokens", 1_000_000) as (_, _, port),
        open_page(browser, f"http://127.0.0.1:{port}/", offline=False) as page,
    ):
        page.wait_for_selector("#t0")
        page.fill("#max_new_tokens", "1000000")
        page.evaluate(STOP_AT_THE_FIRST_TOKEN)
        page.wait_for_function("() => document.getElementById('status').textContent === 'Stopped.'")
        count = page.locator("#tokens [role=option]").count()
        assert f"{count}\ntokens" in page.locator("#stats").inner_text()
        assert page.locator("#tokens .new").count() in range(1, 1_000_000)
        assert page.locator("#continue").is_enabled() and not page.locator("#stop").is_visible()


def test_a_text_that_is_too_long_in_a_browser(port, browser):
    url = f"http://127.0.0.1:{port}/"
    with open_page(browser, url, offline=False, expected=r"status of 422") as page:
        page.wait_for_selector("#t0")
        page.fill("#input", "x y " * 400)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#error:visible")
        assert "the demo reads 300 at most\nremedy: shorten it" in page.locator("#error").inner_text()
        page.fill("#input", "short")
        page.click("#route")
        page.wait_for_selector("#error", state="hidden")
