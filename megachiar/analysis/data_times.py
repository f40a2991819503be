"""Time the data tools, beside Megatron-LM's, as ``megachiar bench-data`` says."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

from megachiar.benchmark import Spread, Times, measure_interleaved, write_json
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer
from megachiar.data.sampling.dataset import build_training_samples
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.index_format import HEADER, MAGIC, VERSION
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

MEGA = 1_000_000
TEXT_SUFFIXES = (".py", ".pyi", ".md", ".txt", ".rst", ".h", ".hpp")
SECONDS_BETWEEN_LOOKS = 0.05  # between two measurements of the memory of a process and its children
VOCABULARY = 32_000
TRAINING_MEGABYTES = 8  # of text that the tokenizer is trained on
DOCUMENTS, TOKENS_PER_DOCUMENT = 10_000_000, 500  # of the large synthetic dataset
SEQUENCE_LENGTH = 2048
CHARACTERS_OF_A_FILE = 400  # of the many


def time_data_tools(options: argparse.Namespace) -> None:
    """Run the measurements of the command line, print them, and write them to ``--json``."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        record = {"preprocess": preprocess, "files": many_files, "open": open_large, "read": read}[options.what](
            options, Path(folder)
        )
    write_json(options.json, {"options": {k: str(v) for k, v in vars(options).items()}, **record})


# ------------------------------------------------------------------------------------------------ preprocessing


def preprocess(options: argparse.Namespace, folder: Path) -> dict:
    """Time our engines and the peer's tools on one corpus in turn, and print rates, memory and ratios."""
    corpus = write_corpus(folder / "corpus.jsonl", options.megabytes)
    tokenizer = make_tokenizer(folder)
    commands = our_commands(options, corpus, tokenizer, folder) | peer_commands(options, corpus, tokenizer, folder)

    def contender(name: str, look: bool = False) -> Callable[[], float]:
        def measure() -> float:
            for path in outputs(folder, name):
                path.unlink()
            seconds, peak = carry_out(commands[name], look)
            return peak if look else seconds

        return measure

    # Memory is measured apart, since measuring takes time, most from the peers.
    memory = {name: contender(name, look=True)() for name in commands}
    times = measure_interleaved({name: contender(name) for name in commands}, options.rounds)
    size = corpus.stat().st_size / MEGA
    print(f"{size:.0f} MB of jsonl, {options.workers} workers, {options.rounds} rounds: median (quartiles)")
    for name in commands:
        seconds = times.spread(name)
        print(f"  {name:24} {seconds.format(' s')}, {size / seconds.median:.1f} MB/s; at most {memory[name]:.0f} MiB")
    ratios = compare(times, memory, commands)
    compare_files(folder, list(commands))
    return {"seconds": times.seconds, "memory_mib": memory, "ratios": ratios, "megabytes": size}


def compare(times: Times, memory: dict[str, float], names: dict) -> dict[str, float]:
    """Print how much faster each of our engines is than each tool of the peer, and return the ratios of the times."""
    ratios = {}
    for ours in (name for name in names if name.startswith("ours")):
        for peer in (name for name in names if name.startswith("peer")):
            speed = times.speed_up(ours, peer)
            room = memory[ours] / memory[peer]
            print(f"  {ours} is {speed.format('x')} as fast as {peer}, with {room:.2f}x of its memory")
            ratios[f"{ours} over {peer}"] = speed.median
    return ratios


def compare_files(folder: Path, names: list[str]) -> None:
    """Print whether all contenders wrote the same tokens."""
    contents: dict[bytes, list[str]] = {}
    for name in names:
        (path,) = (path for path in outputs(folder, name) if path.suffix == ".bin")
        contents.setdefault(path.read_bytes(), []).append(name)
    verdict = "the same bytes" if len(contents) == 1 else f"DIFFERENT bytes: {list(contents.values())}"
    print(f"  all wrote {verdict}")


