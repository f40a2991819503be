"""The contract with DeepSpeed: it has each private name that we use, and one file of ours alone uses them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from support import ROOT, run_ranks, small_config, write_config, write_tokens

from megachiar.engine import deepspeed_patches
from megachiar.errors import UserError

PACKAGE = ROOT / "megachiar"
PATCHES = Path(deepspeed_patches.__file__)
DOCUMENTED_MODULES = {"deepspeed", "deepspeed.pipe", "deepspeed.utils", "deepspeed.accelerator"}
COMMON_WORDS = {"compile", "optimizer", "parts", "dynamic", "skipped_steps"}
"""Private names of DeepSpeed that objects of ours have too, so that a search by name cannot tell them apart."""


def private_words() -> set[str]:
    tables = (deepspeed_patches.PRIVATE_NAMES, deepspeed_patches.PRIVATE_ATTRIBUTES)
    return {name for table in tables for names in table.values() for name in names} - COMMON_WORDS


def used_words(source: str) -> set[str]:
    """Return the attributes that the source reads or sets, by dot or by ``getattr``, ``hasattr`` and ``setattr``."""
    tree = ast.parse(source)
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "hasattr", "setattr"}:
            words |= {
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
    return words


def deepspeed_modules(source: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module for module in modules if module.partition(".")[0] == "deepspeed"}


def test_the_installed_deepspeed_has_every_private_name():
    assert list(deepspeed_patches.missing_names()) == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in deepspeed_patches.PRIVATE_NAMES.items() for name in names],
)
def test_a_deepspeed_without_a_name_is_refused_with_the_name(monkeypatch, owner, name):
    planted = {owner: (f"{name}_of_another_version",)}
    monkeypatch.setattr(deepspeed_patches, "PRIVATE_NAMES", planted)
    with pytest.raises(UserError, match=f"{owner}.{name}_of_another_version"):
        deepspeed_patches.check_deepspeed_version()


def test_a_deepspeed_without_a_module_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed_patches, "PRIVATE_NAMES", {"deepspeed.no_such_module:Engine": ("step",)})
    with pytest.raises(UserError, match=r"no_such_module:Engine\.step"):
        deepspeed_patches.check_deepspeed_version()


def test_running_engines_have_every_private_attribute(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", documents=4, seed=1)
    configs = []
    for name, zero_stage, precision in [("zero1", 1, "fp16"), ("zero2", 2, "bf16"), ("zero3", 3, "fp32")]:
        sections = {"parallel": {"zero_stage": zero_stage}, "precision": {"compute": precision}}
        sections["training"] = {"communication_timeout_s": 77.0}
        configs.append(write_config(tmp_path / f"{name}.yaml", small_config(tmp_path, **sections)))
    (output,) = run_ranks(1, "tests/workers/deepspeed_contract_worker.py", *configs)
    (report,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert report["lacking"] == []
    assert set(report["seen"]) == set(deepspeed_patches.PRIVATE_ATTRIBUTES)
    assert report["timeouts"] == [77.0]  # DeepSpeed's own groups too


def test_private_names_stand_in_one_file():
    words = private_words()
    for path in PACKAGE.rglob("*.py"):
        if path != PATCHES:
            source = path.read_text()
            assert not used_words(source) & words, path
            assert deepspeed_modules(source) <= DOCUMENTED_MODULES, path


def test_no_entry_is_left_over():
    """A name that is listed is also used: it occurs in the file outside the tables."""
    text = re.sub(r"(?s)\nPRIVATE_\w+ = \{.*?\n\}", "", PATCHES.read_text())
    assert {word for word in private_words() if not re.search(rf"\b{word}\b", text)} == set()


def test_the_search_finds_a_private_name(tmp_path):
    source = "def f(p):\n    return getattr(p, 'ds_id', None) or p._hp_mapping\n"
    assert used_words(source) & private_words() == {"ds_id", "_hp_mapping"}
    assert deepspeed_modules("from deepspeed.runtime import compiler") - DOCUMENTED_MODULES
