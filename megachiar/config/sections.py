"""All sections of a run's YAML file but ``model:``, with the meaning and unit of each key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megachiar.config.duration import parse_duration
from megachiar.config.model import ModelConfig
from megachiar.config.paths import ConfigPath
from megachiar.config.section import Section
from megachiar.config.trackers import MlflowConfig, TrackioConfig, WandbConfig

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
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the dataset's tokens that the run reads, from the first on: 0.01 trains on a corpus of 1 %. The first
    documents stand for all where `megachiar preprocess --shuffle-seed` has shuffled them."""


class DataConfig(Section):
    train: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Sources to train on, blended by weight: a list, or the path of a YAML file that holds the list."""
    order: Literal["keyed", "megatron"] = "keyed"
    """keyed: a pure function of seed and position, without an index. megatron: megatron-core's own order, index for
    index, which depends on the number of samples of the whole run."""
    on_change: Literal["refuse", "continue"] = "refuse"
    """How to continue a run whose sources, weights, sequence length or batch differ from the saved ones. refuse: end
    with a message. continue: read each source from where it stopped, which only the keyed order can."""
    max_epochs: PositiveFloat | None = None
    """The most passes over a source; a run with more is refused before it starts. When not given, more than 4 are
    reported, since up to 4 repeated text is nearly as good as new (arXiv:2305.16264)."""
    validation: Annotated[
        dict[str, ConfigPath], BeforeValidator(_without_null, json_schema_input_type=dict[str, Path | None])
    ] = {}
    """Validation sets by name: prefixes of indexed datasets, read whole and in order. Null leaves out a set that the
    base of the config has."""
    test: Annotated[
        dict[str, ConfigPath], BeforeValidator(_without_null, json_schema_input_type=dict[str, Path | None])
    ] = {}
    """Test sets by name, as data.validation has its sets. They are read once, whole, after the last step, with
    the weights of the checkpoint that checkpoint.keep_best chooses, or else of the last one. results.json has the
    result."""
    sequence_length: PositiveInt | None = None
    """Tokens of a training sample; model.max_sequence_length when not given."""
    tokenizer: ConfigPath | None = None
    """Tokenizer file or folder, or hf:NAME@REVISION on the Hugging Face hub; when not given, the one that the first
    manifest of a source names. That manifest also gives its kind and the tokens that begin and end a document."""
    document_mask: bool = False
    """Let no token attend to another document, though a sample holds the ends and beginnings of several."""
    document_end: NonNegativeInt | None = None
    """With document_mask: id of the token that ends a document; when not given, the one that the manifests name. A
    source whose manifest names another one, or none while this id does not occur in it, is refused."""
    prefetch: PositiveInt = 4
    """Micro-batches that each rank reads ahead."""
    verify: Literal["background", "start", "never"] = "background"
    """When datasets are compared with the checksums in their manifests. background: by a thread of low priority while
    the run reads, each block once, shared out among the ranks that read the same file. start: all of them before the
    first step. A block that differs ends the run."""

    @property
    def prefixes(self) -> list[Path]:
        """The prefix of every dataset, those for training first."""
        return [*(source.path for source in self.train), *self.validation.values(), *self.test.values()]


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
    """Type of the sum of gradients over micro-batches."""
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


class MuonConfig(Section):
    """Muon (arXiv 2502.16982): the keys of torch.optim.Muon, with its meanings."""

    momentum: Fraction = 0.95
    """Decay factor, per step, of the running mean of the gradient."""
    nesterov: bool = True
    """Step along the mean of the gradient as it will be after the same gradient again."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations, which bring the singular values of a step near 1."""
    ns_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of these iterations. fp32 rounds least between layouts; bf16 is faster on a GPU and what torch has."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of the learning rate for a matrix of r rows and c columns. match_rms_adamw: 0.2 * sqrt(max(r, c)), with
    which a step changes weights as much as AdamW's, at AdamW's learning rate. original: sqrt(max(1, r / c))."""


class OptimizerConfig(Section):
    """AdamW or Muon, with decoupled weight decay. Biases, norms, DCT filters and gates have none unless ``decay_all``
    is set."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention, feed-forward and RBF mixing, and AdamW for all other parameters."""
    muon: MuonConfig = MuonConfig()
    learning_rate: PositiveFloat
    """Peak learning rate; a step changes a weight by about as much."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay factors, per step, of the running means of the gradient and of its square."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean squared gradient that a step is divided by, in units of the gradient."""
    weight_decay: NonNegativeFloat = 0.01
    """Factor: a step takes weight_decay * learning rate of a weight away."""
    decay_all: bool = False
    """Weight decay for every parameter, as the published training has it. Without it, parameters of one dimension do
    not decay: biases, norms, DCT filters and gates."""
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
    """Tokens of the run instead of its steps, which are tokens / (global_batch_size * sequence length), rounded up. If
    batch or length change during a run, the present ones count from its beginning."""
    epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Epochs of the run instead of its steps. One epoch has as many samples as one pass over every source of
    data.train, all sources together. Steps are epochs * samples / global_batch_size, rounded up. Single sources are
    passed over more or less often, by their weights, and the log says how often. Steps are known where the datasets
    are."""
    global_batch_size: PositiveInt
    """Sequences a step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt
    """Sequences of one forward pass on one rank."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights, order of samples and dropout."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations on data.validation; null: only at the end."""
    evaluation_windows: PositiveInt | None = None
    """Windows of sequence_length tokens, or labelled examples, that are read of each validation set during training;
    null: all."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; when not given, OMP_NUM_THREADS, else the cores shared out among ranks."""
    activation_checkpoint_interval: PositiveInt | None = None
    """Number of layers that are recomputed together in the backward pass; of each such group only the input is kept.
    null keeps all activations."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Compile layers with this backend of torch.compile; null compiles nothing. One graph each: routed layers of static
    shapes, the layer of DCT mixing, and layers of attention without dropout and document masks. Of other layers
    routers, DCT mixing and feed-forward are compiled. inductor needs a C++ compiler on a CPU; aot_eager only traces, to
    find out whether something can be compiled."""
    static_shapes: Literal["auto"] | bool = "auto"
    """Whether routed layers compute with shapes that do not depend on the routes: the host then waits for nothing, and
    fewer kernels are started. auto: on a GPU with Triton, where model and layout allow it; the log says why not. true:
    on a CPU too, slowly, and an error where it cannot be. false: never."""
    cuda_graphs: PositiveInt | None = None
    """Layers that are captured together as CUDA graphs, one for their forward and one for their backward pass; null
    captures nothing. Gradients are communicated when such a group of layers is done. It needs ZeRO 0 to 2, one pipeline
    stage, kept activations and static shapes, which it turns on. On a CPU, which has no graphs, operations are recorded
    and repeated, for tests: slowly, and everything they compute is kept."""
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
    """Newest checkpoints that are kept; null keeps all. The one before the run's newest incident stays as well."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are never removed."""
    keep_best: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Name of a set in data.validation: the checkpoint with the lowest loss on it is never removed. Or what a task of
    evaluation.tasks measures, such as eval/cloze/acc: the checkpoint with the best value. A list keeps the best of
    each. Only checkpoints of steps after which it was measured count. The test sets are measured with the best of the
    first name; without this key with the last checkpoint."""
    asynchronous: bool = True
    """Copy to the host's memory and write in a thread, while training goes on. Each rank keeps memory for its share
    of weights and moments, together 12 bytes a parameter, from its first save on. The last checkpoint of a run is
    always waited for."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written. stop: end the run. continue: warn, go on, and try again at the next
    one. The last checkpoint of a run must be written in any case."""
    resume: Literal["auto", "never"] | PositiveInt = "auto"
    """auto: go on from the newest whole checkpoint of the run folder if there is one. never: refuse a run folder that
    has one. A number: go back to the checkpoint of this step; later ones are set aside. A run that has saved since
    goes on from its newest, so that it can be started again with the same number."""
    export_hf: Literal["last", "best"] | None = None
    """Export for transformers that a finished run writes to RUN/hf, as `megachiar export --to hf` does. last: of
    its last checkpoint. best: of the one that keep_best chooses. null: none. It needs the package transformers."""
    load_from: ConfigPath | None = None
    """Checkpoint to start from, or a run folder, for its newest checkpoint. A run with checkpoints of its own continues
    from those."""
    load: Literal["weights", "all"] = "weights"
    """The parts that load_from loads. weights: the weights alone; optimizer, schedule, steps and data begin anew. all:
    optimizer, loss scale, steps taken and the position in the data as well, as if this run continued that one."""

    @property
    def best_of(self) -> tuple[str, ...]:
        """The names of what keep_best keeps the best checkpoint of."""
        if self.keep_best is None:
            return ()
        return (self.keep_best,) if isinstance(self.keep_best, str) else self.keep_best

    @property
    def chosen_by(self) -> str | None:
        """The name of what chooses the checkpoint that a run is tested with; None for the last checkpoint."""
        return self.best_of[0] if self.best_of else None


class LoggingConfig(Section):
    folder: ConfigPath
    """The run folder: config.yaml, metrics.jsonl, events.jsonl, index.html, tensorboard/, tokenizer/ with
    tokenizer_record.json, checkpoints/, and after the last step results.json."""
    every: PositiveInt = 10
    """Steps between lines of the log."""
    page: bool = True
    """Write index.html, the page of the run, to its folder at each evaluation and at the end."""
    tensorboard: bool = True
    """Write TensorBoard event files below the run folder."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases as well; null does not, and {} does with the defaults."""
    mlflow: MlflowConfig | None = None
    """Send the metrics to MLflow as well; null does not, and {} does with the defaults."""
    trackio: TrackioConfig | None = None
    """Keep the metrics in trackio as well; null does not, and {} does with the defaults."""
