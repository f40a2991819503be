"""Parameters and optimizer state on disk, whatever layout wrote them: safetensors files by rank, read by name.

    weights-p00-t01-d00.safetensors      fp32 (master) weights by their names in the model
    optimizer-p00-t01-d00.safetensors    AdamW's moments: NAME.exp_avg and NAME.exp_avg_sq, fp32

p, t, d: the pipeline, tensor and data rank that wrote the file. The replicas of a parameter share out the writing. A
file's header says for each sharded parameter how it was cut (``shards``) and which piece this is; a reader takes from
all files what its own piece needs, so that a run of any layout reads the checkpoint of any other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megachiar.errors import UserError
from megachiar.parallel.shard import Shard
from megachiar.topology import TensorParallelGroup, Topology


@dataclass(frozen=True)
class Piece:
    """A tensor in a file: all of a parameter, or what ``rank`` of ``size`` held of it."""

    file: Path
    shard: Shard | None
    rank: int
    size: int


class ShardWriter:
    """Collects what this rank writes and writes it."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._tensors: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "optimizer": {}}
        self._shards: dict[str, list[int]] = {}
        self._count = 0

    def is_mine(self, shard: Shard | None) -> bool:
        """Whether this rank writes the next parameter: replicas take turns, and one tensor rank writes whole ones."""
        turn = self._count % self._topology.data_size
        self._count += 1
        return turn == self._topology.data_rank and (shard is not None or self._topology.tensor.rank == 0)

    def add(self, name: str, moment: str | None, tensor: torch.Tensor, shard: Shard | None) -> None:
        """Keep a weight (``moment`` None) or one of its moments, as fp32 on the CPU."""
        kind, name = ("weights", name) if moment is None else ("optimizer", f"{name}.{moment}")
        self._tensors[kind][name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if shard is not None:
            self._shards[name] = [shard.dim, shard.blocks]

    def write(self, folder: Path) -> None:
        t = self._topology
        place = f"p{t.pipeline_rank:02d}-t{t.tensor.rank:02d}-d{t.data_rank:02d}"
        for kind, tensors in self._tensors.items():
            if tensors:
                shards = {name: cut for name, cut in self._shards.items() if name in tensors}
                header = {"rank": str(t.tensor.rank), "size": str(t.tensor.size), "shards": json.dumps(shards)}
                save_file(tensors, folder / f"{kind}-{place}.safetensors", {"format": "pt", **header})


class Store:
    """What the files of a checkpoint hold, by name. Tensors are read when they are asked for, and only in part."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for file in sorted(folder.glob("*-p*-t*-d*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    header = opened.metadata()
                    shards = {name: Shard(*cut) for name, cut in json.loads(header["shards"]).items()}
                    for name in opened.keys():  # noqa: SIM118 (no mapping)
                        piece = Piece(file, shards.get(name), int(header["rank"]), int(header["size"]))
                        self._pieces[name].append(piece)
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise _unreadable(file, error) from error

    def names(self) -> list[str]:
        return list(self._pieces)

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, fp32 on the CPU."""
        return self.part(name, None, TensorParallelGroup())

    def reader(self, group: TensorParallelGroup) -> Callable[[str, Shard | None], torch.Tensor]:
        """Return a function that reads what this rank of ``group`` holds of a tensor."""
        return lambda name, shard: self.part(name, shard, group)

    def part(self, name: str, shard: Shard | None, group: TensorParallelGroup) -> torch.Tensor:
        """What a rank of ``group`` holds of tensor ``name`` where it is cut as ``shard`` says.

        Raises:
            UserError: no file has it, or a file cannot be read.
        """
        pieces = self._pieces.get(name)
        if not pieces:
            raise UserError(self.folder, f"holds no {name}", "use another checkpoint of the run")
        if shard is None and pieces[0].shard is None:
            return _read(pieces[0], name, ())
        if shard is None:
            shard, group = pieces[0].shard, TensorParallelGroup()
        return self._assembled(name, pieces, shard, group)

    def _assembled(self, name: str, pieces: list[Piece], shard: Shard, group: TensorParallelGroup) -> torch.Tensor:
        shape = _whole_shape(pieces[0], name)
        result = torch.empty([n // group.size if dim == shard.dim else n for dim, n in enumerate(shape)])
        for start, length, at in shard.pieces(shape, group.rank, group.size):
            for piece in pieces:
                for held_from, held, held_at in _held(piece, shape, shard):
                    low, high = max(start, held_from), min(start + length, held_from + held)
                    if low < high:
                        before, there, here = (slice(None),) * shard.dim, held_at - held_from, at - start
                        read = _read(piece, name, (*before, slice(low + there, high + there)))
                        result[(*before, slice(low + here, high + here))] = read
        return result


def _held(piece: Piece, shape: tuple[int, ...], shard: Shard) -> list[tuple[int, int, int]]:
    """As ``Shard.pieces``, of a piece in a file; a parameter that was not cut is one piece."""
    if piece.shard is None:
        return [(0, shape[shard.dim], 0)]
    return piece.shard.pieces(shape, piece.rank, piece.size)


def _whole_shape(piece: Piece, name: str) -> tuple[int, ...]:
    try:
        with safe_open(piece.file, "pt") as opened:
            shape = opened.get_slice(name).get_shape()
    except (SafetensorError, OSError) as error:
        raise _unreadable(piece.file, error) from error
    return tuple(shape) if piece.shard is None else piece.shard.whole_shape(shape, piece.size)


def _read(piece: Piece, name: str, index: tuple[slice, ...]) -> torch.Tensor:
    try:
        with safe_open(piece.file, "pt") as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(piece.file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        file, f"cannot be read: {str(error).splitlines()[0]}", "remove its folder to fall back to an older checkpoint"
    )