def outputs(folder: Path, name: str) -> list[Path]:
    """Return the files that a contender wrote; Megatron appends ``_text_document`` to the prefix."""
    prefix = name.replace(" ", "_")
    stems = (prefix, f"{prefix}_text_document")
    return [path for path in folder.iterdir() if path.stem in stems]


def our_commands(options: argparse.Namespace, corpus: Path, tokenizer: Path, folder: Path) -> dict[str, list[str]]:
    """Return, for each engine to be measured, the command that tokenizes the corpus with it."""
    common = [sys.executable, "-m", "megachiar", "preprocess", "--input", str(corpus), "--append-eod"]
    common += ["--tokenizer", str(tokenizer / "tokenizer.json"), "--workers", str(options.workers)]
    return {
        f"ours {engine}": [*common, "--engine", engine, "--output-prefix", str(folder / f"ours_{engine}")]
        for engine in options.engines
    }


def peer_commands(options: argparse.Namespace, corpus: Path, tokenizer: Path, folder: Path) -> dict[str, list[str]]:
    """Return the peer's commands that tokenize the corpus; none without ``--peer``."""
    if options.peer is None:
        return {}
    tool = options.peer / "tools" / "preprocess_data.py"
    if not tool.exists():
        raise UserError("--peer", f"{tool} does not exist", "give the folder of a Megatron-LM checkout")
    common = ["--input", str(corpus), "--append-eod", "--tokenizer-type", "HuggingFaceTokenizer"]
    common += ["--tokenizer-model", str(tokenizer), "--output-prefix"]
    python, fast = options.peer_python, tool.with_name("preprocess_data_fast.py")
    commands = {
        "peer": [python, str(tool), *common, str(folder / "peer"), "--workers", str(options.workers)],
        "peer fast": [python, str(fast), *common, str(folder / "peer_fast"), "--use-gigatoken"],
    }
    return {name: command for name, command in commands.items() if name in options.peer_tools}


