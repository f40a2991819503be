"""``SWEEP.yaml``: what is wrong with it is one message with lines, and its cells have the configs that it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import small_config, write_config, write_tokens

from megachiar.config import ConfigError
from megachiar.config.sweep import load_sweep
from megachiar.errors import UserError
from megachiar.sweeps.cells import cell_named, cells_of, levels_of
from megachiar.sweeps.run_cells import check_cells, launch_words


@pytest.fixture
def base(tmp_path) -> Path:
    return write_config(tmp_path / "base.yaml", small_config(tmp_path, data={"test": {"held": str(tmp_path / "test")}}))


def write_sweep(folder: Path, **keys: Any) -> Path:
    sweep = {"base": "base.yaml", "folder": str(folder / "out"), "seeds": [1, 2], "variants": {"as_it_is": {}}, **keys}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    return str(caught.value)


def test_a_cell_has_its_settings_seed_and_folder(tmp_path, base):
    variants = {"small": {"set": {"model.dropout": 0.3, "training.tokens": 512}}, "plain": {}}
    path = write_sweep(tmp_path, set={"training.steps": 7, "model.dropout": 0.1}, variants=variants)
    cells = cells_of(load_sweep(path))
    assert [cell.name for cell in cells] == ["small/seed_1", "plain/seed_1", "small/seed_2", "plain/seed_2"]
    small, plain = cells[2].config(), cells[3].config()
    assert (small.model.dropout, plain.model.dropout) == (0.3, 0.1)
    assert (small.training.tokens, small.training.steps, plain.training.steps) == (512, 2, 7), "a later length wins"
    for config, name in ((small, "small"), (plain, "plain")):
        assert (config.training.seed, config.model.router.seed) == (2, 2)
        assert config.logging.folder == tmp_path / "out" / name / "seed_2"


def test_a_grid_makes_a_variant_of_each_combination(tmp_path, base):
    grid = {"model.router.attention_share": [0.25, 0.5], "model.num_layers": [3, 4]}
    shares = {"set": {"model.router.kind": "random", "model.router.tau": None}, "grid": grid}
    sweep = load_sweep(write_sweep(tmp_path, variants={"random": shares, "threshold": {}}, seeds=[0]))
    assert list(sweep.variants) == [
        "random-attention_share=0.25-num_layers=3",
        "random-attention_share=0.25-num_layers=4",
        "random-attention_share=0.5-num_layers=3",
        "random-attention_share=0.5-num_layers=4",
        "threshold",
    ]
    found = [cell.config().model for cell in cells_of(sweep, ["random-attention_share=0.5-num_layers=3"])]
    assert [(m.router.attention_share, m.num_layers, m.router.kind) for m in found] == [(0.5, 3, "random")]


def test_sources_come_first_and_levels_wait_for_one_another(tmp_path, base):
    variants = {
        "equal": {"share_of": "threshold", "set": {"model.router.kind": "random", "model.router.tau": None}},
        "threshold": {"calibrate": {"run": "baseline"}},
        "baseline": {"set": {"model.kind": "baseline"}},
    }
    sweep = load_sweep(write_sweep(tmp_path, variants=variants, seeds=[5]))
    assert list(sweep.variants) == ["equal", "threshold", "baseline"] and sweep.reference == "equal"
    cells = cells_of(sweep)
    assert [cell.variant.name for cell in cells] == ["baseline", "threshold", "equal"]
    assert [[cell.variant.name for cell in level] for level in levels_of(cells)] == [
        ["baseline"],
        ["threshold"],
        ["equal"],
    ]
    assert [[cell.variant.name for cell in level] for level in levels_of(cells[1:])] == [["threshold"], ["equal"]]
    assert cells[1].measured_keys() == ["model.router.tau"]
    assert cells[2].measured_keys() == ["model.router.attention_share"]
    assert cell_named(sweep, "equal/seed_5") == cells[2]
    with pytest.raises(UserError, match="equal/seed_6 is no cell of"):
        cell_named(sweep, "equal/seed_6")
    with pytest.raises(UserError, match="nobody is no variant of"):
        cells_of(sweep, ["nobody"])


def test_three_operators_have_two_thresholds(tmp_path, base):
    three = {"model.router.operators": ["dct", "rbf", "attention"], "model.router.tau": None}
    variants = {"three": {"set": three, "calibrate": {"run": "baseline"}}, "baseline": {}}
    cell = cells_of(load_sweep(write_sweep(tmp_path, variants=variants)), ["three"])[0]
    assert cell.measured_keys() == ["model.router.tau_low", "model.router.tau_high"]
    assert len(cell.config().model.router.operators) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": []}, "seeds: is [], must be a list of at least 1"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has a seed twice"),
        ({"seeds": ["one"]}, 'seeds.0: is "one", must be an integer'),
        ({"variants": {}}, "variants: is {}"),
        ({"variants": {"a": {"sett": {}}}}, "variants.a.sett: is not a known key"),
        ({"variants": {"a": {"calibrate": {"where": "layers"}}}}, "variants.a.calibrate.run: is missing"),
        ({"variants": {"a": {"calibrate": {"run": "b"}}}}, "variants.a.calibrate.run: b is no variant of this sweep"),
        ({"variants": {"a": {"share_of": "b"}}}, "variants.a.share_of: b is no variant"),
        ({"variants": {"a": {"share_of": "a"}}}, "variants: are measured on one another in a circle"),
        ({"variants": {"a/b": {}}}, "variants.a/b: is no name of a folder"),
        ({"variants": {"a": {"grid": {"model.dropout": []}}}}, "variants.a.grid.model.dropout: is []"),
        (
            {"variants": {"a": {"set": {"training.seed": 3}}}},
            "variants.a.set.training.seed: is set by the sweep itself",
        ),
        (
            {"variants": {"b": {}, "a": {"grid": {"model.router.tau": [0.1, 0.2]}, "calibrate": {"run": "b"}}}},
            "variants.a.grid.model.router.tau: is measured, by calibrate, which replaces it",
        ),
        (
            {"variants": {"b": {}, "a": {"set": {"model.router.attention_share": 0.5}, "share_of": "b"}}},
            "variants.a.set.model.router.attention_share: is measured, by share_of",
        ),
        ({"set": {"logging": {}}}, "set.logging: is set by the sweep itself"),
        ({"reference": "b"}, "reference: b is no variant of this sweep"),
        ({"base": "nothing"}, "base: nothing is neither a file nor a shipped config (17m, 400m"),
        ({"fodler": "x"}, "fodler: is not a known key"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, base, keys, message):
    text = refused(write_sweep(tmp_path, **keys))
    assert message in text and "remedy:" in text and "sweep.yaml" in text, text


def test_a_wrong_key_of_a_variant_has_its_line_in_the_sweep(tmp_path, base):
    for name in ("train", "valid", "test"):
        write_tokens(tmp_path / name)
    variants = {"right": {}, "wrong": {"set": {"model.hidden_sise": 32}}, "worse": {"set": {"model.num_layers": 1}}}
    path = write_sweep(tmp_path, variants=variants)
    sweep = load_sweep(path)
    with pytest.raises(ConfigError) as caught:
        check_cells(sweep, cells_of(sweep))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "hidden_sise" in text)
    assert f"sweep.yaml:{line}: model.hidden_sise: is not a known key" in str(caught.value)
    assert "model.num_layers: is 1" in str(caught.value) and str(caught.value).count("hidden_sise") == 1


@pytest.mark.parametrize(
    ("source", "taken", "message"),
    [
        ({"model.hidden_size": 64}, {"calibrate": {"run": "b"}}, "b has model.hidden_size 64, and this variant 32"),
        ({"model.num_layers": 5}, {"calibrate": {"run": "b", "where": "layers"}}, "b has model.num_layers 5"),
        (
            {"model.kind": "baseline"},
            {"share_of": "b", "set": {"model.router.kind": "random", "model.router.tau": None}},
            "share_of: no layer of b routes",
        ),
    ],
)
def test_a_source_that_cannot_give_what_is_taken_is_refused(tmp_path, base, source, taken, message):
    """H of rows of another width has another distribution: its threshold would send other shares to attention."""
    for name in ("train", "valid", "test"):
        write_tokens(tmp_path / name)
    sweep = load_sweep(write_sweep(tmp_path, variants={"b": {"set": source}, "a": taken}))
    with pytest.raises(UserError, match=message):
        check_cells(sweep, cells_of(sweep))


def test_data_that_is_missing_is_found_before_anything_is_trained(tmp_path, base):
    sweep = load_sweep(write_sweep(tmp_path))
    with pytest.raises(UserError, match=r"sweep\.yaml, as_it_is: .*train"):
        check_cells(sweep, cells_of(sweep))


def test_a_launcher_is_looked_for(tmp_path, base):
    sweep = load_sweep(write_sweep(tmp_path, launch="torchrun --nproc_per_node 2"))
    program, *options = launch_words(sweep)
    assert program.endswith("/torchrun") and options == ["--nproc_per_node", "2"]
    with pytest.raises(UserError, match="launch: there is no program nosuchlauncher"):
        launch_words(load_sweep(write_sweep(tmp_path, launch="nosuchlauncher -n 2")))
