"""Run the published code, which is at hand in a folder, and write down what it computes.

published_code_worker.py CODE train OUT          its scripts train tiny models of every kind: OUT/KIND.pt
published_code_worker.py CODE answer FILE OUT    FILE is loaded as its demo does; the logits go to OUT
published_code_worker.py CODE record             prints tests/fixtures/published_checkpoints.json
published_code_worker.py CODE record-long        prints tests/fixtures/published_long_sequences.json

Nothing is fetched: the modules that its scripts import for that are replaced by empty ones.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import torch
from published_files import LONG_KINDS, long_weight, recorded_weight
from torch.utils.data import TensorDataset

TOKENS = 40
LENGTH = 16


class FakeTokenizer:
    """Stands for GPT-2's tokenizer, of which the training scripts use the size and two names."""

    eos_token = pad_token = "<|endoftext|>"

    def __len__(self) -> int:
        return TOKENS

    @classmethod
    def from_pretrained(cls, _: str) -> FakeTokenizer:
        return cls()


def prepare(code: Path) -> None:
    """Make the published modules importable."""
    sys.modules["transformers"] = types.SimpleNamespace(AutoTokenizer=FakeTokenizer)  # type: ignore[assignment]
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    sys.path.insert(0, str(code))
    torch.set_num_threads(1)


