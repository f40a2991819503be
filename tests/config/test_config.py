"""A run's config: typed, checked, all problems at once, each with file, key, value and remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megachiar.config import ConfigError, RunConfig, load_config
from megachiar.config.deepspeed import HARMFUL, MONITORS, OWNED, to_deepspeed
from megachiar.config.schema import config_schema
from megachiar.errors import UserError
from megachiar.topology import LaunchError, data_parallel_size
from megachiar.training.schedule import learning_rate

pytestmark = pytest.mark.every_python

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def problems(tmp_path: Path, *overrides: str, text: str | None = None) -> dict[str, str]:
    """Key -> message of each problem of tiny.yaml (or ``text``) under ``overrides``."""
    path = TINY
    if text is not None:
        path = tmp_path / "config.yaml"
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return {p.key: f"{p.message} | {p.remedy}" for p in caught.value.problems}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(CONFIGS / name)
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config


def test_all_configs_are_shipped():
    of_the_paper = ["17m.yaml", "400m.yaml", "400m_baseline.yaml", "400m_mixed.yaml"]
    assert sorted([*of_the_paper, "7b.yaml", "long_range.yaml", "tiny.yaml"]) == SHIPPED


def test_baseline_differs_from_400m_in_the_layers_alone():
    chiar, baseline = load_config(CONFIGS / "400m.yaml"), load_config(CONFIGS / "400m_baseline.yaml")
    same = {"kind", "router"}
    assert chiar.model.model_dump(exclude=same) == baseline.model.model_dump(exclude=same)
    for section in ("data", "optimizer", "schedule", "training", "precision"):
        assert getattr(chiar, section) == getattr(baseline, section)


def test_the_400m_family_trains_as_long_as_the_paper_and_mixes_the_same_text():
    for name in ("400m", "400m_baseline", "400m_mixed"):
        assert load_config(CONFIGS / f"{name}.yaml").training.epochs == 5
    mixed, plain = (load_config(CONFIGS / f"{name}.yaml") for name in ("400m_mixed", "400m"))
    assert mixed.model == plain.model and mixed.data.train == plain.data.train
    assert list(mixed.data.validation) == ["wikitext-103"]
    assert list(mixed.mixed.tasks) == ["imdb", "listops", "wikitext-2"] and mixed.mixed.probability == 0.25


def test_schema_is_that_of_the_code():
    assert json.loads((CONFIGS / "schema.json").read_text()) == config_schema(), "megachiar config schema writes it"


UNITS = (
    r"tokens?|samples?|sequences?|steps?|epochs?|passes|layers?|channels|heads|ranks|threads|stages|windows|"
    r"micro-batches|checkpoints|lines|documents|examples|texts|seconds|nats|id of the token|optimizer\.learning_rate|"
    r"rows|units of|"
    # and what has none
    r"classes|factors?|share|probability|seed|threshold|standard deviation|norm"
)


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value, by its dotted name."""
    for name, field in section.model_fields.items():
        inner = [part for part in types_in(field.annotation) if issubclass(part, BaseModel)]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def types_in(annotation: Any) -> list[type]:
    """The types that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [part for argument in get_args(annotation) for part in types_in(argument)]


def test_every_key_has_a_description_and_every_number_a_unit():
    fields = dict(leaves(RunConfig))
    assert len(fields) > 60 and {"model.router.tau", "data.train.weight", "checkpoint.load_from"} <= set(fields)
    without = [key for key, field in fields.items() if not (field.description or "").strip().endswith(".")]
    assert not without, f"no description: {without}"
    numbers = [key for key, field in fields.items() if {int, float} & set(types_in(field.annotation))]
    assert len(numbers) > 35
    no_unit = [key for key in numbers if not re.search(rf"\b({UNITS})\b", fields[key].description, re.IGNORECASE)]
    assert not no_unit, f"no unit: {no_unit}"


def test_monitors_are_all_that_deepspeed_has():
    monitors = set(DeepSpeedMonitorConfig.model_fields)
    assert {"tensorboard", "wandb"} <= monitors and monitors <= set(MONITORS)


def test_every_problem_of_every_section_is_reported_at_once(tmp_path):
    found = problems(
        tmp_path,
        "model.num_layers='3'",
        "model.num_attention_heads=7",
        "model.router.kind=thresold",
        "data.sequence_length=1.5",
        "training.global_batch_size=5",
        "training.micro_batch_size=2",
        "parallel.zero_stage=4",
        "optimizer.lerning_rate=1",
        "logging.every=0",
    )
    assert set(found) == {
        "model.num_layers",
        "model.router.kind",
        "data.sequence_length",
        "parallel.zero_stage",
        "optimizer.lerning_rate",
        "logging.every",
    }
    assert "'threshold', 'soft', 'hard', 'random', 'hashed' or 'learned'" in found["model.router.kind"]
    assert "did you mean `learning_rate`?" in found["optimizer.lerning_rate"]


def test_a_problem_names_the_line_of_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text().replace("num_layers: 4", "num_layers: four"))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "num_layers" in text)
    with pytest.raises(ConfigError, match=rf"config\.yaml:{line}: model\.num_layers: is \"four\""):
        load_config(path)


def test_an_override_is_named_as_the_place(tmp_path):
    with pytest.raises(ConfigError, match=r"--set training\.steps=-1: training\.steps: is -1"):
        load_config(TINY, ["training.steps=-1"])


def test_an_override_below_a_key_that_no_file_has_is_named_as_the_place():
    with pytest.raises(ConfigError, match=r"--set foo\.bar=1: foo: is not a known key"):
        load_config(TINY, ["foo.bar=1"])


def test_digits_after_a_zero_are_quoted_as_they_are_written():
    for override in ("training.steps=010", "optimizer.learning_rate=00"):
        value = override.partition("=")[2]
        with pytest.raises(ConfigError, match=rf'--set {override}: \S+: is "{value}", must be'):
            load_config(TINY, [override])


SHARE = ["model.router.tau=null", "model.router.target_share=0.5"]
LEARNED = ["model.router.kind=learned", *SHARE]
# (overrides, key of the problem, part of its message)
CROSS_CHECKS = [
    (["model.hidden_size=255"], "model.num_attention_heads", "set hidden_size to 248 or 256"),
    (["model.num_attention_heads=3"], "model.num_attention_heads", "3 does not divide 256"),
    (["model.hidden_size=12", "model.num_attention_heads=4"], "model.num_attention_heads", "even number"),
    (["model.num_layers=1"], "model.num_layers", "at least 2"),
    (["model.router.tau=null"], "model.router.tau", "is missing"),
    (["model.router.tau=[0.5]"], "model.router.tau", "1 values for 2 routed layers"),
    (["model.router.attention_share=0.5"], "model.router.attention_share", "has no effect"),
    (["model.router.operators=[attention,dct]"], "model.router.operators", "use"),
    (["model.router.kind=random", "model.router.tau=null"], "model.router.attention_share", "is missing"),
    (["model.router.kind=hashed", "model.router.tau=null"], "model.router.tau", "is missing"),
    (["model.router.kind=hashed", "model.router.attention_share=0.5"], "model.router.attention_share", "has no effect"),
    (["model.router.kind=hashed", "model.router.tau=[0.5]"], "model.router.tau", "1 values for 2 routed layers"),
    (
        [
            "model.router.kind=hashed",
            "model.router.operators=[dct,rbf,attention]",
            "model.router.tau=null",
            "model.router.tau_low=0.9",
            "model.router.tau_high=0.8",
        ],
        "model.router.tau_low",
        "above tau_high",
    ),
    (
        ["model.router.operators=[dct,rbf,attention]", "model.router.tau=null"],
        "model.router.tau_low",
        "is missing",
    ),
    (
        [
            "model.router.operators=[dct,rbf,attention]",
            "model.router.tau=null",
            "model.router.tau_low=0.9",
            "model.router.tau_high=0.8",
        ],
        "model.router.tau_low",
        "above tau_high",
    ),
    (
        [
            "model.router.kind=random",
            "model.router.tau=null",
            "model.router.attention_share=0.5",
            "model.router.collapse_weight=0.1",
        ],
        "model.router.collapse_weight",
        "nothing to regularise",
    ),
    (
        ["model.router.tau=null", "model.router.kind=hard", "model.attention.keys=routed"],
        "model.router.hard_gradient",
        "the attention of tokens that give no keys",
    ),
    (["model.router.kind=learned", "model.router.tau=null"], "model.router.target_share", "is missing"),
    ([*LEARNED, "model.router.tau=0.5"], "model.router.tau", "does not read it"),
    ([*LEARNED, "model.attention.keys=routed"], "model.attention.keys", "what its keys are to others"),
    ([*LEARNED, "model.router.operators=[dct,rbf,attention]"], "model.router.operators", "two operators"),
    ([*LEARNED, "model.router.collapse_weight=0.1"], "model.router.collapse_weight", "holds the shares"),
    (["model.router.target_share=0.5", "model.router.collapse_weight=0.1"], "model.router.collapse_weight", "holds"),
    (["model.router.kind=hard", *SHARE], "model.router.target_share", "does not read it"),
    (["model.router.explore=0.2"], "model.router.explore", "explores nothing"),
    (["model.router.anneal_steps=9"], "model.router.anneal_steps", "without target_share"),
    ([*LEARNED, "model.router.target_share=1.0"], "model.router.target_share", "less than 1"),
    (["model.router.hard_gradient=dct_only"], "model.router.hard_gradient", "and this is threshold with"),
    (
        ["model.router.tau=null", "model.router.kind=soft", "model.attention.keys=routed"],
        "model.attention.keys",
        "routed with a soft router",
    ),
    (["data.sequence_length=129"], "data.sequence_length", "above model.max_sequence_length 128"),
    (["training.micro_batch_size=5"], "training.global_batch_size", "use 5 or 10"),
    (["parallel.data_size=3"], "training.global_batch_size", "no multiple"),
    (["parallel.pipeline_size=2", "parallel.zero_stage=2"], "parallel.zero_stage", "pipeline"),
    (["parallel.pipeline_size=5"], "parallel.pipeline_size", "5 stages for 4 layers"),
    (["parallel.tensor_size=3"], "parallel.tensor_size", "does not divide"),
    (["parallel.sequence=true"], "parallel.sequence", "tensor_size 1"),
    (["parallel.tensor_size=8"], "parallel.tensor_size", "8 does not divide model.num_attention_heads 4"),
    (["parallel.tensor_size=2", "parallel.zero_stage=0"], "parallel.zero_stage", "tensor_size 2"),
    (["parallel.zero_stage=0", "parallel.offload_optimizer=true"], "parallel.offload_optimizer", "zero_stage 0"),
    (
        ["parallel.pipeline_size=3", "training.activation_checkpoint_interval=2"],
        "training.activation_checkpoint_interval",
        "2 makes 2 groups of 4 layers, fewer than 3 stages",
    ),
    (
        [
            "parallel.tensor_size=2",
            "parallel.sequence=true",
            "training.micro_batch_size=1",
            "data.sequence_length=127",
        ],
        "parallel.sequence",
        "2 ranks cannot share micro_batch_size 1 * 127 = 127 rows evenly",
    ),
    (["precision.gradient_accumulation=bf16"], "precision.gradient_accumulation", "is bf16 with compute fp32"),
    (["precision.compute=bf16", "parallel.zero_stage=0"], "parallel.zero_stage", "is 0 with compute bf16"),
    (["precision.initial_loss_scale=3.0"], "precision.initial_loss_scale", "power of two"),
    (["schedule.minimum_learning_rate=1.0"], "schedule.minimum_learning_rate", "above optimizer.learning_rate"),
    (["schedule.decay_steps=40"], "schedule.warmup_steps", "leaves nothing of decay_steps 40"),
    (
        ["schedule.kind=wsd", "schedule.decay_steps=60", "schedule.wsd_decay_fraction=0.9"],
        "schedule.wsd_decay_fraction",
        "before warm-up ends",
    ),
    (["data.validation={}"], "training.evaluate_every", "no data.validation"),
    (["data.train=[]"], "data.train", "at least 1"),
    (["data.train=[{path: a, wieght: 2.0}]"], "data.train.0.wieght", "did you mean `weight`?"),
    (["checkpoint.keep_best=test"], "checkpoint.keep_best", "no set of data.validation"),
    (
        ["checkpoint.keep_best=valid", "training.evaluate_every=null"],
        "checkpoint.keep_best",
        "without training.evaluate_every",
    ),
    (["checkpoint.load=all"], "checkpoint.load", "without checkpoint.load_from"),
    (["reliability.on_spike=rollback", "checkpoint.every=null"], "reliability.on_spike", "checkpoint.every is null"),
    (
        ["reliability.on_spike=rollback", "checkpoint.every=1", "data.order=megatron"],
        "reliability.on_spike",
        "no sample can be left out",
    ),
    (["deepspeed.optimizer.type=Adam"], "deepspeed.optimizer.type", "use optimizer"),
    (["deepspeed.tensorboard.enabled=true"], "deepspeed.tensorboard.enabled", "use logging.tensorboard"),
    (
        ["deepspeed.wandb={}"],
        "deepspeed.wandb",
        "use logging.tensorboard, logging.wandb, logging.mlflow or logging.trackio",
    ),
    (["deepspeed.csv_monitor.enabled=true"], "deepspeed.csv_monitor.enabled", "use logging.tensorboard"),
    (["deepspeed.comet.enabled=true"], "deepspeed.comet.enabled", "use logging.tensorboard"),
    (["deepspeed.flops_profiler.enabled=true"], "deepspeed.flops_profiler.enabled", "use model_flops_per_second"),
    (["deepspeed.zero_optimization.stage=3"], "deepspeed.zero_optimization.stage", "parallel.zero_stage makes it 1"),
    (["deepspeed.zero_optimization=3"], "deepspeed.zero_optimization", "is 3, not a mapping"),
    (["deepspeed.bf16=null", "precision.compute=bf16"], "deepspeed.bf16", "is None, not a mapping"),
    (
        ["deepspeed.zero_optimization.compute_grad_norm=false", "optimizer.clip_gradient_norm=null"],
        "deepspeed.zero_optimization.compute_grad_norm",
        "would hide gradients that are not finite",
    ),
    (["deepspeed.torch_autocast.enabled=true"], "deepspeed.torch_autocast.enabled", "use precision.compute"),
    (["deepspeed.gradient_allreduce_op=sum"], "deepspeed.gradient_allreduce_op", "multiply the gradients"),
    (
        ["deepspeed.zero_optimization.offload_optimizer.device=cpu"],
        "deepspeed.zero_optimization.offload_optimizer.device",
        "parallel.offload_optimizer makes it 'none'",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "part"), CROSS_CHECKS, ids=lambda v: v if isinstance(v, str) else None)
def test_what_no_single_key_can_tell_is_checked(tmp_path, overrides, key, part):
    found = problems(tmp_path, *overrides)
    assert key in found, found
    assert part in found[key]


def test_a_cross_check_runs_beside_the_errors_of_other_sections(tmp_path):
    found = problems(tmp_path, "model.num_attention_heads=3", "logging.every=0")
    assert set(found) == {"model.num_attention_heads", "logging.every"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "not a mapping"),
        ("", "not a mapping"),
        ("model:\n  num_layers: 1\n  num_layers: 2\n", "stands twice"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (None, "no such config file"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, part):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=part) as caught:
        load_config(path)
    assert "config.yaml" in str(caught.value) and "remedy" in str(caught.value)


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    config = load_config(TINY, ["optimizer.learning_rate=1e-2", "logging.tensorboard=false"])
    assert config.optimizer.learning_rate == 1e-2
    assert "logging.tensorboard" in problems(tmp_path, "logging.tensorboard=no")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.steps", "KEY=VALUE"),
        ("data.train.3.weight=1", "no index"),
        ("training.steps.deep=1", "value, not keys"),
        ("training.steps=[", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(override, part):
    with pytest.raises(UserError, match=part):
        load_config(TINY, [override])


def test_an_override_reaches_into_lists():
    assert load_config(TINY, ["data.train.0.weight=2.5"]).data.train[0].weight == 2.5


def test_a_config_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        load_config(TINY).training.steps = 3


def test_each_typed_key_reaches_deepspeed():
    config = load_config(
        CONFIGS / "400m.yaml",
        [
            "precision.compute=fp16",
            "precision.loss_scale=128",
            "parallel.zero_stage=2",
            "optimizer.clip_gradient_norm=0.5",
        ],
    )
    made = to_deepspeed(config)
    assert made["train_batch_size"] == 128 and made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_clipping"] == 0.5 and made["zero_optimization"]["stage"] == 2
    assert made["fp16"] == {
        "enabled": True,
        "loss_scale": 128.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
    }
    assert "bf16" not in made
    assert made["data_types"]["grad_accum_dtype"] == "fp32"


def test_raw_deepspeed_keys_pass_through_and_may_repeat_a_typed_value():
    config = load_config(
        TINY, ["deepspeed.zero_optimization.reduce_bucket_size=1000", "deepspeed.zero_optimization.stage=1"]
    )
    made = to_deepspeed(config)["zero_optimization"]
    assert (made["stage"], made["reduce_bucket_size"]) == (1, 1000)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_an_empty_raw_section_takes_nothing_back(compute):
    typed = [f"precision.compute={compute}"]
    raw = ["deepspeed.zero_optimization={}", f"deepspeed.{compute}={{}}", "deepspeed.data_types={}"]
    plain, emptied = (to_deepspeed(load_config(TINY, [*typed, *more])) for more in ([], raw))
    assert plain == emptied and emptied[compute]["enabled"] and emptied["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("key", HARMFUL)
def test_raw_keys_that_change_the_run_silently_are_refused(tmp_path, key):
    """The one value that changes nothing, DeepSpeed's own default, may stand there."""
    harmless, problem, typed = HARMFUL[key]
    for value in ({True: "false", False: "true"}.get(harmless, "7"), "{a: 1}"):
        ((found, message),) = problems(tmp_path, f"deepspeed.{key}={value}").items()
        assert found.startswith(f"deepspeed.{key}") and problem in message and typed in message.rpartition("|")[2]
    if harmless is not None:
        load_config(TINY, [f"deepspeed.{key}={json.dumps(harmless)}"])


