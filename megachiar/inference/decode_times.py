"""Time generation token by token, as ``megachiar bench-decode`` says."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from megachiar.benchmark import Spread, machine, measure_interleaved, write_json
from megachiar.config.model import ModelConfig
from megachiar.errors import UserError
from megachiar.inference.engine import Engine, Request
from megachiar.inference.sampling import Sampling
from megachiar.model import ChiarFormer, build_model
from megachiar.model.kv_cache import DecodingCache, SequenceCache

CACHED, FULL, DENSE, PEER = "cache", "full pass a token", "cache, dense", "transformers, dense"

Clock = Callable[[], float]


def time_decoding(options: argparse.Namespace) -> None:
    """Run the measurements of the command line, print them, and write them to ``--json``."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.precision)
    routed, dense = (build_model(config, 0, dtype=dtype).eval() for config in configs(options))
    peer = None if options.without_transformers else dense_peer(options, dtype)
    print(f"d {options.hidden_size}, {options.layers} layers, {options.precision}; {machine(torch.device('cpu'))}")
    sizes = {"routed": routed.parameter_count(), "dense": dense.parameter_count()}
    if peer is not None:
        sizes["transformers"] = sum(parameter.numel() for parameter in peer.parameters())
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))
    record: dict[str, Any] = {"machine": machine(torch.device("cpu")), "parameters": sizes, "batches": {}}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for batch in options.batch:
        prompts = torch.randint(options.vocab_size, (batch, options.context)).tolist()
        record["batches"][batch] = compare(options, prompts, routed, dense, peer, clock)
    record["cache_bytes"] = compare_caches(options, routed, dense)
    write_json(options.json, record)


def configs(options: argparse.Namespace) -> tuple[ModelConfig, ModelConfig]:
    """Return the configs of a model whose keys are those of routed tokens, and of the dense one of its size."""
    base = {
        "num_layers": options.layers,
        "hidden_size": options.hidden_size,
        "num_attention_heads": options.heads,
        "vocab_size": options.vocab_size,
        "max_sequence_length": options.context + options.tokens + 1,
    }
    # A random router computes what a threshold router does, and its share is known.
    router = {"kind": "random", "attention_share": options.attention_share}
    routed = base | {"router": router, "attention": {"keys": "routed"}}
    return ModelConfig.model_validate(routed), ModelConfig.model_validate(base | {"kind": "baseline"})


def compare(
    options: argparse.Namespace,
    prompts: list[list[int]],
    routed: ChiarFormer,
    dense: ChiarFormer,
    peer: Any,
    clock: Clock,
) -> dict[str, Any]:
    """Time one batch, print it, and return seconds a step of each contender and the ratios."""
    contenders = {
        CACHED: lambda: seconds_a_step(routed, prompts, options.tokens, clock),
        FULL: lambda: seconds_of_full_pass(routed, prompts, clock),
        DENSE: lambda: seconds_a_step(dense, prompts, options.tokens, clock),
    }
    if peer is not None:
        contenders[PEER] = lambda: seconds_of_peer(peer, prompts, options.tokens, clock)
    for run in contenders.values():  # warm up
        run()
    times = measure_interleaved(contenders, options.rounds)
    print(f"\nbatch {len(prompts)}, {options.context} tokens of context")
    record: dict[str, Any] = {"seconds": times.seconds, "ratios": {}}
    for name in contenders:
        spread = times.spread(name)
        rate = Spread(*(len(prompts) / seconds for seconds in spread))
        print(f"  {name:21} {spread.format(' ms', 1000)} a step, {rate.median:,.1f} tokens/s")
    for other in (FULL, PEER, DENSE):
        if other in contenders:
            ratio = times.speed_up(CACHED, over=other)
            record["ratios"][other] = ratio._asdict()
            print(f"  {CACHED} over {other:21} {ratio.format('x')}")
    return record


@torch.inference_mode()
def seconds_a_step(model: ChiarFormer, prompts: list[list[int]], tokens: int, clock: Clock) -> float:
    """Return the mean seconds of the steps that follow the reading of the prompts."""
    engine = Engine(model, most_running=len(prompts))
    for prompt in prompts:
        engine.add(Request(prompt, tokens + 1, Sampling(temperature=0.0)))
    engine.step()
    start = clock()
    for _ in range(tokens):
        engine.step()
    return (clock() - start) / tokens


@torch.inference_mode()
def seconds_of_full_pass(model: ChiarFormer, prompts: list[list[int]], clock: Clock) -> float:
    """Return the seconds of one pass over all tokens, with all their logits, of which the last are taken."""
    tokens = torch.tensor(prompts)
    start = clock()
    model(tokens).logits[:, -1].argmax(-1)
    return clock() - start


def dense_peer(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Return a GPT-NeoX of transformers with the shapes of the dense model.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")  # its types differ from version to version
    except ImportError:
        remedy = "pip install 'megachiar[hf]', or give --without-transformers"
        raise UserError("transformers", "is not installed", remedy) from None
    config = transformers.GPTNeoXConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden_size,
        rotary_pct=1.0,
        max_position_embeddings=options.context + options.tokens + 1,
        use_parallel_residual=False,
        tie_word_embeddings=True,
    )
    peer = transformers.GPTNeoXForCausalLM(config).to(dtype).eval()
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer


class _Stamps:
    """Note the time of each token that ``generate`` streams; the prompt is streamed first."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of a token."""
        self.times.append(self._clock())

    def end(self) -> None:
        """Do nothing at the end."""


def seconds_of_peer(peer: Any, prompts: list[list[int]], tokens: int, clock: Clock) -> float:
    """Return the mean seconds of the steps of ``generate()`` that follow the reading of the prompts."""
    stamps = _Stamps(clock)
    inputs = torch.tensor(prompts)
    mask = torch.ones_like(inputs)
    peer.generate(inputs, attention_mask=mask, max_new_tokens=tokens + 1, do_sample=False, streamer=stamps)
    _, first, *others = stamps.times
    return (others[-1] - first) / len(others)


@torch.inference_mode()
def compare_caches(options: argparse.Namespace, routed: ChiarFormer, dense: ChiarFormer) -> dict[str, float]:
    """Count the bytes that both models keep of a context, print them, and return them with their ratio."""
    tokens = torch.randint(options.vocab_size, (1, options.context))
    sizes = {}
    for name, model in (("routed", routed), ("dense", dense)):
        cache = SequenceCache()
        model(tokens, cache=DecodingCache([cache]), last_logits=True)
        sizes[name] = float(cache.num_bytes)
    ratio = sizes["routed"] / sizes["dense"]
    share = options.attention_share
    print(f"\ncache of {options.context} tokens: {sizes['routed'] / 2**20:.2f} MiB at share {share:g}, keys of routed")
    print(f"tokens; {sizes['dense'] / 2**20:.2f} MiB of the dense model: {ratio:.2f} of it")
    return sizes | {"ratio": ratio}
