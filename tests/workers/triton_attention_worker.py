"""Compare routed attention's kernels with the dense formula in float64, and print the greatest deviations as JSON.

    python triton_attention_worker.py cpu|cuda pairs|all          on a CPU with TRITON_INTERPRET=1
    python triton_attention_worker.py dispatch                    the functions that choose between the kernels

With ``pairs`` half of all cases run, in which any two of length, rows, type, dropout and documents still meet.
``tests/kernels/test_triton.py`` starts it.
"""

from __future__ import annotations

import json
import math
import sys

import torch

from megachiar.kernels import attention, gpu, triton_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import KeyedDropout, column_keys, head_keys, row_keys
from megachiar.kernels.hash import GOLDEN, mix64, wrap64
from megachiar.kernels.routed_rows import RoutedRows
from megachiar.kernels.triton_attention import Mask, RowLayout, attend

HEADS, SITE, RATE = 2, 5, 0.25
LENGTHS = ((1, 16), (17, 16), (40, 16), (20, 64))
ROUTINGS = ("all", "some", "few", "one sequence without", "last of each", "first of each")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    if sys.argv[1] == "dispatch":
        print(json.dumps(dispatched()))
        return
    device, pairs = torch.device(sys.argv[1]), sys.argv[2] == "pairs"
    found = {}
    for i, (length, c) in enumerate(LENGTHS):
        for j, routing in enumerate(ROUTINGS):
            for k, (name, dtype) in enumerate(DTYPES.items()):
                for dropped, documents in ((False, False), (True, False), (False, True), (True, True)):
                    if routing not in ("all", "some") and (name == "bf16" or (documents and dropped)):
                        continue
                    if pairs and (i + j + k + dropped + documents) % 2:
                        continue
                    case = f"{name}: {routing} of {length}, {c} channels"
                    case += f"{', dropout' if dropped else ''}{', documents' if documents else ''}"
                    found[case] = deviations(length, c, routing, dtype, dropped, documents, device)
    print(json.dumps(found))


def deviations(
    length: int, c: int, routing: str, dtype: torch.dtype, dropped: bool, documents: bool, device: torch.device
) -> dict[str, float]:
    """Return the deviations of the output and of the gradients of q, k and v, by ``relative``."""
    generator = torch.Generator().manual_seed(length * c)
    routed = route(routing, length, generator)
    b = len(routed)
    openings = document_openings(b, length, generator) if documents else torch.zeros(b, length, dtype=torch.int64)
    k, v, q_of_all, direction = (torch.randn(b, length, HEADS, c, generator=generator).to(dtype) for _ in range(4))
    keys = row_keys(3, torch.arange(b)[:, None], torch.arange(length))  # (b, length)
    rows = routed.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(routed.sum(1).cumsum(0), (1, 0)).int()
    first_keys = torch.arange(0, (b + 1) * length, length, dtype=torch.int32)
    document_starts = (openings + first_keys[:-1, None]).flatten()[rows].int() if documents else None
    row_layout = RowLayout(starts, first_keys, rows.int(), length, length, document_starts)
    row_layout = RowLayout(*(x.to(device) if torch.is_tensor(x) else x for x in row_layout))
    mixed = mix64(head_keys(keys, 1, HEADS).transpose(1, 2) + wrap64(SITE * GOLDEN))  # (b, h, length)
    columns = column_keys(0, length, torch.device("cpu"))
    mask = Mask.of(KeyedDropout(RATE, keys.flatten()[rows].to(device), SITE), 1, HEADS, length) if dropped else None
    inputs = [x.to(device).requires_grad_() for x in (q_of_all.flatten(0, 1)[rows], k, v)]
    output = attend(inputs[0], *(x.flatten(0, 1) for x in inputs[1:]), row_layout, None, mask)
    weight = direction.flatten(0, 1)[rows].to(device)
    of_inputs = torch.autograd.grad(output, inputs, weight)

    by_head = [x.double().transpose(1, 2).requires_grad_() for x in (q_of_all, k, v)]
    whole = dense(*by_head, stays_of(mixed, columns) if dropped else None, openings)  # (b, h, length, c)
    wanted = routed[:, None, :, None].double()
    expected = torch.autograd.grad((whole * direction.double().transpose(1, 2) * wanted).sum(), by_head)
    of_q, of_k, of_v = (x.transpose(1, 2) for x in expected)
    pairs = {
        "output": (output, whole.detach().transpose(1, 2).flatten(0, 1)[rows]),
        "q": (of_inputs[0], of_q.flatten(0, 1)[rows]),
        "k": (of_inputs[1], of_k),
        "v": (of_inputs[2], of_v),
    }
    return {name: relative(got.detach().cpu().double(), want) for name, (got, want) in pairs.items()}


