"""What docs/ says of the code is true: paths, keys, messages; and the generated page is current."""

from __future__ import annotations

import ast
import json
import re
import sys

import pytest
from support import ROOT

from megachiar.config import RunConfig

sys.path.insert(0, str(ROOT / "docs"))
import findings_tables
import generated_pages

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if not {"_build", "generated"} & set(p.parts))]
PATH = re.compile(r"(?<![\w./-])(?:megachiar|tools|tests|slurm|configs)/[\w/-]+\.(?:py|sh|yaml|json)\b")
SHORTEST_FRAGMENT = 4  # letters of a message that are looked for


def test_the_config_reference_is_that_of_the_types():
    written = (DOCS / "configuration.md").read_text()
    assert written == generated_pages.configuration(), "python docs/generated_pages.py writes it anew"


def test_the_tables_of_findings_are_those_of_the_recorded_numbers():
    written = findings_tables.PAGE.read_text()
    assert written == findings_tables.filled(written), "python docs/generated_pages.py fills them anew"


def test_tables_of_findings_are_filled_from_the_files(tmp_path):
    losses = {"tau_1": 4.0, "tau_0": 3.0, "half": 3.25, "other": 9.0}
    rows = [
        {
            "variant": name,
            "measure": "loss",
            "values": {"1": loss - 0.125 * (name == "half"), "2": loss + 0.125 * (name == "half")},
            "mean": loss,
            "deviation": 0.125,
            "difference": None,
        }
        for name, loss in losses.items()
    ]
    table = {"reference": "tau_0", "finished": {name: [1, 2] for name in losses}, "rows": rows}
    for name in losses:
        (tmp_path / "few" / name).mkdir(parents=True)
        for seed in (1, 2):
            share = None if name == "other" else seed / 4
            of_layers = None if share is None else [0.0, 0.0, seed / 2, 1.0]
            result = {"attention_share": share, "attention_share_of_layers": of_layers}
            (tmp_path / "few" / name / f"seed_{seed}.json").write_text(json.dumps(result))
    (tmp_path / "few" / "table.json").write_text(json.dumps(table))
    (tmp_path / "far" / "near").mkdir(parents=True)
    for seed, accuracy in ((1, 0.5), (2, 0.75)):
        of_distance = {"least": 2, "most": 3, "accuracy": accuracy}
        record = {"distances": [of_distance], "accuracy": accuracy / 5}
        (tmp_path / "far" / "near" / f"seed_{seed}.distance.json").write_text(json.dumps(record))
    page = "a\n<!-- sweep: few, loss -->\nold\n<!-- end -->\nb\n<!-- distance: far -->\n<!-- end -->\n"
    text = findings_tables.filled(page, tmp_path)
    assert "old" not in text and text.startswith("a\n") and text == findings_tables.filled(text, tmp_path)
    lines = text.splitlines()
    kept = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines if line[:1] == "|"}
    assert [kept[name] for name in losses] == ["0% (0% to 0%)", "100% (100% to 100%)", "75% (62% to 88%)", ""]
    assert "| half | 2 | 0%, 75% | 3.2500 ± 0.1250 |  | 75% (62% to 88%) |" in lines
    assert "| other | 2 |  | 9.0000 ± 0.1250 |  |  |" in lines
    assert "| near | 2 | 62.5% | 12.5% (10.0% to 15.0%) |" in lines


def keys(name: str = "") -> set[str]:
    """Return every key of the config with dots, sections left out."""
    found = set()
    model = generated_pages.section_of(RunConfig)
    for part in name.split(".") if name else []:
        model = generated_pages.section_of(model.model_fields[part].annotation)
    for key, field in model.model_fields.items():
        path = f"{name}.{key}" if name else key
        inner = generated_pages.section_of(field.annotation)
        found |= {path} if inner is None else keys(path)
    return found


def test_every_key_has_its_line_with_type_and_default():
    text = generated_pages.configuration()
    lines = {}
    for heading, body in re.findall(r"^#{2,3} `([\w.]+)`\n(.*?)(?=^#{2,3} |\Z)", text, re.M | re.S):
        lines |= {f"{heading}.{key}": rest for key, rest in re.findall(r"^\| `(\w+)` \|(.*)$", body, re.M)}
    assert set(lines) >= keys() - {"deepspeed"}
    assert lines["model.hidden_size"].startswith(" integer, at least 2 | **required** |")
    assert lines["parallel.pipeline_size"].startswith(" integer, above 0 | `1` |")
    assert lines["parallel.zero_stage"].startswith(" `0`, `1`, `2`, `3` | `1` |")
    assert lines["precision.tf32"].startswith(" `true`, `false` | `true` |")
    assert lines["optimizer.clip_gradient_norm"].startswith(" number, above 0 or `null` | `1.0` |")


