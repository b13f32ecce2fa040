"""The command line ``lhopt``: options and messages; the work is in :mod:`lhopt_fused.demo`."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lhopt_fused.evaluation.command import eval_app
from lhopt_fused.evaluation.files_command import report
from lhopt_fused.meta.command import meta_train
from lhopt_fused.meta.judge_command import meta_ablate, meta_validate
from lhopt_fused.policy_command import policy_app
from lhopt_fused.stopping import stoppable

if TYPE_CHECKING:
    from lhopt_fused.demo.run import RunConfig, Training
    from lhopt_fused.demo.text import InputError, Text

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A PyTorch optimizer that measures itself at the speed of a fused kernel.",
)
app.add_typer(policy_app, name="policy")
app.add_typer(eval_app, name="eval")
for _name, _command in (
    ("meta-train", meta_train),
    ("meta-validate", meta_validate),
    ("meta-ablate", meta_ablate),
    ("report", report),
):
    app.command(_name)(_command)
_console = Console(highlight=False)

_CHECKPOINT = "checkpoint.pt"
_DEMO_SIZES = {"context": 64, "width": 128, "layers": 2, "heads": 4}
_EVAL_FRACTION = 0.1


class Backend(str, Enum):
    """What steps the parameters."""

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


class OptimizerName(str, Enum):
    """The optimizers that a run can use."""

    TORCH = "torch"
    ADAMW = "adamw"
    CIAO = "ciao"
    LHOPT = "lhopt"


PolicyOption = Annotated[
    str | None,
    typer.Option(
        help="What moves LHOPT's hyperparameters: a name of `lhopt policy list`, or a "
        "policy file; default, a learned one, if not given."
    ),
]
StepsOption = Annotated[int, typer.Option(help="Optimizer steps.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the initial weights and of the batches.")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads; torch's own choice if not given.")
]
BackendOption = Annotated[Backend, typer.Option(help="What steps the parameters.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from lhopt_fused import __version__

        _console.print(f"lhopt-fused {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A PyTorch optimizer that measures itself at the speed of a fused kernel."""


@app.command()
def demo(
    steps: StepsOption = 1000,
    seed: SeedOption = 0,
    policy: PolicyOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("lhopt-runs/demo"),
    threads: ThreadsOption = None,
    backend: BackendOption = Backend.AUTO,
) -> None:
    """Train a small GPT on Python's own documentation with four optimizers, side by side."""
    from lhopt_fused.demo.text import Text, read_topics

    with _bad_input():
        configs = [
            _config(
                optimizer=name.value,
                policy=_policy_of(name, policy) if name is OptimizerName.LHOPT else None,
                steps=steps,
                seed=seed,
                threads=threads,
                backend=backend.value,
                model=_DEMO_SIZES,
            )
            for name in OptimizerName
        ]
        text = Text.split(read_topics(), _EVAL_FRACTION, _DEMO_SIZES["context"])
        _prepare_folder(out)
        trainings = [_start(config, text) for config in configs]
    _describe(trainings, "the topics of Python's help()")
    seconds = _train(trainings)
    _write_results(trainings, out, "A small GPT on Python's documentation", seconds)
    if not trainings[-1].is_done:
        _say("Stopped before the end.")
        raise typer.Exit(130)


