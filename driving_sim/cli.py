"""The `drivesim` command line.

Each command parses its options, calls a function that does the work, and prints the result. It
imports heavy modules in its body, so that `--help` is fast. A command's parameters have the same
names as those of the function that it calls, so most are passed on unchanged. Error messages name
settings by these parameter names, in backticks, and this module replaces the names with flags.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from driving_sim.engine import progress as progress_lines
from driving_sim.engine.errors import BadDriveError, DriveSimError, Interrupted, is_out_of_memory
from driving_sim.engine.threads import collect_rarely, keep_freed_memory, leave_busy_cores
from driving_sim.engine.torchrun import is_main_process

RUNS = Path("runs")
REPORTS = RUNS / "reports"

_SETTING = re.compile(r"`(\w[\w.]*)(=[^`]*)?`")
_RUNNING = "drivesim.command"  # The key of the running command in click's `Context.meta`.
_RESUME = {"resume": "the same command again"}
_WORDS_WITHOUT_FLAG = {
    "tokenize": _RESUME | {"run": "trained --tokenizer"},
    "demo": _RESUME | {"run": "--out"},
    "play": {"actions": "the plan", "seconds": "the plan's time"},
}
"""An error message may name a setting for which the command has no flag. For each command, these
are the words to print instead of the setting's name."""


def with_flags(text: str, command: Any) -> str:
    """Return `text`, in which settings in backticks are replaced with flags of `command`.

    `out` becomes --out, `fps=10` becomes --fps 10, and `training.seed=1` becomes
    --set training.seed=1. Positional arguments become upper case, such as VIDEOS. If `command` has
    no such flag but another command has, its flag is used. Other text in backticks does not change.
    """
    if not _SETTING.search(text):  # Return early, because most texts name no setting.
        return text
    root: Any = typer.main.get_command(app)
    commands = *root.commands.values(), *root.commands["evaluate"].commands.values(), command
    parameters = [parameter for known in commands for parameter in known.params]
    words = {p.name: p.opts[0] for p in parameters if p.opts[0].startswith("-")}
    words |= {p.name: p.opts[0].upper() for p in command.params if p.opts[0][0] != "-"}
    words |= _WORDS_WITHOUT_FLAG.get(command.name, {})

    def to_flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2] or ""
        if "." in name and value:
            return f"{words['assignments']} {name}{value}"
        return words[name] + value.replace("=", " ", 1) if name in words else match[0]

    return _SETTING.sub(to_flag, text)


def _error_line(error: BaseException, command: Any) -> str | None:
    """Return the one-line message for an error caused by the user or the machine.

    Returns None for a bug in drivesim.
    """
    if isinstance(error, BadDriveError) and any(p.name == "skip_bad" for p in command.params):
        return with_flags(f"{error}, or pass `skip_bad`", command)
    if isinstance(error, DriveSimError):
        return with_flags(str(error), command)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if is_out_of_memory(error):
        return (
            "out of memory: to train, lower data.batch_size or choose a smaller --preset; to roll "
            "out, ask for fewer or shorter futures"
        )
    if type(error).__name__ == "NoArgsIsHelpError":
        return None  # typer prints the help text, which is this error's message.
    if isinstance(error, typer.BadParameter.__bases__) and hasattr(error, "format_message"):
        return f"{error.format_message()} (see --help)"
    return None


@contextmanager
def _errors_as_one_line(context: Any = None) -> Iterator[None]:
    """Print an error caused by the user or the machine as one line, and exit with code 1.

    The error is raised unchanged if it is a bug in drivesim, or if the user passed `--debug`.
    """
    try:
        yield
    except Interrupted as interrupted:
        typer.echo(with_flags(str(interrupted), context.meta[_RUNNING]), err=True)
        raise typer.Exit(interrupted.exit_code) from None
    except Exception as error:
        line = _error_line(error, context and context.meta.get(_RUNNING))
        if line is None or (context and context.params["debug"]):
            raise
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def _say_done(line: str) -> None:
    """Print the last line of a command, on the main rank only."""
    if is_main_process():
        typer.echo(line)


