"""Train from a checked config to a finished run; the functions stand in the order in which they act."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from megachiar.activity import Activity, Stage
from megachiar.config import RunConfig
from megachiar.config.run_length import asked_length
from megachiar.data.sampling.verification import BackgroundCheck
from megachiar.data.storage.files import write_atomically
from megachiar.data.tokenizers.recorded import keep_record, keep_tokenizer, read_kept_record
from megachiar.engine.engine import Engine, start_process_group
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.kernels.backends import describe_backends
from megachiar.model import build_model
from megachiar.model.dtypes import DTYPES
from megachiar.model.static_shapes import describe_static_shapes
from megachiar.planning.peaks import why_no_utilisation
from megachiar.stop_signals import StopSignals
from megachiar.topology import Topology, raise_together
from megachiar.training.asked import MakeAsked, nothing_asked
from megachiar.training.communication_time import measure_communication
from megachiar.training.compare_setups import compare_setups
from megachiar.training.continuation import Progress, continue_run, describe_finished, open_run
from megachiar.training.describe_data import describe_data
from megachiar.training.display import Display
from megachiar.training.environment import changed_since_last_start, describe_start, device_name
from megachiar.training.final_evaluation import FinalEvaluation, has_result
from megachiar.training.metrics import MetricsWriter, read_metrics
from megachiar.training.owed_evaluation import owed_evaluations
from megachiar.training.profiling import check_profiling
from megachiar.training.restore import restore
from megachiar.training.run_data import RunData
from megachiar.training.run_events import FAILED, FINISHED, STOPPED, RunEvents
from megachiar.training.run_result import set_result_aside
from megachiar.training.start import broadcast_from_rank_0, check_shared_folder, resolve_start, set_later_aside
from megachiar.training.supervision import Supervision, hold_run_folder
from megachiar.training.trackers.run_trackers import RunTrackers, check_packages
from megachiar.training.trainer import Trainer
from megachiar.training.verify_data import blocks_of_rank, verify_data
from megachiar.training.watch import PeerWatch

ShowRun = Callable[[Engine, RunData], None]
"""Shows the run as it is, and never raises."""


def pretrain(
    config: RunConfig,
    topology: Topology,
    signals: StopSignals,
    console: Console,
    show: ShowRun | None = None,
    make_asked: MakeAsked = nothing_asked,
) -> int:
    """Train as ``config`` says, from opening the data to the last step; every rank calls this function.

    Args:
        config: checked.
        topology: of this rank, still without process groups.
        signals: that stop the run after a checkpoint.
        console: of this rank, for the log.
        show: is called on rank 0 when training begins, and after each evaluation; None shows nothing.
        make_asked: makes the tasks and prompts of the run.

    Returns:
        The exit code of the process.

    Raises:
        UserError: data, checkpoint, layout or disk do not allow the run.
    """
    problem = None
    try:
        if topology.is_main:
            check_packages(config)
        config, data = open_run(config)
        check_profiling(config, topology)
    except UserError as error:
        problem = error  # it is raised on all ranks below: others may see a dataset that this rank does not
    folder, activity = config.logging.folder, Activity()
    try:
        with measure_communication(activity):
            device = start_process_group(config, topology)
            with PeerWatch(topology, config.training.communication_timeout_s, activity, signals) as watch:
                signals.remember()
                raise_together(problem)
                compare_setups(config, data)
                with hold_run_folder(folder, topology, console.print) as lock:
                    watch.use_run_folder(folder, before_exit=lock.release if lock is not None else None)
                    events = RunEvents(folder if lock is not None else None, warner(console.print))
                    supervision = Supervision(signals, lock, watch, activity, events)
                    try:
                        code = train(
                            config, topology.with_groups(), device, data, supervision, console, show, make_asked
                        )
                    except BaseException as error:
                        events.write(FAILED, activity.step, {"reason": reason_of(error)})
                        raise
    finally:
        signals.ignore()
    dist.destroy_process_group()  # not after an error, which could wait for ranks that are gone before it is printed
    return code


def train(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    data: RunData,
    supervision: Supervision,
    console: Console,
    show: ShowRun | None = None,
    make_asked: MakeAsked = nothing_asked,
) -> int:
    """Train with process groups already set up and data already opened; every rank calls this function.

    Args:
        config: checked, with ``data.document_end`` set where a mask needs it.
        topology: of this rank, with process groups.
        device: of this rank.
        data: of the config, as a new run would read it.
        supervision: of this rank.
        console: of this rank, for the log.
        show: is called on rank 0 when training begins, and after each evaluation; None shows nothing.
        make_asked: makes the tasks and prompts of the run.

    Returns:
        The exit code of the process.
    """
    activity, events = supervision.activity, supervision.events
    activity.begin("decides where the run starts", Stage.START, step=0)
    run = continue_run(config, data, resolve_start(config, topology, console.print))
    activity.begin("builds the model", Stage.START, step=0, item=1)
    engine = Engine(config, topology, device)
    activity.communicating = engine.clock.communicating
    log_run_header(config, engine, data, console)
    activity.begin("loads the checkpoint" if run.start.path else "starts anew", Stage.START, step=0, item=2)
    restore(engine, run, console.print)
    progress, data = run.progress, run.data
    for line in describe_data(config, data):
        console.print(f"  {escape(line)}")
    display = Display(console, config.steps, progress.step)
    resumed = topology.is_main and run.start.kind == "resumed"
    owed, is_measured = broadcast_from_rank_0(
        (owed_evaluations(config.logging.folder, progress.step), has_result(config, data)) if resumed else ([], False)
    )
    finished = describe_finished(config, progress)
    if finished is not None and not owed and is_measured:
        console.print(escape(finished))
        return 0
    activity.begin("loads the tasks", Stage.START, step=0, item=3)
    asked = make_asked(config, engine, data.tokenizer)
    activity.begin("opens the run folder", Stage.START, step=0, item=4)
    check_shared_folder(config.logging.folder, topology)
    supervision.watch.open_stacks()
    blocks = blocks_of_rank(data.sources if config.data.verify != "never" else [])
    if config.data.verify == "start":
        signals = supervision.signals
        stop = lambda: signals.received is not None  # noqa: E731
        timeout_s = config.training.communication_timeout_s
        if not verify_data(blocks, activity, stop, engine.sum_over_world, timeout_s, show_progress=topology.is_main):
            why = signals.reason() or "a signal to another rank"
            console.print(f"stopped by {why} before the first step")
            return EXIT_STOPPED
        blocks = []
    if topology.is_main:
        set_later_aside(config, run.start, console.print)
    changed = changed_since_last_start(config) if topology.is_main else None
    writer = open_run_folder(config, data, progress, display.line) if topology.is_main else None
    if topology.is_main:
        start = describe_start(engine, parameter_count(config))
        events.start(progress.step, {"from": run.start.kind, "changed": changed, **start})
    try:
        with BackgroundCheck(blocks) as check:
            trainer = Trainer(
                engine,
                data,
                progress,
                writer,
                display,
                supervision,
                damaged_data=lambda: check.problem,
                asked=asked,
                show=show if topology.is_main else None,
            )
            code = trainer.run(owed)
            raise_together(check.problem)
            if code == 0:
                last = FinalEvaluation(
                    engine, trainer.data, progress, supervision, finished is None, asked, display.line
                )
                code = last.run(lambda: check.problem)
            if code == 0:
                events.write(FINISHED, progress.step)
            else:
                reason = supervision.signals.reason() or "a signal to another rank"
                events.write(STOPPED, progress.step, {"reason": reason})
            return code
    finally:
        if writer is not None:
            writer.close()


def open_run_folder(config: RunConfig, data: RunData, progress: Progress, log: Callable[[str], None]) -> MetricsWriter:
    """Write the resolved config and the tokenizer to the run folder, and open its metrics; rank 0 alone does so."""
    folder = config.logging.folder
    if progress.step < config.steps and (earlier := set_result_aside(folder)) is not None:
        log(f"the result of the shorter run is now {escape(str(earlier))}")
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    if data.tokenizer is not None:
        keep_tokenizer(data.tokenizer, folder)
    elif data.tokenizer_record is not None:
        keep_record(data.tokenizer_record, folder)

    warn = warner(log)
    writer = MetricsWriter(folder, progress.step, warn)  # the trackers find one history
    writer.trackers = RunTrackers(config, progress.step, lambda: read_metrics(folder), warn)
    return writer


def warner(log: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that prints any text as a warning of the log."""
    return lambda line: log(f"[yellow]{escape(line)}[/]")


