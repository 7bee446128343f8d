"""Functions that do the work of the main commands: train, tokenize and roll out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.drive import Drive, DriveSet, check_rate, sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.index import INDEX, UNFINISHED, StoreIndex, read_index
from driving_sim.engine.config import resolve
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import disk_errors
from driving_sim.engine.precision import name_of, resolve_precision
from driving_sim.engine.progress import say
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import CONFIG, is_finished, packaged_models
from driving_sim.engine.training.loop import TrainingResult
from driving_sim.play.replay import Replay, checksum
from driving_sim.tokenizer.presets import PRESETS as TOKENIZER_PRESETS
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import WEIGHTS, Tokenizer
from driving_sim.tokenizer.training import train_tokenizer
from driving_sim.world_model.action_plan import make_plans
from driving_sim.world_model.contexts import (
    context_from_store,
    contexts_of,
    find_for,
    load_context,
)
from driving_sim.world_model.rollout import (
    Context,
    context_from_drive,
    output_files,
    write_rollout,
)
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Frame
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODEL_PRESETS
from driving_sim.world_model.training.train import train_world_model
from driving_sim.world_model.world_model import WorldModel

_TOKENS = "runs/tokens"
_WORLD_MODEL = "runs/world-model"
DEFAULT_FPS = 10.0
"""Frames per second taken from videos if the user gives neither a rate nor a stride."""

C = TypeVar("C")


class Start(TypedDict):
    """Keyword arguments of a training function: initial weights, resuming, and the device."""

    init_from: Path | None
    resume: bool
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRequest:
    """A user's options for a training run: a preset, and settings that override it."""

    preset: str = "auto"
    """Name of the preset, or `auto`. For a tokenizer, `auto` chooses base on CUDA and tiny
    elsewhere. For a world model, it chooses the preset with as many rows and columns of tokens as
    the data. If there is none, it chooses as for a tokenizer."""
    steps: int | None = None
    """Number of training steps. If `steps` and `minutes` are None, the preset sets the length."""
    minutes: float | None = None
    """Training time in minutes, instead of `steps`."""
    config: Path | None = None
    """YAML file with settings that override the preset."""
    assignments: Sequence[str] = ()
    """Settings of the form `a.b=c` that override the preset and the YAML file."""
    resume: bool = False
    """Whether to continue an existing run."""
    init_from: Path | None = None
    """Folder of a finished run, or name of a packaged model, whose weights become the initial
    weights."""
    precision: str | None = None
    """Number format: auto, fp32 or bf16. If None, the preset, `config` or `assignments` set it."""
    shard: bool = False
    """Whether to shard the model over the ranks of `torchrun`. If False, the preset, `config` or
    `assignments` can still turn sharding on."""
    device: str = "auto"
    """Device to train on: auto, cuda, mps or cpu."""

    @property
    def start(self) -> Start:
        """The keyword arguments that the training functions share."""
        return {"init_from": self.init_from, "resume": self.resume, "device": self.device}

    def resolve(self, presets: dict[str, C], grid: tuple[int, int] | None = None) -> C:
        """Return the preset, overridden by the YAML file, the assignments and the other options.

        `grid` is the number of rows and columns of tokens in a frame, or None for a tokenizer.
        Raises DriveSimError for an unknown preset or a wrong setting.
        """
        preset = self.preset if self.preset != "auto" else _auto_preset(self.device, grid)
        if preset not in presets:
            names = ", ".join(presets)
            raise DriveSimError(f"`preset` {preset}: no such preset; choose one of auto, {names}")
        if self.steps is not None and self.minutes is not None:
            raise DriveSimError("`steps` and `minutes` are both given; give only one")
        options: dict[str, object] = {"precision": self.precision, "shard": self.shard or None}
        options = {name: value for name, value in options.items() if value is not None}
        if self.steps is not None or self.minutes is not None:
            options |= {"steps": self.steps, "minutes": self.minutes, "min_steps": None}
        kind = resolve_device(self.device).type
        if preset in ("base", "large") and kind != "cuda":
            say(f"preset {preset} is made for CUDA GPUs and is slow on {kind}; tiny is for CPUs")
        return resolve(
            presets[preset],  # type: ignore[type-var]
            file=self.config,
            assignments=[
                *self.assignments,
                *(f"training.{name}={json.dumps(value)}" for name, value in options.items()),
            ],
        )