@app.command()
def train(
    ctx: typer.Context,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file to learn; repeat for several.", exists=True, dir_okay=False),
    ] = None,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="Which optimizer.")
    ] = OptimizerName.ADAMW,
    policy: PolicyOption = None,
    steps: StepsOption = 1000,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; a good one for the demo if not given.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows in a batch.")] = 8,
    context: Annotated[int, typer.Option(help="Bytes in a window.")] = 128,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads; must divide the width.")] = 4,
    seed: SeedOption = 0,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the text, at its end, that is held out.")
    ] = _EVAL_FRACTION,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("lhopt-runs/train"),
    threads: ThreadsOption = None,
    backend: BackendOption = Backend.AUTO,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue this checkpoint, with its own options; --text says where the text is "
            "now, --out where results go (beside the checkpoint if not given).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Train a small GPT on your own text. Ctrl-C saves; --resume goes on bit-identically."""
    with _bad_input():
        if resume is not None:
            _refuse_options_beside_resume(ctx)
            training, files = _resumed_training(resume, text)
            out = out if _was_given(ctx, "out") else resume.parent
        else:
            files = _absolute(text or [])
            config = _config(
                optimizer=optimizer.value,
                policy=_policy_of(optimizer, policy),
                steps=steps,
                lr=lr,
                batch=batch,
                eval_fraction=eval_fraction,
                seed=seed,
                threads=threads,
                backend=backend.value,
                model={"context": context, "width": width, "layers": layers, "heads": heads},
            )
            training = _start(config, _read_text(files, eval_fraction, context))
        _prepare_folder(out)
    _describe([training], ", ".join(path.name for path in files))
    seconds = _train([training], out / _CHECKPOINT, files)
    title = f"A small GPT on {', '.join(path.name for path in files)}"
    _write_results([training], out, title, seconds)
    if not training.is_done:
        _say(f"Stopped and saved. Go on with: lhopt train --resume {out / _CHECKPOINT}")
        raise typer.Exit(130)


@app.command()
def plot(
    history: Annotated[Path, typer.Argument(help="History of an LHOPT run, as CSV.")],
    out: Annotated[
        Path | None, typer.Option(help="Picture; beside the history, as PNG, if not given.")
    ] = None,
) -> None:
    """Draw an LHOPT run: losses, hyperparameters, and inner features."""
    from lhopt_fused.demo.history_figure import draw_history
    from lhopt_fused.demo.text import InputError
    from lhopt_fused.history import read_csv

    picture = out if out is not None else history.with_suffix(".png")
    with _bad_input():
        try:
            steps = read_csv(history)
        except OSError as error:
            raise InputError("HISTORY", f"cannot read {history}: {error.strerror}") from error
        except ValueError as error:
            raise InputError("HISTORY", f"{error}; give the history.csv of an LHOPT run") from error
        try:
            draw_history(picture, steps, title=history.name)
        except ValueError as error:
            raise InputError("HISTORY", f"cannot draw {history}: {error}") from error
        except OSError as error:
            raise InputError("--out", f"cannot write {picture}: {error.strerror}") from error
    _say(f"Picture: {picture}")


