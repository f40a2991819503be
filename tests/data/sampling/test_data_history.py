"""The order of a run over its whole life: every sample once an epoch, restarts anywhere, changes on the way.

Token t of source s is the number 1,000,000 s + t, so that a sample that was read says where it lies.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import ROOT, forked_python, run_ranks, small_config, write_config, write_tokens

from megachiar.data.sampling.dataset import SampleStream, TokenSource
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.sampling.loader import BatchLoader
from megachiar.data.sampling.order import Consumed, StreamOrder
from megachiar.data.storage.writer import IndexedDatasetBuilder

SOURCE = 1_000_000
CASES = range(12)


def write_numbered(prefix: Path, number: int, tokens: int, rng: np.random.Generator) -> TokenSource:
    cuts = np.sort(rng.choice(np.arange(1, tokens), size=min(tokens - 1, int(rng.integers(0, 9))), replace=False))
    with IndexedDatasetBuilder(prefix, np.int32) as builder:
        for document in np.split(number * SOURCE + np.arange(tokens, dtype=np.int32), cuts):
            builder.add_document(document)
    return TokenSource(prefix)


def initial(sources: list[TokenSource], weights: list[float], length: int, batch: int, seed: int) -> DataHistory:
    records = [SourceRecord(path=str(s.prefix), tokens=s.dataset.tokens.size, checksum=None) for s in sources]
    return DataHistory.initial(zip(records, weights, strict=True), length, batch, seed, "keyed")


def stream_of(history: DataHistory, sources: list[TokenSource]) -> SampleStream:
    """The samples of a history that was written to a file and read again, as a restart does."""
    history = DataHistory.model_validate_json(json.dumps(json.loads(history.model_dump_json())))
    by_path = {str(source.prefix): source for source in sources}
    order = history.orders[-1]
    return SampleStream([by_path[history.sources[s.source].path] for s in order.shares], history.run_order(order))


def read_in_layout(stream: SampleStream, start: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` samples from ``start`` on, read by the loaders of ranks of a random layout, put together in order."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    ranks = int(rng.choice([d for d in divisors if d <= 4]))
    micro = int(rng.choice([d for d in divisors if count % (d * ranks) == 0]))
    turns, rows = count // (ranks * micro), {}
    for rank in range(ranks):
        with BatchLoader(stream, micro, turns, rank, ranks, start, prefetch=int(rng.integers(1, 4))) as loader:
            for turn in range(turns):
                for place, row in enumerate(next(loader)):
                    rows[(turn * ranks + rank) * micro + place] = row
    return np.stack([rows[place] for place in range(count)])


def random_run(rng: np.random.Generator, folder: Path) -> tuple[list[TokenSource], list[float], int, int]:
    length = int(rng.integers(1, 24))
    sizes = rng.integers(length + 1, 14 * length + 2, size=rng.integers(1, 5))
    sources = [write_numbered(folder / f"s{i}", i, max(2, int(size)), rng) for i, size in enumerate(sizes)]
    weights = (rng.random(len(sources)) + 0.05).round(2).tolist()
    return sources, weights, length, int(rng.integers(1 << 30))


def check_epochs(rows: np.ndarray, tokens: int, length: int) -> None:
    """All samples of one source, in the order they came: each epoch's targets are different tokens, all but T."""
    assert (np.diff(rows % SOURCE, axis=1) % tokens == 1 % tokens).all()  # neighbours in the stream, or its two ends
    n = (tokens - 1) // length
    for first in range(0, len(rows), n):
        epoch = rows[first : first + n, 1:]
        assert len(np.unique(epoch)) == epoch.size  # no target twice
        assert len(epoch) < n or tokens - epoch.size <= length