def carry_out(command: list[str], look: bool) -> tuple[float, float]:
    """Run a command and measure it.

    Args:
        command: the program with its arguments.
        look: measure memory as well.

    Returns:
        its seconds, and the most memory in MiB that it and its children held, each shared page counted once; 0 MiB
        without ``look``.
    """
    peak, began = 0.0, time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while look and process.poll() is None:
            peak = max(peak, held_by(process.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        process.wait()
        seconds = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")[-2000:]
            raise UserError(" ".join(command), f"ended with code {process.returncode}: {text}", "run it by itself")
    return seconds, peak


def held_by(process: int) -> float:
    """Return the MiB that a process and its children hold, each shared page counted once."""
    total = 0
    try:
        parent = psutil.Process(process)
        for member in (parent, *parent.children(recursive=True)):
            total += member.memory_full_info().pss
    except psutil.Error:  # the process ended in between
        pass
    return total / 2**20


def write_corpus(path: Path, megabytes: int) -> Path:
    """Write text files of this Python's installation as jsonl until there are ``megabytes`` of text."""
    room = megabytes * MEGA
    with open(path, "w") as file:
        while room > 0:
            before = room
            for text in installed_texts():
                file.write(json.dumps({"text": text}) + "\n")
                room -= len(text.encode())
                if room <= 0:
                    return path
            if room == before:
                raise UserError(path, "found no text in this installation", "use a full Python installation")
            print(f"  the installation's text comes again: {(megabytes * MEGA - room) / MEGA:.0f} MB so far")
    return path


def installed_texts() -> Iterator[str]:
    """Yield the text files of this Python's installation."""
    for root in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in TEXT_SUFFIXES and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                if text.strip() and "<|" not in text:  # the peer makes control tokens of control strings
                    yield text


def make_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE and return its folder, which has the files of a Hugging Face tokenizer."""
    output = folder / "tokenizer"
    output.mkdir()
    sample = write_corpus(folder / "sample.jsonl", TRAINING_MEGABYTES)
    train_tokenizer(TrainingSettings(find_sources([sample]), output / "tokenizer.json", VOCABULARY, "huggingface"))
    described = json.loads((output / "tokenizer.json").read_text())
    end = next(token["content"] for token in described["added_tokens"] if token["special"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (output / "tokenizer_config.json").write_text(json.dumps(config))
    return output


def many_files(options: argparse.Namespace, folder: Path) -> dict:
    """Time the same documents as lines of one file and as files of a folder."""
    tokenizer = make_tokenizer(folder)
    corpora = {"one file": folder / "one.jsonl", "many files": folder / "many"}
    write_twice(corpora["one file"], corpora["many files"], options.files)
    commands = {}
    for name, corpus in corpora.items():
        for engine, command in our_commands(options, corpus, tokenizer, folder).items():
            title = f"{engine.removeprefix('ours ')}, {name}"
            commands[title] = [*command[:-1], str(folder / title.replace(" ", "_"))]

    def contender(title: str) -> Callable[[], float]:
        def measure() -> float:
            for path in outputs(folder, title):
                path.unlink()
            return carry_out(commands[title], look=False)[0]

        return measure

    for title in commands:
        contender(title)()  # brings every file into the page cache
    times = measure_interleaved({title: contender(title) for title in commands}, options.rounds)
    print(f"{options.files:,} documents of {CHARACTERS_OF_A_FILE} characters, {options.workers} workers")
    ratios = {}
    for engine in options.engines:
        one, many = f"{engine}, one file", f"{engine}, many files"
        ratio = times.speed_up(one, over=many)
        ratios[engine] = ratio.median
        seconds = f"{times.spread(one).format(' s')} from one file, {times.spread(many).format(' s')} from many"
        print(f"  {engine}: {seconds}: {ratio.format('x')} as long")
    compare_files(folder, list(commands))
    return {"seconds": times.seconds, "ratios": ratios}


def write_twice(one: Path, many: Path, files: int) -> None:
    """Write ``files`` documents as lines of ``one`` and as files in folders of ``many``."""
    size = CHARACTERS_OF_A_FILE
    texts = itertools.chain.from_iterable(installed_texts() for _ in itertools.repeat(None))
    pieces = (text[first : first + size] for text in texts for first in range(0, len(text), size))
    with open(one, "w") as file:
        for number, piece in enumerate(itertools.islice(filter(str.strip, pieces), files)):
            file.write(json.dumps({"text": piece}) + "\n")
            path = many / f"{number // 1000:05d}" / f"{number:08d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(piece.encode())


# ------------------------------------------------------------------------------------------------ opening and reading


def open_large(options: argparse.Namespace, folder: Path) -> dict:
    """Measure time and memory until the first sample of a sparse dataset of 10 M documents, in a process of its own."""
    prefix = write_sparse(folder / "large", DOCUMENTS, TOKENS_PER_DOCUMENT)
    program = (
        "import sys, time, psutil\n"
        "from megachiar.data.sampling.dataset import build_training_samples\n"
        "me = psutil.Process(); before = me.memory_full_info().uss; began = time.perf_counter()\n"
        f"samples = build_training_samples([(sys.argv[1], 1.0)], {SEQUENCE_LENGTH}, 0)\n"
        "samples.sample(0); seconds = time.perf_counter() - began\n"
        "peak = float(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(seconds, peak / 2**10, (me.memory_full_info().uss - before) / 2**20)\n"
    )
    rounds = []
    for _ in range(options.rounds):
        done = subprocess.run([sys.executable, "-c", program, str(prefix)], capture_output=True, text=True, check=True)
        rounds.append([float(value) for value in done.stdout.split()])
    seconds, peak, added = (Spread.of(list(values)) for values in zip(*rounds, strict=True))
    print(f"{DOCUMENTS:,} documents, {DOCUMENTS * TOKENS_PER_DOCUMENT:,} tokens, sequence length {SEQUENCE_LENGTH}")
    print(
        f"  first sample after {seconds.format(' s', digits=4)}; "
        f"memory of its own added {added.format(' MiB', digits=1)}"
    )
    print(f"  the whole process, with Python and its libraries, at its peak: {peak.format(' MiB', digits=0)}")
    return {"seconds": seconds, "added_mib": added, "peak_mib": peak}


def write_sparse(prefix: Path, documents: int, tokens: int) -> Path:
    """Write a dataset of equal documents of zeros that take no room on the disk."""
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        np.full(documents, tokens, "<i4").tofile(index)
        (np.arange(documents, dtype="<i8") * tokens * 2).tofile(index)
        np.arange(documents + 1, dtype="<i8").tofile(index)
    with open(bin_path(prefix), "wb") as file:
        file.truncate(documents * tokens * 2)
    return prefix


PEER_READER = """
import sys, time
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
import numpy as np, torch

class Tokenizer:
    eod = 0
    pad = 1
    vocab_size = 32000
    unique_identifiers = {"class": "none"}

prefix, length, count, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = GPTDatasetConfig(
    random_seed=0, sequence_length=length, split=None, blend_per_split=[([prefix], None), None, None],
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    tokenizer=Tokenizer(), mid_level_dataset_surplus=0.005,
)
indexed = IndexedDataset(prefix, mmap=True)
documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
for number in range(rounds + 1):
    began = time.perf_counter()
    for k in range(number * count, (number + 1) * count):
        dataset[k % len(dataset)]
    if number:
        print("RATE", count / (time.perf_counter() - began))
"""


def read(options: argparse.Namespace, folder: Path) -> dict:
    """Count samples a second in training order, from random tokens that are not zero."""
    prefix, rng = folder / "tokens", np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        for _ in range(options.megabytes):
            lengths = rng.integers(100, 900, 1000)
            builder.add_documents(rng.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.int64), lengths)
    stream = build_training_samples([(prefix, 1.0)], SEQUENCE_LENGTH, 0)
    count = min(2000, stream.order.orders[0].samples_per_epoch // (options.rounds + 1))
    ours: dict[str, list[float]] = {"one by one": [], "by 8": []}
    for number in range(options.rounds + 1):
        first = number * count
        rates = {}
        began = time.perf_counter()
        for position in range(first, first + count):
            stream.sample(position)
        rates["one by one"] = count / (time.perf_counter() - began)
        began = time.perf_counter()
        for position in range(first, first + count, 8):
            stream.batch(range(position, position + 8))
        rates["by 8"] = count / (time.perf_counter() - began)
        if number:  # the first round warms up
            for name, rate in rates.items():
                ours[name].append(rate)
    record: dict = {"samples_per_second": dict(ours)}
    for name, our_rates in ours.items():
        print(f"  ours, {name}: {Spread.of(our_rates).format(digits=0)} samples/s of {SEQUENCE_LENGTH} tokens")
    if options.peer is not None:
        environment = {**os.environ, "PYTHONPATH": f"{options.peer}:{os.environ.get('PYTHONPATH', '')}"}
        arguments = [str(prefix), str(SEQUENCE_LENGTH), str(count), str(options.rounds)]
        command = [options.peer_python, "-c", PEER_READER, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        theirs = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RATE")]
        if not theirs:
            raise UserError("--peer", f"its GPTDataset did not run: {done.stderr[-2000:]}", "use --peer-python")
        print(f"  peer's GPTDataset: {Spread.of(theirs).format(digits=0)} samples/s")
        for name, our_rates in ours.items():
            ratio = Spread.of([a / b for a, b in zip(our_rates, theirs, strict=True)])
            print(f"  ours, {name}, is {ratio.format('x')} as fast")
        record["samples_per_second"]["peer"] = theirs
    return record