def test_every_harmless_value_is_the_default_of_deepspeed():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    seen = 0
    for key, (harmless, _, _) in HARMFUL.items():
        section, _, name = key.rpartition(".")
        if section:
            assert sections[section].model_fields[name].get_default() in (harmless, None), key
            seen += 1
    assert seen > 8


def test_owned_table_names_real_keys():
    config = load_config(TINY)
    for typed, _ in OWNED.values():
        section, key = typed.split(".")
        assert hasattr(getattr(config, section), key)


@pytest.mark.parametrize(
    ("overrides", "world", "part"),
    [
        ([], 3, "no multiple of micro_batch_size"),
        (["parallel.data_size=2", "training.micro_batch_size=4"], 4, "4 ranks make 4 replicas"),
        (["parallel.tensor_size=2"], 3, "3 ranks are no multiple"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(overrides, world, part):
    with pytest.raises(LaunchError, match=part):
        data_parallel_size(load_config(TINY, overrides), world)


def test_replicas_are_what_pipeline_and_tensor_leave():
    config = load_config(CONFIGS / "7b.yaml")
    assert data_parallel_size(config, 64) == 4


class TestSchedule:
    def config(self, kind: str, *more: str) -> RunConfig:
        return load_config(
            TINY,
            [
                f"schedule.kind={kind}",
                "schedule.warmup_steps=10",
                "schedule.minimum_learning_rate=0.1",
                "optimizer.learning_rate=1.0",
                "training.steps=110",
                *more,
            ],
        )

    def test_warm_up_begins_above_zero_and_ends_at_the_peak(self):
        rates = [learning_rate(self.config("cosine"), step) for step in range(1, 11)]
        assert rates == pytest.approx([0.1 * (i + 1) for i in range(10)])

    def test_cosine(self):
        config = self.config("cosine")
        assert learning_rate(config, 11) == pytest.approx(1.0)
        assert learning_rate(config, 61) == pytest.approx(0.55)
        assert learning_rate(config, 36) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
        assert learning_rate(config, 111) == learning_rate(config, 500) == pytest.approx(0.1)

    def test_linear(self):
        config = self.config("linear")
        assert [learning_rate(config, s) for s in (11, 36, 61, 111)] == pytest.approx([1.0, 0.775, 0.55, 0.1])

    def test_constant(self):
        assert {learning_rate(self.config("constant"), s) for s in (11, 61, 110)} == {1.0}

    def test_wsd_is_stable_then_decays(self):
        config = self.config("wsd", "schedule.decay_steps=100", "schedule.wsd_decay_fraction=0.2")
        assert [learning_rate(config, s) for s in (11, 51, 81)] == [1.0, 1.0, 1.0]
        assert learning_rate(config, 91) == pytest.approx(0.55)
        assert learning_rate(config, 101) == learning_rate(config, 110) == pytest.approx(0.1)

    def test_a_run_cut_short_stays_in_warm_up(self):
        assert learning_rate(self.config("cosine", "training.steps=3"), 3) == pytest.approx(0.3)


def test_the_sources_may_stand_in_a_file_of_their_own(tmp_path):
    listed = tmp_path / "sources.yaml"
    listed.write_text("- {path: data/a, weight: 2}\n- {path: data/b}\n")
    sources = load_config(TINY, [f"data.train={listed}"]).data.train
    assert [(str(source.path), source.weight) for source in sources] == [("data/a", 2.0), ("data/b", 1.0)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no such list of sources"), ("a: 1\n", "holds dict, not a list"), ("[", "cannot be read as YAML")],
    ids=["missing", "mapping", "broken"],
)
def test_a_list_of_sources_that_is_none_is_refused(tmp_path, content, problem):
    listed = tmp_path / "sources.yaml"
    if content is not None:
        listed.write_text(content)
    with pytest.raises(UserError, match=problem):
        load_config(TINY, [f"data.train={listed}"])