def test_the_keys_to_touch_first_exist():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", generated_pages.INTRODUCTION, re.M)
    named = {f"{section}.{key}" for section, row in rows for key in re.findall(r"`([\w.]+)`", row)}
    sections = {f"{section}.{key}" for section, model in sections_of_run() for key in model.model_fields}
    assert len(rows) == 10 and named <= keys() | sections


def sections_of_run():
    """Yield name and class of each section of the config."""
    for name, field in RunConfig.model_fields.items():
        if (model := generated_pages.section_of(field.annotation)) is not None:
            yield name, model


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page):
    missing = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert missing == []


def strings_of_the_code() -> str:
    """Return all texts of the code and the scripts, one after another; of f-strings what stands between the values."""
    found = [path.read_text() for path in (ROOT / "slurm").glob("*.sh")]
    for path in [*(ROOT / "megachiar").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(generated_pages.template(node))
    return "\n".join(found)


def messages_of(page: str) -> list[str]:
    """Return the first column of a page's tables of messages."""
    return re.findall(r"^\| `+ ?(.+?) ?`+ \|", page, re.M)


def test_every_message_that_the_page_of_failures_names_is_one_of_the_code():
    page, strings = (DOCS / "failures.md").read_text(), strings_of_the_code()
    found = messages_of(page.split("## Without a message")[0])
    assert len(found) > 40
    for message in found:
        fragments = [part.strip() for part in message.split("…") if len(part.strip()) >= SHORTEST_FRAGMENT]
        assert fragments, message
        for fragment in fragments:
            assert fragment in strings, f"no message has {fragment!r}"


def test_the_list_of_messages_has_each_error_with_its_remedy():
    text = generated_pages.messages()
    remedy = "{…}check the path; `megachiar config list` names shipped ones"
    assert f"| `{{path}}` | `no such config file` | `` {remedy} `` |" in text
    raised = sum(
        getattr(node.func, "id", "") == "UserError" and len(node.args) > 1
        for path in (ROOT / "megachiar").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    )
    assert raised > 100 and text.count("\n| ") > 0.8 * raised


def test_the_reading_order_counts_on_and_names_every_file_once():
    text = (DOCS / "reading-order.md").read_text()
    listed = re.findall(r"^(\d+)\. `([\w/.]+)`: [A-Za-z].+\.$", text, re.M)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    files = [file for _, file in listed]
    assert len(re.findall(r"^\d+\.", text, re.M)) == len(listed), "each line has a file and one sentence"
    modules = {path for path in (ROOT / "megachiar").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in modules)


def defined_names(source: str) -> set[str]:
    """Return the classes, functions, constants, attributes and keys of a config that Python source defines."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, (ast.ClassDef, ast.Module)):
            fields = [field for field in node.body if isinstance(field, (ast.Assign, ast.AnnAssign))]
            names |= {target.id for field in fields for target in targets(field) if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {
                target.attr
                for target in targets(node)
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
            }
    return names


def targets(assignment: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    """Return what an assignment sets, one by one."""
    whole = assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target]
    return [part for target in whole for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def test_a_word_in_prose_defines_nothing():
    source = '"""Stages\n\nStages send."""\nA, B = 1, 2\nclass C:\n    key: int = 1\n'
    source += "    def f(self):\n        self.x = y = 2\n"
    assert defined_names(source) == {"A", "B", "C", "key", "f", "x"}


def test_each_word_of_the_glossary_has_a_meaning_and_a_file():
    rows = [line for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    words = [row for row in rows if not row.startswith("| word |")]
    rooms = {path.parent for path in (ROOT / "megachiar").rglob("*.py") if path.name != "__init__.py"}
    assert len(words) > 100
    for row in words:
        word, meaning, where = (cell.strip() for cell in row.strip("| ").split(" | "))
        assert meaning.endswith("."), word
        file = ROOT / where.strip("`")
        assert file.is_file(), word
        for name in re.findall(r"`(\w+)`", word):
            assert name in defined_names(file.read_text()), f"{where} defines no {name}"
        rooms.discard(file.parent)
    assert not rooms, "each room has its words"
    assert len({row.split("|")[1] for row in words}) == len(words)
