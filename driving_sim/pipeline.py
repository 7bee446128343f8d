"""What the commands do, as functions: videos to a tokenizer, tokens, a world model, a rollout."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from driving_sim.data.drive import Drive, DriveSet, sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.index import INDEX, UNFINISHED, StoreIndex, read_index
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.config import resolve
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import name_of, resolve_precision
from driving_sim.engine.progress import say
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import CONFIG, is_finished
from driving_sim.engine.training.loop import TrainingResult
from driving_sim.tokenizer.presets import PRESETS as TOKENIZER_PRESETS
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import WEIGHTS, Tokenizer
from driving_sim.tokenizer.training import train_tokenizer
from driving_sim.world_model.action_plan import make_plans
from driving_sim.world_model.rollout import (
    Context,
    context_from_drive,
    context_from_tokens,
    output_files,
    write_rollout,
)
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODEL_PRESETS
from driving_sim.world_model.training.train import train_world_model
from driving_sim.world_model.world_model import WorldModel

DEFAULT_FPS = 10.0
"""Frames per second taken from videos where neither a rate nor a stride is asked for."""

C = TypeVar("C")


class Start(TypedDict):
    """Where a training of either model begins, and on what device."""

    init_from: Path | None
    resume: bool
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRequest:
    """What a user asks of a training, on top of a preset."""

    preset: str = "auto"
    """auto: that of the token grid, for a world model; else base on CUDA and tiny elsewhere."""
    steps: int | None = None
    minutes: float | None = None
    config: Path | None = None
    """YAML file laid over the preset."""
    assignments: Sequence[str] = ()
    """`a.b=c`, laid over that."""
    resume: bool = False
    init_from: Path | None = None
    precision: str | None = None
    """Replaces the preset's; None: what that and the assignments say."""
    shard: bool = False
    """Spread the model over the ranks of `torchrun`."""
    device: str = "auto"

    @property
    def start(self) -> Start:
        """Where to begin."""
        return {"init_from": self.init_from, "resume": self.resume, "device": self.device}

    def resolve(self, presets: dict[str, C], grid: tuple[int, int] | None = None) -> C:
        """The preset with the file, the assignments and the options laid over it.

        `grid` are the rows and columns of the tokens to train on, where there are any yet.
        """
        preset = self.preset if self.preset != "auto" else _auto_preset(self.device, grid)
        if preset not in presets:
            raise DriveSimError(f"`preset` {preset}: presets are auto, {', '.join(presets)}")
        if self.steps is not None and self.minutes is not None:
            raise DriveSimError("`steps` and `minutes` are both given; give one")
        options: dict[str, object] = {"precision": self.precision, "shard": self.shard or None}
        options = {name: value for name, value in options.items() if value is not None}
        if self.steps is not None or self.minutes is not None:
            options |= {"steps": self.steps, "minutes": self.minutes, "min_steps": None}
        kind = resolve_device(self.device).type
        if preset in ("base", "large") and kind != "cuda":
            say(f"preset {preset} is made for GPUs, not for {kind}: tiny is for CPUs")
        return resolve(
            presets[preset],  # type: ignore[type-var]
            file=self.config,
            assignments=[
                *self.assignments,
                *(f"training.{k}={json.dumps(v)}" for k, v in options.items()),
            ],
        )


def _auto_preset(device: str, grid: tuple[int, int] | None) -> str:
    """Choose a preset and say why: the first one of the token grid, else by the device."""
    sizes = {name: (c.model.rows, c.model.cols) for name, c in TOKENIZER_PRESETS.items()}
    fitting = [name for name, size in sizes.items() if size == grid]
    if grid is not None and fitting:
        name, why = fitting[0], f"frames are {grid[0]}x{grid[1]} tokens"
    else:
        kind = resolve_device(device).type
        # MPS counts as a CPU until somebody has measured it.
        name, why = ("base" if kind == "cuda" else "tiny"), f"the device is {kind}"
    say(f"preset {name}, as {why} (`preset` chooses another)")
    return name


def _find(videos: Sequence[Path], *, skip_bad: bool = False, **options: Any) -> DriveSet:
    """Find drives and say what was assumed and skipped; `options` are those of `find_drives`."""
    found = find_drives(videos, **options)
    if not skip_bad:
        found.require_all()
    for line in dict.fromkeys(found.notices):
        say(line)
    for skipped in found.skipped:
        say(f"skipped {skipped.id}: {skipped.reason}")
    if not found.drives:
        raise DriveSimError("every drive was skipped: nothing is left to work on")
    return found


def find_frames(videos: Sequence[Path], *, skip_bad: bool = False) -> DriveSet:
    """Find drives whose actions will not be used: nothing that is wrong with them matters."""
    return _find(videos, skip_bad=skip_bad, actions=False)


def find_for(world: WorldModel, videos: Sequence[Path], time_offset: float) -> DriveSet:
    """Find drives to start from; their steering must be of the model's kind."""
    return _find(
        videos,
        # What a model never learned to follow can hold no mistake that matters.
        actions=any(world.known_channels),
        steering_kind=world.steering_kind,
        time_offset=time_offset,
    )


def model_and_drives(
    run: Path, videos: Sequence[Path], time_offset: float, device: str, precision: str = "auto"
) -> tuple[WorldModel, list[Drive]]:
    """Load a world model, and find drives to start it from or to show it."""
    world = WorldModel.from_run(run, device, precision)
    return world, find_for(world, videos, time_offset).drives


