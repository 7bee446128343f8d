"""Futures as a side-by-side video, with their tokens, settings and a contact sheet beside it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from driving_sim.data.actions.action_file import STEERING
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import FAST, VideoWriter
from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file, disk_errors
from driving_sim.engine.progress import progress
from driving_sim.world_model.action_plan import ActionPlan, Situation
from driving_sim.world_model.panels import (
    Caption,
    Frame,
    contact_sheet,
    draw_panel,
    side_by_side,
)
from driving_sim.world_model.sampling.sampler import Sampling
from driving_sim.world_model.token_file import WriteTokens, token_file
from driving_sim.world_model.world_model import WorldModel

_SHEET_COLUMNS = 8
_DECODED_TOGETHER = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The past that a rollout starts from, and what was recorded after it."""

    label: str
    tokens: torch.Tensor
    """int64 [T, rows, cols], at most the model's context and the frame before it."""
    frames: NDArray[np.uint8]
    """uint8 [T, height, width, 3]."""
    actions: NDArray[np.float32]
    """[N, 2] from context frame 0 on: T - 1 past ones, then those to the recorded frames after."""
    action_valid: NDArray[np.bool_]
    """[N, 2]."""
    future: Iterator[Frame]
    """The true frames after the context, as far as they go."""
    start_s: float
    """Time of the last context frame in its drive."""

    def situation(self, world: WorldModel) -> Situation:
        """What action plans start from here."""
        past = len(self.tokens) - 1
        has_recording = bool(self.action_valid[past:].any())
        return Situation(
            fps=world.fps,
            steering_kind=world.steering_kind,
            steering_limit=world.steering_p95,
            known_channels=world.known_channels,
            last_action=self.actions[past - 1] if past else np.zeros(2, np.float32),
            last_valid=self.action_valid[past - 1] if past else np.zeros(2, np.bool_),
            recorded=(self.actions[past:], self.action_valid[past:]) if has_recording else None,
        )


def _context_range(
    timestamps: NDArray[np.float64],
    segments: list[tuple[int, int]],
    start_s: float | None,
    context_frames: int,
    label: str,
) -> tuple[int, int]:
    """First frame of the context and the frame after its last one, inside one segment without gaps.

    Without `start_s` the context is the first full one of the drive.
    """
    if start_s is None:
        longest = max(segments, key=lambda segment: min(segment[1] - segment[0], context_frames))
        return longest[0], min(longest[0] + context_frames, longest[1])
    if not 0 <= start_s <= timestamps[-1]:
        raise DriveSimError(
            f"--start {start_s:g}: {label} goes from 0 to {timestamps[-1]:.1f} s; name one of those"
        )
    last = int(np.searchsorted(timestamps, start_s + 1e-6, side="right")) - 1
    first = next(begin for begin, end in segments if begin <= last < end)
    return max(first, last + 1 - context_frames), last + 1


def sample_for(world: WorldModel, drive: Drive) -> SampledDrive:
    """Sample a drive at the model's frame rate.

    What the model's training data did not have, a steering or a speed, counts as unknown. Raises
    DriveSimError where the steering kind or the frame rate is not the model's.
    """
    if drive.log is not None:
        log = replace(drive.log, has=drive.log.has & world.known_channels)
        if log.has[STEERING] and log.steering_kind != world.steering_kind:
            raise DriveSimError(
                f"{drive.id}: steering is {log.steering_kind}, the model was trained on "
                f"{world.steering_kind}; give the actions in that kind"
            )
        drive = replace(drive, log=log)
    sampled = sample(drive, fps=world.fps)
    if sampled.fps == 0:
        raise DriveSimError(
            f"{drive.id}: no two frames in a row at the model's {world.fps:.3g} frames/s; "
            "use a longer video"
        )
    if abs(sampled.fps / world.fps - 1) > RATE_TOLERANCE:
        raise DriveSimError(
            f"{drive.id}: its {sampled.fps:.3g} frames/s are too far from the model's "
            f"{world.fps:.3g}; use a video of that rate or more"
        )
    return sampled


def context_from_drive(world: WorldModel, drive: Drive, start_s: float | None) -> Context:
    """Take the context from a drive, as `sample_for` samples it, at the model's frame size.

    Raises DriveSimError as that does, and where `start_s` is outside the drive.
    """
    size = FrameSize(height=world.tokenizer.height, width=world.tokenizer.width)
    sampled = sample_for(world, drive)
    begin, end = _context_range(
        sampled.timestamps, sampled.segments, start_s, world.context_frames + 1, drive.id
    )
    segment_end = next(stop for start, stop in sampled.segments if start <= begin < stop)
    frames = drive.frames(sampled.indices[begin:end], size)
    return Context(
        label=drive.id,
        tokens=world.tokenizer.encode(frames),
        frames=frames,
        # The last frame's action leads to none of them.
        actions=sampled.actions[begin : segment_end - 1],
        action_valid=sampled.action_valid[begin : segment_end - 1],
        future=drive.stream(size, sampled.indices[end:segment_end]),
        start_s=float(sampled.timestamps[end - 1]),
    )


