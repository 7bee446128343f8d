"""The `drivesim` command: parses, calls, prints. Whatever is heavy is imported in the commands.

A command's parameters have the names of those of the function that does its work, so that they go
on as they are. Errors name them in that way too; here they are said as the command's flags.
"""

import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from driving_sim.engine import progress as progress_lines
from driving_sim.engine.errors import BadDriveError, DriveSimError, Interrupted
from driving_sim.engine.threads import collect_rarely, keep_freed_memory, leave_busy_cores
from driving_sim.engine.torchrun import is_main_process

RUNS = Path("runs")
REPORTS = RUNS / "reports"

_SETTING = re.compile(r"`(\w[\w.]*)(=[^`]*)?`")
_RUNNING = "drivesim.command"  # where a context keeps the command that runs
_REPEATED = {"resume": "the same command again"}
_OF_THE_MODEL = {"steering_kind": "the model's kind of steering"}
_OWN_WORDS = {
    "tokenize": _REPEATED | {"run": "trained --tokenizer"},
    "demo": _REPEATED | {"run": "--out"},
    **dict.fromkeys(("rollout", "surprise", "world-model", "control"), _OF_THE_MODEL),
}
"""What commands call settings for which they have no option."""


def with_flags(text: str, command: Any) -> str:
    """The text with flags for the settings that it names in backticks, as Python calls them.

    `out` becomes the option of `command`, or of another one where it has none; `fps=10` the option
    and its value; `training.seed=1` an assignment. What else is in backticks stays as it is.
    """
    if not _SETTING.search(text):  # most lines that are said: the commands are not looked through
        return text
    root: Any = typer.main.get_command(app)
    commands = *root.commands.values(), *root.commands["evaluate"].commands.values(), command
    named = [(each.name, each.opts[0]) for one in commands for each in one.params]
    words = {name: flag for name, flag in named if flag.startswith("-")}
    words |= {each.name: each.opts[0].upper() for each in command.params if each.opts[0][0] != "-"}
    words |= _OWN_WORDS.get(command.name, {})

    def said(found: re.Match[str]) -> str:
        name, value = found[1], found[2] or ""
        if "." in name and value:
            return f"{words['assignments']} {name}{value}"
        return words[name] + value.replace("=", " ", 1) if name in words else found[0]

    return _SETTING.sub(said, text)


def _explain(error: BaseException, command: Any) -> str | None:
    """The one line for an error that a user or the machine caused; None for a bug of ours."""
    if isinstance(error, BadDriveError) and any(o.name == "skip_bad" for o in command.params):
        return with_flags(f"{error}, or pass `skip_bad`", command)
    if isinstance(error, DriveSimError):
        return with_flags(str(error), command)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if _is_out_of_memory(error):
        return (
            "out of memory: to train, lower data.batch_size or choose a smaller --preset; to roll "
            "out, ask for fewer or shorter futures"
        )
    if type(error).__name__ == "NoArgsIsHelpError":
        return None  # its message is the help
    if isinstance(error, typer.BadParameter.__bases__) and hasattr(error, "format_message"):
        return f"{error.format_message()} (see --help)"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Of torch's allocators only CUDA's has an error of its own.
    plain = isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)
    )
    return plain or isinstance(error, MemoryError)


@contextmanager
def _one_line(context: Any = None) -> Iterator[None]:
    """Turn errors that users cause into one line and exit code 1; `--debug` shows the traceback."""
    try:
        yield
    except Interrupted as interrupted:
        typer.echo(with_flags(str(interrupted), context.meta[_RUNNING]), err=True)
        raise typer.Exit(interrupted.exit_code) from None
    except Exception as error:
        line = _explain(error, context and context.meta.get(_RUNNING))
        if line is None or (context and context.params["debug"]):
            raise
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def _say_done(line: str) -> None:
    """Print a command's last line, once for all ranks of `torchrun`."""
    if is_main_process():
        typer.echo(line)


class _Group(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, with a summary that the list of commands wraps and does not cut."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.short_help = command.help.splitlines()[0]
        ctx.meta[_RUNNING] = command
        progress_lines.wording = partial(with_flags, command=command)
        return command


class _OneLineErrors(_Group):
    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # importing rich is half of the time that --help takes
    pretty_exceptions_enable=False,
    help="Learn a driving simulator from driving video, then drive in it.",
)
evaluate_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a trained model on held-out drives.",
)
app.add_typer(evaluate_app, name="evaluate")


