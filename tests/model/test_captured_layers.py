"""Captured layers: bit for bit the numbers of layers that run as they are, and nothing that a replay would not see.

On a CPU operations are recorded and repeated (``graph_capture.OperationRecorder``), so that what Python computes at the
capture stays as it was, as in a CUDA graph.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from model_cases import MIDDLE, THREE, lively_model, small_model_config, token_batch
from support import pretrain, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.config.cuda_graphs import needs_static_shapes
from megachiar.errors import UserError
from megachiar.kernels import gpu
from megachiar.kernels.graph_capture import OperationRecorder
from megachiar.kernels.tables import cached_table, keep_tables
from megachiar.model import ChiarFormer
from megachiar.model.batch_layout import lay_out
from megachiar.model.captured_layers import SHAPES, WARM_UP, CapturedLayers
from megachiar.model.kv_cache import DecodingCache, SequenceCache
from megachiar.model.layer import RoutedLayer
from megachiar.model.static_shapes import check_kernels_of_graphs, use_static_shapes

END = 3
"""The token that ends a document."""
CASES: dict[str, dict[str, Any]] = {
    "threshold": {},
    "dropout, documents": {"dropout": 0.1},
    "routed keys, pre": {"attention": {"keys": "routed"}, "norm": "pre", "dropout": 0.1},
    "per layer": {"router": {"tau": (0.74, 0.83, 0.79)}},
    "hashed, regularised": {"router": {"kind": "hashed", "tau": MIDDLE, "collapse_weight": 0.3}},
    "random": {"router": {"kind": "random", "attention_share": 0.4, "seed": 5}},
    "of a share": {"router": {"target_share": 0.4}},
    "soft": {"router": {"kind": "soft"}, "dropout": 0.1},
    "soft of three, documents": {"router": {"kind": "soft", "operators": THREE, "collapse_weight": 0.3}},
    "gate of a prefix": {"meta_router": {"pool": "causal"}},
    "no gate": {"meta_router": {"pool": "none"}},
    "baseline": {"kind": "baseline", "dropout": 0.1},
}


class Trained:
    """A model that is trained by plain gradient descent, and counts the calls of Python in its layers."""

    def __init__(self, segment_length: int | None, documents: bool = False, device: str = "cpu", **fields: Any):
        dtype = torch.float64 if device == "cpu" else torch.float32
        model = lively_model(small_model_config(num_layers=5, **fields), dtype=dtype)
        self.model: ChiarFormer = model.train().to(device)
        self.device = device
        self.model.document_end = END if documents else None
        if needs_static_shapes(self.model.config):
            use_static_shapes(self.model)
        if segment_length is not None:
            captured = CapturedLayers(list(self.model.layers), segment_length, torch.device(device))
            self.model.captured_layers = captured
        self.calls = 0
        for layer in self.model.layers:
            layer.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def backward(
        self, step: int, sequences: int = 3, scale: float = 1.0, regularised: bool = True
    ) -> list[torch.Tensor]:
        """Add the gradients of a micro-batch, and return loss, regulariser, statistics and routes."""
        tokens = token_batch(sequences, length=13, seed=step).to(self.device)
        ids = torch.arange(sequences, device=self.device) + sequences * step
        output = self.model(tokens[:, :-1], tokens[:, 1:], ids)
        ((output.loss + output.regulariser if regularised else output.loss) * scale).backward()
        routed = (layer for layer in self.model.layers if isinstance(layer, RoutedLayer))
        routes = [layer.last_routes.clone() for layer in routed if layer.last_routes is not None]
        found = [output.loss, output.regulariser, *output.statistics, *routes]
        return [tensor.detach().double().nan_to_num() for tensor in found]

    def step(self, step: int, **fields: Any) -> list[torch.Tensor]:
        """Train a step on one micro-batch, and return its numbers and gradients."""
        self.model.zero_grad()
        found = self.backward(step, **fields)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight -= 0.05 * weight.grad
        return found + self.gradients()

    def gradients(self) -> list[torch.Tensor]:
        return [weight.grad.clone() for weight in self.model.parameters()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], within: float = 0) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within)


@pytest.fixture(params=(2, 5), ids=("segments of 2", "one segment"))
def pair(request):
    """A model whose layers are captured already, and the same without."""
    captured, plain = Trained(request.param), Trained(None)
    for step in range(WARM_UP + 1):
        assert_equal(captured.step(step), plain.step(step))
    return captured, plain


@pytest.mark.parametrize("segment_length", (1, 2, 5))
@pytest.mark.parametrize("case", CASES)
def test_captured_layers_learn_the_same_bit_by_bit(case, segment_length):
    """A segment of DCT mixing alone makes its matrix by another product than all layers together do."""
    captured, plain = (Trained(n, "documents" in case, **CASES[case]) for n in (segment_length, None))
    for step in range(WARM_UP + 3):
        calls = captured.calls
        expected = plain.step(step)
        assert_equal(captured.step(step), expected, within=1e-12 if segment_length == 1 else 0)
        assert captured.calls - calls == (5 if step <= WARM_UP else 0), "a replay calls no layer"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_graphs_learn_the_same_on_a_gpu(case):
    captured, plain = (Trained(n, "documents" in case, "cuda", **CASES[case]) for n in (2, None))
    for step in range(2 * WARM_UP):
        for found, expected in zip(captured.step(step), plain.step(step), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for model in (captured, plain):  # elsewhere: what was captured is given up, and captured anew
        for weight in model.model.parameters():
            weight.data = 0.9 * weight.data
    with pytest.warns(UserWarning, match="weights lie elsewhere"):
        again = captured.step(0)
    for found, expected in zip(again, plain.step(0), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_micro_batches_add_up(pair):
    """1 + 10 = 11: the gradients of a micro-batch are not those that the next one writes."""
    captured, plain = pair
    for model in pair:
        model.model.zero_grad()
        model.backward(7)
    first = captured.gradients()
    kept = [weight.grad for weight in captured.model.parameters()]
    for model in pair:
        model.backward(7, scale=10.0)
    assert_equal(captured.gradients(), plain.gradients())
    for eleven, one in zip(captured.gradients(), first, strict=True):
        torch.testing.assert_close(eleven, 11 * one, rtol=1e-9, atol=1e-9)
    captured.model.zero_grad(set_to_none=True)
    held = [gradient.clone() for gradient in kept]
    captured.backward(8)
    assert_equal(kept, held)


def test_a_regulariser_that_a_task_leaves_out_has_no_gradient():
    """As in mixed training: the gradient of the micro-batch before must not stay."""
    captured, plain = (Trained(n, router={"tau": MIDDLE, "collapse_weight": 0.3}) for n in (2, None))
    for step in range(2 * WARM_UP):
        for model in (captured, plain):
            model.model.zero_grad()
            model.backward(step, regularised=step % 2 == 0)
        assert_equal(captured.gradients(), plain.gradients())


def test_other_shapes_run_layer_by_layer_until_they_are_captured(pair):
    captured, plain = pair
    for sequences in range(1, 3 + SHAPES):
        for step in range(WARM_UP + 2):
            calls = captured.calls
            assert_equal(captured.step(step, sequences=sequences), plain.step(step, sequences=sequences))
        is_captured = sequences <= SHAPES
        assert (captured.calls == calls) == is_captured, "no more than so many shapes are captured"


def test_evaluation_and_decoding_between_steps_change_nothing(pair):
    captured, plain = pair
    tokens = token_batch(2)
    expected = plain.model.eval()(tokens).logits
    for model in (captured.model, captured.model.eval()):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-12)
            cache = DecodingCache(SequenceCache() for _ in tokens)
            parts = [model(part, cache=cache).logits for part in tokens.split((7, 5), 1)]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-10)
    plain.model.train(), captured.model.train()
    assert_equal(captured.step(9), plain.step(9))


def test_a_forward_pass_between_forward_and_backward_pass_is_an_error(pair):
    model = pair[0].model
    for other in (3, 2):  # sequences: micro-batches of another shape take the same memory
        first, second = (
            model.captured_layers.run(
                torch.ones(n * 12, 32, dtype=torch.float64), lay_out(model.config, torch.arange(n), 12)
            )[0]
            for n in (3, other)
        )
        second.sum().backward()
        with pytest.raises(AssertionError, match="later micro-batch"):
            first.sum().backward()


def test_weights_that_moved_are_captured_anew(pair):
    """DeepSpeed and loaded checkpoints may put weights into other memory."""
    captured, plain = pair
    for model in pair:
        for weight in model.model.parameters():
            weight.data = 0.9 * weight.data
    with pytest.warns(UserWarning, match="weights lie elsewhere"):
        found = captured.step(0)
    assert_equal(found, plain.step(0))
    assert_equal(captured.step(1), plain.step(1))
    for model in pair:  # other parameters in the same memory: their gradients are wanted
        for module in model.model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(weight.data))
    with pytest.warns(UserWarning, match="weights lie elsewhere"):
        found = captured.step(2)
    assert_equal(found, plain.step(2))
    assert_equal(captured.step(3), plain.step(3))


@pytest.mark.parametrize("router", ({}, {"target_share": 0.4}), ids=("fixed", "running"))
def test_thresholds_that_move_are_followed(router):
    captured, plain = (Trained(n, router={"tau": MIDDLE} | router) for n in (2, None))
    shares = set()
    for step in range(WARM_UP + 4):
        for model in (captured, plain):
            for layer in model.model.layers:
                if isinstance(layer, RoutedLayer):
                    layer.router.set_thresholds((0.74 + 0.02 * step,))
        found = captured.step(step)
        assert_equal(found, plain.step(step))
        shares.add(found[2][1].item())
    assert len(shares) > 4


def test_layers_whose_shapes_follow_the_routes_are_refused():
    model = lively_model(small_model_config()).train()
    model.captured_layers = CapturedLayers(list(model.layers), 2, torch.device("cpu"))
    tokens = token_batch(length=13)
    for _ in range(WARM_UP):
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    with pytest.raises(UserError, match=r"training.cuda_graphs: the layers cannot be captured: .*host would wait"):
        model(tokens[:, :-1], tokens[:, 1:])


def test_a_recorded_operation_sees_memory_and_no_number_of_the_host():
    x, factor = torch.ones(3), [2.0]
    replay, (product, total) = OperationRecorder().capture(lambda: ((x[1:] * factor[0]).add_(1), x.sum()))
    factor[0] = 5.0
    x.fill_(4)
    replay()
    assert product.tolist() == [9, 9] and total.item() == 12


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.index_put_((x > 1,), torch.ones(())),
    ],
)
def test_what_a_host_waits_for_cannot_be_captured(wait):
    with pytest.raises(RuntimeError, match="the host would wait"):
        OperationRecorder().capture(lambda: wait(torch.arange(4.0)))


def test_a_capture_keeps_the_tables_that_it_looked_up():
    make = cached_table(lambda size: torch.ones(size))
    replay, _ = OperationRecorder().capture(lambda: make(3).data_ptr())
    table = weakref.ref(make(3))
    make.cache_clear()
    assert table() is not None
    del replay
    assert table() is None


def test_tables_of_a_capture_are_kept():
    make = cached_table(lambda size: torch.zeros(size))
    with keep_tables() as kept:
        first = make(1)
    for size in range(2, 40):
        make(size)
    assert make(1) is not first, "the cache has given it up"
    assert kept[0] is first and len(kept) == 1


@pytest.fixture
def load(tmp_path):
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    return lambda *overrides: load_config(path, ["training.cuda_graphs=4", *overrides])


@pytest.mark.parametrize(
    ("reason", "overrides"),
    [
        ("pipeline_size is 2", ["parallel.pipeline_size=2"]),
        ("tensor_size is 2", ["parallel.tensor_size=2"]),
        ("tensor_size is 2", ["parallel.tensor_size=2", "parallel.sequence=true"]),
        ("zero_stage is 3", ["parallel.zero_stage=3"]),
        ("offload_optimizer is true", ["parallel.zero_stage=2", "parallel.offload_optimizer=true"]),
        ("activation_checkpoint_interval is set", ["training.activation_checkpoint_interval=1"]),
        ("compile is aot_eager", ["training.compile=aot_eager"]),
        ("static_shapes is false", ["training.static_shapes=false"]),
        ("router.kind is hard", ["model.router.kind=hard", "model.router.tau=null"]),
    ],
)
def test_what_cannot_be_captured_says_why(load, reason, overrides):
    with pytest.raises(UserError, match=f"training.cuda_graphs: is 4, but .*{reason}"):
        load(*overrides)


def test_soft_routers_need_no_static_shapes(load):
    assert load("model.router.kind=soft", "model.router.tau=null", "training.static_shapes=false")


@pytest.mark.parametrize(
    ("overrides", "are_needed"),
    [
        ([], True),
        (["model.kind=baseline"], False),
        (["model.kind=baseline", "model.dropout=0.1"], True),
        (["model.kind=baseline", "data.document_mask=true", "data.document_end=5"], True),
        (["model.router.kind=soft", "model.router.tau=null"], True),
    ],
)
def test_a_gpu_without_kernels_is_told(load, monkeypatch, overrides, are_needed):
    """SDPA alone needs no host; attention of documents, dropout and routed rows needs one without our kernels."""
    gpu_here = torch.device("meta")
    odd_heads = ["model.hidden_size=48", "model.num_attention_heads=4"]
    for reason, sizes in (("the device is", []), ("heads have no", odd_heads)):
        config = load(*overrides, *sizes)
        if are_needed:
            with pytest.raises(UserError, match=f"training.cuda_graphs: layers need Triton kernels .*{reason}"):
                check_kernels_of_graphs(config, gpu_here)
        else:
            check_kernels_of_graphs(config, gpu_here)
        check_kernels_of_graphs(config, torch.device("cpu"))
        monkeypatch.setattr(gpu, "why_not", lambda device: None)
    check_kernels_of_graphs(load(*overrides), gpu_here)


@pytest.mark.parametrize("zero_stage", (0, 1, 2))
def test_two_ranks_with_captured_layers_learn_the_same(tmp_path, zero_stage):
    """DeepSpeed's hooks of weights run, gradients accumulate, and evaluation goes between the steps."""
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    sections = {"training": {"steps": 4, "evaluate_every": 2, "micro_batch_size": 1}, "model": {"dropout": 0.1}}
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path, **sections))
    numbers = []
    for name, key in (("plain", "training.static_shapes=true"), ("captured", "training.cuda_graphs=2")):
        folder = tmp_path / name
        sets = [key, f"parallel.zero_stage={zero_stage}", f"logging.folder={folder}"]
        output = pretrain(config, *sets, ranks=2)[0]
        assert ("in place of CUDA graphs of 2 layers" in " ".join(output.split())) == (name == "captured")
        assert "weights lie elsewhere" not in output, "each step would capture"
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        numbers.append([(line["loss"], line.get("gradient_norm")) for line in lines if "loss" in line])
    assert len(numbers[0]) > 5 and numbers[0] == numbers[1]
