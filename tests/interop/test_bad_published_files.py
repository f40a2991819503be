"""A file that cannot be imported, or not so, is one message with what is wrong and what to do, and leaves nothing."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import TAU, published_content, save
from support import forked_python, write_tokens

from megachiar.config import ConfigError
from megachiar.errors import UserError

import_ = importlib.import_module("megachiar.cli.import_")


def refused(path: Path, *options: object) -> UserError:
    """Return the error of an import, which must not have made anything."""
    run = path.with_name("run")
    with pytest.raises(UserError) as caught:
        import_.main([str(path), "--output", str(run), *map(str, options)])
    assert not run.exists()
    if not isinstance(caught.value, ConfigError):
        assert caught.value.remedy and "\n" not in caught.value.problem
    return caught.value


class Code:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (os.environ["CODE_RAN"],)


def truncated(path: Path) -> None:
    save(path, published_content("threshold"))
    path.write_bytes(path.read_bytes()[:-2000])


def with_flipped_bytes(path: Path) -> None:
    content = bytearray(save(path, {"model": {"token_emb.weight": torch.ones(3)}}).read_bytes())
    at = content.index(b"token_emb")
    content[at - 30 : at] = bytes(30)
    path.write_bytes(content)


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_text("step: 3\n"), "is no checkpoint that torch can read"),
    "empty": (lambda path: path.write_bytes(b""), "is no checkpoint that torch can read"),
    "truncated": (truncated, "is no checkpoint that torch can read"),
    "flipped": (with_flipped_bytes, "is no checkpoint that torch can read"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "is no checkpoint that torch can read"),
    "code": (lambda path: save(path, {"model": Code()}), "reading it would run code"),
    "old pickle with code": (lambda path: path.write_bytes(pickle.dumps(Code(), 2)), "reading it would run code"),
    "new pickle with code": (lambda path: path.write_bytes(pickle.dumps(Code(), 5)), "is no checkpoint that torch can"),
    "whole model": (lambda path: save(path, torch.nn.Linear(2, 2)), "reading it would run code"),
    "folder": (lambda path: path.mkdir(), "it is a folder without config.json"),
    "fifo": (lambda path: os.mkfifo(path), "it is a fifo, not a regular file"),
    "nothing": (lambda path: None, "No such file"),
    "a tensor": (lambda path: save(path, torch.ones(3)), "holds a Tensor, and no model"),
    "a list": (lambda path: save(path, [torch.ones(3)]), "holds a list, and no model"),
    "no model": (lambda path: save(path, {"model": {}}), "holds no model"),
    "a number": (lambda path: save(path, {"model": {"token_emb.weight": 3}}), "holds a int under 'token_emb.weight'"),
    "integers": (
        lambda path: save(path, {"model": {"token_emb.weight": torch.ones(3, dtype=torch.int64)}}),
        "token_emb.weight is strided of int64 on cpu",
    ),
    "sparse": (
        lambda path: save(path, {"model": {"token_emb.weight": torch.ones(3, 3).to_sparse()}}),
        "token_emb.weight is sparse_coo of float32 on cpu",
    ),
    "expanded": (
        lambda path: save(path, {"model": {"token_emb.weight": torch.ones(1, 1).expand(10**9, 10**9)}}),
        "fewer numbers than that",
    ),
    "another model": (
        lambda path: save(path, {"model": {"wte.weight": torch.ones(3, 3), "h.0.attn.weight": torch.ones(3)}}),
        "holds no model of the published code: it has no token_emb.weight with layers.* or attns.* but h.0.attn.weight",
    ),
    "a classifier without layers": (
        lambda path: save(path, {"model": {"backbone.token_emb.weight": torch.ones(3, 3)}}),
        "holds no model of the published code",
    ),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CODE_RAN", str(tmp_path / "ran"))
    write, message = NO_CHECKPOINTS[name]
    write(tmp_path / "file.pt")
    error = refused(tmp_path / "file.pt", *TAU)
    assert message in error.problem and error.where == str(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()


def changed(**tensors: Any) -> Callable[[dict], None]:
    """Return a change of a state dict: other tensors by name, None to take one out."""

    def change(model: dict) -> None:
        for name, tensor in tensors.items():
            model.pop(name, None)
            if tensor is not None:
                model[name] = tensor

    return change


EMBEDDING, GONE = torch.ones(13, 16), "lacks 1 tensors of a chiar model of 4 layers: "
DAMAGED: dict[str, tuple[Callable[[dict], None], str]] = {
    "one is missing": (changed(**{"layers.2.ffn.3.bias": None}), f"{GONE}layers.2.ffn.3.bias"),
    "a table is missing": (
        changed(**{"layers.2.attn.rope.cos_cache": None}),
        f"{GONE}layers.2.attn.rope.cos_cache",
    ),
    "a layer is missing": (
        lambda model: [model.pop(name) for name in list(model) if name.startswith("layers.1.")],
        "has layers.3 and no layers.1",
    ),
    "a gap of a billion layers": (
        changed(**{"layers.999999999.x": torch.ones(1)}),
        "has layers.999999999 and no layers.4",
    ),
    "two kinds at once": (changed(**{"attns.0.norm.bias": torch.ones(16)}), "holds no model of the published code"),
    "RBF mixing": (
        changed(**{"layers.1.rbf_mix.omega": torch.ones(16, 64)}),
        "has 1 tensors that a chiar model of 4 layers of the published code does not have: layers.1.rbf_mix.omega",
    ),
    "another shape": (
        changed(**{"layers.3.attn.qkv.weight": torch.ones(16, 16)}),
        "layers.3.attn.qkv.weight has shape (16, 16), where a chiar model of 4 layers with d 16 has (48, 16)",
    ),
    "a narrower feed-forward": (
        changed(**{"layers.0.ffn.0.weight": torch.ones(48, 16)}),
        "layers.0.ffn.0.weight has shape (48, 16)",
    ),
    "an embedding of one dimension": (changed(**{"token_emb.weight": torch.ones(13)}), "has shape (13,)"),
    "an embedding of another width": (
        changed(**{"token_emb.weight": torch.ones(13, 20), "lm_head.weight": torch.ones(13, 20)}),
        "contradicts itself: its rotary tables are for heads of 8 channels, and d is 20",
    ),
    "a head of its own": (changed(**{"lm_head.weight": EMBEDDING}), "lm_head.weight is not token_emb.weight"),
    "not finite": (changed(**{"norm.bias": torch.full((16,), torch.nan)}), "norm.bias is not finite"),
    "tables of two sizes": (
        changed(**{"layers.3.attn.rope.cos_cache": torch.ones(24, 8)}),
        "layers.3.attn.rope.cos_cache has shape (24, 8), where the first ones make it (12, 8)",
    ),
    "tables of another embedding": (
        changed(**{"layers.3.attn.rope.sin_cache": torch.ones(12, 8)}),
        "layers.3.attn.rope.sin_cache is not that of base 10000",
    ),
    "frequencies of no base": (
        changed(**{f"layers.{i}.attn.rope.inv_freq": torch.tensor([1.0, 0.5, 0.4, 0.1]) for i in (1, 2, 3)}),
        "its frequencies are not those of base",
    ),
    "frequencies that are not finite": (
        changed(**{f"layers.{i}.attn.rope.inv_freq": torch.full((4,), torch.nan) for i in (1, 2, 3)}),
        "its frequencies are not those of base",
    ),
    "tables in part": (
        changed(**{f"layers.{i}.attn.rope.inv_freq": None for i in (1, 2, 3)}),
        "it has 0 of frequencies, 3 of cosines, 3 of sines",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_make_no_model_are_refused(name, tmp_path):
    change, message = DAMAGED[name]
    content = published_content("threshold")
    change(content["model"])
    error = refused(save(tmp_path / "file.pt", content), *TAU)
    assert message in error.problem and error.where == str(tmp_path / "file.pt")


HEADS = [
    ({"classifier.3.weight": None}, "is a classifier without classifier.3.weight"),
    ({"classifier.3.weight": torch.ones(5)}, "is a classifier without classifier.3.weight"),
    ({"classifier.3.bias": torch.ones(4)}, "classifier.3.bias has shape (4,), where a baseline classifier"),
    ({"classifier.0.weight": None}, "lacks 1 tensors of a baseline classifier of 4 layers: classifier.0.weight"),
    ({"lm_head.weight": torch.ones(13, 16)}, "does not have: lm_head.weight"),
    ({"classifier.3.weight": torch.ones(1, 16), "classifier.3.bias": torch.ones(1)}, "task.classes"),
]


@pytest.mark.parametrize(("tensors", "message"), HEADS)
def test_heads_that_make_no_classifier_are_refused(tensors, message, tmp_path):
    content = published_content("baseline_classifier")
    changed(**tensors)(content["model"])
    assert message in str(refused(save(tmp_path / "file.pt", content)))


SETTINGS = [
    ({"d_model": 32}, "cfg has d_model 32, and the tensors are those of 16"),
    ({"n_heads": 4}, "cfg has n_heads 4, and the tensors are those of 2"),
    ({"n_layers": 5}, "cfg has n_layers 5"),
    ({"vocab_size": 50257}, "cfg has vocab_size 50257, and the tensors are those of 13"),
    ({"max_seq_len": 256}, "cfg has max_seq_len 256, and its rotary tables 12 rows"),
    ({"rope_base": 500}, "its frequencies are not those of base 500"),
    ({"routing_mode": "soft"}, "cfg has routing_mode soft, and its routers have no gates"),
    ({"routing_mode": "fast"}, "cfg has routing_mode 'fast'"),
    ({"d_model": "16"}, "cfg has d_model '16', which is no int"),
    ({"n_heads": True}, "cfg has n_heads True, which is no int"),
    ({"dropout": 1.5}, "model.dropout"),
    ([1, 2], "has a list as cfg"),
]


@pytest.mark.parametrize(("cfg", "message"), SETTINGS)
def test_settings_that_contradict_the_tensors_are_refused(cfg, message, tmp_path):
    error = refused(save(tmp_path / "file.pt", published_content("threshold") | {"cfg": cfg}), *TAU)
    assert message in str(error) and str(tmp_path / "file.pt") in str(error)


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, 10**30])
def test_a_step_that_is_none_is_refused(step, tmp_path):
    error = refused(save(tmp_path / "file.pt", published_content("threshold") | {"step": step}), *TAU)
    assert "is no number of steps" in error.problem


OPTIONS = [
    ("threshold", (), "does not say the threshold of its router"),
    ("threshold", ("--tau", 0.1, 0.2, 0.3), "has 3 numbers"),
    ("threshold", ("--tau", 0.3, 0.2), "has a tau_low above its tau_high"),
    ("threshold", ("--tau", 0.3, "--calibrate", "x"), "comes with --calibrate"),
    ("threshold", ("--tau", 1.2), "1.2 is not at least 0 and at most 1"),
    ("threshold", ("--calibrate", "nowhere"), "nowhere.idx"),
    ("threshold", (*TAU, "--router", "soft"), "have no gates"),
    ("threshold", (*TAU, "--heads", 4), "are for 2"),
    ("threshold", (*TAU, "--sequence-length", 13), "is above the 12 rows"),
    ("threshold", (*TAU, "--vocab-size", 12), "is below the 13 rows"),
    ("threshold", (*TAU, "--set", "model.norm=pre"), "the file says what the model is"),
    ("threshold", (*TAU, "--set", "training.stops=3"), "training.stops"),
    ("classifier", (*TAU, "--set", "task.classes=3"), "the file says what the model is"),
    ("classifier", (), "does not say the threshold of its router"),
    ("threshold", (*TAU, "--tokenizer", "nowhere"), "there is no such tokenizer file or folder"),
    ("soft", TAU, "decide by gates, without a threshold"),
    ("soft", ("--router", "hard"), "is soft"),
    ("baseline", TAU, "the file holds a baseline"),
    ("baseline", ("--router", "hard"), "the file holds a baseline"),
    ("baseline", ("--calibrate", "{train}"), "needs no threshold"),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_options_that_do_not_fit_the_file_are_refused(kind, options, message, tmp_path):
    train = write_tokens(tmp_path / "train", vocab_size=13)
    error = refused(
        save(tmp_path / "file.pt", published_content(kind)), *(str(option).format(train=train) for option in options)
    )
    assert message in str(error)


def test_the_published_thresholds_are_named_where_they_may_be_meant(tmp_path):
    from megachiar.interop.published_file import PublishedFile
    from megachiar.interop.published_model import missing_tau

    file = PublishedFile(tmp_path / "x.pt", {}, {}, 0, None)
    assert "0.8935 and 0.8973" in missing_tau(file, 1024).remedy and "0.855 and 0.865" in missing_tau(file, 256).remedy
    assert not re.search(r"\d", missing_tau(file, 512).remedy)


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "file.pt").write_text("text")
    done = forked_python("tools/import_weights.py", tmp_path / "file.pt", "--output", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'file.pt'}: is no checkpoint that torch can read")
    assert done.stderr.splitlines()[1].startswith("    remedy: ")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    file, run = save(tmp_path / "file.pt", published_content("baseline")), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match=r"holds config.yaml: it is no folder of an import"):
        import_.main([str(file), "--output", str(run)])
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        import_.main([str(file), "--output", str(file / "run")])
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        import_.main([str(file), "--output", str(file)])