def _gives_way(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Steps or minutes: what the environment says gives way to the other on the command line."""
    other = "minutes" if option.name == "steps" else "steps"
    own, others = (context.get_parameter_source(str(name)) for name in (option.name, other))
    gives_way = own and own.name == "ENVIRONMENT" and others and others.name == "COMMANDLINE"
    return None if gives_way else value


def _preset(choice: str) -> Any:
    return Option(envvar="DRIVESIM_PRESET", help=f"auto, demo, tiny, base or large{choice}")


def _length(variable: str, text: str) -> Any:
    return Option(envvar=variable, callback=_gives_way, help=text)


Videos = Annotated[
    list[Path],
    Argument(
        help="Video files or folders of them; also Udacity recordings and comma2k19 segments."
    ),
]
Model = Annotated[Path, Argument(help="World-model run.")]
Preset = Annotated[str, _preset(" (see the README); auto: base on CUDA, else tiny.")]
Steps = Annotated[int | None, _length("DRIVESIM_STEPS", "Train for this many steps.")]
Minutes = Annotated[float | None, _length("DRIVESIM_MINUTES", "Train for this long instead.")]
Precision = Annotated[
    str | None, Option(help="auto, fp32 or bf16 [default: auto, bf16 where it is faster].")
]
Device = Annotated[str, Option(envvar="DRIVESIM_DEVICE", help="auto, cuda, mps or cpu.")]
Kind = Annotated[
    str | None,
    Option(
        help="What a bare `steering` column is: steering_wheel, road_wheel, curvature, normalised."
    ),
]
TimeOffset = Annotated[
    float, Option(help="Seconds added to the action file's clock to reach the video's.")
]
Every = Annotated[int | None, Option(help="Take every n-th frame instead of a rate.", min=1)]
Fps = Annotated[float | None, Option(help="Frames per second to take [default: 10].")]
Config = Annotated[Path | None, Option(help="YAML file laid over the preset.")]
Set = Annotated[
    list[str] | None, Option("--set", help="Override one setting: a.b=value. May be repeated.")
]
RunOut = Annotated[Path, Option("--out", help="Run folder.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in --out.")]
InitFrom = Annotated[
    Path | None, Option(help="Start from the weights of this finished run (fine-tuning).")
]
Shard = Annotated[
    bool, Option("--shard", help="Spread the model over the ranks of torchrun (FSDP2).")
]
SkipBad = Annotated[
    bool, Option("--skip-bad", help="Go on without drives that cannot be read, and name them.")
]
Guidance = Annotated[float, Option(help="Strength of the actions; 1 is the plain model.")]
Temperature = Annotated[float, Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, Option(help="Keep only the k likeliest tokens.")]
TopP = Annotated[float | None, Option(help="Keep the likeliest up to this mass.")]
Seed = Annotated[int, Option(help="Seed of the draws.")]


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    """A command's `locals()`, taken first of all, without the options that are not given.

    What they are by default, the function knows to which the others go.
    """
    return {name: value for name, value in parameters.items() if value is not None}


def _taken(given: dict[str, Any], cls: type) -> dict[str, Any]:
    """Take those out of `given` that are fields of a dataclass."""
    return {each.name: given.pop(each.name) for each in fields(cls) if each.name in given}


def _sampling(given: dict[str, Any]) -> Any:
    """The `Sampling` that is asked for, taken out of `given`."""
    from driving_sim.engine.config import from_dict
    from driving_sim.world_model.sampling.sampling import Sampling

    return from_dict(Sampling, _taken(given, Sampling), where="sampling")


@app.callback()
def main(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Learn a driving simulator from driving video, then drive in it."""
    collect_rarely()
    keep_freed_memory()
    leave_busy_cores()


@app.command()
def synth(
    out: Annotated[Path, Argument(help="Folder for the videos, CSVs and worlds.")],
    drives: Annotated[int, Option(min=1, help="How many drives.")] = 8,
    seconds: Annotated[float, Option(min=1, help="Length of each drive.")] = 30.0,
    seed: Annotated[int, Option(min=0, help="Seed of the worlds and the drivers.")] = 0,
    worlds: Annotated[
        int | None, Option(min=1, help="How many worlds [default: one for each drive].")
    ] = None,
    first: Annotated[
        int, Option(min=0, help="Number of the first drive: later ones, to hold out.")
    ] = 0,
    height: Annotated[int, Option(min=16, help="Picture height in pixels.")] = 128,
    width: Annotated[int, Option(min=16, help="Picture width in pixels.")] = 256,
    fps: Annotated[float, Option(min=4, help="Frames per second.")] = 10.0,
) -> None:
    """Make synthetic drives: video, exact actions, and the world to replay them in."""
    given = _given(locals())
    from driving_sim.data.synthetic.drives import frame_count
    from driving_sim.data.synthetic.world import SyntheticConfig
    from driving_sim.data.synthetic.writer import write_synthetic_drives
    from driving_sim.engine.config import from_dict
    from driving_sim.engine.progress import progress
    from driving_sim.engine.threads import usable_cores

    config = from_dict(SyntheticConfig, _taken(given, SyntheticConfig), where="drivesim synth")
    with progress(drives * frame_count(seconds, config), f"drive -> {out}", "frames") as bar:
        write_synthetic_drives(**given, config=config, workers=usable_cores(), progress=bar.advance)
    typer.echo(f"{drives} drives of {seconds:g} s -> {out}; next: drivesim tokenize {out}")


@app.command()
def inspect(
    context: typer.Context,
    videos: Videos,
    out: Annotated[
        Path, Option(help="Folder for the pictures, in place of an earlier inspection.")
    ] = RUNS / "inspect",
    as_json: Annotated[bool, Option("--json", help="Print JSON, not a table.")] = False,
    steering_kind: Kind = None,
    time_offset: TimeOffset = 0.0,
) -> None:
    """Show what is there and what is wrong: rates, gaps, action lag, steering sign."""
    from driving_sim.data.inspect.inspection import inspect_drives

    report = inspect_drives(videos, out, steering_kind=steering_kind, time_offset=time_offset)
    table = f"{report.table()}\n\npictures and inspection.json: {out}"
    shown = json.dumps(asdict(report), indent=2) if as_json else table
    typer.echo(with_flags(shown, context.command))


@app.command()
def train_tokenizer(
    videos: Videos,
    run: RunOut = RUNS / "tokenizer",
    preset: Preset = "auto",
    steps: Steps = None,
    minutes: Minutes = None,
    fps: Fps = None,
    every: Every = None,
    config: Config = None,
    assignments: Set = None,
    resume: Resume = False,
    init_from: InitFrom = None,
    skip_bad: SkipBad = False,
    precision: Precision = None,
    shard: Shard = False,
    device: Device = "auto",
) -> None:
    """Learn to turn frames into tokens and back."""
    given = _given(locals())
    from driving_sim.pipeline import TrainingRequest, train_tokenizer_on

    request = TrainingRequest(**_taken(given, TrainingRequest))
    train_tokenizer_on(request=request, **given)
    _say_done(f"tokenizer -> {run}; next: drivesim tokenize VIDEOS --tokenizer {run}")


@app.command()
def tokenize(
    videos: Videos,
    tokenizer: Annotated[
        Path | None,
        Option(help="Tokenizer run [default: runs/tokenizer, trained first if missing]."),
    ] = None,
    out: Annotated[Path, Option(help="Token store to write.")] = RUNS / "tokens",
    preset: Annotated[
        str,
        _preset(": of the tokenizer that is trained if missing; auto: base on CUDA, else tiny."),
    ] = "auto",
    steps: Annotated[
        int | None, _length("DRIVESIM_STEPS", "Train a missing tokenizer for this many steps.")
    ] = None,
    minutes: Annotated[
        float | None,
        _length("DRIVESIM_MINUTES", "Train a missing tokenizer for this long instead."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Override one setting of a missing tokenizer: a.b=value. May be repeated.",
        ),
    ] = None,
    fps: Fps = None,
    every: Every = None,
    mirror: Annotated[
        bool, Option("--mirror", help="Add each drive flipped, with steering negated.")
    ] = False,
    steering_kind: Kind = None,
    time_offset: TimeOffset = 0.0,
    skip_bad: SkipBad = False,
    batch_size: Annotated[int, Option(min=1, help="Frames encoded at once.")] = 8,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Turn videos and their actions into a token store."""
    given = _given(locals())
    from driving_sim.pipeline import TrainingRequest, tokenize_videos

    training = TrainingRequest(**_taken(given, TrainingRequest))
    # A tokenizer that is named must be there; the default one is made where it is not.
    given["training"] = training if tokenizer is None else None
    given["tokenizer"] = tokenizer or RUNS / "tokenizer"
    index = tokenize_videos(**given, device=device, precision=precision or "auto")
    named = "" if tokenizer is None else f" --tokenizer {tokenizer}"
    _say_done(f"{index} -> {out}; next: drivesim train-world-model {out}{named}")


@app.command()
def train_world_model(
    tokens: Annotated[Path, Argument(help="Token store.")] = RUNS / "tokens",
    run: RunOut = RUNS / "world-model",
    tokenizer: Annotated[Path, Option(help="The tokenizer run that made the tokens.")] = RUNS
    / "tokenizer",
    preset: Annotated[
        str, _preset(" (see the README); auto: the one that fits the tokens.")
    ] = "auto",
    steps: Steps = None,
    minutes: Minutes = None,
    config: Config = None,
    assignments: Set = None,
    resume: Resume = False,
    init_from: InitFrom = None,
    precision: Precision = None,
    shard: Shard = False,
    device: Device = "auto",
) -> None:
    """Learn to predict the next frame's tokens from the past and the actions."""
    given = _given(locals())
    from driving_sim.pipeline import TrainingRequest, train_world_model_on

    request = TrainingRequest(**_taken(given, TrainingRequest))
    train_world_model_on(request=request, **given)
    named = "" if tokens == RUNS / "tokens" else f" --tokens {tokens}"
    _say_done(f"world model -> {run}; next: drivesim rollout --actions left --model {run}{named}")


@app.command()
def rollout(
    actions: Annotated[
        list[str],
        Option(
            help="A CSV, a script such as 'speed=8 steer=0.1 for 2s; steer=0 for 1s', or straight, "
            "left, right, brake, recorded. Repeat it for several futures side by side."
        ),
    ],
    model: Annotated[Path, Option(help="World-model run.")] = RUNS / "world-model",
    context: Annotated[
        Path | None,
        Option(help="Video to start from [default: the first validation drive of --tokens]."),
    ] = None,
    tokens: Annotated[
        Path, Option(help="Token store to start from where there is no --context.")
    ] = RUNS / "tokens",
    start_s: Annotated[
        float | None, Option("--start", help="Time of the last context frame in the video, s.")
    ] = None,
    seconds: Annotated[
        float | None, Option(help="Length [default: the actions' own, else 4].", min=0)
    ] = None,
    out: Annotated[
        Path, Option(help="Video to write (.mp4), or a folder; a JSON, PNG and tokens beside it.")
    ] = Path("rollout.mp4"),
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing --out.")] = False,
    samples: Annotated[int, Option(min=1, help="Futures for each --actions.")] = 1,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    time_offset: Annotated[
        float, Option(help="Seconds added to the clock of --context's CSV to reach the video's.")
    ] = 0.0,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Drive in the model: one video of every future, with speed and steering drawn on it."""
    given = _given(locals())
    from driving_sim.pipeline import roll_out

    report = roll_out(sampling=_sampling(given), **given)
    typer.echo(
        f"{len(report['futures'])} x {report['frames']} frames "
        f"({report['frames_per_second']:.1f} frames/s) -> {out}"
    )


@app.command()
def demo(
    out: Annotated[Path, Option(help="Folder for everything it makes.")] = RUNS / "demo",
    seed: Annotated[int, Option(min=0, help="Seed of worlds, training and sampling.")] = 0,
    drives: Annotated[
        int | None, Option(min=2, help="Drives to train on, 24 s each. [default: 160]")
    ] = None,
    precision: Precision = None,
) -> None:
    """Run all of it on the synthetic world, in minutes, on a CPU."""
    given = _given(locals())
    from driving_sim.demo import DemoConfig, run_demo

    typer.echo(run_demo(config=DemoConfig(**_taken(given, DemoConfig)), **given))


@app.command()
def surprise(
    run: Model,
    videos: Videos,
    out: Annotated[Path, Option(help="Folder for videos, pictures and JSON.")] = RUNS / "surprise",
    time_offset: TimeOffset = 0.0,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Show what a world model did not expect: heat maps over the videos, drives ranked by it."""
    from driving_sim.evaluate.likelihood.surprise import find_surprises
    from driving_sim.pipeline import model_and_drives

    world, drives = model_and_drives(run, videos, time_offset, device, precision or "auto")
    found = find_surprises(world, drives, out)
    for drive in found["ranking"]:
        typer.echo(f"{found['drives'][drive]['bits_per_token']:8.3f} bits per token  {drive}")
    typer.echo(f"videos, curves and the most surprising moments -> {out}")


@app.command()
def scaling(
    runs: Annotated[
        list[Path],
        Argument(help="Finished world-model runs of at least three sizes, on one token store."),
    ],
    out: Annotated[Path, Option(help="Folder for the law and its plot.")] = RUNS / "scaling",
    compute: Annotated[
        float | None,
        Option(help="Predict a run of this many operations [default: 10 times the largest run's]."),
    ] = None,
    parameters: Annotated[
        float | None, Option(help="Or of this many parameters without embeddings, with --tokens.")
    ] = None,
    tokens: Annotated[float | None, Option(help="Tokens that it is trained on.")] = None,
) -> None:
    """Fit a scaling law to small runs and predict what a larger one will come to."""
    from driving_sim.scaling.report import scale, target_compute

    typer.echo(str(scale(runs, out, compute=target_compute(compute, parameters, tokens))))
    typer.echo(f"law and plot -> {out}")


@evaluate_app.command("tokenizer")
def evaluate_tokenizer(
    run: Annotated[Path, Argument(help="Tokenizer run.")],
    videos: Videos,
    out: Annotated[Path, Option(help="Folder for the report.")] = REPORTS / "tokenizer",
    fps: Fps = None,
    every: Every = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """PSNR, SSIM, codebook use, flicker and speed of reconstructions: a report."""
    given = _given(locals())
    from driving_sim.evaluate.measure import measure_tokenizer

    _show(measure_tokenizer(**given), out)


@evaluate_app.command("world-model")
def evaluate_world_model(
    run: Model,
    data: Annotated[
        list[Path], Argument(help="Held-out drives: videos, or one token store of them.")
    ],
    out: Annotated[Path, Option(help="Folder for the report.")] = REPORTS / "world-model",
    training_tokens: Annotated[
        Path, Option(help="Token store that the model was trained on, for the baselines.")
    ] = RUNS / "tokens",
    training_videos: Annotated[
        list[Path] | None,
        Option(
            help="Its videos, which the inverse-dynamics probe learns from, 20 minutes of them at "
            "most; drives that are held out, or not in --training-tokens, are left out. May be "
            "repeated. [default: reconstructions of the tokens]"
        ),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Less of everything.")] = False,
    fps: Annotated[
        float | None, Option(help="Frames per second [default: as in --training-tokens].")
    ] = None,
    every: Every = None,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    i3d: Annotated[
        Path | None, Option(help="I3D TorchScript file: the Fréchet distance is then FVD.")
    ] = None,
    probe: Annotated[
        Path | None,
        Option(
            help="Report whose inverse-dynamics probe is used again, to compare with it: of the "
            "model's frame rate and kind of steering, and of none of the held-out drives."
        ),
    ] = None,
    time_offset: TimeOffset = 0.0,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Likelihood, action information, rollout quality, action fidelity, stability: a report."""
    given = _given(locals())
    from dataclasses import replace

    from driving_sim.evaluate.measure import measure_world_model
    from driving_sim.evaluate.world_model import FULL, QUICK

    config = replace(QUICK if given.pop("quick") else FULL, sampling=_sampling(given))
    _show(measure_world_model(config=config, **given), out)


@evaluate_app.command("compare")
def evaluate_compare(
    a: Annotated[Path, Argument(help="A report.")],
    b: Annotated[Path, Argument(help="Another one, measured in the same way.")],
    out: Annotated[Path, Option(help="Page to write.")] = REPORTS / "comparison.html",
) -> None:
    """Set two reports side by side, if they were measured under one protocol."""
    from driving_sim.evaluate.report.compare import compare_reports

    typer.echo(compare_reports(a, b, out))


@evaluate_app.command("control")
def evaluate_control(
    run: Model,
    videos: Videos,
    starts: Annotated[int, Option(min=1, help="Starts, spread over the videos.")] = 10,
    seconds: Annotated[float, Option(help="Length of each future.")] = 2.0,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    time_offset: TimeOffset = 0.0,
    sheet: Annotated[Path | None, Option(help="Picture of the futures (.png or .jpg).")] = None,
    out: Annotated[Path | None, Option(help="Also write the JSON here.")] = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Steer left and right from many starts: does the picture move the right way?"""
    sampling = _sampling(_given(locals()))
    from driving_sim.engine.config import save_json
    from driving_sim.evaluate.actions.control import measure_control
    from driving_sim.pipeline import model_and_drives

    world, drives = model_and_drives(run, videos, time_offset, device, precision or "auto")
    measured = measure_control(
        world, drives, starts=starts, seconds=seconds, sampling=sampling, sheet=sheet
    )
    typer.echo(json.dumps(measured, indent=2))
    if out is not None:
        save_json(out, measured)


def _show(figures: dict[str, str], out: Path) -> None:
    """Print a report's key figures and where the rest is."""
    for label, text in figures.items():
        typer.echo(f"{label}: {text}")
    typer.echo(f"report -> {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(app())