def tiny_config(folder: Path, **settings: Any) -> Any:
    """Return a config whose sizes are its class's, as the published ones are; scripts set ``settings`` on it."""
    from config import Config

    class TinyConfig(Config):
        d_model, n_heads, n_layers, max_seq_len = 32, 4, 4, LENGTH
        batch_size, grad_accum_steps, max_epochs, warmup_steps = 4, 1, 2, 2
        log_every, eval_every = 1000, 5
        learning_rate, meta_mix_ratio = 1e-2, 0.9
        checkpoint_dir = str(folder)
        tau_low, tau_high = 0.79, 0.80

    config = TinyConfig()
    config.vocab_size = TOKENS
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def text(count: int, seed: int) -> TensorDataset:
    tokens = torch.randint(TOKENS, (count, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def labelled(count: int, classes: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=generator)
    return TensorDataset(tokens, torch.randint(classes, (count,), generator=generator))


def train(out: Path) -> None:
    """Let the scripts train and save a model of each kind, with the settings that they set themselves."""
    import train as language
    import train_all
    from model import CHIARClassifier, CHIARFormer

    device, sets = torch.device("cpu"), (text(40, 0), text(4, 1), text(4, 2))
    for mode in ("threshold", "soft", "hard"):
        config = tiny_config(out, routing_mode=mode, use_collapse_reg=mode == "soft", layer_variant="dct_attn")
        language.train(config, CHIARFormer(config), *sets, device, mode)
    config = tiny_config(out)
    language.train(config, language.BaselineTransformer(config), *sets, device, "baseline")
    train_all.load_wikitext = lambda config, tokenizer, version: sets
    train_all.load_lra_task = lambda task, config, tokenizer: (labelled(32, 2, 3), labelled(8, 2, 4), 2)
    train_all.AutoTokenizer = FakeTokenizer
    random.seed(0)
    config = tiny_config(out, routing_mode="threshold", layer_variant="dct_attn")
    train_all.train_mixed(config, CHIARFormer(config), device)
    data = (labelled(1200, 10, 5), labelled(40, 10, 6), 10)
    config = tiny_config(out, max_epochs=2, routing_mode="threshold", layer_variant="dct_attn")
    train_all.train_cls(config, CHIARClassifier(config, 10), *data, device, "classifier", "listops")
    config = tiny_config(out, max_epochs=2)
    train_all.train_cls(
        config, train_all.BaselineClassifier(config, 10), *data, device, "baseline_classifier", "listops"
    )
    for path in sorted(out.glob("*_best.pt")):
        path.rename(out / f"{path.stem.removesuffix('_best').removeprefix('chiar_v3_')}.pt")


def load(file: Path, **defaults: Any) -> torch.nn.Module:
    """Build the model of a file as the demo does: a config, what ``cfg`` says of it, and a strict load."""
    from model import CHIARClassifier, CHIARFormer
    from train import BaselineTransformer
    from train_all import BaselineClassifier

    content = torch.load(file, map_location="cpu")
    config = tiny_config(file.parent, **defaults)
    for name, value in content.get("cfg", {}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    weights = {name: value for name, value in content["model"].items() if not name.startswith("_cls_head")}
    classes = len(weights["classifier.3.bias"]) if "classifier.3.bias" in weights else 0
    is_baseline = any(name.startswith("attns.") for name in weights)
    if classes:
        model = BaselineClassifier(config, classes) if is_baseline else CHIARClassifier(config, classes)
    else:
        model = BaselineTransformer(config) if is_baseline else CHIARFormer(config)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def answers(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
    """Return logits of both types and the routes of the layers that route.

    In fp64 they are computed twice: with the rotary tables of 32 bits that ``double`` leaves, and with those of fp64.
    """
    found: dict[str, Any] = {"tokens": tokens, "routes": {}}

    def note(name: str) -> Any:
        return lambda module, inputs, output: found["routes"].update({name: output[2].clone()})

    for name, module in model.named_modules():
        if type(module).__name__ == "SpectralRouter":
            module.register_forward_hook(note(name.removesuffix(".router").removeprefix("backbone.")))
    found["fp32"] = model(tokens)[0]
    model.double()
    found["fp64, tables of fp32"] = model(tokens)[0]
    use_exact_tables(model)
    found["fp64"] = model(tokens)[0]
    return found


def use_exact_tables(model: torch.nn.Module) -> None:
    """Compute the rotary tables anew in fp64; a model that was converted has numbers of 32 bits in them."""
    for module in model.modules():
        if type(module).__name__ == "RotaryEmbedding":
            size = 2 * len(module.inv_freq)
            base = float(torch.round(module.inv_freq[-1] ** (-size / (size - 2)))) if size > 2 else 1.0
            angles = torch.arange(len(module.cos_cache))[:, None] / base ** (torch.arange(0, size, 2).double() / size)
            module.cos_cache.copy_(angles.cos().repeat(1, 2))
            module.sin_cache.copy_(angles.sin().repeat(1, 2))


def some_tokens(vocabulary: int, sequences: int, length: int) -> torch.Tensor:
    return torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(7))


def record() -> dict[str, Any]:
    """Return what models of recorded weights compute."""
    from config import Config
    from model import CHIARClassifier, CHIARFormer
    from train import BaselineTransformer
    from train_all import BaselineClassifier

    sizes = {"vocab_size": 13, "d_model": 16, "n_heads": 2, "n_layers": 4, "max_seq_len": 12}
    tokens, models = some_tokens(13, 3, 12), {}
    make = {"baseline": BaselineTransformer, "baseline_classifier": lambda config: BaselineClassifier(config, 5)}
    make |= {"classifier": lambda config: CHIARClassifier(config, 5)}
    for kind in ("threshold", "soft", "hard", "no_gate", "baseline", "classifier", "baseline_classifier"):
        config = Config()
        config.tau_low, config.tau_high = 0.77, 0.79
        config.routing_mode = kind if kind in ("soft", "hard") else "threshold"
        config.use_meta_router = kind != "no_gate"
        for name, value in sizes.items():
            setattr(config, name, value)
        model = make.get(kind, CHIARFormer)(config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(recorded_weight(name, tuple(parameter.shape)))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        tables = [table.tolist() for table in list(buffers.values())[-3:]]  # those of all layers are alike
        found = answers(model.eval(), tokens)
        models[kind] = {
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
            "buffers": list(buffers),
            "logits": found["fp64"].tolist(),
            "routes": {name: routes.tolist() for name, routes in found["routes"].items()},
        }
    return {"sizes": sizes, "tau": [0.77, 0.79], "tokens": tokens.tolist(), "tables": tables, "models": models}


def record_long() -> dict[str, Any]:
    """Return what models of ``long_weight`` compute for sequences of the published length, at every 32nd token."""
    from config import Config
    from model import CHIARFormer
    from train import BaselineTransformer

    sizes = {"vocab_size": 13, "d_model": 32, "n_heads": 2, "n_layers": 4, "max_seq_len": 256}
    tokens, models, shown = some_tokens(13, 2, 256), {}, slice(31, None, 32)
    for kind in LONG_KINDS:
        config = Config()
        config.tau_low, config.tau_high, config.routing_mode = 0.77, 0.79, "threshold"
        for name, value in sizes.items():
            setattr(config, name, value)
        model = BaselineTransformer(config) if kind == "baseline" else CHIARFormer(config)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(long_weight(name, tuple(parameter.shape)))
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        found = answers(model.eval(), tokens)
        logits = {name: found[name][:, shown].tolist() for name in ("fp64", "fp64, tables of fp32")}
        routes = {name: operators[:, shown].tolist() for name, operators in found["routes"].items()}
        models[kind] = {"shapes": shapes, "logits": logits, "routes": routes}
    return {"sizes": sizes, "tau": [0.77, 0.79], "every": 32, "tokens": tokens.tolist(), "models": models}


def main(code: str, action: str, *paths: str) -> None:
    prepare(Path(code))
    if action == "train":
        train(Path(paths[0]))
        for file in sorted(Path(paths[0]).glob("*.pt")):
            torch.save(answers(load(file, **known_of(file)), some_tokens(TOKENS, 3, LENGTH)), f"{file}.answers")
    elif action == "answer":
        model = load(Path(paths[0]))
        torch.save(answers(model, some_tokens(TOKENS, 3, LENGTH)), paths[1])
    else:
        print(json.dumps(record_long() if action == "record-long" else record(), separators=(",", ":")))


def known_of(file: Path) -> dict[str, Any]:
    """Return what whoever loads a file without ``cfg`` must know."""
    return {"routing_mode": file.stem if file.stem in ("soft", "hard") else "threshold"}


if __name__ == "__main__":
    main(*sys.argv[1:])