@pytest.mark.parametrize("case", CASES)
def test_each_sample_comes_once_an_epoch_and_a_restart_in_any_layout_goes_on_exactly(tmp_path, case):
    rng = np.random.default_rng(case)
    sources, weights, length, seed = random_run(rng, tmp_path)
    total = int(rng.integers(200, 900))
    history = initial(sources, weights, length, 1, seed)
    whole = stream_of(history, sources).batch(range(total))
    for number, source in enumerate(sources):
        check_epochs(whole[whole[:, 0] // SOURCE == number], source.dataset.tokens.size, length)
    position = 0
    while position < total:  # stopped again and again, each time in another layout
        count = min(int(rng.integers(1, 120)), total - position)
        rows = read_in_layout(stream_of(history, sources), position, count, rng)
        assert np.array_equal(rows, whole[position : position + count])
        position += count


@pytest.mark.parametrize("case", CASES)
def test_samples_that_are_left_out_are_never_read_and_those_after_them_move_up(tmp_path, case):
    rng = np.random.default_rng(200 + case)
    sources, weights, length, seed = random_run(rng, tmp_path)
    history = initial(sources, weights, length, 4, seed)
    expected = stream_of(history, sources).batch(range(500))
    for _ in range(int(rng.integers(1, 6))):
        first = int(rng.integers(0, 200))
        left_out = range(first, first + int(rng.integers(1, 30)))
        history = history.leave_out(left_out)
        expected = np.delete(expected, left_out, axis=0)
        count = int(rng.integers(left_out.stop, 300))
        assert np.array_equal(read_in_layout(stream_of(history, sources), 0, count, rng), expected[:count])
    ranges = history.orders[-1].left_out
    assert all(first < end for first, end in ranges)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(ranges)), "ascending, and apart"


def test_another_order_goes_on_after_the_samples_that_were_left_out(tmp_path):
    """Source 0 is read alone for 3 steps of 4, of which the samples 5 to 6 are left out; then it is blended."""
    rng = np.random.default_rng(0)
    sources = [write_numbered(tmp_path / f"s{number}", number, 200, rng) for number in range(2)]
    alone = initial(sources[:1], [1.0], 5, 4, seed=3)
    series = stream_of(alone, sources).batch(range(30))
    history = alone.leave_out(range(5, 7)).continue_from(initial(sources, [1.0, 1.0], 5, 4, seed=3), 3)
    rows = stream_of(history, sources).batch(range(12, 28))
    of_first = rows[rows[:, 0] < SOURCE]
    assert len(of_first) > 4 and np.array_equal(of_first, series[14 : 14 + len(of_first)])
    uses = stream_of(alone.leave_out(range(5, 7)), sources).describe(12)
    assert [use.samples for use in uses] == [14], "what is left out is passed over"


@pytest.mark.parametrize("case", CASES)
def test_samples_that_are_left_out_stay_so_when_sources_and_weights_change(tmp_path, case):
    """Some changes come before a step was taken, and sources pause; each is read as if it never had the samples."""
    rng = np.random.default_rng(300 + case)
    sources, weights, length, seed = random_run(rng, tmp_path)
    names = [str(source.prefix) for source in sources]
    history, step, read, left_out = initial(sources, weights, length, 4, seed), 0, [], set()

    def located(positions: range) -> list[tuple[str, int, int]]:
        stream = stream_of(history, sources)
        return [(str(stream.sources[at.source].prefix), at.epoch, at.token) for at in stream.locate(positions)]

    for turn in range(12):
        begin = history.samples_before(step)
        if turn < 9:
            bad = range(first := begin + int(rng.integers(0, 60)), first + int(rng.integers(1, 9)))
            left_out |= {*located(bad)}
            history = history.leave_out(bad)
        steps = int(rng.integers(turn == 0, 2)) * int(rng.integers(1, 15))  # no run goes back to its beginning
        step += steps
        read += located(range(begin, begin + 4 * steps))
        present = rng.permutation(len(sources))[: rng.integers(1, len(sources) + 1)].tolist()
        wanted = initial([sources[i] for i in present], (rng.random(len(present)) + 0.05).tolist(), length, 4, seed)
        assert history.describe_returning(wanted, step) == []
        history = history.continue_from(wanted, step)
        assert history.continue_from(wanted, step) == history
    assert left_out.isdisjoint(read)
    for name, source in zip(names, sources, strict=True):
        mine = [(epoch, token) for path, epoch, token in read if path == name]
        number = next((n for n, s in enumerate(history.sources) if s.path == name), None)
        if number is not None:
            series = StreamOrder(source.dataset.tokens.size, length, (seed, number))
            every = np.arange(len(mine) + len(left_out))
            pairs = zip(series.epochs(every).tolist(), series.starts(every).tolist(), strict=True)
            assert mine == [pair for pair in pairs if (name, *pair) not in left_out][: len(mine)]


def test_what_was_left_out_is_known_again_and_the_log_tells_where_it_is_not(tmp_path):
    """Positions 20 to 26 of two sources, by turns and half of each, are left out while the run is at position 8."""
    rng = np.random.default_rng(0)
    one, two, new = (
        write_numbered(tmp_path / name, number, 900 + number, rng) for number, name in enumerate(("one", "two", "new"))
    )
    both = initial([one, two], [1.0, 1.0], 5, 4, seed=3)
    history = both.leave_out(range(20, 26))
    count = sum(row[0] < SOURCE for row in stream_of(both, [one, two]).batch(range(20, 26)))
    assert 0 < count < 6
    told = {
        str(one.prefix): f"{count} samples of {one.prefix}",
        str(two.prefix): f"{6 - count} samples of {two.prefix}",
    }

    def told_by(sources: list[TokenSource], length: int, now: DataHistory = history) -> list[str]:
        return now.describe_returning(initial(sources, [1.0] * len(sources), length, 4, seed=3), 2)

    assert told_by([one, two], 5) == told_by([two], 5) == []
    cut = [f"{told[str(s.prefix)]} that a rollback left out may be read again, since" for s in (one, two)]
    assert [line[: len(start)] for line, start in zip(told_by([two, one], 7), cut, strict=True)] == cut
    (line,) = told_by([two, new], 5)
    assert (
        line == f"{told[str(one.prefix)]} that a rollback left out may be read again, if new data holds the same text"
    )
    assert history.describe_returning(initial([one, two], [1.0, 1.0], 7, 4, seed=3), 8) == [], "they are passed"
    longer = history.continue_from(initial([one, two], [1.0, 1.0], 7, 4, seed=3), 2)
    assert longer.orders[-1].left_out == ()
    assert len(told_by([one, two], 7, longer)) == 2, "nothing was read since: it is told at each start"
    again = longer.continue_from(initial([one, two], [2.0, 3.0], 5, 4, seed=3), 3)
    assert sum(end - first for first, end in again.orders[-1].left_out) == 6
    bad = {*map(tuple, stream_of(both, [one, two]).batch(range(20, 26)).tolist())}
    assert bad.isdisjoint(map(tuple, stream_of(again, [one, two]).batch(range(12, 60)).tolist()))


@pytest.mark.parametrize("case", CASES)
def test_weights_sources_and_batch_change_and_every_source_goes_on_at_its_next_sample(tmp_path, case):
    """However the run was blended, what it has read of a source is the beginning of that source's own series."""
    rng = np.random.default_rng(100 + case)
    sources, weights, length, seed = random_run(rng, tmp_path)
    present = list(range(len(sources)))
    history, step, read = initial(sources, weights, length, int(rng.integers(1, 9)), seed), 0, []
    for _ in range(int(rng.integers(2, 7))):
        steps = int(rng.integers(1, 60))
        begin, end = history.samples_before(step), history.samples_before(step + steps)
        read.append(read_in_layout(stream_of(history, sources), begin, end - begin, rng))
        step += steps
        present = rng.permutation(len(sources))[: rng.integers(1, len(sources) + 1)].tolist()
        weights, batch = (rng.random(len(present)) + 0.05).tolist(), int(rng.integers(1, 9))
        wanted = initial([sources[i] for i in present], weights, length, batch, seed)
        history = history.continue_from(wanted, step)
        assert history.changes(wanted, step + 1) == [] and history.continue_from(wanted, step) == history
    rows = np.concatenate(read)
    assert history.tokens_before(len(rows)) == len(rows) * length
    for number, source in enumerate(sources):
        mine = rows[rows[:, 0] // SOURCE == number]
        if not len(mine):
            continue
        tokens = source.dataset.tokens.size
        check_epochs(mine, tokens, length)
        (named,) = (n for n, s in enumerate(history.sources) if s.path == str(source.prefix))
        series = StreamOrder(tokens, length, (seed, named)).starts(np.arange(len(mine)))
        assert np.array_equal(mine[:, 0] % SOURCE, series)


@pytest.mark.parametrize("case", CASES)
def test_another_sequence_length_goes_on_in_the_epoch_that_was_begun_and_later_ones_are_whole(tmp_path, case):
    rng = np.random.default_rng(200 + case)
    length = int(rng.integers(2, 12))
    sources = [write_numbered(tmp_path / f"s{i}", i, int(rng.integers(200, 500)), rng) for i in range(2)]
    history, step, position = initial(sources, [2, 1], length, 4, case), 0, 0
    targets: dict[tuple[int, int], list[np.ndarray]] = {}
    for _ in range(4):
        stream = stream_of(history, sources)
        numbers = [share.source for share in history.orders[-1].shares]
        steps = int(rng.integers(5, 120))
        positions = range(position, position + 4 * steps)
        for place, row in zip(stream.locate(positions), stream.batch(positions), strict=True):
            assert row[0] // SOURCE == numbers[place.source]
            targets.setdefault((int(row[0]) // SOURCE, place.epoch), []).append(row[1:])
        step, position = step + steps, positions.stop
        used = [history.consumed(number, position) for number in range(2)]
        length = int(rng.integers(1, 40))
        history = history.continue_from(initial(sources[::-1], [1, 1], length, 4, case), step)
        for now, before, source in zip(
            (history.consumed(number, position) for number in range(2)), used, sources, strict=True
        ):
            n = (source.dataset.tokens.size - 1) // length
            ahead = (now.epoch - before.epoch) * n * length + now.tokens - min(before.tokens, n * length)
            assert 0 <= ahead < length  # goes on where it was, at the next cut
    last = {number: max(epoch for source, epoch in targets if source == number) for number in range(2)}
    changed = {(o.source, o.epoch) for order in history.orders for o in order.shares}
    for (number, epoch), pieces in targets.items():
        tokens, read = sources[number].dataset.tokens.size, np.concatenate(pieces)
        if epoch < last[number]:
            assert tokens - 40 - 40 <= len(read) < tokens + 40  # as much as an epoch is, to within a sample
        if (number, epoch) not in changed or epoch == 0 == len(changed):
            assert len(np.unique(read)) == len(read)
    assert any((number, epoch) not in changed and epoch < last[number] for number, epoch in targets)


def test_a_source_is_known_by_its_content_and_an_order_that_nothing_was_read_in_leaves_no_trace():
    one, two = (SourceRecord(path=p, tokens=100, checksum=c) for p, c in (("a", "x"), ("b", "y")))
    history = DataHistory.initial([(one, 1.0), (two, 3.0)], 4, 2, 0, "keyed")
    moved = [s.model_copy(update={"path": "/elsewhere/" + s.path}) for s in (two, one)]
    turned = DataHistory.initial(zip(moved, (6.0, 2.0), strict=True), 4, 2, 0, "keyed")
    assert history.changes(turned, 5) == []
    went_on = history.continue_from(turned, 5)
    assert went_on.orders == history.orders and [s.path for s in went_on.sources] == ["/elsewhere/a", "/elsewhere/b"]
    other = DataHistory.initial([(two, 1.0)], 4, 2, 0, "keyed")
    tried = history.continue_from(other, 5)
    assert len(tried.orders) == 2 and tried.orders[1].first_sample == 10
    back = tried.continue_from(turned, 5)
    assert back.orders == history.orders and back.consumed(1, 10) == history.consumed(1, 10)
    twins = [SourceRecord(path=p, tokens=100, checksum=None) for p in "ab"]
    history = DataHistory.initial(zip(twins, (1.0, 2.0), strict=True), 4, 2, 0, "keyed")
    assert history.numbers_of([twins[1], twins[0]]) == [1, 0]
    assert history.consumed(0, 0) == Consumed(0, 0)


def test_a_run_changes_its_data_on_the_way_and_every_step_can_be_named(tmp_path):
    """Refused without a word that it is meant; then resumed in another layout, stopped, and resumed once more."""
    paths = {name: write_tokens(tmp_path / name, seed=seed) for seed, name in enumerate(("train", "valid", "more"))}
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path, schedule={"kind": "constant"}))
    program = ROOT / "megachiar" / "pretrain.py"
    run_ranks(1, program, "--config", config, "--set", "training.steps=3")
    changed = small_config(
        tmp_path,
        schedule={"kind": "constant"},
        data={
            "train": [{"path": str(paths["more"]), "weight": 3}, {"path": str(paths["train"])}],
            "sequence_length": 16,
        },
        training={"global_batch_size": 16, "steps": 9},
    )
    config.write_text(yaml.safe_dump(changed))
    (refused,) = run_ranks(1, program, "--config", config, codes=(2,))
    assert "data.train" in refused and "data.on_change to continue" in refused and "Traceback" not in refused
    changed["data"]["on_change"] = "continue"
    config.write_text(yaml.safe_dump(changed))
    stopped = run_ranks(2, program, "--config", config, "--set", "training.steps=6")[0]
    assert "data.sequence_length was 32 up to here and is 16 from here on" in " ".join(stopped.split())
    again = run_ranks(1, program, "--config", config, "--set", "training.steps=9")[0]
    assert "training.steps was 6 up to here and is 9 from here on" in again
    assert again.count("up to here") == 1  # the data is as it was
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {row["step"]: (row["samples"], row["tokens"]) for row in rows if "gradient_norm" in str(row)}
    seen = {step: tuple(map(int, values)) for step, values in seen.items()}
    assert seen[3] == (24, 24 * 32) and seen[9] == (24 + 6 * 16, 24 * 32 + 6 * 16 * 16)

    def step(number: int) -> list[dict]:
        done = forked_python("tools/inspect_dataset.py", "--config", config, "--step", str(number), "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["samples"]

    first, third, fourth, last = (step(number) for number in (1, 3, 4, 9))
    assert [s["position"] for s in first] == [*range(8)] and {s["tokens"] for s in first} == {33}
    assert [s["position"] for s in third] == [*range(16, 24)]
    assert [s["position"] for s in fourth] == [*range(24, 40)] and {s["tokens"] for s in fourth} == {17}
    assert [s["position"] for s in last] == [*range(104, 120)]
    assert {s["source"] for s in first + third} == {str(paths["train"])}
    assert {s["source"] for s in fourth + last} == {str(paths["train"]), str(paths["more"])}
    counts = [sum(s["source"] == str(paths["more"]) for s in itertools.chain(*map(step, range(4, 10))))]
    assert 60 <= counts[0] <= 84  # three quarters of 96
    seed = forked_python("tools/inspect_dataset.py", "--config", config, "--step", "1", "--set", "training.seed=8")
    assert seed.returncode == 2 and "training.seed: was 1234" in " ".join(seed.stderr.split())