class _Group(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, and store it as the running command.

        Set its summary to the first line of its help, because click would truncate that line.
        """
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.short_help = command.help.splitlines()[0]
        ctx.meta[_RUNNING] = command
        progress_lines.wording = partial(with_flags, command=command)
        return command


class _OneLineErrors(_Group):
    def make_context(self, *args: Any, **options: Any) -> Any:
        with _errors_as_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _errors_as_one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # Importing rich would double the time that --help takes.
    pretty_exceptions_enable=False,
    help="Train a driving simulator on driving video, then drive in it.",
)
evaluate_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a trained model on held-out drives.",
)
app.add_typer(evaluate_app, name="evaluate")


def _source(context: typer.Context, name: str) -> str:
    """Return where a value comes from: COMMANDLINE, ENVIRONMENT or DEFAULT; "" if it has none."""
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _unless_overridden(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Return the `value` of `steps` or `minutes`, or None if the other option overrides it.

    A run can have only one of them. If one is given on the command line, the environment variable
    of the other is ignored.
    """
    rival = "minutes" if option.name == "steps" else "steps"
    from_environment = _source(context, str(option.name)) == "ENVIRONMENT"
    is_overridden = _source(context, rival) == "COMMANDLINE"
    return None if from_environment and is_overridden else value


def _preset(help_text: str) -> Any:
    return Option(envvar="DRIVESIM_PRESET", help=help_text)


def _training_length(variable: str, help_text: str) -> Any:
    return Option(envvar=variable, callback=_unless_overridden, help=help_text)


Videos = Annotated[
    list[Path],
    Argument(
        help="Video files, or folders that contain videos, series of pictures, Udacity recordings, "
        "comma2k19 segments, donkeycar tubs, KITTI recordings or nuScenes."
    ),
]
Model = Annotated[
    Path, Argument(help="Folder of a world-model run, or the name of a packaged model.")
]
Preset = Annotated[
    str,
    _preset(
        "Model size and training settings: demo, tiny, base, large, or auto, which chooses base on "
        "a CUDA GPU and tiny elsewhere."
    ),
]
Steps = Annotated[
    int | None,
    _training_length("DRIVESIM_STEPS", "Number of training steps [default: set by the preset]."),
]
Minutes = Annotated[
    float | None,
    _training_length("DRIVESIM_MINUTES", "Training time in minutes, instead of --steps."),
]
Precision = Annotated[
    str | None,
    Option(
        help="Number format of the computation: fp32, bf16, or auto, which chooses bf16 if it is "
        "faster on the device [default: auto]."
    ),
]
Device = Annotated[
    str,
    Option(
        envvar="DRIVESIM_DEVICE",
        help="Device to compute on: cuda, mps, cpu, or auto, which chooses the first of these that "
        "is available.",
    ),
]
_READING: dict[str, Any] = {
    "steering_kind": Annotated[
        str | None,
        Option(
            help="What the steering in the action files measures: steering_wheel, road_wheel, "
            "curvature or normalised, all positive to the left. Needed if the column's name does "
            "not say it [default: with a model, the model's]."
        ),
    ],
    "time_offset": Annotated[
        float | None,
        Option(
            help="Seconds to add to the times in the action files, so that they match the video."
        ),
    ],
    "speed": Annotated[
        str | None, Option(help="Column with the speed, if its name is not one of drivesim's.")
    ],
    "speed_unit": Annotated[
        str | None, Option(help="Unit of the column --speed: mps, kmh or mph [default: mps].")
    ],
    "steering": Annotated[
        str | None, Option(help="Column with the steering, if its name is not one of drivesim's.")
    ],
    "steering_unit": Annotated[
        str | None, Option(help="Unit of the column --steering: rad or deg [default: rad].")
    ],
    "stream": Annotated[
        int | None,
        Option(
            min=0,
            help="Number of the video stream to read, as ffprobe counts them [default: the best].",
        ),
    ],
    "video_fps": Annotated[
        float | None,
        Option(
            help="Frame rate of videos that do not store one, such as raw H.264 and HEVC, and of "
            "numbered pictures."
        ),
    ],
    "wheelbase": Annotated[
        list[str] | None,
        Option(
            metavar="[FOLDER=]METRES",
            help="Distance between the axles, for checking the steering against the picture; with "
            "a folder, only for its drives. Can be given several times [default: that of a "
            "passenger car].",
        ),
    ],
}
"""The options of `Reading`, for all commands that take videos. All of them default to None."""
Command = TypeVar("Command", bound=Callable[..., Any])


def reads_recordings(command: Command) -> Command:
    """Give a command the options of `Reading`, in place of its parameter `reading`."""
    parameters = list(signature(command).parameters.values())
    place = [parameter.name for parameter in parameters].index("reading")
    parameters[place : place + 1] = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _READING.items()
    ]

    @wraps(command)
    def with_options(**options: Any) -> Any:
        from driving_sim.data.actions.reading import Reading, parse_wheelbases

        given = _given_options({name: options.pop(name) for name in _READING})
        if wheelbases := given.pop("wheelbase", None):
            given["wheelbase"] = parse_wheelbases(wheelbases)
        return command(**options, reading=Reading(**given))

    names = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_options.__signature__ = signature(command).replace(parameters=names)  # type: ignore[attr-defined]
    return cast(Command, with_options)