def _auto_preset(device: str, grid: tuple[int, int] | None) -> str:
    """Choose the first preset with this token grid. If there is none, choose by the device.

    Prints the choice and the reason.
    """
    grids = {
        name: (config.model.rows, config.model.cols) for name, config in TOKENIZER_PRESETS.items()
    }
    fitting = [name for name, preset_grid in grids.items() if preset_grid == grid]
    if grid is not None and fitting:
        name, reason = fitting[0], f"frames are {grid[0]}x{grid[1]} tokens"
    else:
        kind = resolve_device(device).type
        # MPS gets the preset for CPUs, because larger presets have not been measured on MPS.
        name, reason = ("base" if kind == "cuda" else "tiny"), f"the device is {kind}"
    say(f"using preset {name} because {reason} (use `preset` to choose another)")
    return name


def _find(
    videos: Sequence[Path], reading: Reading, *, skip_bad: bool = False, actions: bool = True
) -> DriveSet:
    """Find drives. Print the assumptions made and the drives skipped.

    Raises BadDriveError if a drive cannot be read, unless `skip_bad` is set.
    """
    drive_set = find_drives(videos, reading, actions=actions)
    if not skip_bad:
        drive_set.require_all()
    for line in dict.fromkeys(drive_set.notices):
        say(line)
    for skipped in drive_set.skipped:
        say(f"skipped {skipped.id}: {skipped.reason}")
    if not drive_set.drives:
        raise DriveSimError("every drive was skipped; name at least one that can be read")
    return drive_set


def find_frames(
    videos: Sequence[Path], reading: Reading = AS_NAMED, *, skip_bad: bool = False
) -> DriveSet:
    """Find drives, but do not read their action files, so errors in these files do not matter."""
    return _find(videos, reading, skip_bad=skip_bad, actions=False)


def model_and_drives(
    run: Path, videos: Sequence[Path], reading: Reading, device: str, precision: str = "auto"
) -> tuple[WorldModel, list[Drive]]:
    """Load the world model of `run`, and find the drives in `videos` for it."""
    world = WorldModel.from_run(run, device, precision)
    return world, find_for(world, videos, reading).drives


def frame_rate(fps: float | None, every: int | None) -> dict[str, Any]:
    """Return keyword arguments for `sample`, with the default rate if both parameters are None.

    Raises DriveSimError if both are given, or if `fps` is not a finite number above 0.
    """
    check_rate(fps, every)
    return {"fps": DEFAULT_FPS if fps is None and every is None else fps, "every": every}


def train_tokenizer_on(
    videos: Sequence[Path],
    run: Path,
    request: TrainingRequest,
    *,
    fps: float | None = None,
    every: int | None = None,
    reading: Reading = AS_NAMED,
    skip_bad: bool = False,
) -> TrainingResult:
    """Train a tokenizer on the frames of videos. The videos need no actions."""
    rate = frame_rate(fps, every)
    config = request.resolve(TOKENIZER_PRESETS)
    drives = find_frames(videos, reading, skip_bad=skip_bad).drives
    sampled = [sample(drive, **rate) for drive in drives]
    return train_tokenizer(sampled, config, run, skip_bad=skip_bad, **request.start)


