"""The `drivesim` command: parses, calls, prints. Whatever is heavy is imported in the commands."""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.memory import keep_freed_memory
from driving_sim.engine.ranks.environment import is_main_process
from driving_sim.engine.threads import leave_busy_cores

if TYPE_CHECKING:
    from driving_sim.world_model.sampling.sampler import Sampling

RUNS = Path("runs")
REPORTS = RUNS / "reports"


def _explain(error: BaseException) -> str | None:
    """The one line for an error that a user or the machine caused; None for a bug of ours."""
    if isinstance(error, DriveSimError):
        return str(error)
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
def _one_line(debug: bool = False) -> Iterator[None]:
    """Turn errors that users cause into one line and exit code 1; `debug` shows the traceback."""
    try:
        yield
    except Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(interrupted.exit_code) from None
    except Exception as error:
        line = _explain(error)
        if line is None or debug:
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


class _WholeSummaries(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, with a summary that the list of commands wraps and does not cut."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            command.short_help = command.help.splitlines()[0]
        return command


class _OneLineErrors(_WholeSummaries):
    def make_context(self, *args: Any, **options: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(ctx.params.get("debug", False)):
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
    cls=_WholeSummaries,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a trained model on held-out drives.",
)
app.add_typer(evaluate_app, name="evaluate")

Videos = Annotated[
    list[Path],
    typer.Argument(
        help="Video files or folders of them; also Udacity recordings and comma2k19 segments."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        envvar="DRIVESIM_PRESET",
        help="auto, demo, tiny, base or large (see the README); auto: base on CUDA, else tiny.",
    ),
]


def _gives_way(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Steps or minutes: what the environment says gives way to the other on the command line."""
    other = "minutes" if option.name == "steps" else "steps"
    own, others = (context.get_parameter_source(str(name)) for name in (option.name, other))
    gives_way = own and own.name == "ENVIRONMENT" and others and others.name == "COMMANDLINE"
    return None if gives_way else value


Steps = Annotated[
    int | None,
    typer.Option(envvar="DRIVESIM_STEPS", callback=_gives_way, help="Train for this many steps."),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        envvar="DRIVESIM_MINUTES", callback=_gives_way, help="Train for this long instead."
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="auto, fp32 or bf16 [default: auto, bf16 where it is faster].")
]
Device = Annotated[str, typer.Option(envvar="DRIVESIM_DEVICE", help="auto, cuda, mps or cpu.")]
Kind = Annotated[
    str | None,
    typer.Option(
        help="What a bare `steering` column is: steering_wheel, road_wheel, curvature, normalised."
    ),
]
TimeOffset = Annotated[
    float, typer.Option(help="Seconds added to the action file's clock to reach the video's.")
]
Every = Annotated[int | None, typer.Option(help="Take every n-th frame instead of a rate.", min=1)]
Fps = Annotated[float | None, typer.Option(help="Frames per second to take [default: 10].")]
Config = Annotated[Path | None, typer.Option(help="YAML file laid over the preset.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: a.b=value. May be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
InitFrom = Annotated[
    Path | None, typer.Option(help="Start from the weights of this finished run (fine-tuning).")
]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="Spread the model over the ranks of torchrun (FSDP2)."),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Go on without drives that cannot be read, and name them."),
]

MetricsOut = Annotated[Path | None, typer.Option("--out", help="Also write the JSON here.")]
Guidance = Annotated[float, typer.Option(help="Strength of the actions; 1 is the plain model.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Keep only the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest up to this mass.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Learn a driving simulator from driving video, then drive in it."""
    keep_freed_memory()
    leave_busy_cores()


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for the videos, CSVs and worlds.")],
    drives: Annotated[int, typer.Option(min=1, help="How many drives.")] = 8,
    seconds: Annotated[float, typer.Option(min=1, help="Length of each drive.")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the worlds and the drivers.")] = 0,
    worlds: Annotated[
        int | None, typer.Option(min=1, help="How many worlds [default: one for each drive].")
    ] = None,
    first: Annotated[
        int, typer.Option(min=0, help="Number of the first drive: later ones, to hold out.")
    ] = 0,
    height: Annotated[int, typer.Option(min=16, help="Picture height in pixels.")] = 128,
    width: Annotated[int, typer.Option(min=16, help="Picture width in pixels.")] = 256,
    fps: Annotated[float, typer.Option(min=4, help="Frames per second.")] = 10.0,
) -> None:
    """Make synthetic drives: video, exact actions, and the world to replay them in."""
    from driving_sim.data.synthetic.drives import frame_count
    from driving_sim.data.synthetic.world import SyntheticConfig
    from driving_sim.data.synthetic.writer import write_synthetic_drives
    from driving_sim.engine.config import from_dict
    from driving_sim.engine.progress import progress
    from driving_sim.engine.threads import usable_cores

    shape = {"height": height, "width": width, "fps": fps}
    config = from_dict(SyntheticConfig, shape, where="drivesim synth")
    with progress(drives * frame_count(seconds, config), f"drive -> {out}", "frames") as bar:
        write_synthetic_drives(
            out,
            drives=drives,
            seconds=seconds,
            seed=seed,
            worlds=worlds,
            first=first,
            config=config,
            workers=usable_cores(),
            progress=lambda count: bar.advance(count),
        )
    typer.echo(f"{drives} drives of {seconds:g} s -> {out}; next: drivesim tokenize {out}")


@app.command()
def inspect(
    videos: Videos,
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures, in place of an earlier inspection.")
    ] = RUNS / "inspect",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
    steering_kind: Kind = None,
    time_offset: TimeOffset = 0.0,
) -> None:
    """Show what is there and what is wrong: rates, gaps, action lag, steering sign."""
    from driving_sim.data.inspect.inspection import inspect_drives

    report = inspect_drives(videos, out, steering_kind=steering_kind, time_offset=time_offset)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        typer.echo(f"{report.table()}\n\npictures and inspection.json: {out}")


@app.command()
def train_tokenizer(
    videos: Videos,
    out: Annotated[Path, typer.Option(help="Run folder.")] = RUNS / "tokenizer",
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
    from driving_sim.pipeline import TrainingRequest, train_tokenizer_on

    request = TrainingRequest(
        preset=preset,
        steps=steps,
        minutes=minutes,
        config=config,
        assignments=tuple(assignments or ()),
        resume=resume,
        init_from=init_from,
        precision=precision,
        shard=shard,
        device=device,
    )
    train_tokenizer_on(videos, out, request, fps=fps, every=every, skip_bad=skip_bad)
    _say_done(f"tokenizer -> {out}; next: drivesim tokenize VIDEOS --tokenizer {out}")


@app.command()
def tokenize(
    videos: Videos,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer run [default: runs/tokenizer, trained first if missing]."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Token store to write.")] = RUNS / "tokens",
    preset: Annotated[
        str,
        typer.Option(
            envvar="DRIVESIM_PRESET",
            help="auto, demo, tiny, base or large: of the tokenizer that is trained if missing; "
            "auto: base on CUDA, else tiny.",
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(
            envvar="DRIVESIM_STEPS", help="Train a missing tokenizer for this many steps."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            envvar="DRIVESIM_MINUTES", help="Train a missing tokenizer for this long instead."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override one setting of a missing tokenizer: a.b=value. May be repeated.",
        ),
    ] = None,
    fps: Fps = None,
    every: Every = None,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Add each drive flipped, with steering negated.")
    ] = False,
    steering_kind: Kind = None,
    time_offset: TimeOffset = 0.0,
    skip_bad: SkipBad = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames encoded at once.")] = 8,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Turn videos and their actions into a token store."""
    from driving_sim.pipeline import TrainingRequest, tokenize_videos

    # A tokenizer that is named must be there; the default one is made where it is not.
    training = TrainingRequest(
        preset=preset,
        steps=steps,
        minutes=minutes,
        assignments=tuple(assignments or ()),
        precision=precision,
        device=device,
    )
    index = tokenize_videos(
        videos,
        tokenizer or RUNS / "tokenizer",
        out,
        fps=fps,
        every=every,
        mirror=mirror,
        steering_kind=steering_kind,
        time_offset=time_offset,
        skip_bad=skip_bad,
        batch_size=batch_size,
        training=training if tokenizer is None else None,
        device=device,
        precision=precision or "auto",
    )
    named = "" if tokenizer is None else f" --tokenizer {tokenizer}"
    _say_done(f"{index} -> {out}; next: drivesim train-world-model {out}{named}")


@app.command()
def train_world_model(
    tokens: Annotated[Path, typer.Argument(help="Token store.")] = RUNS / "tokens",
    out: Annotated[Path, typer.Option(help="Run folder.")] = RUNS / "world-model",
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer run that made the tokens.")] = RUNS
    / "tokenizer",
    preset: Annotated[
        str,
        typer.Option(
            envvar="DRIVESIM_PRESET",
            help="auto, demo, tiny, base or large (see the README); auto: the one that fits the "
            "tokens.",
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
    """Learn to predict the next frame's tokens from the past and the actions."""
    from driving_sim.pipeline import TrainingRequest, train_world_model_on

    request = TrainingRequest(
        preset=preset,
        steps=steps,
        minutes=minutes,
        config=config,
        assignments=tuple(assignments or ()),
        resume=resume,
        init_from=init_from,
        precision=precision,
        shard=shard,
        device=device,
    )
    train_world_model_on(tokens, tokenizer, out, request)
    named = "" if tokens == RUNS / "tokens" else f" --tokens {tokens}"
    _say_done(f"world model -> {out}; next: drivesim rollout --actions left --model {out}{named}")


@app.command()
def rollout(
    actions: Annotated[
        list[str],
        typer.Option(
            help="A CSV, a script such as 'speed=8 steer=0.1 for 2s; steer=0 for 1s', or straight, "
            "left, right, brake, recorded. Repeat it for several futures side by side."
        ),
    ],
    model: Annotated[Path, typer.Option(help="World-model run.")] = RUNS / "world-model",
    context: Annotated[
        Path | None,
        typer.Option(help="Video to start from [default: the first validation drive of --tokens]."),
    ] = None,
    tokens: Annotated[
        Path, typer.Option(help="Token store to start from where there is no --context.")
    ] = RUNS / "tokens",
    start: Annotated[
        float | None, typer.Option(help="Time of the last context frame in the video, s.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length [default: the actions' own, else 4].", min=0)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Video to write (.mp4), or a folder; a JSON, PNG and tokens beside it."),
    ] = Path("rollout.mp4"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = (
        False
    ),
    samples: Annotated[int, typer.Option(min=1, help="Futures for each --actions.")] = 1,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    time_offset: Annotated[
        float,
        typer.Option(help="Seconds added to the clock of --context's CSV to reach the video's."),
    ] = 0.0,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Drive in the model: one video of every future, with speed and steering drawn on it."""
    from driving_sim.pipeline import roll_out

    sampling = _sampling(temperature, top_k, top_p, guidance, seed)
    report = roll_out(
        model,
        actions,
        out,
        tokens=tokens,
        context=context,
        start_s=start,
        seconds=seconds,
        samples=samples,
        sampling=sampling,
        time_offset=time_offset,
        overwrite=overwrite,
        device=device,
        precision=precision or "auto",
    )
    typer.echo(
        f"{len(report['futures'])} x {report['frames']} frames "
        f"({report['frames_per_second']:.1f} frames/s) -> {out}"
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = RUNS / "demo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of worlds, training and sampling.")] = 0,
    drives: Annotated[
        int | None,
        typer.Option(min=2, help="Drives to train on, 24 s each. [default: 160]"),
    ] = None,
    precision: Precision = None,
) -> None:
    """Run all of it on the synthetic world, in minutes, on a CPU."""
    from dataclasses import replace

    from driving_sim.demo import DemoConfig, run_demo

    config = DemoConfig()
    config = replace(config, drives=drives or config.drives, precision=precision or "auto")
    typer.echo(run_demo(out, seed=seed, config=config))


@app.command()
def surprise(
    run: Annotated[Path, typer.Argument(help="World-model run.")],
    videos: Videos,
    out: Annotated[Path, typer.Option(help="Folder for videos, pictures and JSON.")] = (
        RUNS / "surprise"
    ),
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
        typer.Argument(
            help="Finished world-model runs of at least three sizes, on one token store."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the law and its plot.")] = RUNS / "scaling",
    compute: Annotated[
        float | None,
        typer.Option(
            help="Predict a run of this many operations [default: 10 times the largest run's]."
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(help="Or of this many parameters without embeddings, with --tokens."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens that it is trained on.")] = None,
) -> None:
    """Fit a scaling law to small runs and predict what a larger one will come to."""
    from driving_sim.scaling.report import scale, target_compute

    typer.echo(str(scale(runs, out, compute=target_compute(compute, parameters, tokens))))
    typer.echo(f"law and plot -> {out}")


@evaluate_app.command("tokenizer")
def evaluate_tokenizer(
    run: Annotated[Path, typer.Argument(help="Tokenizer run.")],
    videos: Videos,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = REPORTS / "tokenizer",
    fps: Fps = None,
    every: Every = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """PSNR, SSIM, codebook use, flicker and speed of reconstructions: a report."""
    from driving_sim.evaluate.measure import measure_tokenizer

    figures = measure_tokenizer(
        run, videos, out, fps=fps, every=every, device=device, precision=precision or "auto"
    )
    _show(figures, out)


@evaluate_app.command("world-model")
def evaluate_world_model(
    run: Annotated[Path, typer.Argument(help="World-model run.")],
    data: Annotated[
        list[Path], typer.Argument(help="Held-out drives: videos, or one token store of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = REPORTS / "world-model",
    training_tokens: Annotated[
        Path, typer.Option(help="Token store that the model was trained on, for the baselines.")
    ] = RUNS / "tokens",
    training_videos: Annotated[
        list[Path] | None,
        typer.Option(
            help="Its videos, which the inverse-dynamics probe learns from, 20 minutes of them at "
            "most; drives that are held out, or not in --training-tokens, are left out. May be "
            "repeated. [default: reconstructions of the tokens]"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything.")] = False,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second [default: as in --training-tokens].")
    ] = None,
    every: Every = None,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    i3d: Annotated[
        Path | None,
        typer.Option(help="I3D TorchScript file: the Fréchet distance is then FVD."),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            help="Report whose inverse-dynamics probe is used again, to compare with it: of the "
            "model's frame rate and kind of steering, and of none of the held-out drives."
        ),
    ] = None,
    time_offset: TimeOffset = 0.0,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Likelihood, action information, rollout quality, action fidelity, stability: a report."""
    from dataclasses import replace

    from driving_sim.evaluate.measure import measure_world_model
    from driving_sim.evaluate.world_model import FULL, QUICK

    sampling = _sampling(temperature, top_k, top_p, guidance, seed)
    figures = measure_world_model(
        run,
        data,
        out,
        training_tokens=training_tokens,
        training_videos=training_videos or (),
        config=replace(QUICK if quick else FULL, sampling=sampling),
        fps=fps,
        every=every,
        time_offset=time_offset,
        i3d=i3d,
        probe=probe,
        device=device,
        precision=precision or "auto",
    )
    _show(figures, out)


@evaluate_app.command("compare")
def evaluate_compare(
    a: Annotated[Path, typer.Argument(help="A report.")],
    b: Annotated[Path, typer.Argument(help="Another one, measured in the same way.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = REPORTS / "comparison.html",
) -> None:
    """Set two reports side by side, if they were measured under one protocol."""
    from driving_sim.evaluate.report.compare import compare_reports

    typer.echo(compare_reports(a, b, out))


@evaluate_app.command("control")
def evaluate_control(
    run: Annotated[Path, typer.Argument(help="World-model run.")],
    videos: Videos,
    starts: Annotated[int, typer.Option(min=1, help="Starts, spread over the videos.")] = 10,
    seconds: Annotated[float, typer.Option(help="Length of each future.")] = 2.0,
    guidance: Guidance = 1.0,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    time_offset: TimeOffset = 0.0,
    sheet: Annotated[
        Path | None, typer.Option(help="Picture of the futures (.png or .jpg).")
    ] = None,
    out: MetricsOut = None,
    precision: Precision = None,
    device: Device = "auto",
) -> None:
    """Steer left and right from many starts: does the picture move the right way?"""
    from driving_sim.evaluate.actions.control import measure_control
    from driving_sim.pipeline import model_and_drives

    world, drives = model_and_drives(run, videos, time_offset, device, precision or "auto")
    sampling = _sampling(temperature, top_k, top_p, guidance, seed)
    measured = measure_control(
        world, drives, starts=starts, seconds=seconds, sampling=sampling, sheet=sheet
    )
    _report(measured, out)


def _sampling(
    temperature: float, top_k: int | None, top_p: float | None, guidance: float, seed: int
) -> "Sampling":
    from driving_sim.engine.config import from_dict
    from driving_sim.world_model.sampling.sampler import Sampling

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return from_dict(Sampling, options | {"guidance": guidance, "seed": seed}, where="sampling")


def _show(figures: dict[str, str], out: Path) -> None:
    """Print a report's key figures and where the rest is."""
    for label, text in figures.items():
        typer.echo(f"{label}: {text}")
    typer.echo(f"report -> {out / 'report.html'}")


def _report(measured: dict[str, Any], out: Path | None) -> None:
    """Print measurements as JSON, and write them to `out`."""
    typer.echo(json.dumps(measured, indent=2))
    if out is not None:
        from driving_sim.engine.config import save_json

        save_json(out, measured)


if __name__ == "__main__":
    sys.exit(app())
