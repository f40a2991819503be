"""The costs of a layout for each rank in FLOPs, memory and communication, from the config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from megachiar.config import RunConfig
from megachiar.model.classifier import build_heads
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.layer_stack import build_layer
from megachiar.model.norm import RowNorm
from megachiar.planning.communication import RankCommunication, rank_communication
from megachiar.planning.flops import forward_flops_per_token, layer_flops_per_token
from megachiar.planning.memory import RankMemory, rank_memory
from megachiar.planning.muon import NO_COSTS, MatrixShape, MuonCosts, matrix_shapes, muon_costs
from megachiar.planning.partition import Stage, cut_into_stages, layer_groups
from megachiar.planning.step_tokens import step_tokens
from megachiar.topology import SINGLE_RANK, TensorParallelGroup


class LayerParameters(NamedTuple):
    """The number of parameters of a layer on one tensor-parallel rank, and the matrices that Muon trains."""

    parameters: int
    matrices: list[MatrixShape]


@dataclass(frozen=True)
class RankPlan:
    """The costs of one rank of a stage.

    Attributes:
        layers: numbers of the stage's layers, from 0.
        parameters: number of parameters of the rank.
        muon: what Muon trains, computes and sends; zeros where AdamW trains all.
        flops: FLOPs of its forward and backward passes in a step, and of Muon's step. Recomputed forward passes are
            counted too.
        memory: bytes on the rank.
        snapshot: bytes of the host's memory that a checkpoint takes while it is written: the rank's share of fp32
            weights and the moments.
        communication: bytes that the rank sends in a step.
    """

    layers: range
    parameters: int
    muon: MuonCosts
    flops: float
    memory: RankMemory
    snapshot: float
    communication: RankCommunication


def plan_ranks(config: RunConfig, data_size: int, device: str = "cuda") -> list[RankPlan]:
    """Return the plan of one rank of each stage; the ranks of one stage are alike.

    Args:
        config: config of the run.
        data_size: number of data-parallel replicas.
        device: type of the device, ``"cuda"`` or ``"cpu"``.
    """
    stages = cut_into_stages(
        config.model,
        interval=config.training.activation_checkpoint_interval,
        length=config.sequence_length,
        attention_share=config.model.expected_attention_share,
        stages=config.parallel.pipeline_size,
    )
    layer_parameters = _layer_parameters(config)
    return [_plan_stage(config, data_size, stage, layer_parameters, device) for stage in stages]


def _plan_stage(
    config: RunConfig, data_size: int, stage: Stage, layer_parameters: list[LayerParameters], device: str
) -> RankPlan:
    """Return the plan of one rank of ``stage``; ``layer_parameters`` has the numbers of every layer."""
    parameters = sum(layer_parameters[index].parameters for index in stage.layers)
    matrices = [matrix for index in stage.layers for matrix in layer_parameters[index].matrices]
    muon = muon_costs(config, data_size, matrices) if matrices else NO_COSTS
    sent = rank_communication(config, data_size, stage, parameters)
    if stage.is_first or stage.is_last:
        parameters += _embedding_parameters(config)
    if stage.is_last:
        parameters += _norm_parameters(config) + _classifier_parameters(config)
    return RankPlan(
        layers=stage.layers,
        parameters=parameters,
        muon=muon,
        flops=_rank_flops(config, data_size, stage) + muon.flops,
        memory=rank_memory(config, data_size, stage, parameters, device, muon, _captured(config, layer_parameters)),
        snapshot=4 * (3 * parameters - muon.parameters) / data_size,
        communication=replace(sent, tensor=sent.tensor + muon.tensor, data=sent.data + muon.data),
    )


def _captured(config: RunConfig, layer_parameters: list[LayerParameters]) -> int:
    """Return the most parameters whose layers are captured together; 0 without ``training.cuda_graphs``."""
    length = config.training.cuda_graphs
    if length is None:
        return 0
    return max(sum(layer_parameters[i].parameters for i in group) for group in layer_groups(config.model, length))


def _rank_flops(config: RunConfig, data_size: int, stage: Stage) -> float:
    """Return the FLOPs of one rank of ``stage`` in a step."""
    model, length, share = config.model, config.sequence_length, config.model.expected_attention_share
    forward, backward = (
        sum(layer_flops_per_token(model, index, length, share, backward=b).total for index in stage.layers)
        for b in (False, True)
    )
    forward_passes = 1 if config.training.activation_checkpoint_interval is None else 2
    tokens = step_tokens(config)
    flops = (forward_passes * forward + backward) * tokens.total
    if stage.is_last:
        head = sum(forward_flops_per_token(model, length, share, backward=b).head for b in (False, True))
        flops += head * tokens.predicting
    return flops / data_size / config.parallel.tensor_size


def _layer_parameters(config: RunConfig) -> list[LayerParameters]:
    """Return the numbers of parameters of each layer on one tensor-parallel rank; of equal layers one is built."""
    group = TensorParallelGroup(size=config.parallel.tensor_size, sequence=config.parallel.sequence)
    model = config.model
    counts: dict[tuple[bool, bool, bool], LayerParameters] = {}

    def count(index: int) -> LayerParameters:
        kind = (index in model.routed_layers, index == 0, index == model.num_layers - 1)
        if kind not in counts:
            with torch.device("meta"):
                layer = build_layer(model, index, group)
            counts[kind] = LayerParameters(
                parameters=sum(prod(p.shape) for p in layer.parameters()),
                matrices=matrix_shapes(layer, group.size) if config.optimizer.kind == "muon" else [],
            )
        return counts[kind]

    return [count(index) for index in range(model.num_layers)]


def _norm_parameters(config: RunConfig) -> int:
    """Return the number of parameters of the last norm."""
    with torch.device("meta"):
        norm = RowNorm(config.model.hidden_size, config.model.norm_epsilon, SINGLE_RANK)
    return sum(parameter.numel() for parameter in norm.parameters())


def _classifier_parameters(config: RunConfig) -> int:
    """Return the number of parameters of the classification heads, which every tensor-parallel rank holds whole."""
    with torch.device("meta"):
        heads = build_heads(config.model, config.heads)
    return sum(parameter.numel() for parameter in heads.parameters())


def _embedding_parameters(config: RunConfig) -> int:
    """Return the number of parameters of the tied embedding on one tensor-parallel rank."""
    with torch.device("meta"):
        embedding = TiedEmbedding(config.model, TensorParallelGroup(size=config.parallel.tensor_size))
    return embedding.weight.numel()
