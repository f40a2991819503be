"""What a check of a GPU runs, in the order of importance: each part is a command with a share of the time.

Layers and steps are timed by ``bench-layers`` and ``bench-train``. Variants of a config key are timed where this
version has the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachiar.config import RunConfig, load_config
from megachiar.config.shipped import shipped_config
from megachiar.config.typed_sections import section_class

KEYS = "model.attention.keys=routed"
DENSE = "model.kind=baseline"
STATIC, GRAPHS = "training.static_shapes", "training.cuda_graphs"
_12_LAYERS = "--layers 12 --hidden-size 1024 --heads 16 --sequence-length 1024 --batch 8 --vocab-size 50304"
_TINY_STEPS = "--layers 3 --hidden-size 32 --heads 2 --sequence-length 16 --batch 2 --vocab-size 64"
_TINY_ROUNDS = "--rounds 2 --steps 1 --warm-up 4 --threads 1"


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: in JSON and table.
        kind: ``tests``, ``layers`` or ``steps``: how its result is read.
        words: of the command, after ``python``. ``RESULT`` stands for the file that it writes.
        share: of the whole time, beside the shares of the others.
        least_s: seconds below which it is not worth starting.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    share: float
    least_s: float


RESULT = "{result}"


def parts_of_check(root: Path, *, rehearse: bool) -> list[Part]:
    """Return the parts, the most important first.

    Args:
        root: of the checkout, which has the tests.
        rehearse: whether to take tiny sizes, which a CPU can do.
    """
    small, paper = _12_LAYERS.split(), steps_of_config(load_config(shipped_config("400m")))
    if rehearse:
        small = paper = _TINY_STEPS.split()
    compiled = compiled_variants("aot_eager" if rehearse else "inductor")
    return [
        Part("tests", "tests", gpu_tests(root), share=0.2, least_s=30),
        _steps("steps, 12 layers", small, eager_variants(), rehearse, share=0.15),
        _layers("layers, d 1024", 1024, rehearse, share=0.15),
        _steps("steps, 400M", paper, eager_variants(), rehearse, share=0.15),
        _layers("layers, d 2048", 2048, rehearse, share=0.1),
        _steps("steps, 12 layers, compiled", small, compiled, rehearse, share=0.15),
        _steps("steps, 400M, compiled", paper, compiled, rehearse, share=0.1),
    ]


def gpu_tests(root: Path) -> tuple[str, ...]:
    """Return the command of the tests that need a GPU; only files that have one are read, since that takes a while."""
    files = [path for path in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    named = [str(path.relative_to(root)) for path in files]
    return ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={RESULT}", *named)


def eager_variants() -> dict[str, Sequence[str]]:
    """Return the keys of each contender beside the routed model and the dense one, as far as the config has them."""
    variants = {
        "keys_routed": [KEYS],
        "static": [f"{STATIC}=true"],
        "static_keys": [f"{STATIC}=true", KEYS],
        "graphs": [f"{GRAPHS}=4"],
        "graphs_keys": [f"{GRAPHS}=4", KEYS],
        "graphs_dense": [f"{GRAPHS}=4", DENSE],
    }
    return {name: keys for name, keys in variants.items() if _are_known(keys)}


def compiled_variants(backend: str) -> dict[str, Sequence[str]]:
    """Return the same of compiled contenders."""
    compiled = f"training.compile={backend}"
    variants = {
        "compiled": [compiled],
        "compiled_keys": [compiled, KEYS],
        "compiled_dense": [compiled, DENSE],
        "compiled_static": [compiled, f"{STATIC}=true"],
    }
    return {name: keys for name, keys in variants.items() if _are_known(keys)}


def has_key(key: str) -> bool:
    """Return whether the config has a key, such as ``training.steps``."""
    section = RunConfig
    *sections, last = key.split(".")
    for name in sections:
        found = section_class(section.model_fields[name].annotation) if name in section.model_fields else None
        if found is None:
            return False
        section = found  # type: ignore[assignment]
    return last in section.model_fields


def _are_known(overrides: Iterable[str]) -> bool:
    return all(has_key(override.partition("=")[0]) for override in overrides)


def steps_of_config(config: RunConfig) -> list[str]:
    """Return the options of ``bench-train`` for the model and the micro-batch of a config."""
    model = config.model
    sizes = {
        "--layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--heads": model.num_attention_heads,
        "--sequence-length": config.sequence_length,
        "--batch": config.training.micro_batch_size,
        "--vocab-size": model.vocab_size,
    }
    return [word for option, size in sizes.items() for word in (option, str(size))]


def _steps(name: str, sizes: Sequence[str], variants: dict[str, Sequence[str]], rehearse: bool, share: float) -> Part:
    rounds = _TINY_ROUNDS if rehearse else "--rounds 7 --steps 4"
    words = ["-m", "megachiar", "bench-train", *sizes, *rounds.split(), "--precision", "bf16", "--json", RESULT]
    for variant, keys in variants.items():
        words += ["--variant", variant, *keys]
    return Part(name, "steps", tuple(words), share, least_s=1 if rehearse else 40)


def _layers(name: str, d: int, rehearse: bool, share: float) -> Part:
    sizes = f"--hidden-size {d} --heads 16 --sequence-length 256 1024 4096 16384 --tokens 32768 --rounds 5"
    if rehearse:
        sizes = f"--hidden-size {d // 32} --heads 2 --sequence-length 8 16 --tokens 16 --rounds 2 --threads 1"
    command = f"-m megachiar bench-layers {sizes} --attention-share 0.5 --precision bfloat16"
    return Part(name, "layers", (*command.split(), "--json", RESULT), share, least_s=1 if rehearse else 30)
