"""A config that says only what differs from another one, and how long a run is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megachiar.config import ConfigError, load_config
from megachiar.config.run_length import asked_length, steps_of_epochs
from megachiar.config.shipped import shipped_config
from megachiar.errors import UserError
from megachiar.training.schedule import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestBase:
    def test_what_differs_is_merged_over_the_base(self, tmp_path):
        """Mappings key by key at any depth, lists and values as a whole."""
        write(tmp_path / "deep" / "first.yaml", TINY.read_text())
        text = "base: deep/first.yaml\nmodel:\n  dropout: 0.25\n  router: {tau: 0.5}\n"
        write(tmp_path / "second.yaml", text + "data: {train: [{path: a}, {path: b, weight: 2}]}\n")
        third = write(tmp_path / "third.yaml", "base: second.yaml\nmodel: {router: {tau: 0.25}}\n")
        config, tiny = load_config(third), load_config(TINY)
        assert (config.model.dropout, config.model.router.tau) == (0.25, 0.25)
        assert config.model.meta_router == tiny.model.meta_router and config.training == tiny.training
        assert [str(source.path) for source in config.data.train] == ["a", "b"]
        assert config.data.validation == tiny.data.validation

    def test_a_path_is_of_the_file_that_names_it_wherever_the_command_is_started(self, tmp_path, monkeypatch):
        write(tmp_path / "one" / "base.yaml", TINY.read_text())
        write(tmp_path / "two" / "over.yaml", "base: ../one/base.yaml\n")
        monkeypatch.chdir(tmp_path / "two")
        assert load_config("over.yaml") == load_config(TINY)
        monkeypatch.chdir(tmp_path)
        assert load_config("two/over.yaml") == load_config(TINY)
        absolute = write(tmp_path / "absolute.yaml", f"base: {tmp_path}/one/base.yaml\n")
        assert load_config(absolute) == load_config(TINY)

    @pytest.mark.parametrize("name", ["tiny", "tiny.yaml"])
    def test_a_shipped_config_is_a_base_by_name_unless_a_file_has_it(self, tmp_path, name):
        path = write(tmp_path / "mine.yaml", f"base: {name}\nmodel: {{dropout: 0.5}}\n")
        assert load_config(path, ["model.dropout=0.0"]) == load_config(shipped_config("tiny"))
        (tmp_path / name).write_text(TINY.read_text().replace("num_layers: 4", "num_layers: 6"))
        assert load_config(path).model.num_layers == 6

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("base: lost.yaml\n", r"mine\.yaml:1: base lost\.yaml is neither a file \(.*lost\.yaml\) nor a shipped"),
            ("base: ring/aa.yaml\n", r"remedy: did you mean ring/a\.yaml\? else name a file by its path"),
            ("model: {dropout: 0.1}\nbase: 3\n", r"mine\.yaml:2: base is 3, not the path of a config\n.*base: other"),
            ("base:\n", r"mine\.yaml:1: base is None"),
            ("base: mine.yaml\n", r"mine\.yaml:1: a config cannot be its own base: .*mine\.yaml -> .*mine\.yaml\n"),
            ("base: ring/a.yaml\n", r"ring/b\.yaml:2: a config cannot be its own base: .*mine.* -> .*a\..* -> .*b\."),
            ("base: broken.yaml\n", r"broken\.yaml:3:1: not valid YAML"),
            ("base: list.yaml\n", r"list\.yaml: holds list, not a mapping of sections"),
        ],
    )
    def test_a_base_that_cannot_be_read_is_one_message_with_file_and_line(self, tmp_path, text, message):
        path = write(tmp_path / "mine.yaml", text)
        write(tmp_path / "ring" / "a.yaml", "base: b.yaml\n")
        write(tmp_path / "ring" / "b.yaml", "logging: {every: 1}\nbase: a.yaml\n")
        write(tmp_path / "broken.yaml", "model:\n  a: [\n")
        write(tmp_path / "list.yaml", "- a\n")
        with pytest.raises(UserError, match=message) as caught:
            load_config(path)
        assert "remedy" in str(caught.value)

    def test_each_problem_is_reported_where_its_value_stands(self, tmp_path):
        base = TINY.read_text().replace("num_layers: 4", "num_layers: four")
        base = base.replace("    - path: data/shakespeare/train", "    - path: 3\n    - path: 4")
        write(tmp_path / "below.yaml", base)
        text = "base: below.yaml\nmodel:\n  router:\n    tau: high\noptimizer: {learning_rate: fast}\n"
        path = write(tmp_path / "over.yaml", text + "data:\n  train:\n    - weight: 2\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path, ["training.seed=x"])
        places = {problem.key: place for place, problem in caught.value.located}
        line = next(i for i, row in enumerate(base.splitlines(), 1) if "num_layers" in row)
        assert places == {
            "model.num_layers": f"{tmp_path / 'below.yaml'}:{line}",
            "model.router.tau": f"{path}:4",
            "optimizer.learning_rate": f"{path}:5",
            "data.train.0.path": f"{path}:8",  # the base's list, and the lines in it, count no more
            "training.seed": "--set training.seed=x",
        }

    def test_an_override_wins_over_all_and_cannot_name_a_base(self, tmp_path):
        write(tmp_path / "below.yaml", TINY.read_text())
        path = write(tmp_path / "over.yaml", "base: below.yaml\ntraining: {seed: 5}\n")
        assert load_config(path).training.seed == 5
        assert load_config(path, ["training.seed=6"]).training.seed == 6
        with pytest.raises(UserError, match=r"--set base=tiny: a base can only be named in a file"):
            load_config(path, ["base=tiny"])

    def test_the_resolved_config_is_whole(self, tmp_path):
        path = write(tmp_path / "over.yaml", f"base: {TINY}\nmodel: {{dropout: 0.5}}\n")
        config = load_config(path)
        text = config.to_yaml()
        assert "base" not in yaml.safe_load(text) and "dropout: 0.5" in text
        assert load_config(write(tmp_path / "config.yaml", text)) == config

    def test_null_leaves_out_a_validation_set_of_the_base(self, tmp_path):
        path = write(tmp_path / "over.yaml", f"base: {TINY}\ndata: {{validation: {{valid: null, other: here}}}}\n")
        assert load_config(path).data.validation == {"other": Path("here")}

    def test_the_schema_lets_a_config_with_a_base_leave_out_what_its_base_has(self):
        """What ``required`` says holds for a config without base, for its sections as well."""
        schema = json.loads((CONFIGS / "schema.json").read_text())
        assert schema["properties"]["base"]["type"] == "string"
        assert "required" not in schema and schema["if"] == {"not": {"required": ["base"]}}
        assert schema["then"]["required"] == ["model", "data", "optimizer", "training", "logging"]
        needed = schema["then"]["properties"]
        assert needed["training"]["required"] == ["global_batch_size", "micro_batch_size"]
        assert [each["required"] for each in needed["training"]["anyOf"]] == [["steps"], ["tokens"], ["epochs"]]
        assert "num_layers" in needed["model"]["required"] and needed["data"]["required"] == ["train"]
        assert [name for name, each in schema["$defs"].items() if "required" in each] == [
            "AuxiliaryTaskConfig",
            "SourceConfig",
        ]


class TestLength:
    """8 sequences of 128 tokens a step."""

    def test_tokens_are_rounded_up_to_steps(self):
        for tokens, steps in ((1, 1), (1024, 1), (1025, 2), (102_400, 100)):
            config = load_config(TINY, [f"training.tokens={tokens}"])
            assert (config.steps, config.training.steps, config.training.tokens) == (steps, steps, tokens)
        more = ["training.tokens=102400", "data.sequence_length=64", "training.global_batch_size=16"]
        assert load_config(TINY, more).steps == 100

    def test_epochs_are_rounded_up_to_steps_as_the_decimal_number_that_was_written(self):
        assert steps_of_epochs(5.0, 460_736, 128) == 17_998
        assert steps_of_epochs(0.5, 16, 8) == 1 and steps_of_epochs(0.5, 17, 8) == 2
        assert steps_of_epochs(1.1, 50, 1) == 55 and 1.1 * 50 > 55, "in floating point it would be 56"

    def test_the_schedule_ends_with_the_tokens(self):
        by_tokens, by_steps = (load_config(TINY, [f"training.{each}"]) for each in ("tokens=204800", "steps=200"))
        assert [learning_rate(by_tokens, s) for s in (60, 150, 200)] == [
            learning_rate(by_steps, s) for s in (60, 150, 200)
        ]
        assert learning_rate(by_tokens, 150) != learning_rate(load_config(TINY), 150)

    def test_the_resolved_config_has_both_and_reads_back(self, tmp_path):
        config = load_config(TINY, ["training.tokens=5000"])
        path = write(tmp_path / "config.yaml", config.to_yaml())
        training = yaml.safe_load(path.read_text())["training"]
        assert (training["steps"], training["tokens"], training["epochs"]) == (5, 5000, None)
        assert load_config(path) == config and asked_length(config.training) == ("tokens", 5000)
        assert load_config(path, ["training.tokens=6000"]).steps == 6
        assert load_config(path, ["training.steps=7"]).training.tokens is None

    @pytest.mark.parametrize(
        ("lengths", "key", "message"),
        [
            ("", "training", "does not say how long the run is | set one of steps, tokens and epochs"),
            ("  tokens: 5000\n  epochs: 2\n", "training.epochs", "is 2 beside tokens 5,000 | keep one"),
            ("  steps: 4\n  tokens: 5000\n", "training.steps", "is 4, but tokens 5,000 make 5 | keep one"),
            ("  epochs: 0\n", "training.epochs", "greater than 0"),
            ("  epochs: .inf\n", "training.epochs", "finite"),
            ("  tokens: 1.5e9\n", "training.tokens", "integer"),
        ],
    )
    def test_the_length_is_given_once(self, tmp_path, lengths, key, message):
        text = re.sub(r"  steps: 1200\n", lengths, TINY.read_text())
        path = write(tmp_path / "config.yaml", text)
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        (problem,) = caught.value.problems
        assert problem.key == key and message in f"{problem.message} | {problem.remedy}"

    def test_a_length_replaces_that_of_the_base_and_an_override_replaces_both(self, tmp_path):
        write(tmp_path / "below.yaml", TINY.read_text().replace("steps: 1200", "epochs: 2"))
        path = write(tmp_path / "over.yaml", "base: below.yaml\ntraining: {tokens: 2048}\n")
        assert load_config(tmp_path / "below.yaml").training.epochs == 2
        training = load_config(path).training
        assert (training.steps, training.tokens, training.epochs) == (2, 2048, None)
        training = load_config(path, ["training.steps=9"]).training
        assert (training.steps, training.tokens, training.epochs) == (9, None, None)

    @pytest.mark.parametrize(
        ("overrides", "key", "said"),
        [
            (["training.steps=5", "training.tokens=100"], "training.steps", "is 5 beside training.tokens 100"),
            (["training.tokens=5120", "training.steps=5"], "training.tokens", "is 5120 beside training.steps 5"),
            (["training.steps=9", "training.epochs=1.5"], "training.steps", "is 9 beside training.epochs 1.5"),
            (["training={steps: 5}", "training.epochs=1"], "training.steps", "is 5 beside training.epochs 1"),
            (
                ["training.epochs=1", "training.steps=1", "training.tokens=1"],
                "training.epochs",
                "is 1 beside training.steps 1 and training.tokens 1",
            ),
        ],
    )
    def test_two_lengths_on_the_command_line_contradict_each_other(self, overrides, key, said):
        with pytest.raises(ConfigError) as caught:
            load_config(TINY, overrides)
        ((place, problem),) = caught.value.located
        assert place == f"--set {overrides[0]}"
        assert problem.key == key and problem.message.startswith(said) and problem.remedy == "keep one of them"

    def test_an_override_that_a_later_one_takes_back_is_no_length(self):
        training = load_config(TINY, ["training.steps=5", "training.steps=null", "training.tokens=5120"]).training
        assert (training.steps, training.tokens) == (5, 5120)
        training = load_config(TINY, ["training.steps=5", "training.steps=7"]).training
        assert (training.steps, training.tokens) == (7, None)