def context_from_tokens(world: WorldModel, drive: DriveTokens, start_s: float | None) -> Context:
    """Take the context from a token store; its true frames are the tokenizer's reconstructions."""
    begin, end = _context_range(
        drive.timestamps, list(drive.entry.segments), start_s, world.context_frames + 1, drive.id
    )
    segment_end = next(stop for start, stop in drive.entry.segments if start <= begin < stop)
    tokens = torch.from_numpy(drive.tokens[begin:end].astype(np.int64))

    def future() -> Iterator[Frame]:
        for index in range(end, segment_end):
            yield world.tokenizer.decode(drive.tokens[index : index + 1])[0].numpy()

    return Context(
        label=f"{drive.id} (reconstructed)",
        tokens=tokens,
        frames=world.tokenizer.decode(tokens).numpy(),
        actions=np.asarray(drive.actions[begin : segment_end - 1]),
        action_valid=drive.action_valid[begin : segment_end - 1] & world.known_channels,
        future=future(),
        start_s=float(drive.timestamps[end - 1]),
    )


@dataclass(slots=True)
class _Panels:
    """Draws the side-by-side picture of a moment."""

    world: WorldModel
    context: Context
    titles: list[str]
    plans: list[ActionPlan]
    steering_range: float

    def _caption(
        self, title: str, action: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> Caption:
        speed, steering = (
            float(value) if known else None for value, known in zip(action, valid, strict=True)
        )
        return Caption(
            title=title, speed_mps=speed, steering=steering, steering_range=self.steering_range
        )

    def past(self, index: int) -> Frame:
        """Every panel shows context frame `index`, under the action that led to it."""
        action, valid = np.zeros(2, np.float32), np.zeros(2, np.bool_)
        if index > 0:
            action = self.context.actions[index - 1]
            valid = self.context.action_valid[index - 1]
        panel = draw_panel(self.context.frames[index], self._caption("context", action, valid))
        return side_by_side([panel] * (len(self.titles) + 1))

    def future(self, index: int, frames: list[Frame], truth: Frame | None) -> Frame:
        """The recording, where it goes on, then every future, after action `index`."""
        panels = [self._truth(index, truth)]
        for title, plan, frame in zip(self.titles, self.plans, frames, strict=True):
            panels.append(
                draw_panel(frame, self._caption(title, plan.actions[index], plan.valid[index]))
            )
        return side_by_side(panels)

    def _truth(self, index: int, truth: Frame | None) -> Frame:
        if truth is None:
            blank = np.full_like(self.context.frames[0], 40)
            nothing = np.zeros(2, np.float32), np.zeros(2, np.bool_)
            return draw_panel(blank, self._caption("recording ended", *nothing))
        position = len(self.context.tokens) - 1 + index
        action, valid = self.context.actions[position], self.context.action_valid[position]
        return draw_panel(truth, self._caption("recorded", action, valid))


def output_files(out: Path) -> dict[str, Path]:
    """Every file that a rollout to `out` writes: an .mp4, or a folder for a rollout.mp4."""
    has_file_suffix = out.suffix[1:2].isalpha()  # "run-1.5" has none
    if out.is_dir() or not has_file_suffix:
        out = out / "rollout.mp4"
    elif out.suffix.lower() != ".mp4":
        raise DriveSimError(
            f"--out {out}: a rollout is written as an .mp4 file or into a folder; name one of those"
        )
    return {
        "video": out,
        "tokens": out.with_suffix(".safetensors"),
        "settings": out.with_suffix(".json"),
        "sheet": out.with_suffix(".png"),
    }


def write_rollout(
    world: WorldModel,
    context: Context,
    plans: list[ActionPlan],
    out: Path,
    *,
    sampling: Sampling,
    samples: int = 1,
) -> dict[str, Any]:
    """Roll out every plan `samples` times from one context and write the files of `output_files`.

    Frames are generated, decoded and written a few at a time: memory does not grow with the length.
    Returns what the JSON holds. The files appear together at the end, or not at all.
    """
    files = output_files(out)
    titles = [
        plan.label + (f" #{number + 1}" if samples > 1 else "")
        for plan in plans
        for number in range(samples)
    ]
    shown = [plan for plan in plans for _ in range(samples)]
    largest = max(float(np.abs(plan.actions[:, STEERING]).max()) for plan in plans)
    steering_range = max(2 * world.steering_p95, largest) or 1.0
    panels = _Panels(world, context, titles, shown, steering_range)
    length = len(plans[0].actions)
    with disk_errors(files["video"]), ExitStack() as stack:
        temporary = {kind: stack.enter_context(atomic_file(path)) for kind, path in files.items()}
        written = token_file(
            temporary["tokens"],
            context=context.tokens,
            actions=np.stack([plan.actions for plan in shown]),
            valid=np.stack([plan.valid for plan in shown]),
        )
        recorder = _Recorder(titles, length, world.fps, stack.enter_context(written))
        height, width = panels.past(0).shape[:2]
        with VideoWriter(
            temporary["video"], fps=world.fps, height=height, width=width, x264=FAST
        ) as writer:
            for index in range(len(context.frames)):
                writer.write(panels.past(index))
            recorder.start(context.frames[-1])
            moments = _futures(world, context, plans, sampling, samples, recorder)
            with progress(length, f"rollout -> {files['video']}", "frames") as bar:
                for index, (tokens, frames, truth) in enumerate(moments):
                    recorder.record(index, tokens, frames, truth)
                    writer.write(panels.future(index, frames, truth))
                    bar.advance(1)
        report = _report(world, context, shown, titles, sampling, recorder.seconds, length)
        Image.fromarray(recorder.sheet()).save(temporary["sheet"], compress_level=2)
        save_json(temporary["settings"], report)
    return report


class _Recorder:
    """Writes the tokens; keeps the seconds spent and the few frames of the contact sheet."""

    def __init__(
        self, titles: list[str], length: int, fps: float, write_tokens: WriteTokens
    ) -> None:
        self.titles, self.fps, self.write_tokens = titles, fps, write_tokens
        self.seconds = {"generate": 0.0, "decode": 0.0}
        steps = np.unique(np.linspace(0, length, _SHEET_COLUMNS).round().astype(int))
        self.columns = [int(step) for step in steps]
        self.rows: list[tuple[str, list[Frame]]] = [(name, []) for name in ["recorded", *titles]]

    def start(self, frame: Frame) -> None:
        for _, row in self.rows:
            row.append(frame)

    def record(
        self, index: int, tokens: torch.Tensor, frames: list[Frame], truth: Frame | None
    ) -> None:
        self.write_tokens(index, tokens)
        if index + 1 in self.columns:
            recorded = np.full_like(frames[0], 40) if truth is None else truth
            for (_, row), frame in zip(self.rows, [recorded, *frames], strict=True):
                row.append(frame)

    def sheet(self) -> Frame:
        return contact_sheet(self.rows, [f"{step / self.fps:+.2f} s" for step in self.columns])


def _futures(
    world: WorldModel,
    context: Context,
    plans: list[ActionPlan],
    sampling: Sampling,
    samples: int,
    recorder: _Recorder,
) -> Iterator[tuple[torch.Tensor, list[Frame], Frame | None]]:
    """Yield one moment after the other: tokens [F, rows, cols], decoded frames, the true frame.

    Some moments are decoded together: a few frames take hardly longer than one.
    """
    past = len(context.tokens) - 1
    began = time.perf_counter()
    prefix = world.encode_prefix(
        context.tokens, context.actions[:past], context.action_valid[:past]
    )
    futures = len(plans) * samples
    moments = world.generate(
        prefix,
        np.stack([plan.actions for plan in plans]),
        np.stack([plan.valid for plan in plans]),
        samples=samples,
        sampling=sampling,
    )
    while some := list(islice(moments, -(-_DECODED_TOGETHER // futures))):
        generated = time.perf_counter()
        decoded = world.tokenizer.decode(torch.cat([moment.tokens for moment in some])).numpy()
        recorder.seconds["generate"] += generated - began
        recorder.seconds["decode"] += time.perf_counter() - generated
        for moment, frames in zip(some, np.split(decoded, len(some)), strict=True):
            yield moment.tokens, list(frames), next(context.future, None)
        began = time.perf_counter()


def _report(
    world: WorldModel,
    context: Context,
    plans: list[ActionPlan],
    titles: list[str],
    sampling: Sampling,
    seconds: dict[str, float],
    length: int,
) -> dict[str, Any]:
    total = seconds["generate"] + seconds["decode"]
    return {
        "context": {
            "drive": context.label,
            "start_s": context.start_s,
            "frames": len(context.tokens),
        },
        "futures": titles,
        "sampling": asdict(sampling),
        "fps": world.fps,
        "frames": length,
        "steering_kind": world.steering_kind,
        "fingerprints": {
            "tokenizer": world.tokenizer.fingerprint,
            "world_model": world.fingerprint,
        },
        "device": str(world.device),
        "precision": world.precisions,
        "frames_per_second": length * len(plans) / total,
        "seconds": seconds,
    }