def frame_rate(fps: float | None, every: int | None) -> dict[str, Any]:
    """The options `sample` takes of what a user asked for: a rate, a stride, or the default."""
    if fps is not None and every is not None:
        raise DriveSimError("`fps` and `every` are both given; give one")
    if fps is not None and not 0 < fps < math.inf:
        raise DriveSimError(f"`fps` {fps:g}: the rate must be above 0 frames/s")
    return {"fps": DEFAULT_FPS if fps is None and every is None else fps, "every": every}


def train_tokenizer_on(
    videos: Sequence[Path],
    run: Path,
    request: TrainingRequest,
    *,
    fps: float | None = None,
    every: int | None = None,
    skip_bad: bool = False,
) -> TrainingResult:
    """Train a tokenizer on the frames of videos; their actions, if any, play no part."""
    rate = frame_rate(fps, every)
    config = request.resolve(TOKENIZER_PRESETS)
    sampled = [sample(drive, **rate) for drive in find_frames(videos, skip_bad=skip_bad).drives]
    return train_tokenizer(sampled, config, run, skip_bad=skip_bad, **request.start)


def tokenize_videos(
    videos: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    mirror: bool = False,
    steering_kind: str | None = None,
    time_offset: float = 0.0,
    skip_bad: bool = False,
    batch_size: int = 8,
    training: TrainingRequest | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> StoreIndex:
    """Turn videos and their actions into the token store `out`.

    With `training`, a tokenizer that is missing or unfinished is trained on these videos first:
    after everything has been checked that would stop the tokenizing later. Under `torchrun` the
    ranks share the drives.
    """
    rate = frame_rate(fps, every)
    if training is None:
        Tokenizer.from_run(tokenizer, "cpu", "fp32")
    # With unfinished work in it, its run was killed at the end: the writer tidies up, then says.
    if (out / INDEX).exists() and not (out / UNFINISHED).exists():
        raise DriveSimError(f"{out} already holds a token store: choose another `out` or delete it")
    found = _find(videos, skip_bad=skip_bad, steering_kind=steering_kind, time_offset=time_offset)
    _ = found.steering_kind  # raises where kinds are mixed
    # One rank may have days more to do than another.
    with process_group(resolve_device(device), timedelta(days=30)) as (ranks, own_device):

        def state() -> tuple[bool, bool]:
            begun, has_weights = ((tokenizer / name).exists() for name in (CONFIG, WEIGHTS))
            # Trained to its end, or a copy of one without the rest of its run.
            return is_finished(tokenizer) or (has_weights and not begun), begun

        usable, begun = ranks.from_main(state)
        if training is not None and not usable:
            what = "is unfinished: going on with it" if begun else "is not there: training it"
            say(f"the tokenizer {tokenizer} {what} on these videos")
            request = replace(training, resume=begun)
            config = request.resolve(TOKENIZER_PRESETS)
            sampled = [sample(drive, **rate) for drive in found.drives]
            train_tokenizer(sampled, config, tokenizer, skip_bad=skip_bad, **request.start)
        dtype = ranks.from_main(lambda: resolve_precision(precision, own_device))
        frozen = Tokenizer.from_run(tokenizer, own_device, name_of(dtype))
        say(
            f"the tokenizer is {tokenizer}: {frozen.height}x{frozen.width} pixels to "
            f"{frozen.rows}x{frozen.cols} tokens, in {name_of(frozen.dtype)}"
        )
        return tokenize(
            found,
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
    """Train a world model on a token store; `tokenizer` is the run that made the tokens."""
    grid = None
    if request.preset == "auto":
        info = read_index(tokens).info
        grid = info.rows, info.cols
    config = request.resolve(WORLD_MODEL_PRESETS, grid)
    return train_world_model(tokens, config, run, tokenizer=tokenizer, **request.start)


def roll_out(
    model: Path | str,
    actions: Sequence[str],
    out: Path | str = "rollout.mp4",
    *,
    tokens: Path | str = "runs/tokens",
    context: Path | str | None = None,
    start_s: float | None = None,
    seconds: float | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    time_offset: float = 0.0,
    overwrite: bool = False,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Roll out every one of `actions` from a video, or from a validation drive of `tokens`.

    Returns what the JSON beside the video holds.
    """
    out = Path(out)
    present = [path for path in output_files(out).values() if path.exists()]
    if present and not overwrite:
        raise DriveSimError(f"{present[0]} exists: choose another `out`, or pass `overwrite`")
    world = WorldModel.from_run(model, device, precision)
    if context is None:
        beginning = _stored_context(world, Path(tokens), start_s)
    else:
        drive, *others = find_for(world, [Path(context)], time_offset).drives
        if others:
            raise DriveSimError(
                f"`context` {context} holds {1 + len(others)} drives; name one of their videos"
            )
        beginning = context_from_drive(world, drive, start_s)
    plans = make_plans(actions, beginning.situation(world), seconds=seconds)
    return write_rollout(
        world, beginning, plans, out, sampling=sampling or Sampling(), samples=samples
    )


def _stored_context(world: WorldModel, tokens: Path, start_s: float | None) -> Context:
    try:
        store = TokenStore(tokens)
        world.check_store(store)
    except DriveSimError as error:
        raise DriveSimError(f"{error}, or name a video with `context`") from error
    if notice := world.format_notice(store):
        say(notice)
    # A drive that the model was not trained on, unless these are other drives altogether.
    unseen = [name for name in store.drive_ids if name in world.validation_drives]
    drive, *_ = store.select((unseen or store.drive_ids)[:1])
    return context_from_tokens(world, drive, start_s)