@app.command()
def info() -> None:
    """Show versions, what this machine has, and which backends can run on it."""
    import platform

    import torch

    from lhopt_fused import __version__
    from lhopt_fused.demo.optimizers import backend_problem

    table = Table.grid(padding=(0, 2))
    table.add_row("lhopt-fused", __version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.is_available()
    table.add_row("GPU", torch.cuda.get_device_name() if cuda else "none that torch can use")
    table.add_row("instruction sets", _instruction_sets())
    for backend in (Backend.REFERENCE, Backend.CPU, Backend.TRITON):
        problem = backend_problem(backend.value)
        state = (
            "[green]available[/]"
            if problem is None
            else f"[yellow]not available[/]: {escape(problem)}"
        )
        table.add_row(f"backend {backend.value}", state)
    _console.print(table)


def _instruction_sets() -> str:
    """What the C++ extension can use of this processor, and what it does use."""
    try:
        from lhopt_fused import _C

        return f"{', '.join(_C.available_isas())} (in use: {_C.active_isa()})"
    except (ImportError, AttributeError, ValueError) as error:
        return f"unknown: {error}"


# ---------------------------------------------------------------------- input


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Turn an InputError into the message and exit code of a wrong option."""
    from lhopt_fused.demo.text import InputError

    try:
        yield
    except InputError as error:
        _fail(error)


def _fail(error: InputError) -> NoReturn:
    raise typer.BadParameter(error.problem, param_hint=f"'{error.option}'") from error


def _config(*, model: dict[str, int], **options: Any) -> RunConfig:
    """A config with ``options``, those that are None left at their defaults."""
    from lhopt_fused.demo.model import GPTConfig
    from lhopt_fused.demo.optimizers import DEFAULT_POLICY, default_lr
    from lhopt_fused.demo.run import RunConfig

    given = {name: value for name, value in options.items() if value is not None}
    if "lr" not in given:
        given["lr"] = default_lr(
            given["optimizer"], given.get("policy", DEFAULT_POLICY), given["steps"]
        )
    return RunConfig(**given, model=GPTConfig(**model))


def _policy_of(optimizer: OptimizerName, policy: str | None) -> str | None:
    """The policy of a run, so that it is found again from another folder.

    Raises:
        InputError: there is none of that name, or the optimizer takes none.
    """
    from lhopt_fused.demo.optimizers import absolute_policy, find_policy
    from lhopt_fused.demo.text import InputError

    if policy is None:
        return None
    if optimizer is not OptimizerName.LHOPT:
        raise InputError("--policy", "is for --optimizer lhopt; leave it out or change that")
    find_policy(policy)
    return absolute_policy(policy)


def _start(config: RunConfig, text: Text) -> Training:
    """A training at its first step, with torch's threads set as it asks.

    Raises:
        InputError: its backend cannot run here.
    """
    import torch

    from lhopt_fused.demo.optimizers import backend_problem
    from lhopt_fused.demo.run import Training
    from lhopt_fused.demo.text import InputError

    problem = backend_problem(config.backend) if config.optimizer != "torch" else None
    if problem is not None:
        raise InputError("--backend", f"{config.backend!r} cannot run here: {problem}")
    torch.set_num_threads(config.threads)
    return Training(config, text)


def _resumed_training(checkpoint: Path, text: list[Path] | None) -> tuple[Training, list[Path]]:
    from lhopt_fused.demo.run import load_checkpoint
    from lhopt_fused.demo.text import InputError

    saved = load_checkpoint(checkpoint)
    config = saved["config"]
    files = _absolute(text or map(Path, saved["text_files"]))
    read = _read_text(files, config.eval_fraction, config.model.context)
    if read.digest != saved["text_digest"]:
        raise InputError(
            "--text", "is not the text that the run began with; give the same files, in order"
        )
    if saved["training"]["step"] >= config.steps:
        raise InputError("--resume", f"{checkpoint} has done all its {config.steps} steps")
    training = _start(config, read)
    try:
        training.load_state_dict(saved["training"])
    except ValueError as error:  # the policy file has changed, for example
        raise InputError("--resume", f"{checkpoint} does not fit: {error}") from error
    return training, files


def _read_text(files: Sequence[Path], eval_fraction: float, context: int) -> Text:
    from lhopt_fused.demo.text import InputError, Text, read_files

    if not files:
        raise InputError("--text", "is missing; give a text file to learn")
    return Text.split(read_files(files), eval_fraction, context)


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_options_beside_resume(ctx: typer.Context) -> None:
    from lhopt_fused.demo.text import InputError

    for name in ctx.params:
        if name not in ("resume", "text", "out") and _was_given(ctx, name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(option, "--resume goes on with the options of the run; leave it out")


def _absolute(files: Iterable[Path]) -> list[Path]:
    return [file.absolute() for file in files]


def _prepare_folder(out: Path) -> None:
    from lhopt_fused.demo.text import InputError

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            "--out", f"cannot write to {out}: {error.strerror}; give a folder that can be written"
        ) from error


# ---------------------------------------------------------------------- running


def _describe(trainings: Sequence[Training], source: str) -> None:
    """Say what is about to be trained."""
    config, text, model = trainings[0].config, trainings[0].text, trainings[0].config.model
    parameters = sum(p.numel() for p in trainings[0].model.parameters())
    lines = {
        "text": f"{source}: {len(text.train):,} bytes to learn, {len(text.held_out):,} held out "
        f"(byte frequencies alone: {text.unigram_entropy():.3f} nats per byte)",
        "model": f"GPT over bytes, {parameters:,} parameters: {model.layers} layers of width "
        f"{model.width}, {model.heads} heads, context {model.context}",
        "run": f"{config.steps:,} steps of {config.batch} windows, seed {config.seed}, "
        f"{config.threads} thread(s), backend {config.backend}",
        "learning rate": _learning_rates(trainings),
    }
    table = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        table.add_row(f"[bold]{name}[/]", escape(line))
    _console.print(table, "")


def _learning_rates(trainings: Sequence[Training]) -> str:
    scheduled = [f"{t.config.lr:g} for {t.name}" for t in trainings if not t.has_policy]
    parts = [
        f"{t.config.lr:g} for {t.name}, moved by its policy {t.config.policy!r}"
        for t in trainings
        if t.has_policy
    ]
    if scheduled:
        schedule = "linear warm-up over a tenth, then a cosine to 1 %"
        parts.insert(0, f"{', '.join(scheduled)}: {schedule}")
    return "; ".join(parts)


def _say(message: str) -> None:
    """Print ``message`` as it is: paths may hold what looks like markup, and must not be broken."""
    _console.print(message, markup=False, soft_wrap=True)


def _train(
    trainings: Sequence[Training], checkpoint: Path | None = None, files: Sequence[Path] = ()
) -> float:
    """Do the steps of all ``trainings`` in turn until they are done or Ctrl-C stops them.

    Returns:
        The seconds that this took.
    """
    from lhopt_fused.demo.display import LiveView
    from lhopt_fused.demo.run import save_checkpoint

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, trainings[0], [str(file) for file in files])

    begin = time.perf_counter()
    with stoppable() as stop, LiveView(_console, trainings) as view:
        while not (trainings[-1].is_done or stop.is_set):
            for training in trainings:
                training.advance()
            view.update()
            if trainings[0].has_just_evaluated:
                save()
        save()
    return time.perf_counter() - begin


def _write_results(trainings: Sequence[Training], out: Path, title: str, seconds: float) -> None:
    """Print the final table; write the measurements and the pictures."""
    from lhopt_fused.demo.display import final_table
    from lhopt_fused.demo.figure import draw_runs
    from lhopt_fused.demo.record import write_csv

    runs = {training.name: training.rows for training in trainings}
    metrics, picture = out / "metrics.csv", out / "runs.png"
    write_csv(metrics, runs)
    draw_runs(picture, runs, title=title, unigram_entropy=trainings[0].text.unigram_entropy())
    _console.print(final_table(trainings))
    _write_histories(trainings, out, title, seconds)
    _say(f"Picture: {picture}\nMeasurements: {metrics}")


def _write_histories(trainings: Sequence[Training], out: Path, title: str, seconds: float) -> None:
    """For LHOPT: what its outer steps cost, its history as CSV, and a picture of it."""
    from lhopt_fused.demo.history_figure import draw_history
    from lhopt_fused.demo.record import Summary
    from lhopt_fused.history import write_csv

    for training in trainings:
        if not training.history:
            continue
        history, picture = out / "history.csv", out / "history.png"
        write_csv(training.history, history)
        draw_history(picture, training.history, title=f"{title}: {_policy_label(training)}")
        summary = Summary(training.rows)
        _say(
            f"{training.name}'s {len(training.history)} outer steps (losses, features, decision, "
            f"apply): {summary.outer_seconds:.3f} s of {seconds:.0f} s, "
            f"{summary.outer_seconds / seconds:.3%} of everything and "
            f"{summary.outer_seconds / summary.seconds:.3%} of its own steps"
        )
        _say(f"Policy's picture: {picture}\nPolicy's history: {history}")


def _policy_label(training: Training) -> str:
    return f"LHOPT with policy {Path(training.config.policy).stem!r}"
