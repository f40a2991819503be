"""Whatever stands in a run folder, commands and runs read it rightly or say in one message what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import EXAMPLES, IN_PLACE, for_each_damage, fresh_folder, put_in_place, refused, with_hostile_values
from support import small_config, write_config, write_tokens

from megachiar.cli.stacks import read_answer
from megachiar.config import load_config
from megachiar.data.storage.sealed_json import with_seal
from megachiar.data.tokenizers.recorded import read_kept_record
from megachiar.errors import UserError
from megachiar.training import run_lock
from megachiar.training.incident_record import INCIDENT_FILE, find_incident, read_incident
from megachiar.training.incidents import MORE_FILE, Incidents
from megachiar.training.metrics import MetricsWriter, read_metrics
from megachiar.training.owed_evaluation import owed_evaluations
from megachiar.training.run_data import RunData, open_data
from megachiar.training.run_lock import Owner, RunLock, read_locks
from megachiar.training.stacks import StackWriter, read_request, remove_request, request_stacks, stack_path

pytestmark = pytest.mark.timeout(60)
STEP = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> RunData:
    folder = tmp_path_factory.mktemp("data")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    return open_data(load_config(write_config(folder / "config.yaml", small_config(folder))))


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


METRICS = jsonl(
    *({"step": step, "kind": "train", "loss": 4.0 - step / 8} for step in range(1, 6)),
    {"step": STEP, "kind": "evaluation_owed", "names": ["valid"]},
)
LOCK = Owner.current(2).to_json().encode()
TOKENIZER = {"kind": "gpt2", "file": "tokenizer/gpt2", "fingerprint": "sha256:ab", "vocab_size": 64, "eod_id": 2}
ANSWER = b"== now, rank 0 (process 7) trains [asked for, 0123456789ab]\nstack\n== end\n"


def read_metrics_of(run: Path) -> object:
    """Go on after ``STEP``: the file then holds records of the steps up to there, and the next one."""
    owed, warnings = owed_evaluations(run, STEP), []
    writer = MetricsWriter(run, STEP, warnings.append)
    writer.write(STEP + 1, "train", {"loss": 1.0})
    writer.close()
    *before, last = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert last == {"step": STEP + 1, "kind": "train", "loss": 1.0}
    assert all(record["step"] <= STEP for record in before)
    assert read_metrics(run) == [*before, last]
    return owed, before


def take_lock(run: Path) -> object:
    """Start a run in the folder; without a sign of life for ``DEAD_AFTER_S`` an unknown owner counts as dead."""
    seen = [lock.owner for lock in read_locks(run)]
    with RunLock(run, 1, lambda line: None):
        assert seen != [json_owner()], "the owner is this process, which lives"
    return "taken"


def json_owner() -> Owner:
    return Owner.from_json(LOCK)


def incident_record(data: RunData) -> dict[str, object]:
    history = data.leave_out(range(3, 9)).history.model_dump(mode="json")
    return {"step": STEP, "kind": "spike", "checkpoint": None, "data": history}


def samples_of_incident(run: Path, data: RunData) -> object:
    incident = find_incident(run, STEP)
    if incident is None:
        return None
    return data.with_history(read_incident(incident).data).training.batch(range(16)).tolist()


@pytest.fixture
def readers(data, monkeypatch) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """File of a run folder -> its content, and what reads it."""
    monkeypatch.setattr(run_lock, "DEAD_AFTER_S", -1.0)
    incident = json.dumps(with_seal(incident_record(data)), indent=1).encode()
    return {
        "metrics.jsonl": (METRICS, read_metrics_of),
        "run-1.lock": (LOCK, take_lock),
        f"incidents/step_{STEP:08d}/{INCIDENT_FILE}": (incident, lambda run: samples_of_incident(run, data)),
        "tokenizer_record.json": (json.dumps(with_seal(TOKENIZER)).encode(), read_kept_record),
        "stacks/request": (b"0123456789ab", read_request),
        "stacks/rank_00000.txt": (ANSWER, lambda run: read_answer(stack_path(run, 0), "0123456789ab")),
    }


SEALED = ("incidents", "tokenizer_record.json")


@EXAMPLES
def test_damage_is_answered_by_the_right_result_or_one_error(readers, tmp_path, examples):
    for name, (content, read) in readers.items():
        expected = None if name == "run-1.lock" else read(fresh_folder(tmp_path / "run", {name: content}))

        def check(damaged: bytes, name: str = name, read: Callable = read, expected: object = expected) -> None:
            run = fresh_folder(tmp_path / "run", {name: damaged})
            found: list[object] = []
            error = refused(lambda: found.append(read(run)))
            if error is None and name.startswith(SEALED):
                assert found == [expected]

        for_each_damage(content, check, examples)


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_is_no_file_neither_hangs_nor_breaks_off(readers, tmp_path, what):
    for name, (content, read) in readers.items():
        run = fresh_folder(tmp_path / "run", {name: content})
        put_in_place(run / name, what)
        error = refused(lambda read=read, run=run: read(run))
        if error is not None:
            assert str(run) in error.where


def test_any_value_of_a_record_is_read_or_refused(readers, data, tmp_path):
    """These records have no seal, as those of earlier versions."""
    records = {
        "run-1.lock": json.loads(LOCK),
        f"incidents/step_{STEP:08d}/{INCIDENT_FILE}": incident_record(data),
        "tokenizer_record.json": TOKENIZER,
        "metrics.jsonl": {"step": STEP, "kind": "evaluation_owed", "names": ["valid"]},
    }
    for name, record in records.items():
        record.pop("seal", None)
        for changed in with_hostile_values(record):
            run = fresh_folder(tmp_path / "run", {name: jsonl(changed)})
            refused(lambda name=name, run=run: readers[name][1](run))


def test_a_lock_with_another_digit_is_nobodys(readers, tmp_path):
    """With another process id the owner would seem to be dead."""
    owner = json.loads(LOCK)
    owner["process"]["pid"] ^= 1
    run = fresh_folder(tmp_path / "run", {"run-1.lock": json.dumps(owner).encode()})
    assert [lock.owner for lock in read_locks(run)] == [None]
    run = fresh_folder(tmp_path / "run", {"run-1.lock": LOCK})
    assert [lock.owner for lock in read_locks(run)] == [json_owner()]
    with pytest.raises(UserError, match="another run works in this run folder"):
        take_lock(run)


def test_damaged_metrics_are_left_out_with_a_warning_and_a_cut_last_line_without(tmp_path):
    lines = METRICS.splitlines(keepends=True)
    for changed, damaged in (([*lines[:1], b"\xff{]\n", b"[1]\n", *lines[3:]], "2 damaged lines"), (lines, "")):
        run, warnings = fresh_folder(tmp_path / "run", {"metrics.jsonl": b"".join(changed) + b'{"step": 3, "ki'}), []
        MetricsWriter(run, STEP, warnings.append).close()
        assert len(warnings) == bool(damaged) and damaged in "".join(warnings)
        assert {record["step"] for record in read_metrics(run)} == ({1, 3} if damaged else {1, 2, 3})


def test_an_incident_is_named_by_its_step_alone(tmp_path):
    run = tmp_path / "run"
    for name in ("step_00000003", "step_00000003_2", "step_00000003_copy", "step_000000031", "step_00000003x"):
        fresh_folder(run / "incidents" / name, {INCIDENT_FILE: b"{}"})
    assert find_incident(run, STEP) == run / "incidents" / "step_00000003_2"


@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b'{"incidents": "many"}', b"[]", b"\xff"])
def test_a_damaged_count_of_incidents_does_not_end_a_run(data, tmp_path, content, monkeypatch):
    monkeypatch.setattr("megachiar.training.incidents.MOST_FOLDERS", 0)
    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)))
    fresh_folder(tmp_path / "run" / "incidents", {MORE_FILE: content})
    lines: list[str] = []
    Incidents(config, "1 process", lines.append).record(STEP, None, None, data, None)
    assert not lines and json.loads((tmp_path / "run" / "incidents" / MORE_FILE).read_bytes()) == {"incidents": 1}


def test_stacks_are_written_beside_a_fifo(tmp_path):
    run = fresh_folder(tmp_path / "run", {"stacks/request": b"no token"})
    assert read_request(run) == ""
    token = request_stacks(run)
    assert read_request(run) == token
    put_in_place(stack_path(run, 0), "a fifo")
    writer = StackWriter(0)
    writer.run = run
    writer.open()  # of a fifo it would wait for a reader
    writer.close()
    remove_request(run, token)
    assert read_request(run) == ""


def test_a_kept_tokenizer_is_inside_the_run_folder(tmp_path):
    for file in ("/etc/passwd", "../other/tokenizer.model", "tokenizer/../../x"):
        run = fresh_folder(
            tmp_path / "run", {"tokenizer_record.json": json.dumps({**TOKENIZER, "file": file}).encode()}
        )
        with pytest.raises(UserError, match="is no path inside the run folder"):
            read_kept_record(run)