Every = Annotated[int | None, Option(help="Take every n-th frame, instead of --fps.", min=1)]
Fps = Annotated[
    float | None, Option(help="Frames per second to take from the videos [default: 10].")
]
Config = Annotated[
    Path | None, Option(help="YAML file with settings that override those of the preset.")
]
Set = Annotated[
    list[str] | None,
    Option("--set", help="Override one setting, such as training.seed=1. May be repeated."),
]
RunOut = Annotated[Path, Option("--out", help="Folder to write the run to.")]
Resume = Annotated[bool, Option("--resume", help="Continue the run in --out where it stopped.")]
InitFrom = Annotated[
    Path | None,
    Option(
        help="Finished run, or name of a packaged model, to take the initial weights from, for "
        "fine-tuning."
    ),
]
Shard = Annotated[
    bool, Option("--shard", help="Shard the model over the ranks of torchrun (FSDP2).")
]
SkipBad = Annotated[
    bool, Option("--skip-bad", help="Skip drives that cannot be read, and list them.")
]
Guidance = Annotated[
    float,
    Option(
        help="Guidance scale for the actions. 1 means no guidance. Larger values make the model "
        "follow the actions more strongly."
    ),
]
Temperature = Annotated[
    float, Option(help="Sampling temperature; 0 always takes the most likely token.")
]
MinP = Annotated[
    float,
    Option(
        help="Sample only tokens that are at least this share as likely as the most likely one; 0 "
        "allows all."
    ),
]
TopK = Annotated[
    int | None, Option(help="Sample only from the k most likely tokens [default: all].")
]
TopP = Annotated[
    float | None,
    Option(
        help="Sample only from the most likely tokens that together reach this probability "
        "[default: all]."
    ),
]
Seed = Annotated[int, Option(help="Random seed for sampling the tokens.")]


def _given_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a command's options, taken from its `locals()`, without those that are None.

    Call it first in a command, before there are other local variables. The function that does the
    work has defaults for the options that are missing.
    """
    return {name: value for name, value in parameters.items() if value is not None}


def _pop_fields(options: dict[str, Any], cls: type) -> dict[str, Any]:
    """Remove the options that are fields of the dataclass `cls` from `options`, and return them."""
    return {field.name: options.pop(field.name) for field in fields(cls) if field.name in options}


def _pop_sampling(options: dict[str, Any]) -> Any:
    """Remove the sampling options from `options`, and return them as a `Sampling`."""
    from driving_sim.engine.config import from_dict
    from driving_sim.world_model.sampling.sampling import Sampling

    return from_dict(Sampling, _pop_fields(options, Sampling), where="sampling")


@app.callback()
def main(
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a driving simulator on driving video, then drive in it."""
    collect_rarely()
    keep_freed_memory()
    leave_busy_cores()


