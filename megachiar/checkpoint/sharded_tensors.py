"""Parameters and optimizer state on disk: each rank writes safetensors files, and any layout reads them by name.

    weights-p00-t01-d00.safetensors      fp32 (master) weights by their names in the model
    optimizer-p00-t01-d00.safetensors    moments in fp32: AdamW's NAME.exp_avg and NAME.exp_avg_sq, Muon's
                                         NAME.momentum_buffer

p, t and d are the pipeline, tensor and data rank that wrote the file. The replicas of a parameter divide the writing
among themselves. The header of a file records how each sharded parameter was cut (``shards``), and which tensor rank of
how many wrote it (``rank``, ``size``). A reader takes what its own shard needs from all files, so that a run of any
layout reads the checkpoint of any other.

The files are written here and not by safetensors, which would need a second copy of them to give their checksums, and
gives them other permissions than the files beside them. safetensors reads them.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megachiar.checkpoint.checksums import ChecksummedFile, FileRecord, checksum
from megachiar.data.storage.files import as_bytes
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError
from megachiar.parallel.shard import Shard
from megachiar.topology import TensorParallelGroup, Topology

_LONGEST_REASON = 300  # characters of what safetensors says, which repeats the values of a header


@dataclass(frozen=True)
class StoredShard:
    """One tensor of one file: the shard of a parameter that one tensor rank held, or a whole parameter.

    Attributes:
        file: safetensors file that holds the tensor.
        shard: how the parameter is cut; None for a parameter that every rank holds whole.
        rank: tensor rank that wrote the tensor.
        size: number of tensor ranks of the run that wrote it.
    """

    file: Path
    shard: Shard | None
    rank: int
    size: int


class HostMemory:
    """Memory of the host for the tensors of one checkpoint, kept for the next one.

    Memory that is new to the process costs a page fault for each 4 KiB at its first use, which takes longer than the
    copy itself. Only one checkpoint at a time may use this memory.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return an fp32 tensor of ``shape`` on the CPU, with any values; it is kept, and ``name`` gets it again."""
        kept = self._tensors.get(name)
        if kept is None or kept.shape != shape:
            kept = self._tensors[name] = torch.empty(shape)
        return kept


class ShardWriter:
    """Collect the tensors that this rank writes, and write them to its files.

    Args:
        topology: place of this rank in the layout.
        memory: holds the copies of the tensors; None for new memory.
    """

    def __init__(self, topology: Topology, memory: HostMemory | None = None):
        self._topology = topology
        self._memory = memory or HostMemory()
        self._tensors: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}}
        self._shards: dict[str, list[int]] = {}
        self._count = 0

    def is_mine(self, shard: Shard | None) -> bool:
        """Return whether this rank writes the next parameter; call it once a parameter, on every rank.

        The replicas take turns. A parameter that is not sharded is written by the first tensor rank.
        """
        turn = self._count % self._topology.data_size
        self._count += 1
        return turn == self._topology.data_rank and (shard is not None or self._topology.tensor.rank == 0)

    def add(self, name: str, moment: str | None, tensor: torch.Tensor, shard: Shard | None) -> None:
        """Copy a weight (``moment`` None) or one of its moments to the CPU as fp32, to be written later."""
        kind, name = ("weights", name) if moment is None else ("optimizer", f"{name}.{moment}")
        self._tensors[kind][name] = self._memory.tensor(name, tensor.shape).copy_(tensor.detach())
        if shard is not None:
            self._shards[name] = [shard.dim, shard.blocks]

    @property
    def size(self) -> int:
        """Bytes of the collected tensors."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors.values())

    def checksums(self) -> dict[str, str]:
        """Return the checksum of each collected tensor by name, to time what ``write`` spends on checksums."""
        collected = (item for tensors in self._tensors.values() for item in tensors.items())
        return {name: checksum(as_bytes(tensor.numpy().reshape(-1))) for name, tensor in collected}

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write the collected tensors to this rank's files in ``folder``; a rank without tensors writes no file.

        Returns:
            Size and checksum of each file, by name. The files are on the disk.

        Raises:
            OSError: the disk is full or read-only.
        """
        t = self._topology
        ranks = f"p{t.pipeline_rank:02d}-t{t.tensor.rank:02d}-d{t.data_rank:02d}"
        records = {}
        for kind, tensors in self._tensors.items():
            if tensors:
                shards = {name: cut for name, cut in self._shards.items() if name in tensors}
                header = {"rank": str(t.tensor.rank), "size": str(t.tensor.size), "shards": json.dumps(shards)}
                name = f"{kind}-{ranks}.safetensors"
                records[name] = write_safetensors(folder / name, tensors, {"format": "pt", **header})
        return records


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> FileRecord:
    """Write fp32 tensors of the CPU to a safetensors file, see ``stream_safetensors``."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return stream_safetensors(path, shapes, tensors.__getitem__, metadata)