def dispatched() -> dict[str, float]:
    """Return how far the functions of ``kernels.attention`` with kernels deviate from themselves without."""
    length, heads, c = 20, 2, 16
    q, k, v = (torch.randn(3, heads, length, c, generator=torch.Generator().manual_seed(i)) for i in range(3))
    indices = route("some", length, torch.Generator().manual_seed(5)).flatten().nonzero().flatten()
    rows = RoutedRows(indices, sequences=3, length=length)
    keys = row_keys(3, torch.arange(3)[:, None], torch.arange(length)).flatten()
    packed_q, packed_k, packed_v = (x.transpose(1, 2).flatten(0, 1)[indices] for x in (q, k, v))
    starts = document_openings(3, length, torch.Generator().manual_seed(6))
    found = {}
    for dropout in (None, KeyedDropout(RATE, keys, SITE)):
        calls = {}
        for name, of_all in (("", None), (", documents", starts)):
            options = AttentionOptions(dropout, first_head=1, document_starts=of_all)
            of_rows = AttentionOptions(
                dropout=dropout and dropout.select(indices),
                first_head=1,
                document_starts=of_all.flatten()[indices] if of_all is not None else None,
            )
            calls[f"causal{name}"] = lambda o=options: attention.causal_attention(q, k, v, o)
            calls[f"routed{name}"] = lambda o=of_rows: attention.routed_attention(packed_q, k, v, rows, o)
            calls[f"self{name}"] = lambda o=of_rows: attention.routed_self_attention(
                packed_q, packed_k, packed_v, rows, o
            )
        for name, call in calls.items():
            expected = call()
            launched = []
            has_kernels, attend = gpu.has_kernels, triton_attention.attend
            gpu.has_kernels = lambda device: True
            triton_attention.attend = lambda *a, call=attend, seen=launched: seen.append(0) or call(*a)
            got = call()
            gpu.has_kernels, triton_attention.attend = has_kernels, attend
            assert launched or (dropout is None and name == "causal"), name  # without dropout torch's own is at hand
            found[f"{name}, {'dropout' if dropout else 'plain'}"] = relative(got, expected)
    return found


def route(routing: str, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return which tokens of 3 sequences are routed to attention, (3, length) bool."""
    routed = torch.rand(3, length, generator=generator) < {"some": 0.5, "few": 0.1}.get(routing, 0.6)
    match routing:
        case "all":
            routed[:] = True
        case "one sequence without":
            routed[1], routed[0, -1] = False, True
        case "last of each":
            routed[:], routed[:, -1] = False, True
        case "first of each":
            routed[:], routed[:, 0] = False, True
    return routed


def document_openings(sequences: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return where the document of each position begins, (sequences, length); the last sequence is one document."""
    opens = torch.rand(sequences, length, generator=generator) < 0.2
    opens[-1] = False
    return (opens * torch.arange(length)).cummax(1).values


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stays: torch.Tensor | None, openings: torch.Tensor
) -> torch.Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    hidden = hidden | (torch.arange(scores.shape[-1]) < openings[:, None, :, None])
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return (probabilities if stays is None else probabilities * stays / (1 - RATE)) @ v


def stays_of(keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return which of (b, h, rows, columns) dropout keeps, by its definition: integer arithmetic modulo 2^32."""
    half = 2**32
    first, second = (keys >> 32) % half, (keys % half) | 1
    number = ((first[..., None] ^ (columns.long() % half)) * 0x7FEB352D) % half
    number = number ^ (number >> 15)
    # A product of two 32-bit numbers does not fit in int64: by halves of the second one.
    low, high = second[..., None] % 2**16, second[..., None] >> 16
    number = (number * low + ((number * high) % 2**16) * 2**16) % half
    return ((number + 2**31) % half) >= int(RATE * 2**32)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1.0)).item()


if __name__ == "__main__":
    main()
