"""Whether the datasets of a sweep are those that a result was trained and measured on.

The config of a cell names datasets by their paths. A file that was written anew under its path leaves the config as it
was, so that the contents are compared as well. Datasets that are not on this machine tell nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megachiar.config import RunConfig
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import bin_path, idx_path, manifest_path
from megachiar.errors import UserError
from megachiar.training.continuation import open_run
from megachiar.training.run_result import RunResult


class _Datasets(NamedTuple):
    train: tuple[SourceRecord, ...]
    validation: Mapping[str, SourceRecord]
    test: Mapping[str, SourceRecord]


def other_data(result: RunResult, config: RunConfig) -> str | None:
    """Return a dataset of ``config`` that is not the one of ``result``; None if there is none that tells.

    Args:
        result: of a run with this config.
        config: of the run.
    """
    now = _datasets(config.model_dump_json(), _stamps(config))
    if now is None:
        return None
    then = _Datasets(tuple(result.train), result.validation_data, result.test_data)
    pairs = [
        *zip(then.train, now.train, strict=False),
        *((then.validation[name], now.validation[name]) for name in then.validation.keys() & now.validation.keys()),
        *((then.test[name], now.test[name]) for name in then.test.keys() & now.test.keys()),
    ]
    return next((after.path for before, after in pairs if not before.same_data(after)), None)


def check_same_data(results: Mapping[str, Mapping[int, RunResult]]) -> None:
    """Check that a dataset that several results name is the same in all of them.

    Args:
        results: by variant and seed.

    Raises:
        UserError: a path held one text for one result and another text for another one.
    """
    seen: dict[str, tuple[str, SourceRecord]] = {}
    for variant, by_seed in results.items():
        for seed, result in by_seed.items():
            name = f"{variant}/seed_{seed}"
            for record in (*result.train, *result.validation_data.values(), *result.test_data.values()):
                earlier, known = seen.setdefault(record.path, (name, record))
                if None not in (record.checksum, known.checksum) and record.checksum != known.checksum:
                    raise UserError(
                        record.path,
                        f"held another text for {name} than for {earlier}: their numbers are not comparable",
                        "train the cells of the older text anew, or give the other text a path of its own",
                    )


def _stamps(config: RunConfig) -> tuple[tuple[str, int, int], ...]:
    """Return the size and the time of each file of the datasets, which change when one is written anew."""
    tasks = config.mixed.tasks.values()
    prefixes = [
        *(source.path for source in config.data.train),
        *config.data.validation.values(),
        *config.data.test.values(),
        *(path for task in tasks for path in (task.data, task.validation, task.test) if path is not None),
    ]
    files = [name(Path(prefix)) for prefix in prefixes for name in (bin_path, idx_path, manifest_path)]
    return tuple((str(file), s.st_size, s.st_mtime_ns) for file in files if file.exists() for s in [file.stat()])


@functools.lru_cache(maxsize=256)
def _datasets(config: str, stamps: tuple[tuple[str, int, int], ...]) -> _Datasets | None:
    """Return what the datasets of a config hold; None where one cannot be opened. ``stamps`` tell a new one."""
    try:
        _, data = open_run(RunConfig.model_validate_json(config))
    except UserError:
        return None
    return _Datasets(
        tuple(data.history.sources[: len(data.training.sources)]), data.validation_records(), data.test_records()
    )
