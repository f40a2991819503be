"""Time the saving of checkpoints: the copy to memory, the checksums, the whole save, and how long training waits.

    megachiar bench-checkpoint --folder /scratch/bench --rounds 5

One process saves the model of a config (without --config the shipped 400m) with its optimizer state to FOLDER, which
should be on the disk that runs write to. In each round it takes in turn

    copy        copy weights and moments to the host's memory, where the last snapshot was
    checksums   compute the checksums of what was copied
    save        a save that is waited for: copy, write with checksums, force to the disk, rename
    held up     what a save in the background takes of the training loop

It prints medians with quartiles, and the ratios within a round. It needs memory for some 30 bytes a parameter.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar import launch
from megachiar.errors import UserError, disk_errors
from megachiar.options import CommandParser, add_config_options

if TYPE_CHECKING:  # torch and DeepSpeed are imported when the environment is prepared
    from megachiar.benchmark import Times
    from megachiar.config import RunConfig
    from megachiar.engine.engine import Engine

CONTENDERS = ("copy", "checksums", "save", "held up")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-checkpoint", __doc__)
    add_config_options(parser, required=False)
    parser.add_argument("--folder", type=Path, required=True, help="new folder to save to; it is removed at the end")
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    launch.prepare_environment()
    from megachiar.benchmark import machine, write_json

    if options.folder.exists():
        raise UserError(options.folder, "exists already, and this command removes its folder", "name a new one")
    with disk_errors(options.folder):
        options.folder.mkdir(parents=True)
    try:
        config = config_of(options)
        with started_engine(config) as engine:
            times, size = measure(engine, options.rounds)
            record = {"machine": machine(engine.device), "bytes": size, "seconds": times.seconds}
    finally:
        shutil.rmtree(options.folder)
    print_report(times, size)
    write_json(options.json, record)
    return 0


def config_of(options: argparse.Namespace) -> RunConfig:
    """Return the config whose model is saved, by one process and to ``--folder``."""
    from megachiar.config import load_config
    from megachiar.config.shipped import shipped_config

    path = options.config or shipped_config("400m")
    alone = ["parallel.tensor_size=1", "parallel.pipeline_size=1", "parallel.data_size=null", "parallel.sequence=false"]
    run = [f"logging.folder={options.folder}", "training.steps=1", "training.epochs=null", "training.tokens=null"]
    return load_config(path, [*alone, *run, "checkpoint.keep=1", "checkpoint.asynchronous=true", *options.overrides])


@contextmanager
def started_engine(config: RunConfig) -> Iterator[Engine]:
    """Give an engine of one process, and end its process group afterwards."""
    launch.configure_torch(config.training.threads)
    import torch.distributed as dist

    from megachiar.engine.engine import Engine, start_process_group
    from megachiar.topology import build_topology

    topology = build_topology(config)
    device = start_process_group(config, topology)
    try:
        yield Engine(config, topology.with_groups(), device)
    finally:
        dist.destroy_process_group()


def measure(engine: Engine, rounds: int) -> tuple[Times, int]:
    """Return the seconds of each contender, and the bytes of weights and moments."""
    from megachiar.benchmark import measure_interleaved
    from megachiar.checkpoint.saver import CheckpointSaver
    from megachiar.checkpoint.snapshot import Snapshot, take_snapshot
    from megachiar.data.sampling.history import DataHistory
    from megachiar.data.sampling.history_records import SourceRecord

    nothing_read = [(SourceRecord(path="none", tokens=1, checksum=None), 1.0)]
    data = DataHistory.initial(nothing_read, engine.config.sequence_length, 1, seed=0, order="keyed")
    saver = CheckpointSaver(engine, None, lambda line: None, lambda path, seconds: None)

    def snapshot() -> Snapshot:
        return take_snapshot(engine, 0, data, {}, memory=saver.memory)

    size = snapshot().shards.size

    def checksums() -> float:
        shards = snapshot().shards
        return seconds_of(shards.checksums)

    def held_up() -> float:
        seconds = seconds_of(lambda: saver.save(1, data, {}, must_succeed=False))
        saver.wait()
        return seconds

    contenders = {
        "copy": lambda: seconds_of(snapshot),
        "checksums": checksums,
        "save": lambda: seconds_of(lambda: saver.save(1, data, {}, must_succeed=True)),
        "held up": held_up,
    }
    for warm_up in contenders.values():
        warm_up()
    return measure_interleaved(contenders, rounds), size


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds of one call of ``function``."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def print_report(times: Times, size: int) -> None:
    print(f"{size / 1e9:.2f} GB of weights and moments")
    for name in CONTENDERS:
        print(f"{name:12} {times.spread(name).format(' s')}  {size / 1e9 / times.spread(name).median:.2f} GB/s")
    print(f"checksums / save  {times.speed_up('save', over='checksums').format(' %', 100, 1)}")
    print(f"held up / copy    {times.speed_up('copy', over='held up').format()}")
