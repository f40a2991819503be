"""Whatever a config holds, it is read rightly or answered with one clear error: no traceback and no hang."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import small_config

from megachiar.config import RunConfig, load_config
from megachiar.errors import UserError

CONFIG = small_config(Path("/data"))
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def nested_aliases(levels: int) -> str:
    """Return a few lines of YAML that stand for 9 to the power of ``levels`` values."""
    lines = ["a0: &a0 [1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "alias bomb": (nested_aliases(12), "with its aliases written out it has more than 100,000 values"),
    "an alias in itself": ("model: &m {router: *m}", "an alias stands inside the value that it repeats"),
    "brackets": ("model: " + "[" * 3000, "nested too deep"),
    "nested deep": ("model: " + "[" * 60 + "]" * 60, "nested deeper than 50 levels"),
    "a Python object": ("model: !!python/object/apply:os.system [ls]", "has no place in a config"),
    "a set": ("model: !!set {a, b}", "has no place in a config"),
    "a type of its own": ("model: !mine 3", "the type '!mine' has no place in a config"),
    "a list as a key": ("{[1, 2]: 3}", "unhashable key"),
    "a number as a key": ("1: 2", "1: is not a known key"),
    "null as a key": ("null: 2", "None: is not a known key"),
    "a number too long to read": ("model: " + "9" * 5000, "5000 digits"),
    "a boolean that is none": ("model: !!bool maybe", "maybe"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "a control character": ("model: \x01", "special characters are not allowed"),
    "nothing": ("", "holds NoneType, not a mapping"),
    "a list": ("- 1", "holds list, not a mapping"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_one_message(case, tmp_path):
    text, message = HOSTILE[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 20_000


def test_a_device_without_end_is_not_read_to_its_end():
    with pytest.raises(UserError, match="it has more than 16,777,216 bytes"):
        load_config("/dev/zero")


def test_a_list_of_sources_without_end_is_not_read_to_its_end(tmp_path):
    (tmp_path / "sources.yaml").symlink_to("/dev/zero")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {"train": str(tmp_path / "sources.yaml")}}))
    with pytest.raises(UserError, match="it has more than 16,777,216 bytes"):
        load_config(path)


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "config.yaml"
    text = yaml.safe_dump(CONFIG | {"data": {"validation": {}}})
    path.write_text(text.replace("validation: {}", "validation: {}\n  train: [&s {path: /data/train}, *s]"))
    sources = load_config(path).data.train
    assert len(sources) == 2 and sources[0] == sources[1]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(["~", "$HOME/x", "-1", "1e400", "null", "..", "a=b", "&x", "*x", "!!int", "{", "[", "%", "@"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def key_paths(mapping: dict, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for key, value in mapping.items():
        paths.append((*before, key))
        if isinstance(value, dict):
            paths += key_paths(value, (*before, key))
    return paths


KEYS = key_paths(load_config("configs/tiny.yaml").model_dump(mode="json"))


def read_or_refused(path: Path, *overrides: str) -> None:
    """Read the config at ``path``: it must be a config that reads back to itself, or one error of ours."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        assert error.problem or error.remedy or str(error)
        return
    assert isinstance(config, RunConfig)
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@FUZZ
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_of_any_key_is_read_or_refused(key, value, tmp_path):
    config = copy.deepcopy(CONFIG)
    *parents, name = key
    section = config
    for parent in parents:
        inner = section.get(parent)
        section[parent] = inner if isinstance(inner, dict) else {}
        section = section[parent]
    section[name] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    read_or_refused(path)


@FUZZ
@given(key=st.sampled_from(KEYS), text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_override_is_read_or_refused(key, text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    read_or_refused(path, f"{'.'.join(key)}={text}")


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), bits=st.binary(min_size=1, max_size=4))
def test_any_damage_to_the_text_is_read_or_refused(place, bits, tmp_path):
    data = bytearray(yaml.safe_dump(CONFIG).encode())
    start = int(place * len(data))
    for offset, byte in enumerate(bits):
        if start + offset < len(data):
            data[start + offset] ^= byte
    path = tmp_path / "config.yaml"
    path.write_bytes(bytes(data))
    read_or_refused(path)
