"""What cannot be exported or imported is one message, and nothing half-written stays behind."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from exported_runs import library, write_run
from safetensors.torch import load_file, save_file
from support import forked_python, python

from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.errors import UserError
from megachiar.interop import huggingface_export
from megachiar.interop.huggingface_export import HuggingFaceOptions, export_huggingface

transformers = library()
export = importlib.import_module("megachiar.cli.export")
import_ = importlib.import_module("megachiar.cli.import_")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """An export of ``run``, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    export_huggingface(locate_checkpoint(run), folder, HuggingFaceOptions())
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_gate_over_the_batch_is_refused_with_the_reason(tmp_path):
    run = write_run(tmp_path / "run", model={"meta_router": {"pool": "batch"}})
    done = forked_python("-m", "megachiar", "export", str(run), "--to", "hf", "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    words = " ".join(done.stderr.split())
    assert "model.meta_router.pool is batch: the gate of layer 1 averages over all tokens of a batch" in words
    assert "use --to published" in words
    assert left_in(tmp_path) == ["run"]


ALTERED = {
    "the scale of attention": ("dropout_p=dropout, scale=scale", "dropout_p=dropout, scale=0.1"),
    "the other operator": ("route += score > bound", "route += score <= bound"),
    "a mask without padding": ("is_real = attention_mask[:, -length:].bool()", "pass"),
    "positions in the cache": (
        "self.position[:, self.past :].flatten()",
        "self.position[:, self.past :].flatten() // 2",
    ),
    "what the cache keeps": (
        "return keys[:, :, :end], values[:, :, :end]",
        "return keys[:, :, :end], keys[:, :, :end]",
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_model_that_computes_something_else_is_not_exported(what, run, tmp_path, monkeypatch):
    """Every alteration is seen, whether in one pass, in a batch or with a cache; the folder does not appear."""
    (old, new), source = ALTERED[what], tmp_path / "altered.py"
    text = huggingface_export.MODEL_SOURCE.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    monkeypatch.setattr(huggingface_export, "MODEL_SOURCE", source)
    with pytest.raises(UserError, match=r"the exported model is not the run's: (logits|greedy decoding)"):
        export_huggingface(locate_checkpoint(run), tmp_path / "out", HuggingFaceOptions())
    assert left_in(tmp_path) == ["altered.py"]


def test_a_missing_library_is_one_message(run, tmp_path, monkeypatch):
    words = [str(run), "--to", "hf", "--output", str(tmp_path / "out")]

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"--to hf: needs the package transformers(.|\n)*pip install 'megachiar\[hf\]'"):
        export.main(words)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.40.1")
    with pytest.raises(UserError, match=r"needs transformers 4\.56 or newer, not 4\.40\.1"):
        export.main(words)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "hf"], "--to hf: needs --output"),
        (["--to", "published"], "--to published: needs FILE"),
        (["out.pt", "--to", "hf", "--output", "out"], "--to hf: FILE is an option of the other form"),
        (["out.pt", "--to", "published", "--task", "main"], "--to published: --task is an option of the other form"),
        (
            ["--to", "hf", "--output", "out", "--vocab-size", "5"],
            "--to hf: --vocab-size is an option of the other form",
        ),
    ],
)
def test_an_option_of_the_other_form_is_refused(words, message, run):
    with pytest.raises(UserError, match=message):
        export.main([str(run), *words])


def test_another_export_is_replaced_only_when_that_is_asked_for(run, copy, tmp_path):
    checkpoint = locate_checkpoint(run)
    assert export_huggingface(checkpoint, copy, HuggingFaceOptions()) is None
    with pytest.raises(UserError, match=r"is another export(.|\n)*--overwrite"):
        export_huggingface(checkpoint, copy, HuggingFaceOptions(license_name="mit"))
    assert "license: unknown" in (copy / "README.md").read_text()
    assert export_huggingface(checkpoint, copy, HuggingFaceOptions(license_name="mit", replace=True)) is not None
    assert "license: mit" in (copy / "README.md").read_text() and left_in(tmp_path) == ["copy"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists already, and is no export"):
        export_huggingface(checkpoint, mine, HuggingFaceOptions(replace=True))
    assert left_in(mine) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert export_huggingface(checkpoint, tmp_path / "empty", HuggingFaceOptions()) is not None


def test_an_export_follows_a_link_and_does_not_replace_the_current_folder(run, copy, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(copy)
    export.main([str(run), "--to", "hf", "--output", str(tmp_path / "link"), "--license", "mit", "--overwrite"])
    assert (tmp_path / "link").is_symlink() and "license: mit" in (copy / "README.md").read_text()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the current folder"):
        export.main([str(run), "--to", "hf", "--output", "."])
    assert left_in(tmp_path) == ["copy", "empty", "link"]


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "it is a folder without config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "holds broken JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "of type 'gpt2'"),
    "another format": (lambda f: change_config(f, lambda c: c["megachiar"].update(format=9)), "this version reads 1"),
    "no step": (lambda f: change_config(f, lambda c: c["megachiar"].pop("step")), "is no number of steps"),
    "a string": (lambda f: change_config(f, lambda c: c["megachiar"].update(data="x")), "'x', and no mapping"),
    "no layers": (lambda f: change_config(f, lambda c: c["megachiar"]["model"].update(num_layers=0)), "num_layers"),
    "unknown key": (lambda f: change_config(f, lambda c: c["megachiar"]["model"].update(colour=1)), "colour"),
    "a setting of the library's model": (
        lambda f: change_config(f, lambda c: c.update(thresholds=[[0.5], [0.5]])),
        "thresholds is .*0.5.*, but the section megachiar has a model with .*0.79",
    ),
    "no numbers": (lambda f: change_config(f, lambda c: c["megachiar"].update(validation=[3])), "no numbers by name"),
    "not finite": (
        lambda f: change_weights(f, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight holds numbers that are not finite",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: cannot be read"),
    "one missing": (lambda f: change_weights(f, lambda t: t.pop("model.norm.weight")), "lacks norm.weight"),
    "one more": (lambda f: change_weights(f, lambda t: t.update(more=torch.zeros(2))), "has more, which the model"),
    "another shape": (
        lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        r"norm.weight has shape \(3,\), and the model of config.json \(32,\)",
    ),
    "a file elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        "names '../x', which is no file of the folder",
    ),
    "a missing file": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks model-2.safetensors, which model.safetensors.index.json names",
    ),
    "an empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_message(what, copy, tmp_path):
    damage, message = DAMAGE[what]
    damage(copy)
    with pytest.raises(UserError, match=message):
        import_.main([str(copy), "--output", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_weights_of_16_bits_come_back_as_the_same_numbers(copy, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    import_.main([str(tmp_path / "half"), "--output", str(tmp_path / "back")])
    assert "weights of bfloat16 are fp32 numbers now" in capsys.readouterr().out
    from megachiar.checkpoint.reading import read_weights

    found = read_weights(locate_checkpoint(tmp_path / "back"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name.removeprefix("model.")], tensor.float()), name


def test_a_full_disk_leaves_no_folder(run, tmp_path):
    limited = (
        "import resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from megachiar.cli.main import start\n"
        "start()\n"
    )
    done = python("-c", limited, "export", str(run), "--to", "hf", "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write: File too large" in done.stderr and left_in(tmp_path) == []
