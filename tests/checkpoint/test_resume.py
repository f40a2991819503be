"""A run that stopped, for whatever reason, continues as if it had never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import checkpoint_tensors, pretrain, small_config, start_ranks, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name, complete_checkpoints
from megachiar.errors import EXIT_STOPPED
from megachiar.training.metrics import read_metrics

pytestmark = pytest.mark.every_python

STEPS = 10


def losses(folder: Path) -> dict[int, tuple]:
    """Return loss, gradient norm, and the share of attention of each layer, by step, in full precision."""
    keys = ("loss", "gradient_norm", "attention_share")
    return {r["step"]: tuple(r[key] for key in keys) for r in read_metrics(folder, "train")}


def make_run(folder: Path, **sections: dict) -> Path:
    """Write datasets and a config to ``folder``; dropout is on, so that a resumed run must draw the same masks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, checkpoint={"every": 1, "keep": None}, **sections)
    config["model"]["dropout"] = 0.1
    config["training"] |= {"steps": STEPS, "global_batch_size": 4}
    return write_config(folder / "config.yaml", config)


TWO = {"training": {"micro_batch_size": 1}}  # two ranks accumulate over 2 micro-batches, as one process does
BF16 = {"precision": {"compute": "bf16"}}
RANDOM = {"model": {"router": {"kind": "random", "attention_share": 0.4}}}
HASHED = {"model": {"router": {"kind": "hashed", "tau": 0.79}}}
MUON = {"optimizer": {"kind": "muon"}}
CAPTURED = {"cuda_graphs": 2}
LEARNED = {"model": {"router": {"kind": "learned", "target_share": 0.4, "explore": 0.3, "anneal_steps": 6}}}
STATIC = {"static_shapes": True}
ALL_AT_ONCE = {  # a router whose threshold moves, documents, and keys of routed tokens alone
    "model": {
        "router": {"kind": "hashed", "tau": 0.79, "target_share": 0.4, "anneal_steps": 6},
        "attention": {"keys": "routed"},
    },
    "data": {"document_mask": True, "document_end": 5},
}
LAYOUTS = {
    "one process, fp32": (1, {"parallel": {"zero_stage": 0}}),
    "two processes, ZeRO 1, bf16": (2, TWO | BF16),
    "two processes, ZeRO 2, bf16": (2, TWO | BF16 | {"parallel": {"zero_stage": 2}}),
    "two processes, ZeRO 3": (2, TWO | {"parallel": {"zero_stage": 3}}),
    "two processes, ZeRO 1, bf16, Muon": (2, TWO | BF16 | MUON),
    "one process, coins of documents": (1, RANDOM | {"data": {"document_mask": True, "document_end": 5}}),
    "two processes, ZeRO 2, random router": (2, TWO | RANDOM | {"parallel": {"zero_stage": 2}}),
    "one process, hashed router": (1, HASHED),
    "one process, learned router": (1, LEARNED),
    "two processes, ZeRO 3, learned router, bf16": (2, TWO | LEARNED | BF16 | {"parallel": {"zero_stage": 3}}),
    "two stages, static shapes, all at once, recomputation": (
        2,
        ALL_AT_ONCE | {"parallel": {"pipeline_size": 2}, "training": STATIC | {"activation_checkpoint_interval": 1}},
    ),
    "two processes, ZeRO 2, bf16, static shapes": (
        2,
        BF16 | {"parallel": {"zero_stage": 2}, "training": STATIC | {"micro_batch_size": 1}},
    ),
    "fp16 with dynamic loss scale": (
        1,
        {"precision": {"compute": "fp16", "initial_loss_scale": 2.0**20, "loss_scale_window": 3}},
    ),
    # Captured after as many micro-batches, wherever a run begins.
    "fp16 with dynamic loss scale, captured layers": (
        1,
        {
            "precision": {"compute": "fp16", "initial_loss_scale": 2.0**20, "loss_scale_window": 3},
            "training": CAPTURED,
        },
    ),
    "two processes, ZeRO 2, bf16, captured layers": (
        2,
        BF16 | {"training": TWO["training"] | CAPTURED, "parallel": {"zero_stage": 2}},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bit_identical_at_any_step(tmp_path, name):
    ranks, sections = LAYOUTS[name]
    config = make_run(tmp_path, **sections)
    pretrain(config, ranks=ranks)
    whole = losses(tmp_path / "run")
    assert len(whole) == STEPS
    if "fp16" in name:  # some steps overflow and others train
        assert {r["skipped"] for r in read_metrics(tmp_path / "run", "train")} == {True, False}
    last = Path("checkpoints") / checkpoint_name(STEPS)
    tensors = checkpoint_tensors(tmp_path / "run" / last)
    for stopped_at in (1, 7) if ranks == 1 else (4,):
        folder = tmp_path / f"resumed_{stopped_at}"
        folder.mkdir()
        shutil.copytree(
            tmp_path / "run" / "checkpoints" / checkpoint_name(stopped_at),
            folder / "checkpoints" / checkpoint_name(stopped_at),
        )
        pretrain(config, f"logging.folder={folder}", ranks=ranks)
        resumed = losses(folder)
        assert sorted(resumed) == list(range(stopped_at + 1, STEPS + 1))
        assert resumed == {step: whole[step] for step in resumed}
        assert checkpoint_tensors(folder / last) == tensors


def test_a_run_with_learned_routers_goes_on_under_another_layout(tmp_path):
    """Its thresholds and its scale of values go with it: the run with two stages continues as one process does."""
    config = make_run(tmp_path, **LEARNED)
    pretrain(config)
    whole = losses(tmp_path / "run")
    folder = tmp_path / "resumed"
    (folder / "checkpoints").mkdir(parents=True)
    name = checkpoint_name(6)
    shutil.copytree(tmp_path / "run" / "checkpoints" / name, folder / "checkpoints" / name)
    pretrain(config, f"logging.folder={folder}", "parallel.pipeline_size=2", ranks=2)
    for step, (loss, norm, shares) in losses(folder).items():
        assert (loss, norm) == pytest.approx(whole[step][:2], rel=1e-5), step
        assert shares == pytest.approx(whole[step][2], abs=1e-6), step


def test_a_signal_saves_and_stops_and_the_history_has_no_seam(tmp_path):
    undisturbed = make_run(tmp_path / "a")
    pretrain(undisturbed, "training.steps=60", "checkpoint.every=null", ranks=2)
    config = make_run(tmp_path / "b")
    sets = ["training.steps=60", "checkpoint.every=null"]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        processes = start_ranks(2, "-m", "megachiar.pretrain", "--config", config, "--set", *sets)
        before = _lines(tmp_path / "b" / "run")
        while _lines(tmp_path / "b" / "run") < before + 5:
            assert all(p.poll() is None for p in processes), processes[0].communicate()[0]
            time.sleep(0.05)
        processes[1].send_signal(number)  # one rank alone gets the signal; all must stop at the same step
        outputs = [p.communicate(timeout=120)[0] for p in processes]
        assert [p.returncode for p in processes] == [EXIT_STOPPED] * 2, outputs
        assert "stopped by a signal" in outputs[0]
    pretrain(config, *sets, ranks=2)
    assert losses(tmp_path / "b" / "run") == losses(tmp_path / "a" / "run")
    steps = [r["step"] for r in read_metrics(tmp_path / "b" / "run", "train")]
    assert steps == list(range(1, 61))


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_only_the_newest_are_kept_and_a_finished_run_is_left_alone(tmp_path):
    config = make_run(tmp_path)
    pretrain(config, "checkpoint.keep=2")
    assert [p.name for p in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [
        checkpoint_name(9),
        checkpoint_name(10),
    ]
    (output,) = pretrain(config)
    assert "is finished: it is at step 10 of training.steps 10. To train it further raise training.steps" in output


def test_more_steps_can_be_asked_for_later(tmp_path):
    config = make_run(tmp_path)
    constant = "schedule.kind=constant"
    pretrain(config, constant)
    pretrain(config, constant, "training.steps=14")
    together = losses(tmp_path / "run")
    pretrain(config, constant, "training.steps=14", f"logging.folder={tmp_path / 'other'}")
    assert together == losses(tmp_path / "other")


REFUSED = {
    "another model": (["model.hidden_size=64"], "model.hidden_size is 32 in the checkpoint and 64 in the config"),
    "another operator set": (
        ["model.kind=baseline"],
        "model.kind is 'chiar' in the checkpoint and 'baseline' in the config",
    ),
    "another seed": (["training.seed=7"], "training.seed: was 1234"),
    "another batch": (["training.global_batch_size=16"], "training.global_batch_size"),
    "another length": (["data.sequence_length=16"], "data.sequence_length: was 32"),
    "other data": (["data.train.0.path={other}"], "data.train: was"),
    "resume never": (["checkpoint.resume=never"], "checkpoint.resume is never"),
}


def test_what_does_not_go_on_is_refused_and_nothing_is_lost(tmp_path):
    config = make_run(tmp_path)
    pretrain(config, "training.steps=3")
    other = write_tokens(tmp_path / "other", seed=5)
    before = json.dumps(sorted(str(p) for p in (tmp_path / "run").rglob("*")))

    def refuse(overrides: list[str]) -> str:
        return pretrain(config, *(o.format(other=other) for o in overrides), codes=(2,))[0]

    def refuse_in_a_copy(name: str) -> str:
        copy = shutil.copytree(tmp_path / "run", tmp_path / name)
        output = refuse([*REFUSED[name][0], f"logging.folder={copy}"])
        files = [str(tmp_path / "run" / p.relative_to(copy)) for p in copy.rglob("*")]
        assert json.dumps(sorted(files)) == before
        return output

    with ThreadPoolExecutor(2) as pool:  # each in a copy, since one run at a time works in a folder
        outputs = pool.map(refuse_in_a_copy, REFUSED)
        for (name, (_, message)), output in zip(REFUSED.items(), outputs, strict=True):
            assert message in " ".join(output.split()), (name, output)
            assert "Traceback" not in output and "remedy:" in output, name
    state = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json"
    written = state.read_text()
    record = json.loads(written) | {"format_version": 2}
    del record["seal"]
    state.write_text(json.dumps(record))
    assert "format_version 2" in refuse([])  # a run that ignored the checkpoint would start over
    state.write_text(written)
    assert json.dumps(sorted(str(p) for p in (tmp_path / "run").rglob("*"))) == before


def test_weights_alone_start_a_new_run(tmp_path):
    config = make_run(tmp_path)
    pretrain(config)
    new = tmp_path / "new"
    (output,) = pretrain(
        config,
        f"logging.folder={new}",
        f"checkpoint.load_from={tmp_path / 'run'}",
        "parallel.zero_stage=2",
        "training.steps=2",
    )
    assert "optimizer, schedule and data start anew" in output
    first_old, first_new = losses(tmp_path / "run")[1][0], losses(new)[1][0]
    assert first_new < first_old - 0.1


def test_an_fp16_overflow_is_told_at_its_own_step_alone(tmp_path):
    fp16 = {"compute": "fp16", "initial_loss_scale": 2.0**30, "loss_scale_window": 1000}
    config = make_run(tmp_path, precision=fp16)
    pretrain(config, "training.steps=20")
    records = read_metrics(tmp_path / "run", "train")
    assert records[0]["skipped"] and not records[-1]["skipped"]
    # An overflowing gradient has no norm: null in the file.
    assert all(r["skipped"] == (r["gradient_norm"] is None) for r in records)
    pretrain(config, "training.steps=21", "schedule.kind=constant")
    assert not read_metrics(tmp_path / "run", "train")[-1]["skipped"]
