"""All sections of a run's YAML file but ``model:``, with the meaning and unit of each key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megachiar.config.duration import parse_duration
from megachiar.config.model import ModelConfig
from megachiar.config.paths import ConfigPath
from megachiar.config.section import Section

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _without_null(mapping: Any) -> Any:
    if not isinstance(mapping, dict):
        return mapping
    return {name: value for name, value in mapping.items() if value is not None}


class SourceConfig(Section):
    path: ConfigPath
    """Prefix of an indexed dataset: PREFIX.bin, PREFIX.idx and (if made here) PREFIX.json."""
    weight: PositiveFloat = 1.0
    """Share of training samples from this source, relative to the other weights."""


class DataConfig(Section):
    train: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Sources to train on, blended by weight: a list, or the path of a YAML file that holds the list."""
    order: Literal["keyed", "megatron"] = "keyed"
    """keyed: a pure function of seed and position, without an index. megatron: megatron-core's own order, index for
    index, which depends on the number of samples of the whole run."""
    on_change: Literal["refuse", "continue"] = "refuse"
    """What to do where sources, weights, sequence length or batch differ from those that the run was saved with.
    refuse: end with a message. continue: read each source from where it was left, which the keyed order alone can."""
    max_epochs: PositiveFloat | None = None
    """Passes over a source beyond which the run is refused before it starts. When not given, more than 4 are reported,
    since up to 4 repeated text is nearly as good as new (arXiv:2305.16264)."""
    validation: Annotated[
        dict[str, ConfigPath], BeforeValidator(_without_null, json_schema_input_type=dict[str, Path | None])
    ] = {}
    """Validation sets by name: prefixes of indexed datasets, read whole and in order. Null leaves out a set that the
    base of the config has."""
    sequence_length: PositiveInt | None = None
    """Tokens of a training sample; model.max_sequence_length when not given."""
    tokenizer: ConfigPath | None = None
    """Tokenizer file or folder. When not given, the one that the first manifest of a source names. Its kind and the
    token that ends a document are those of that manifest."""
    document_mask: bool = False
    """Let no token attend to another document, though a sample holds the ends and beginnings of several."""
    document_end: NonNegativeInt | None = None
    """With document_mask: id of the token that ends a document; when not given, the one that the manifests name. A
    source whose manifest names another one, or none while this id does not occur in it, is refused."""
    prefetch: PositiveInt = 4
    """Micro-batches that each rank reads ahead."""


def sample_length(model: ModelConfig, data: DataConfig) -> int:
    """Return the tokens of a training sample."""
    return data.sequence_length or model.max_sequence_length


class ParallelConfig(Section):
    pipeline_size: PositiveInt = 1
    """Pipeline stages (pp)."""
    tensor_size: PositiveInt = 1
    """Tensor-parallel ranks a layer is split over (tp)."""
    data_size: PositiveInt | None = None
    """Data-parallel ranks (dp). When not given: world size / (pp * tp)."""
    sequence: bool = False
    """Sequence parallelism: rows outside attention and feed-forward are sharded over the tensor-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO over the data-parallel ranks: 0 replicates all, 1 shards optimizer state, 2 gradients as well, 3 parameters
    as well. With 0 each rank holds a whole model; pipeline stages need 1."""
    offload_optimizer: bool = False
    """ZeRO-Offload: fp32 master weights and optimizer state live in the host's memory, and AdamW runs there."""