def stream_safetensors(
    path: Path, shapes: Mapping[str, torch.Size], read: Callable[[str], torch.Tensor], metadata: dict[str, str]
) -> FileRecord:
    """Write a safetensors file: length of the header, header in JSON, tensors. Only one tensor is needed at a time.

    Args:
        path: of the file.
        shapes: of the tensors by name.
        read: returns a tensor by name, fp32 on the CPU.
        metadata: of the header.

    Raises:
        OSError: the disk is full or read-only.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in sorted(shapes.items()):
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with ChecksummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            file.write(as_bytes(read(name).numpy().reshape(-1)))
    return file.record


class ShardReader:
    """Read the tensors of a checkpoint by name. Only the bytes that a call asks for are read.

    Args:
        folder: of the checkpoint.
        files: names of the files to read, see ``CheckpointState.tensor_files``; no other file is opened.

    Raises:
        UserError: a file's header cannot be read, or does not describe shards.
    """

    def __init__(self, folder: Path, files: Iterable[str]):
        self.folder = folder
        self._stored: dict[str, list[StoredShard]] = defaultdict(list)
        for file in (folder / name for name in files):
            with _reading(file):
                check_regular(file)
                with safe_open(file, "pt") as opened:
                    self._add(file, opened)

    def _add(self, file: Path, opened: Any) -> None:
        """Remember the tensors of one open file."""
        header = opened.metadata()
        rank, size = int(header["rank"]), int(header["size"])
        shards = {name: Shard(*map(int, cut)) for name, cut in json.loads(header["shards"]).items()}
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            shard, shape = shards.get(name), opened.get_slice(name).get_shape()
            if not 0 <= rank < size:
                raise ValueError(f"tensor rank {rank} of {size}")
            if shard is not None and not (0 <= shard.dim < len(shape) and 1 <= shard.blocks <= shape[shard.dim]):
                raise ValueError(f"{name} of shape {shape} cannot be cut by {shard}")
            self._stored[name].append(StoredShard(file, shard, rank, size))

    def names(self) -> list[str]:
        """Return the names of all weights, buffers and moments of the checkpoint."""
        return list(self._stored)

    def whole(self, name: str) -> torch.Tensor:
        """Return the whole tensor ``name``, fp32 on the CPU."""
        return self.part(name, None, TensorParallelGroup())

    def for_rank(self, group: TensorParallelGroup) -> Callable[[str, Shard | None], torch.Tensor]:
        """Return a function of name and shard that reads this rank of ``group``'s shard of a tensor."""
        return lambda name, shard: self.part(name, shard, group)

    def part(self, name: str, shard: Shard | None, group: TensorParallelGroup) -> torch.Tensor:
        """Return the shard of tensor ``name`` that this rank of ``group`` holds, fp32 on the CPU.

        Args:
            name: of a weight, buffer or moment.
            shard: how the reading run cuts the tensor; None to read it whole.
            group: rank and size of the reading tensor-parallel group.

        Raises:
            UserError: no file holds the tensor, or a file cannot be read.
        """
        stored = self._stored.get(name)
        if not stored:
            raise UserError(self.folder, f"holds no {name}", "use another checkpoint of the run")
        if shard is not None:
            return _assemble(name, stored, shard, group)
        if stored[0].shard is not None:
            return _assemble(name, stored, stored[0].shard, TensorParallelGroup())
        return _read(stored[0], name, ())


def _assemble(name: str, stored: list[StoredShard], shard: Shard, group: TensorParallelGroup) -> torch.Tensor:
    """Put together what a rank of ``group`` holds from the overlaps with each stored shard."""
    if any(source.shard is not None and source.size > len(stored) for source in stored):  # before memory is taken
        raise _unreadable(stored[0].file, ValueError(f"the files hold {name} in part"))
    shape = _whole_shape(stored[0], name)
    result = torch.empty([n // group.size if dim == shard.dim else n for dim, n in enumerate(shape)])
    before = (slice(None),) * shard.dim
    for start, length, offset in shard.pieces(shape, group.rank, group.size):
        missing = length
        for source in stored:
            for source_start, source_length, source_offset in _stored_ranges(source, shape, shard):
                low, high = max(start, source_start), min(start + length, source_start + source_length)
                if low < high:
                    there, here = source_offset - source_start, offset - start
                    values = _read(source, name, (*before, slice(low + there, high + there)))
                    result[(*before, slice(low + here, high + here))] = values
                    missing -= high - low
        if missing:
            raise _unreadable(stored[0].file, ValueError(f"the files hold {name} in part, or twice"))
    return result


def _stored_ranges(stored: StoredShard, shape: tuple[int, ...], shard: Shard) -> list[tuple[int, int, int]]:
    """Return (start in the whole, length, start in the file) along ``shard.dim`` of each range that a file holds."""
    if stored.shard is None:
        return [(0, shape[shard.dim], 0)]
    return stored.shard.pieces(shape, stored.rank, stored.size)


def _whole_shape(stored: StoredShard, name: str) -> tuple[int, ...]:
    with _reading(stored.file), safe_open(stored.file, "pt") as opened:
        shape = opened.get_slice(name).get_shape()
    return tuple(shape) if stored.shard is None else stored.shard.whole_shape(shape, stored.size)


def _read(stored: StoredShard, name: str, index: tuple[slice, ...]) -> torch.Tensor:
    """Return tensor ``name`` of one file; only the slices of ``index`` are read unless it is empty."""
    with _reading(stored.file), safe_open(stored.file, "pt") as opened:
        return opened.get_slice(name)[index] if index else opened.get_tensor(name)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a damaged ``file`` makes of reading it into a ``UserError`` that names it."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:_LONGEST_REASON] if str(error) else type(error).__name__
    return UserError(file, f"cannot be read: {reason}", "remove its folder to fall back to an older checkpoint")