@app.command()
def synth(
    out: Annotated[
        Path, Argument(help="Folder to write the videos, action CSVs and world descriptions to.")
    ],
    drives: Annotated[int, Option(min=1, help="Number of drives to make.")] = 8,
    seconds: Annotated[float, Option(min=1, help="Length of each drive in seconds.")] = 30.0,
    seed: Annotated[int, Option(min=0, help="Random seed for the worlds and the drivers.")] = 0,
    worlds: Annotated[
        int | None,
        Option(min=1, help="Number of worlds that the drives share [default: one for each drive]."),
    ] = None,
    first: Annotated[
        int,
        Option(
            min=0,
            help="Number of the first drive, as in its file name. To make held-out drives in the "
            "same worlds, use the same --seed and --worlds, and start after the last training "
            "drive.",
        ),
    ] = 0,
    height: Annotated[int, Option(min=16, help="Height of the videos in pixels.")] = 128,
    width: Annotated[int, Option(min=16, help="Width of the videos in pixels.")] = 256,
    fps: Annotated[float, Option(min=4, help="Frames per second of the videos.")] = 10.0,
    assignments: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Override one setting of the world or its drivers, such as traffic=0. May be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Make synthetic drives: videos with exact speed and steering (left is positive).

    A JSON file beside each video describes the world, so that the drive can be replayed with
    different actions.
    """
    options = _given_options(locals())
    from driving_sim.data.synthetic.drives import frame_count
    from driving_sim.data.synthetic.world import SyntheticConfig
    from driving_sim.data.synthetic.writer import write_synthetic_drives
    from driving_sim.engine.config import from_dict, resolve
    from driving_sim.engine.progress import progress
    from driving_sim.engine.threads import usable_cores

    settings = _pop_fields(options, SyntheticConfig)
    config = from_dict(SyntheticConfig, settings, where="drivesim synth")
    config = resolve(config, assignments=options.pop("assignments", ()))
    with progress(drives * frame_count(seconds, config), f"drive -> {out}", "frames") as bar:
        write_synthetic_drives(
            **options, config=config, workers=usable_cores(), progress=bar.advance
        )
    typer.echo(f"{drives} drives of {seconds:g} s -> {out}; next: drivesim tokenize {out}")


@app.command()
@reads_recordings
def inspect(
    context: typer.Context,
    videos: Videos,
    out: Annotated[
        Path,
        Option(
            help="Folder for the pictures and inspection.json. An earlier inspection in it is "
            "replaced."
        ),
    ] = RUNS / "inspect",
    fps: Annotated[
        float | None,
        Option(
            help="Frame rate to train at: show how much of each drive is usable at it "
            "[default: nothing is resampled]."
        ),
    ] = None,
    every: Every = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
    reading: Any = None,
) -> None:
    """Check drives for problems, such as gaps, a lag of the actions, or a flipped steering sign.

    In drivesim, steering is positive to the left. The command prints a table and draws plots
    that compare the actions with the video.
    """
    from driving_sim.data.inspect.inspection import inspect_drives

    report = inspect_drives(videos, out, reading, fps=fps, every=every)
    table = f"{report.table()}\n\npictures and inspection.json: {out}"
    text = json.dumps(asdict(report), indent=2) if as_json else table
    typer.echo(with_flags(text, context.command))


@app.command()
@reads_recordings
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
    reading: Any = None,
    skip_bad: SkipBad = False,
    precision: Precision = None,
    shard: Shard = False,
    device: Device = "auto",
) -> None:
    """Train a tokenizer, the model that turns frames into tokens and back."""
    options = _given_options(locals())
    from driving_sim.pipeline import TrainingRequest, train_tokenizer_on

    request = TrainingRequest(**_pop_fields(options, TrainingRequest))
    train_tokenizer_on(request=request, **options)
    _say_done(f"tokenizer -> {run}; next: drivesim tokenize VIDEOS --tokenizer {run}")


@app.command()
@reads_recordings
def tokenize(
    videos: Videos,
    tokenizer: Annotated[
        Path | None,
        Option(
            help="Folder of a finished tokenizer run, or name of a packaged model [default: "
            "runs/tokenizer, which is trained first if it is missing]."
        ),
    ] = None,
    out: Annotated[Path, Option(help="Folder to write the token store to.")] = RUNS / "tokens",
    preset: Annotated[
        str,
        _preset(
            "Model size and training settings of a missing tokenizer: demo, tiny, base, large, or "
            "auto, which chooses base on a CUDA GPU and tiny elsewhere."
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        _training_length(
            "DRIVESIM_STEPS",
            "Number of training steps for a missing tokenizer [default: set by the preset].",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        _training_length(
            "DRIVESIM_MINUTES",
            "Training time for a missing tokenizer in minutes, instead of --steps.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Override one setting for training a missing tokenizer, such as training.seed=1. "
            "May be repeated.",
        ),
    ] = None,
    fps: Fps = None,
    every: Every = None,
    mirror: Annotated[
        bool,
        Option("--mirror", help="Also add a mirrored copy of each drive, with negated steering."),
    ] = False,
    reading: Any = None,
    skip_bad: SkipBad = False,
    batch_size: Annotated[int, Option(min=1, help="Number of frames to encode at once.")] = 8,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Turn videos and their actions into a token store.

    Without --tokenizer, the command uses the tokenizer in runs/tokenizer. If that is missing or
    unfinished, the command first trains it on the videos.
    """
    options = _given_options(locals())
    from driving_sim.pipeline import TrainingRequest, tokenize_videos

    training = TrainingRequest(**_pop_fields(options, TrainingRequest))
    # Only the default tokenizer is trained if it is missing. A named one must exist.
    options["training"] = training if tokenizer is None else None
    options["tokenizer"] = tokenizer or RUNS / "tokenizer"
    index = tokenize_videos(**options, device=device, precision=precision or "auto")
    option = "" if tokenizer is None else f" --tokenizer {tokenizer}"
    _say_done(f"{index} -> {out}; next: drivesim train-world-model {out}{option}")


@app.command()
def train_world_model(
    tokens: Annotated[Path, Argument(help="Token store to train on.")] = RUNS / "tokens",
    run: RunOut = RUNS / "world-model",
    tokenizer: Annotated[
        Path,
        Option(
            help="Folder of the tokenizer run that made the tokens, or name of a packaged model."
        ),
    ] = RUNS / "tokenizer",
    preset: Annotated[
        str,
        _preset(
            "Model size and training settings: demo, tiny, base, large, or auto, which chooses the "
            "preset by the number of tokens in a frame."
        ),
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
    """Train a world model to predict the tokens of the next frame from the past and the actions."""
    options = _given_options(locals())
    from driving_sim.pipeline import TrainingRequest, train_world_model_on

    request = TrainingRequest(**_pop_fields(options, TrainingRequest))
    train_world_model_on(request=request, **options)
    option = "" if tokens == RUNS / "tokens" else f" --tokens {tokens}"
    _say_done(f"world model -> {run}; next: drivesim rollout --actions left --model {run}{option}")


@app.command()
@reads_recordings
def rollout(
    typed: typer.Context,
    actions: Annotated[
        list[str] | None,
        Option(
            help="How to drive: a CSV file, a script such as 'speed=8 steer=0.1 for 2s; steer=0 "
            "for 1s', or a name: straight, left, right, brake or recorded. Steering is positive to "
            "the left. Repeat the option to show several futures side by side."
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        Option(
            help="JSON file of a drive that `drivesim play` recorded, to drive it again instead of "
            "--actions. Its model, start and settings are taken from the file."
        ),
    ] = None,
    model: Annotated[
        Path, Option(help="Folder of a world-model run, or the name of a packaged model.")
    ] = RUNS / "world-model",
    context: Annotated[
        Path | None,
        Option(
            help="Video to start from, or the name of one of the model's own contexts [default: "
            "the first validation drive in --tokens]."
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        Option(
            help="Token store to start from, if there is no --context [default: the model's first "
            "own context or, if it has none, runs/tokens]."
        ),
    ] = None,
    start_s: Annotated[
        float | None,
        Option(
            "--start",
            help="Time in the drive, in seconds, at which the prediction starts [default: the end "
            "of one of the model's own contexts; in other drives, the earliest time with as many "
            "frames before it as the model can use].",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        Option(
            help="Length of the futures in seconds [default: the length of the actions, or 4 if "
            "they have no end].",
            min=0,
        ),
    ] = None,
    out: Annotated[
        Path,
        Option(
            help="Video to write (.mp4), or a folder for rollout.mp4. A JSON file, a PNG and the "
            "tokens are written beside the video."
        ),
    ] = Path("rollout.mp4"),
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing files.")] = False,
    samples: Annotated[
        int, Option(min=1, help="Number of futures to sample for each --actions.")
    ] = 1,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    reading: Any = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Drive in the world model and write a video of the futures, with speed and steering shown.

    A script sets speed in m/s, accel in m/s² and steer. The unit of steer is that of the training
    data, for example rad for wheel angles. A channel that is not set keeps its value.

    `left` and `right` steer by the 95th percentile of |steering| in the training data. `brake`
    slows down by 4 m/s². `recorded` repeats the actions that were recorded after the start.
    """
    options = _given_options(locals())
    from driving_sim.pipeline import drive_again, roll_out

    if replay is not None:
        chosen = ("COMMANDLINE", "ENVIRONMENT")
        given = {name for name in typed.params if _source(typed, name) in chosen}
        own = {"replay", "model", "out", "overwrite", "precision", "device"}
        if unused := sorted(given - own):
            raise DriveSimError(f"`replay` takes the drive from its file: leave out `{unused[0]}`")
        report = drive_again(**{name: options[name] for name in given})
    elif actions is None:
        raise typer.BadParameter("say how to drive", param_hint="--actions or --replay")
    else:
        del options["typed"]
        report = roll_out(sampling=_pop_sampling(options), **options)
    typer.echo(
        f"{len(report['futures'])} x {report['frames']} frames, "
        f"generated at {report['frames_per_second']:.1f} frames/s -> {out}"
    )
    if replay is not None:
        first = report["first_difference"]
        same = "the tokens are those of the recording"
        typer.echo(same if first is None else f"frame {first} is the first with other tokens")


@app.command()
@reads_recordings
def play(
    model: Annotated[
        Path | None,
        Argument(
            metavar="RUN",
            help="Folder of a world-model run, or the name of a packaged model [default: "
            "runs/world-model or, if there is none, the packaged model].",
        ),
    ] = None,
    context: Annotated[
        Path | None,
        Option(
            help="Video or folder of videos to start from [default: the model's own contexts or, "
            "if it has none, runs/tokens]."
        ),
    ] = None,
    port: Annotated[
        int,
        Option(min=0, max=65535, help="Port of the page; if it is in use, the next free one."),
    ] = 8000,
    host: Annotated[
        str,
        Option(
            help="Address to listen on. On one that other machines can reach, the page's address "
            "has a token."
        ),
    ] = "127.0.0.1",
    sessions: Annotated[
        int, Option(min=1, max=64, help="Number of people who can drive at a time.")
    ] = 2,
    record: Annotated[
        Path | None, Option(help="Folder for recordings. Without it, nothing can be recorded.")
    ] = None,
    reading: Any = None,
    no_browser: Annotated[bool, Option("--no-browser", help="Do not open a browser.")] = False,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Drive in a world model, in the browser.

    Steer with the arrow keys, WASD, a gamepad, or the wheel and pedals on the page. Stop with
    Ctrl-C.
    """
    options = _given_options(locals())
    from driving_sim.pipeline import play

    options["open_browser"] = not options.pop("no_browser")
    play(**options)


@app.command()
def demo(
    out: Annotated[Path, Option(help="Folder to write all results to.")] = RUNS / "demo",
    seed: Annotated[
        int, Option(min=0, help="Random seed for the worlds, the training and the sampling.")
    ] = 0,
    drives: Annotated[
        int | None,
        Option(min=2, help="Number of drives to train on, each of 24 s [default: 160]."),
    ] = None,
    precision: Precision = None,
) -> None:
    """Run the whole pipeline on a synthetic world, in minutes on a CPU."""
    options = _given_options(locals())
    from driving_sim.demo import DemoConfig, run_demo

    typer.echo(run_demo(config=DemoConfig(**_pop_fields(options, DemoConfig)), **options))


@app.command()
@reads_recordings
def surprise(
    run: Model,
    videos: Videos,
    out: Annotated[Path, Option(help="Folder to write the videos, pictures and JSON to.")] = RUNS
    / "surprise",
    reading: Any = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Show where videos surprise a world model, as heat maps and as a ranking of the drives."""
    from driving_sim.evaluate.likelihood.surprise import find_surprises
    from driving_sim.pipeline import model_and_drives

    world, drives = model_and_drives(run, videos, reading, device, precision or "auto")
    summary = find_surprises(world, drives, out)
    for drive in summary["ranking"]:
        typer.echo(f"{summary['drives'][drive]['bits_per_token']:8.3f} bits per token  {drive}")
    typer.echo(f"videos, curves and the most surprising moments -> {out}")


@app.command()
def scaling(
    runs: Annotated[
        list[Path],
        Argument(
            help="Folders of finished world-model runs of at least three sizes, all trained on the "
            "same token store."
        ),
    ],
    out: Annotated[Path, Option(help="Folder to write the scaling law and its plot to.")] = RUNS
    / "scaling",
    compute: Annotated[
        float | None,
        Option(
            help="Training compute to predict the loss for, in floating-point operations "
            "[default: 10 times the compute of the largest run]."
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        Option(
            help="Number of parameters to predict the loss for, without embeddings. Use it with "
            "--tokens, instead of --compute."
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        Option(
            help="Number of training tokens to predict the loss for. Use it with --parameters, "
            "instead of --compute."
        ),
    ] = None,
) -> None:
    """Fit a scaling law to small training runs and predict the loss of a larger one."""
    from driving_sim.scaling.report import scale, target_compute

    typer.echo(str(scale(runs, out, compute=target_compute(compute, parameters, tokens))))
    typer.echo(f"law and plot -> {out}")


@evaluate_app.command("tokenizer")
@reads_recordings
def evaluate_tokenizer(
    run: Annotated[
        Path, Argument(help="Folder of a tokenizer run, or the name of a packaged model.")
    ],
    videos: Videos,
    out: Annotated[Path, Option(help="Folder to write the report to.")] = REPORTS / "tokenizer",
    fps: Fps = None,
    every: Every = None,
    reading: Any = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Measure a tokenizer's reconstructions: PSNR, SSIM, codebook use, flicker and speed."""
    options = _given_options(locals())
    from driving_sim.evaluate.measure import measure_tokenizer

    _print_figures(measure_tokenizer(**options), out)


@evaluate_app.command("world-model")
@reads_recordings
def evaluate_world_model(
    run: Model,
    data: Annotated[
        list[Path],
        Argument(help="Held-out drives: video files or folders, or one token store."),
    ],
    out: Annotated[Path, Option(help="Folder to write the report to.")] = REPORTS / "world-model",
    training_tokens: Annotated[
        Path | None,
        Option(
            help="Token store that the model was trained on. The baselines are fitted to it, and "
            "the held-out drives must not be in it. Without it, both are left out. "
            "[default: runs/tokens, if that is this store]"
        ),
    ] = None,
    training_videos: Annotated[
        list[Path] | None,
        Option(
            help="Videos to train the inverse-dynamics probe on, which estimates actions from "
            "frames. Only drives that are in --training-tokens, if there are any, and are not held "
            "out are used, for at most 20 minutes in total. May be repeated. "
            "[default: videos reconstructed from the tokens]"
        ),
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="Measure on fewer and shorter clips, for a first look.")
    ] = False,
    long_rollouts: Annotated[
        int | None,
        Option(min=1, help="Number of long rollouts, which show stability [default: 4; quick 2]."),
    ] = None,
    long_seconds: Annotated[
        float | None,
        Option(help="Length of each long rollout in seconds [default: 60; quick 10]."),
    ] = None,
    sweeps: Annotated[
        int | None,
        Option(
            min=1,
            help="Number of starts for the sweep, which rolls out 21 commands from each [default: "
            "3; quick 1].",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        Option(help="Frames per second to take from the videos [default: the model's]."),
    ] = None,
    every: Every = None,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    i3d: Annotated[
        Path | None,
        Option(
            help="TorchScript file of the I3D network, for computing FVD. Without it, the report "
            "contains a Fréchet distance between built-in features, which is not FVD."
        ),
    ] = None,
    probe: Annotated[
        Path | None,
        Option(
            help="Folder of an earlier report. Its inverse-dynamics probe is used again, so that "
            "the reports can be compared. The probe must have the model's frame rate and kind of "
            "steering. It must not have been trained on the held-out drives."
        ),
    ] = None,
    reading: Any = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Measure how well a world model predicts, obeys actions and stays stable in long rollouts."""
    options = _given_options(locals())
    from driving_sim.engine.config import from_dict, to_dict
    from driving_sim.evaluate.measure import measure_world_model
    from driving_sim.evaluate.world_model import FULL, QUICK, EvaluationConfig

    chosen = to_dict(QUICK if options.pop("quick") else FULL)
    chosen |= {"sampling": asdict(_pop_sampling(options)), **_pop_fields(options, EvaluationConfig)}
    config = from_dict(EvaluationConfig, chosen, where="evaluation")
    tokens = RUNS / "tokens"
    _print_figures(measure_world_model(config=config, usual_tokens=tokens, **options), out)


@evaluate_app.command("compare")
def evaluate_compare(
    a: Annotated[Path, Argument(help="Folder of the first report.")],
    b: Annotated[
        Path, Argument(help="Folder of the second report, measured under the same protocol.")
    ],
    out: Annotated[Path, Option(help="Web page to write (.html).")] = REPORTS / "comparison.html",
) -> None:
    """Compare two reports that were measured under the same protocol, on one web page."""
    from driving_sim.evaluate.report.compare import compare_reports

    typer.echo(compare_reports(a, b, out))


@evaluate_app.command("control")
@reads_recordings
def evaluate_control(
    run: Model,
    videos: Videos,
    starts: Annotated[
        int, Option(min=1, help="Number of starting points, spread over the videos.")
    ] = 10,
    seconds: Annotated[float, Option(help="Length of each future in seconds.")] = 2.0,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    reading: Any = None,
    sheet: Annotated[
        Path | None,
        Option(help="File for a picture of the futures, .png or .jpg [default: no picture]."),
    ] = None,
    out: Annotated[
        Path | None, Option(help="File to save the printed JSON to [default: not saved].")
    ] = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Steer left and right from many starting points; count how often the picture turns that way.

    The command prints the results as JSON. Steering and motion are positive to the left.
    """
    sampling = _pop_sampling(_given_options(locals()))
    from driving_sim.engine.config import save_json
    from driving_sim.evaluate.actions.control import measure_control
    from driving_sim.pipeline import model_and_drives

    world, drives = model_and_drives(run, videos, reading, device, precision or "auto")
    measured = measure_control(
        world, drives, starts=starts, seconds=seconds, sampling=sampling, sheet=sheet
    )
    typer.echo(json.dumps(measured, indent=2))
    if out is not None:
        save_json(out, measured)


@evaluate_app.command("futures")
@reads_recordings
def evaluate_futures(
    run: Model,
    folder: Annotated[
        Path,
        Argument(
            help="Folder with a folder for each start. In it are context.mp4, and a video for each "
            "of two or more futures, such as left.mp4, with a CSV beside every video. A future "
            "begins with the last frame of the context."
        ),
    ],
    out: Annotated[Path, Option(help="Folder to write the report to.")] = REPORTS / "futures",
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    reading: Any = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Compare rollouts with the true futures of several actions; count which is nearest."""
    options = _given_options(locals())
    from driving_sim.evaluate.futures.measure import measure_futures

    _print_figures(measure_futures(sampling=_pop_sampling(options), **options), out)


def _print_figures(figures: dict[str, str], out: Path) -> None:
    """Print a report's key figures, and the path of the report."""
    for label, text in figures.items():
        typer.echo(f"{label}: {text}")
    typer.echo(f"report -> {out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(app())