def tokenize_videos(
    videos: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    mirror: bool = False,
    reading: Reading = AS_NAMED,
    skip_bad: bool = False,
    batch_size: int = 8,
    training: TrainingRequest | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> StoreIndex:
    """Turn videos and their actions into the token store `out`.

    If `training` is given and the tokenizer is missing or unfinished, it is trained on these videos
    first. The other options and the videos are checked before the training, so that tokenizing does
    not fail after it. Under `torchrun`, each rank tokenizes a share of the drives.
    """
    rate = frame_rate(fps, every)
    if training is None:
        Tokenizer.from_run(tokenizer, "cpu", "fp32")
    # A finished store still contains the folder UNFINISHED if an earlier command was killed before
    # it deleted the folder. Then raise no error here: the writer of the store will delete the
    # folder and raise a similar error.
    if (out / INDEX).exists() and not (out / UNFINISHED).exists():
        raise DriveSimError(
            f"{out} already contains a token store; choose another `out`, or delete it"
        )
    drive_set = _find(videos, reading, skip_bad=skip_bad)
    # Reading this property raises an error if the drives have different kinds of steering.
    _ = drive_set.steering_kind

    # The timeout is long because a rank may have to wait for days for the slowest rank.
    with process_group(resolve_device(device), timedelta(days=30)) as (ranks, own_device):

        def state() -> tuple[bool, bool]:
            begun, has_weights = ((tokenizer / name).exists() for name in (CONFIG, WEIGHTS))
            # A folder with weights but no run config is a copy of a finished tokenizer.
            return is_finished(tokenizer) or (has_weights and not begun), begun

        usable, begun = ranks.from_main(state)
        if training is not None and not usable:
            state_text = "is unfinished: resuming its" if begun else "does not exist: starting its"
            say(f"the tokenizer {tokenizer} {state_text} training on these videos")
            request = replace(training, resume=begun)
            config = request.resolve(TOKENIZER_PRESETS)
            sampled = [sample(drive, **rate) for drive in drive_set.drives]
            train_tokenizer(sampled, config, tokenizer, skip_bad=skip_bad, **request.start)
        dtype = ranks.from_main(lambda: resolve_precision(precision, own_device))
        frozen = Tokenizer.from_run(tokenizer, own_device, name_of(dtype))
        say(
            f"using the tokenizer {tokenizer}: it turns {frozen.height}x{frozen.width} pixels into "
            f"{frozen.rows}x{frozen.cols} tokens, in {name_of(frozen.dtype)}"
        )
        return tokenize(
            drive_set,
            frozen,
            out,
            **rate,
            mirror=mirror,
            skip_bad=skip_bad,
            batch_size=batch_size,
            ranks=ranks,
        )


def train_world_model_on(
    tokens: Path, tokenizer: Path, run: Path, request: TrainingRequest
) -> TrainingResult:
    """Train a world model on a token store. `tokenizer` is the run that made the tokens."""
    grid = None
    if request.preset == "auto":
        info = read_index(tokens).info
        grid = info.rows, info.cols
    config = request.resolve(WORLD_MODEL_PRESETS, grid)
    return train_world_model(tokens, config, run, tokenizer=tokenizer, **request.start)


def roll_out(
    model: Path | str,
    actions: Sequence[str] | str,
    out: Path | str = "rollout.mp4",
    *,
    tokens: Path | str | None = None,
    context: Path | str | None = None,
    start_s: float | None = None,
    seconds: float | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    reading: Reading = AS_NAMED,
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Predict a future for each of `actions`, and write the futures as a video to `out`.

    The futures start in `context`, which is a video or the name of one of the run's contexts. If it
    is None, they start in a validation drive of the token store `tokens`. If both are None, they
    start in the run's first context or, if the run has none, in the token store `runs/tokens`. In a
    context of the run, they start at its end unless `start_s` is given.

    A JSON file, a PNG and the tokens are written beside the video. Returns the content of the JSON
    file.
    """
    out = _new(out, overwrite)
    world = WorldModel.from_run(model, device, precision)
    own = contexts_of(model)
    if context is not None:
        beginning = _named_context(world, Path(context), own, start_s, reading)
    elif tokens is None and own:
        beginning = load_context(world, next(iter(own.values())), start_s, reading=reading)
    else:
        beginning = context_from_store(world, Path(tokens or _TOKENS), start_s)
    actions = [actions] if isinstance(actions, str) else actions
    plans = make_plans(actions, beginning.situation(world), seconds=seconds, reading=reading)
    return write_rollout(
        world, beginning, plans, out, sampling=sampling or Sampling(), samples=samples
    )


def drive_again(
    replay: Path | str,
    out: Path | str = "rollout.mp4",
    *,
    model: Path | str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Drive a recorded drive again, and write it as `roll_out` does.

    `replay` is the JSON file beside the video of a recorded drive. The tokens are the same to the
    last one on the same machine and in the same number format. `model` is the model of the
    recording, if it lies elsewhere now. Returns the content of the JSON file, with
    `first_difference`: the number of the first frame whose tokens differ, or None.
    """
    out = _new(out, overwrite)
    recorded = Replay.load(Path(replay))
    world = WorldModel.from_run(model or recorded.model, device, precision)
    made_in, own = (
        formats.get("world_model") for formats in (recorded.precision, world.precisions)
    )
    if made_in != own:
        say(
            f"{replay} was recorded in {made_in}, but this model computes in {own}, so its tokens "
            "may differ; set `precision`"
        )
    context = recorded.context(world)
    differing: list[int] = []

    def compared() -> Iterator[Frame]:
        frames = zip(recorded.drive(world, context), recorded.checksums, strict=True)
        for number, (frame, made) in enumerate(frames, start=1):
            if checksum(frame.tokens[0]) != made:
                differing.append(number)
            yield frame

    report = write_rollout(
        world,
        context,
        [recorded.plan],
        out,
        sampling=recorded.first_sampling,
        moments=compared(),
    )
    return report | {"first_difference": differing[0] if differing else None}


def _new(out: Path | str, overwrite: bool) -> Path:
    """Return the path `out`. Raises DriveSimError if a rollout exists there, unless `overwrite`."""
    out = Path(out)
    existing = [path for path in output_files(out).values() if path.exists()]
    if existing and not overwrite:
        raise DriveSimError(f"{existing[0]} exists: choose another `out`, or pass `overwrite`")
    return out


def play(
    model: Path | str | None = None,
    *,
    context: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    sessions: int = 2,
    record: Path | None = None,
    reading: Reading = AS_NAMED,
    open_browser: bool = True,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Serve a page on which people drive in a world model, until the user stops it.

    Without `model`, it is `runs/world-model` or, if there is none, the packaged model. Drives start
    in the videos of `context`, by default in the model's own contexts or, if it has none, in
    `runs/tokens`. `sessions` is how many people can drive at a time. Recordings are written to the
    folder `record`. `reading` says how to read `context`.
    """
    from driving_sim.play.serving.server import Server, listen, serve
    from driving_sim.play.starts import find_starts

    if record is not None:
        with disk_errors(record):
            record.mkdir(parents=True, exist_ok=True)
    with listen(host, port) as listening:
        if model is None:
            model = _WORLD_MODEL if Path(_WORLD_MODEL).is_dir() else packaged_models()[0]
        world = WorldModel.from_run(model, device, precision)
        starts = find_starts(world, context, Path(_TOKENS), reading)
        server = Server(world, str(model), starts, sessions=sessions, recordings=record)
        server.warm_up()
        serve(server, listening, host, open_browser=open_browser)


def _named_context(
    world: WorldModel,
    context: Path,
    own: Mapping[str, Path],
    start_s: float | None,
    reading: Reading,
) -> Context:
    """Return the context in the video `context`, or the context of this name in `own`."""
    if own and not context.exists():
        if str(context) in own:
            return load_context(world, own[str(context)], start_s, reading=reading)
        raise DriveSimError(
            f"`context` {context}: no such file, and the model has no context of this name; its "
            f"contexts are {', '.join(own)}"
        )
    drive, *others = find_for(world, [context], reading).drives
    if others:
        raise DriveSimError(
            f"`context` {context} contains {1 + len(others)} drives; name the video of one drive"
        )
    return context_from_drive(world, drive, start_s)
