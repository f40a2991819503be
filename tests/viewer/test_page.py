"""The page of routes, in a real browser without a network: the colours are those of the routes, and it can be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import background, open_page, start_browser
from model_cases import ROUTERS, THREE, lively_model
from routed_runs import TEXT, described_routes, record_of

from megachiar.analysis.route_trace import trace_routes
from megachiar.errors import UserError
from megachiar.viewer.page import as_data, check_page, static_page, write_page

MODELS: dict[str, dict[str, Any]] = {
    "baseline": {"kind": "baseline"},
    **{
        name: {"router": ROUTERS[name]}
        for name in ("threshold", "threshold three", "soft three", "hard", "random three", "hashed three")
    },
}
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror=hacked()> & \" ' <!-- \u2028 \x1b[31m \u202e $title"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def browser():
    with start_browser() as started:
        yield started


def write(folder: Path, path: Path, text: str = TEXT, **model: Any) -> dict[str, Any]:
    """Write the page of ``text``, and return its record."""
    routes, config, _ = described_routes(folder, text, **model)
    record = record_of(routes, config)
    write_page(path, record)
    return record


@pytest.mark.parametrize("model", MODELS)
def test_each_token_has_the_colour_of_the_operator_that_the_model_took(browser, folder, tmp_path, model):
    """In every layer, against the legend; the routes are traced anew, on the model, window by window."""
    record = write(folder, tmp_path / "routes.html", **MODELS[model])
    routes, config, _ = described_routes(folder, **MODELS[model])
    fresh = lively_model(config).eval()  # fp64: another computation than the page's
    taken: list[list[int]] = [[] for _ in range(4)]
    for start, kept, stop in routes.windows:
        trace = trace_routes(fresh, torch.tensor([routes.tokens[start:stop]]))
        for index in range(4):
            taken[index] += trace.operator[index, 0, kept - start :].tolist()
    with open_page(browser, (tmp_path / "routes.html").as_uri()) as page:
        legend = {name: background(page, f"#legend [data-op={name}]") for name in config.router.operators}
        assert len(set(legend.values())) == len(legend)
        for index in range(4):
            page.locator("#layer").fill(str(index + 1))  # the slider
            assert page.locator("#layer-title").inner_text().startswith(f"Layer {index + 1} of 4")
            tokens = page.locator("#tokens [role=option]")
            colours = tokens.evaluate_all("all => all.map(token => getComputedStyle(token).backgroundColor)")
            assert colours == [legend[config.router.operators[operator]] for operator in taken[index]]
    used = {operator for layer in taken for operator in layer}
    assert len(used) == (1 if model == "baseline" else len(config.router.operators)), "all operators occur"
    assert [t["operator"] for t in record["tokens"]] == [list(column) for column in zip(*taken, strict=True)]


def test_hover_shows_entropy_and_operator_of_each_layer(browser, folder, tmp_path):
    record = write(folder, tmp_path / "routes.html", router=ROUTERS["threshold three"])
    names = {"dct": "DCT mixing", "rbf": "RBF mixing", "attention": "attention"}
    with open_page(browser, (tmp_path / "routes.html").as_uri()) as page:
        assert "Point at a token" in page.locator("#inspector").inner_text()
        for place in (3, 11):
            token = record["tokens"][place]
            page.hover(f"#t{place}")
            rows = page.locator("#inspector tbody tr").all()
            assert len(rows) == 4
            for index, row in enumerate(rows):
                cells = row.locator("td").all_inner_texts()
                assert cells[0] == str(index + 1)
                assert cells[1] == names[THREE[token["operator"][index]]]
                assert float(cells[2]) == pytest.approx(token["entropy"][index], abs=5.1e-5)
            facts = page.locator("#inspector dl").inner_text()
            assert f"{place + 1} of {len(record['tokens'])}" in facts and token["class"] in facts
        page.click("#t3")
        page.hover("#t11")
        assert "4 of" in page.locator("#inspector dl").inner_text(), "a click holds the token"


def test_gates_are_shown(browser, folder, tmp_path):
    record = write(folder, tmp_path / "routes.html", router=ROUTERS["soft three"])
    with open_page(browser, (tmp_path / "routes.html").as_uri()) as page:
        page.hover("#t5")
        gates = record["tokens"][5]["gates"][1]
        shown = page.locator("#inspector tbody tr").nth(1).locator("td").nth(1).inner_text()
        assert [float(number) for number in re.findall(r"\d\.\d\d", shown)] == pytest.approx(gates, abs=0.0051)
        assert "soft router computes all operators" in page.locator("#notes").inner_text()
        routed = record["layers"][1]["shares"]["attention"]
        assert f"{100 * routed:.0f} %" in page.locator("#stats").inner_text()


def test_shares_per_class_follow_the_slider(browser, folder, tmp_path):
    record = write(folder, tmp_path / "routes.html")
    with open_page(browser, (tmp_path / "routes.html").as_uri()) as page:
        for layer in (2, 3):
            page.locator("#layer").fill(str(layer))
            rows = [row.locator("th, td").all_inner_texts() for row in page.locator("#classes tbody tr").all()]
            for row, each in zip(rows, record["classes"], strict=True):
                share = each["shares"][layer - 1]["attention"]
                assert row[0] == each["class"] and row[1] == f"{each['tokens']:,}"
                assert float(row[3].removesuffix(" %")) == pytest.approx(100 * share, abs=0.51)
                assert float(row[4]) == pytest.approx(each["entropy_mean"][layer - 1], abs=5.1e-5)
            described = page.locator("#histogram").get_attribute("aria-label")
            assert f"layer {layer}" in described and f"{record['layers'][layer - 1]['entropy_mean']:.4f}" in described


def test_the_keyboard_reaches_everything(browser, folder, tmp_path):
    write(folder, tmp_path / "routes.html")
    with open_page(browser, (tmp_path / "routes.html").as_uri(), viewport={"width": 1200, "height": 800}) as page:
        page.locator("#layer").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#layer-title").inner_text().startswith("Layer 3")
        page.locator("#tokens").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.locator("#tokens").get_attribute("aria-activedescendant") == "t1"
        assert "layer 3" in page.locator("#t1").get_attribute("aria-label")
        page.keyboard.press("[")
        assert page.locator("#layer-title").inner_text().startswith("Layer 2")
        page.keyboard.press("ArrowDown")
        below = page.locator("#tokens").get_attribute("aria-activedescendant")
        assert page.locator(f"#{below}").bounding_box()["y"] > page.locator("#t1").bounding_box()["y"]
        page.keyboard.press("ArrowUp")
        assert page.locator("#tokens").get_attribute("aria-activedescendant") == "t1"
        page.keyboard.press("Enter")
        assert page.locator("#t1").evaluate("t => t.classList.contains('pinned')")
        page.keyboard.press("Escape")
        assert "Point at a token" in page.locator("#inspector").inner_text()
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.id || document.activeElement.name"))
        assert {"theme", "save-json", "layer", "tokens", "mode"} <= reached


@pytest.mark.parametrize("mode", ["entropy", "loss", "layers"])
def test_other_colours(browser, folder, tmp_path, mode):
    record = write(folder, tmp_path / "routes.html")
    with open_page(browser, (tmp_path / "routes.html").as_uri()) as page:
        page.locator(f"[value={mode}]").check(force=True)
        if mode == "layers":
            images = page.locator("#t4").evaluate("t => t.style.backgroundImage")
            assert re.findall(r"var\(--(\w+)\)", images)[::2] == [
                record["operators"][operator] for operator in record["tokens"][4]["operator"]
            ]
            return
        key = (lambda token: token["entropy"][1]) if mode == "entropy" else (lambda token: token["loss"] or 0)
        order = sorted(range(len(record["tokens"])), key=lambda place: key(record["tokens"][place]))
        mixes = [page.locator(f"#t{place}").evaluate("t => t.style.backgroundColor") for place in (order[0], order[-1])]
        assert "0%" in mixes[0] or not mixes[0]
        assert "100%" in mixes[1] and page.locator("#scale").is_visible()


@pytest.mark.parametrize(
    "text", [HOSTILE, "\x00\x07\x7f\ufeff", "مرحبا بالعالم", "🙂🙃👩‍🚀 峠 e\u0301", "a" * 3000, "\n\n\n"]
)
def test_any_text_is_shown_as_text(browser, folder, tmp_path, text):
    path = tmp_path / "routes.html"
    record = write(folder, path, text)
    assert "window.hacked" not in path.read_text().replace("\\u003c", "<").split('id="record">')[0]
    with open_page(browser, path.as_uri()) as page:
        assert page.evaluate("() => window.hacked === undefined")
        assert page.locator("#tokens [role=option]").count() == len(record["tokens"])
        assert page.locator("#tokens script, #tokens img").count() == 0
        shown = page.locator("#tokens").evaluate("element => element.textContent")
        plain = [letter for letter in "".join(t["text"] for t in record["tokens"]) if letter.isalnum()]
        assert [letter for letter in shown if letter.isalnum()] == plain
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)


def test_a_hostile_name_of_a_run(browser, folder, tmp_path):
    routes, config, _ = described_routes(folder)
    path = tmp_path / "routes.html"
    write_page(path, record_of(routes, config, f"runs/{HOSTILE}"))
    with open_page(browser, path.as_uri()) as page:
        assert page.evaluate("() => window.hacked === undefined")
        assert page.locator("h1").evaluate("h => h.textContent") == f"runs/{HOSTILE}"


def test_five_thousand_tokens(browser, folder, tmp_path):
    path = tmp_path / "routes.html"
    record = write(folder, path, TEXT * 130, num_layers=4)
    count = len(record["tokens"])
    assert count > 5000 and path.stat().st_size < 5_000_000
    with open_page(browser, path.as_uri()) as page:
        assert page.locator("#tokens [role=option]").count() == count
        seconds = page.evaluate(
            """() => { const slider = document.getElementById('layer'); const start = performance.now();
            slider.value = 3; slider.dispatchEvent(new Event('input')); document.body.offsetHeight;
            return (performance.now() - start) / 1000 }"""
        )
        assert seconds < 5, "the slider answers"
        assert "windows of at most 16 tokens" in page.locator("#notes").inner_text()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_can_be_read_in_dark_and_light(browser, folder, tmp_path, scheme):
    """By the contrast of WCAG: 4.5 for text, also on each operator's colour."""
    write(folder, tmp_path / "routes.html", router=ROUTERS["threshold three"])
    with open_page(browser, (tmp_path / "routes.html").as_uri(), color_scheme=scheme) as page:
        found = {name: contrast(page, f"#legend [data-op={name}]") for name in THREE}
        found |= {name: contrast(page, name, ".card") for name in ("h2", ".notes", "#classes thead th")}
        found["body"] = contrast(page, "body")
        assert min(found.values()) >= 4.5, found
        before = background(page, "body")
        page.click("#theme")
        assert background(page, "body") != before
        assert contrast(page, "body") >= 4.5