def reason_of(error: BaseException) -> str:
    """Return why a run failed, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def parameter_count(config: RunConfig) -> int:
    """Return the number of trained parameters of the run's model."""
    return build_model(config.model, seed=0, device="meta", heads=config.heads).parameter_count()


def log_run_header(config: RunConfig, engine: Engine, data: RunData, console: Console) -> None:
    """Print the first lines of the log: model, ranks and device, kernels, batch sizes, and what the run lacks."""
    topology, training = engine.topology, config.training
    count, device = parameter_count(config), device_name(engine)
    console.print(f"[bold]megachiar[/] {config.model.kind}, {count:,} parameters, run folder {config.logging.folder}")
    console.print(
        f"{topology.world_size} x {device} ({torch.get_num_threads()} threads), {topology.describe()}, "
        f"ZeRO {config.parallel.zero_stage}, {config.precision.compute}, "
        f"optimizer: {engine.replica.optimizer_implementation}"
    )
    dtype = DTYPES[config.precision.compute]
    kernels = describe_backends(config.model.hidden_size, config.model.num_attention_heads, engine.device, dtype)
    if (shapes := describe_static_shapes(config, engine.device)) is not None:
        kernels.append(shapes)
    if training.compile is not None:
        kernels.append(f"layers compiled by {training.compile}, or parts of them")
    if (length := training.cuda_graphs) is not None:
        on_cpu = "operations recorded and repeated in place of CUDA graphs"
        kernels.append(f"{on_cpu if engine.device.type == 'cpu' else 'CUDA graphs'} of {length} layers")
    console.print(f"kernels: {'; '.join(kernels)}")
    tokens = training.global_batch_size * config.sequence_length
    key, value = asked_length(training)
    asked = "" if key == "steps" else f", from training.{key} {value:,g}"
    console.print(
        f"{config.steps:,} steps of {training.global_batch_size} x {config.sequence_length} = {tokens:,} tokens "
        f"(micro-batch {training.micro_batch_size}, accumulation {engine.accumulation_steps}){asked}"
    )
    if reason := why_no_utilisation(engine.device):
        console.print(f"[yellow]  {escape(reason)}[/]")
    if config.tasks[0].head is not None:  # nobody samples from a classifier
        return
    kept = read_kept_record(config.logging.folder)
    if data.tokenizer is None and not (kept is not None and (config.logging.folder / kept.file).exists()):
        record = data.tokenizer_record
        lack = "no manifest, no data.tokenizer" if record is None else f"{record.file} of the manifest is gone"
        console.print(f"[yellow]  no tokenizer is known ({escape(lack)}): the run cannot be sampled from[/]")