class PrecisionConfig(Section):
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights, activations and gradients in a step. bf16 and fp16 keep fp32 master weights."""
    gradient_accumulation: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which gradients are summed over micro-batches."""
    loss_scale: PositiveFloat | Literal["dynamic"] = "dynamic"
    """fp16 only: a fixed factor on the loss, or one that follows overflows."""
    initial_loss_scale: PositiveFloat = 65536.0
    """fp16 with a dynamic scale: the factor at the start; a power of two."""
    loss_scale_window: PositiveInt = 1000
    """fp16 with a dynamic scale: steps without overflow until it doubles."""
    tf32: bool = True
    """Let fp32 matrix products on NVIDIA GPUs use TF32. Spectral entropy never does."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Which kernels a GPU runs where both can: ours in Triton (auto, triton) or plain torch operations (torch). Where
    Triton cannot run, triton refuses the run and auto takes torch. The log's first lines say what runs."""


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay. Biases, norms and DCT filters have no decay."""

    learning_rate: PositiveFloat
    """Peak learning rate, which is about what a step changes a weight by."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Factors by which the running means of the gradient and of its square shrink in a step."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean squared gradient that a step is divided by, in units of the gradient."""
    weight_decay: NonNegativeFloat = 0.01
    """Factor: a step takes weight_decay * learning rate of a weight away."""
    clip_gradient_norm: PositiveFloat | None = 1.0
    """Global L2 norm that gradients are clipped to; null for no clipping."""
    implementation: Literal["auto", "torch", "apex"] = "auto"
    """auto: NVIDIA apex's fused Adam on a GPU where it is installed, else torch's (fused where torch has it)."""


class ScheduleConfig(Section):
    """The learning rate over steps. Step 1, the first, has learning_rate / warmup_steps, not 0."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """cosine, linear: from the peak to the minimum at decay_steps. constant: the peak. wsd: the peak until
    decay_steps * (1 - wsd_decay_fraction), then linearly to the minimum."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    minimum_learning_rate: NonNegativeFloat = 0.0
    """Learning rate that the decay ends at, in the units of optimizer.learning_rate."""
    decay_steps: PositiveInt | None = None
    """Steps after which the minimum is reached; training.steps when not given."""
    wsd_decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """wsd: share of decay_steps that the decay takes."""


class TrainingConfig(Section):
    """A run's length is given once: as steps, as tokens or as epochs."""

    steps: PositiveInt | None = None
    """Optimizer steps of the run. Step N is the N-th of the run, counted from 1, in the log, in metrics, in the name of
    a checkpoint and as an argument of every tool."""
    tokens: PositiveInt | None = None
    """Tokens of the run in place of its steps, which are tokens / (global_batch_size * sequence length), rounded up. A
    run that changes batch or length on its way counts as if it had had the present ones from the beginning."""
    epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Epochs of the run in place of its steps. One epoch is as many samples as one pass over every source of data.train
    holds together; steps are epochs * samples / global_batch_size, rounded up. Single sources are passed over more or
    less often, by their weights, and the log says how often. Steps are known where the datasets are."""
    global_batch_size: PositiveInt
    """Sequences a step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt
    """Sequences of one forward pass on one rank."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights, order of samples and dropout."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations on data.validation; null: only at the end."""
    evaluation_windows: PositiveInt | None = None
    """Windows of sequence_length tokens read of each validation set during training; null: all."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; when not given, OMP_NUM_THREADS, else the cores shared out among ranks."""
    activation_checkpoint_interval: PositiveInt | None = None
    """Keep only the input of each so many layers in the forward pass and compute the rest once more in the backward
    pass; null keeps all activations."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Compile routers, DCT mixing and feed-forward with this backend of torch.compile; null compiles nothing. inductor
    needs a C++ compiler on a CPU; aot_eager only traces, to find out whether something can be compiled."""
    communication_timeout_s: PositiveFloat = 1800.0
    """Seconds a rank waits for the others before the run stops and names the one that holds it up."""
    stop_after: (
        Annotated[PositiveFloat, BeforeValidator(parse_duration, json_schema_input_type=PositiveFloat | str)] | None
    ) = None
    """Time from the start of the process after which the run saves and stops as after a signal, such as 11h30m, 45m or
    seconds; null: never. It is for clusters that end a job without a signal. A step and a save must fit into what is
    left of the job's time."""


class CheckpointConfig(Section):
    every: PositiveInt | None = None
    """Steps between checkpoints; null: only at the end and on a signal."""
    keep: PositiveInt | None = 3
    """Newest checkpoints that are kept; null keeps all."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of the run folder if there is one. never: refuse a run folder
    that has one."""
    load_from: ConfigPath | None = None
    """Checkpoint to start from, or a run folder, whose newest one counts. A run that has saved goes on from its own."""
    load: Literal["weights", "all"] = "weights"
    """What load_from loads. weights: the weights alone; optimizer, schedule, steps and data begin anew. all: optimizer,
    loss scale, steps taken and the position in the data as well, as if this run continued that one."""


class LoggingConfig(Section):
    folder: ConfigPath
    """The run folder: config.yaml, metrics.jsonl, tensorboard/, tokenizer/ with tokenizer_record.json, checkpoints/."""
    every: PositiveInt = 10
    """Steps between lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard event files below the run folder."""