def contrast(page, selector: str, behind: str | None = None) -> float:
    """Return the contrast of the text of ``selector`` with its background, or with that of ``behind``."""
    ink = page.locator(selector).first.evaluate("element => getComputedStyle(element).color")
    light, dark = sorted((luminance(ink), luminance(background(page, behind or selector))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(number) / 255 for number in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("size", [(390, 844), (820, 1100), (1600, 1000)])
def test_nothing_is_wider_than_the_window(browser, folder, tmp_path, size):
    write(folder, tmp_path / "routes.html", TEXT + "x" * 400, num_layers=30)
    window = {"width": size[0], "height": size[1]}
    with open_page(browser, (tmp_path / "routes.html").as_uri(), viewport=window) as page:
        page.hover("#t2")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]


def test_the_page_is_one_file_that_names_no_other(folder, tmp_path):
    write(folder, tmp_path / "routes.html")
    text = (tmp_path / "routes.html").read_text()
    assert not re.search(r"<(?:link|iframe|object|embed|base|img|video|audio)\b|\bsrc=|@import|url\(", text)
    assert set(re.findall(r"https?://[\w./-]+", text)) == {
        "http://www.w3.org/2000/svg",  # a name, not an address
        "https://arxiv.org/abs/2606.08327",  # a link to click
    }
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert "connect-src" not in policy


def test_json_in_a_page_ends_no_element_and_keeps_its_value():
    value = {"a": HOSTILE, "b": [1.23456789, None, True, {"c": ("x", 2)}]}
    data = as_data(value)
    assert data.isascii() and not set("<>&\n\u2028") & set(data)
    assert json.loads(data) == {"a": HOSTILE, "b": [1.234568, None, True, {"c": ["x", 2]}]}


def test_a_page_replaces_a_page_and_nothing_else(folder, tmp_path):
    path = tmp_path / "routes.html"
    write(folder, path)
    check_page(path)
    path.write_text("<html>notes of mine</html>")
    with pytest.raises(UserError, match="is no page of routes"):
        check_page(path)
    with pytest.raises(UserError, match="no such folder"):
        check_page(tmp_path / "nowhere" / "routes.html")
    with pytest.raises(UserError, match="is a folder"):
        check_page(tmp_path)


def test_a_text_that_is_too_long_for_a_page_is_refused(folder, tmp_path):
    routes, config, _ = described_routes(folder)
    record = record_of(routes, config)
    record["tokens"] = record["tokens"] * 1000
    with pytest.raises(UserError, match=r"a page holds 20,000.*\n.*--json"):
        write_page(tmp_path / "routes.html", record)


def test_the_same_record_makes_the_same_page(folder):
    routes, config, _ = described_routes(folder)
    assert static_page(record_of(routes, config)) == static_page(record_of(routes, config))
