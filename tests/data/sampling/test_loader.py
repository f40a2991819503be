"""The loader: every layout reads the same steps, restarts are exact, errors arrive, the thread ends."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from indexed_oracle import write_stream

from megachiar.data.sampling.dataset import build_training_samples
from megachiar.data.sampling.loader import BatchLoader
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python


class Numbers:
    """Samples that are their own position, read after an optional delay, broken from a position on."""

    def __init__(self, broken_at: int | None = None, delay: float = 0.0):
        self.broken_at, self.delay, self.reads = broken_at, delay, 0

    def batch(self, positions: range) -> np.ndarray:
        time.sleep(self.delay)
        self.reads += 1
        if self.broken_at is not None and self.broken_at in positions:
            raise UserError("a.bin", "the disk is gone")
        return np.array(positions, np.int64)[:, None] * np.ones((1, 3), np.int64)


def read_steps(stream, micro: int, accumulation: int, dp: int, start: int, steps: int) -> np.ndarray:
    """Samples of each step as all ranks together read them, in position order, (steps, G, T + 1)."""
    micro_steps = steps * accumulation
    ranks = []
    for rank in range(dp):
        with BatchLoader(stream, micro, accumulation, rank, dp, start) as loader:
            assert loader.global_batch_size == micro * accumulation * dp
            ranks.append([next(loader) for _ in range(micro_steps)])
            assert loader.position == start + steps * loader.global_batch_size
    together = np.stack([np.stack(rank) for rank in ranks], axis=1)  # (micro-steps, dp, micro, T + 1)
    return together.reshape(steps, -1, together.shape[-1])


def test_every_layout_of_a_global_batch_reads_the_same_steps(tmp_path):
    rng = np.random.default_rng(2)
    sources = [
        (write_stream(tmp_path / name, rng.integers(0, 999, size)), weight)
        for name, size, weight in (("a", 400, 0.6), ("b", 90, 0.4))
    ]
    stream = build_training_samples(sources, 8, seed=3)
    size, steps = 24, 4
    layouts = [
        (m, a, size // (m * a)) for m, a in itertools.product((1, 2, 3, 6, 24), (1, 2, 4)) if size % (m * a) == 0
    ]
    assert len(layouts) > 8 and {dp for *_, dp in layouts} >= {1, 2, 4, 8, 12, 24}
    expected = stream.batch(range(steps * size)).reshape(steps, size, -1)
    for micro, accumulation, dp in layouts:
        assert np.array_equal(read_steps(stream, micro, accumulation, dp, 0, steps), expected)


def test_a_run_goes_on_exactly_in_another_layout():
    rng = np.random.default_rng(4)
    for _ in range(8):
        before = int(rng.integers(1, 5))
        layouts = [(4, 1, 3), (2, 3, 2), (1, 12, 1), (12, 1, 1), (1, 1, 12)]
        first, second = (layouts[i] for i in rng.integers(0, len(layouts), 2))
        stream = Numbers()
        read = [*read_steps(stream, *first, 0, before), *read_steps(stream, *second, before * 12, 3)]
        assert np.concatenate(read)[:, 0].tolist() == list(range((before + 3) * 12))


def test_position_counts_what_was_handed_out_not_what_was_read_ahead():
    stream = Numbers()
    with BatchLoader(stream, 2, 3, 1, 2, start_sample=100, prefetch=5) as loader:
        assert next(loader)[:, 0].tolist() == [102, 103]
        deadline = time.monotonic() + 10
        while stream.reads < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.reads >= 6
        assert loader.position == 104
        next(loader)
        position = loader.position
    with BatchLoader(Numbers(), 2, 3, 1, 2, start_sample=position) as resumed:
        assert next(resumed)[:, 0].tolist() == [110, 111]


def test_reading_ahead_is_bounded():
    stream = Numbers()
    with BatchLoader(stream, 1, 1, 0, 1, prefetch=3):
        deadline = time.monotonic() + 10
        while stream.reads < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # for one more that must not come
        assert stream.reads == 4  # three in the queue and one in the thread's hand


def test_an_error_arrives_in_its_turn_and_stays():
    with BatchLoader(Numbers(broken_at=6), 2, 1, 0, 1) as loader:
        assert [next(loader)[0, 0] for _ in range(3)] == [0, 2, 4]
        for _ in range(2):
            with pytest.raises(UserError, match="the disk is gone"):
                next(loader)
        assert loader.position == 6


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megachiar-loader"]


def test_the_thread_ends_when_closed_when_dropped_and_after_an_error():
    loader = BatchLoader(Numbers(), 1, 1, 0, 1)
    next(loader)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)

    dropped = BatchLoader(Numbers(), 1, 1, 0, 1)
    thread = loader_threads()[0]
    del dropped
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()

    with pytest.raises(UserError), BatchLoader(Numbers(broken_at=0), 1, 1, 0, 1) as loader:
        next(loader)
    assert not loader_threads()


def test_waiting_for_data_is_counted():
    with BatchLoader(Numbers(delay=0.1), 1, 1, 0, 1) as loader:
        next(loader)
        waited = loader.take_wait_seconds()
        assert 0.05 < waited < 5
        assert loader.take_wait_seconds() == 0.0
    with BatchLoader(Numbers(), 1, 1, 0, 1) as loader:
        next(loader)
        loader.take_wait_seconds()
        time.sleep(0.2)  # the thread reads ahead meanwhile
        next(loader)
        assert loader.take_wait_seconds() < 0.05


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 0), (1, 1, 1, 1), (1, 1, -1, 2), (1, 1, 0, 1, -1)]
)
def test_impossible_layouts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be|is not one of"):
        BatchLoader(Numbers(), *arguments)
    with pytest.raises(ValueError, match="prefetch 0"):
        BatchLoader(Numbers(), 1, 1, 0, 1, prefetch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_the_same_and_page_locked():
    with BatchLoader(Numbers(), 2, 1, 0, 1, pin_memory=True) as loader:
        for step in range(8):
            batch = torch.from_numpy(next(loader))
            assert batch.is_pinned()
            assert batch.to("cuda", non_blocking=True).cpu()[:, 0].tolist() == [2 * step, 2 * step + 1]
