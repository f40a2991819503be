"""A small corpus, tokenizers trained on it, and ways to run tools, for the tests of tokenizers and preprocessing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
from pathlib import Path

import zstandard

from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.choices import TrainedKind
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer

COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
ROOT = Path(__file__).resolve().parents[2]
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "old", "ships", "sail", "home")
DOCUMENTS = [
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n",
    "  two spaces,\ttabs\t\tand   runs of them  \n\n\n  indented\r\nwindows line",
    "Grüße aus Zürich – naïve café, 東京 and 🙂🙃 emoji, ﬁ ligature, e\u0301 combining, nul \x00, bom \ufeff",
    "control strings: <s> </s> <unk> <|endoftext|> <0x41> [SEP] are text here",
    "1234567890 3.14159 2,000,000",
]


def numbered_documents(count: int) -> list[str]:
    """Return ``count`` distinct documents of about 100 bytes, the same in each call."""
    return [
        f"Document {number}: " + " ".join(WORDS[(number * 7 + step * step) % len(WORDS)] for step in range(16))
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """Write ``texts`` as JSON lines, compressed if the suffix says so, and return the path."""
    content = "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)(content))
    return path


def write_other_text(path: Path) -> None:
    """Change the last ``e`` of a file; its size and the time of its content stay."""
    status, (head, _, tail) = path.stat(), path.read_bytes().rpartition(b"e")
    path.write_bytes(head + b"i" + tail)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def train(folder: Path, kind: TrainedKind, vocab_size: int = 400) -> Path:
    """Train a tokenizer of this kind in ``folder``, on the documents of this module, and return its path."""
    corpus = write_jsonl(folder / "training.jsonl", numbered_documents(200) + DOCUMENTS)
    output = folder / {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}[kind]
    train_tokenizer(TrainingSettings(find_sources([corpus]), output, vocab_size, kind))
    return output


def run_tool(name: str, *arguments: object, stdin: bytes | None = None, **options) -> subprocess.CompletedProcess:
    """Run ``tools/NAME.py`` as a user does, and return the finished process with its output as text."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def expected_index(lengths: list[int], code: int, itemsize: int) -> bytes:
    """Return the .idx of documents of one sequence each, written from the description of the format alone."""
    pointers = [sum(lengths[:number]) * itemsize for number in range(len(lengths))]
    count = len(lengths)
    return b"".join(
        (
            b"MMIDIDX\x00\x00",
            struct.pack("<QBQQ", 1, code, count, count + 1),
            struct.pack(f"<{count}i", *lengths),
            struct.pack(f"<{count}q", *pointers),
            struct.pack(f"<{count + 1}q", *range(count + 1)),
        )
    )
