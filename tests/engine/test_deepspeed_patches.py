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
HOLDERS = {
    "compile": {"compiler"},
    "optimizer": {"optimizer"},
    "parts": {"deepspeed", "module", "pipeline", "stage"},
}
"""Private name that objects of ours have too -> what our code calls the objects of DeepSpeed that have it."""


def private_words() -> set[str]:
    tables = (
        deepspeed_patches.PRIVATE_NAMES,
        deepspeed_patches.PRIVATE_PARAMETERS,
        deepspeed_patches.PRIVATE_ATTRIBUTES,
    )
    return {name for table in tables for names in table.values() for name in names}


def used_words(source: str) -> set[str]:
    """Return the private words that the source uses.

    It may read or set an attribute by dot or by ``getattr``, ``hasattr`` and ``setattr``, or pass a parameter by name.
    Of a word in ``HOLDERS`` only the uses on such an object count.
    """
    tree, uses = ast.parse(source), set()
    aliases = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            uses |= {(holder, node.attr) for holder in called(node.value, aliases)}
        elif isinstance(node, ast.Call):
            uses |= {("", keyword.arg) for keyword in node.keywords}
            if getattr(node.func, "id", "") in {"getattr", "hasattr", "setattr"}:
                words = [part.value for part in node.args if isinstance(part, ast.Constant)]
                uses |= {(holder, word) for holder in called(node.args[0], aliases) for word in words}
    return {word for holder, word in uses if word in private_words() and holder in HOLDERS.get(word, {holder})}


def called(node: ast.expr, aliases: dict[str, ast.expr]) -> set[str]:
    """Return what the source calls an object: its last name, and for a variable that of what was assigned to it."""
    last = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    assigned = aliases.get(last) if isinstance(node, ast.Name) else None
    return {last} | ({assigned.attr} if isinstance(assigned, ast.Attribute) else set())


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
    for path in PACKAGE.rglob("*.py"):
        if path != PATCHES:
            source = path.read_text()
            assert not used_words(source), path
            assert deepspeed_modules(source) <= DOCUMENTED_MODULES, path


def test_no_entry_is_left_over():
    """A name that is listed is also used: it occurs in the file outside the tables."""
    text = re.sub(r"(?s)\nPRIVATE_\w+ = \{.*?\n\}", "", PATCHES.read_text())
    assert {word for word in private_words() if not re.search(rf"\b{word}\b", text)} == set()


def test_the_search_finds_a_private_name(tmp_path):
    source = "def f(p):\n    return getattr(p, 'ds_id', None) or p._hp_mapping\n"
    assert used_words(source) == {"ds_id", "_hp_mapping"}
    assert deepspeed_modules("from deepspeed.runtime import compiler") - DOCUMENTED_MODULES


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("replica.deepspeed.optimizer.optimizer.state", "optimizer"),
        ("zero = engine.optimizer\nzero.optimizer", "optimizer"),
        ("getattr(engine.optimizer, 'optimizer')", "optimizer"),
        ("replica.deepspeed.module.parts", "parts"),
        ("scaler.dynamic", "dynamic"),
        ("compiler.compile = None", "compile"),
        ("engine.eval_batch(batches, bcast_loss=False)", "bcast_loss"),
    ],
)
def test_the_search_finds_a_private_name_that_is_a_common_word(source, word):
    assert used_words(source) == {word}


@pytest.mark.parametrize(
    "source",
    [
        "config.optimizer.betas",
        "made.parts",
        "config.training.compile",
        "module.compile()",
    ],
)
def test_what_objects_of_ours_call_alike_is_not_private(source):
    assert used_words(source) == set()


def test_a_deepspeed_whose_function_lacks_a_parameter_is_refused_with_it(monkeypatch):
    (function,) = deepspeed_patches.PRIVATE_PARAMETERS
    for planted in (function, "deepspeed.runtime.pipe.engine:PipelineEngine.no_such_function"):
        monkeypatch.setattr(deepspeed_patches, "PRIVATE_PARAMETERS", {planted: ("of_another_version",)})
        with pytest.raises(UserError, match=r"PipelineEngine\.\w+\(of_another_version=\)"):
            deepspeed_patches.check_deepspeed_version()
