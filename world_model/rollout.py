"""Write the files of a rollout: a side-by-side video, tokens, settings and a contact sheet.

Axes: F futures, N frames, T context frames, r c token rows and columns.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from driving_sim.data.actions.action_log import STEERING
from driving_sim.data.arrays import Floats, Floats32, Mask, Pixels
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.data.video.writer import FAST, video_writer
from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file, disk_errors
from driving_sim.engine.progress import progress
from driving_sim.engine.weights import write_safetensors
from driving_sim.world_model.action_plan import ActionPlan, Situation
from driving_sim.world_model.panels import contact_sheet, draw_moment
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Frame, Prefix
from driving_sim.world_model.world_model import WorldModel

_SHEET_COLUMNS = 8
_DECODED_TOGETHER = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The frames and actions that a rollout starts from, and the recording that follows them."""

    label: str
    tokens: torch.Tensor
    """int64 [T, rows, cols]. The model can use its `context_frames` + 1 last ones."""
    frames: Pixels
    """uint8 [T, height, width, 3]."""
    actions: Floats32
    """[N, 2]: the T - 1 actions within the context, then the recorded actions after the context."""
    action_valid: Mask
    """[N, 2]: whether the speed and the steering of each action are known."""
    future: Iterator[Pixels]
    """The recorded frames after the context, until the recording ends."""
    start_s: float
    """Time of the last context frame in its drive, in s."""

    @property
    def has_future(self) -> bool:
        """Whether the recording continues after the context."""
        return len(self.actions) >= len(self.tokens)

    def prefix(self, world: WorldModel) -> Prefix:
        """Encode the context's frames and the actions between them."""
        past = len(self.tokens) - 1
        return world.encode_prefix(self.tokens, self.actions[:past], self.action_valid[:past])

    def situation(self, world: WorldModel) -> Situation:
        """Return the situation after this context, which action plans begin from."""
        past = len(self.tokens) - 1
        has_recording = bool(self.action_valid[past:].any())
        return Situation(
            fps=world.fps,
            steering_kind=world.steering_kind,
            steering_limit=world.statistics.steering_p95,
            known_channels=world.known_channels,
            last_action=self.actions[past - 1] if past else np.zeros(2, np.float32),
            last_valid=self.action_valid[past - 1] if past else np.zeros(2, np.bool_),
            recorded=(self.actions[past:], self.action_valid[past:]) if has_recording else None,
        )


def context_range(
    timestamps: Floats,
    segments: Sequence[tuple[int, int]],
    start_s: float | None,
    most: int,
    label: str,
) -> tuple[int, int, int]:
    """Choose the frames of a context; return its first frame, its end and its segment's end.

    Both ends are exclusive. A segment is a run of frames without gaps, and a context has at most
    `most` frames. If `start_s` is given, the context ends with the last frame at or before this
    time. If not, the context is the beginning of the first segment with at least `most` frames. If
    all segments are shorter, the context is the longest segment.
    """
    if start_s is None:
        begin, end = max(segments, key=lambda segment: min(segment[1] - segment[0], most))
        return begin, min(begin + most, end), end
    if not 0 <= start_s <= timestamps[-1]:
        raise DriveSimError(
            f"`start_s` {start_s:g}: {label} goes from 0 to {timestamps[-1]:.1f} s; choose a "
            "time in this range"
        )
    stop = int(np.searchsorted(timestamps, start_s + 1e-6, side="right"))
    begin, end = next(segment for segment in segments if segment[0] < stop <= segment[1])
    return max(begin, stop - most), stop, end


def sample_for(world: WorldModel, drive: Drive) -> SampledDrive:
    """Sample a drive at the model's frame rate.

    Channels that the model was not trained with become unknown. Raises DriveSimError if the drive
    has another steering kind than the model, or if it cannot be sampled at the model's frame rate.
    """
    if drive.log is not None:
        log = drive.log.only(world.known_channels)
        if log.steering_kind not in (None, world.steering_kind):
            raise DriveSimError(
                f"{drive.id}: its steering is {log.steering_kind}, but the model was trained on "
                f"{world.steering_kind}; give the actions in that kind"
            )
        drive = replace(drive, log=log)
    sampled = sample(drive, fps=world.fps)
    if sampled.fps == 0:
        raise DriveSimError(
            f"{drive.id}: the video has no two consecutive frames at the model's "
            f"{world.fps:.3g} frames/s; use a longer video"
        )
    if abs(sampled.fps / world.fps - 1) > RATE_TOLERANCE:
        raise DriveSimError(
            f"{drive.id}: its {sampled.fps:.3g} frames/s are too far from the model's "
            f"{world.fps:.3g}; use a video with at least that frame rate"
        )
    return sampled


def context_from_drive(
    world: WorldModel, drive: Drive, start_s: float | None, frames: int | None = None
) -> Context:
    """Take the context from a drive; sample and resize its video as the model expects.

    The context has at most `frames` frames, by default as many as the model can use.

    Raises DriveSimError if `sample_for` does, if `start_s` is outside the drive, or if the video is
    damaged there.
    """
    size = world.tokenizer.frame_size
    sampled = sample_for(world, drive)
    begin, stop, end = context_range(
        sampled.timestamps, sampled.segments, start_s, frames or world.context_frames + 1, drive.id
    )
    # Stream the frames, as `tokenize` does: damage is an error then, and the tokens are the same.
    pictures = np.stack([*drive.stream(size, sampled.indices[begin:stop])])
    return Context(
        label=drive.id,
        tokens=world.tokenizer.encode(pictures),
        frames=pictures,
        # Leave out the action of the segment's last frame, because no frame follows it.
        actions=sampled.actions[begin : end - 1],
        action_valid=sampled.action_valid[begin : end - 1],
        future=drive.stream(size, sampled.indices[stop:end]),
        start_s=float(sampled.timestamps[stop - 1]),
    )


def context_from_tokens(world: WorldModel, drive: DriveTokens, start_s: float | None) -> Context:
    """Take the context from a drive in a token store; decode its frames from the tokens."""
    begin, stop, end = context_range(
        drive.timestamps, drive.entry.segments, start_s, world.context_frames + 1, drive.id
    )
    tokens = torch.from_numpy(drive.tokens[begin:stop].astype(np.int64))
    after = (drive.tokens[index : index + 1] for index in range(stop, end))
    return Context(
        label=f"{drive.id} (reconstructed)",
        tokens=tokens,
        frames=world.tokenizer.decode(tokens).numpy(),
        actions=np.asarray(drive.actions[begin : end - 1]),
        action_valid=drive.action_valid[begin : end - 1] & world.known_channels,
        future=(world.tokenizer.decode(frame)[0].numpy() for frame in after),
        start_s=float(drive.timestamps[stop - 1]),
    )


def output_files(out: Path) -> dict[str, Path]:
    """Return the paths that a rollout writes to, by kind; `out` is an .mp4 file or a folder."""
    has_file_suffix = out.suffix[1:2].isalpha()  # the ".5" of a folder "run-1.5" is no suffix
    if out.is_dir() or not has_file_suffix:
        out = out / "rollout.mp4"
    elif out.suffix.lower() != ".mp4":
        raise DriveSimError(
            f"`out` {out} is neither an .mp4 file nor a folder; choose one of these"
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
    plans: Sequence[ActionPlan],
    out: Path,
    *,
    sampling: Sampling,
    samples: int = 1,
    moments: Iterator[Frame] | None = None,
) -> dict[str, Any]:
    """Roll out every plan `samples` times from one context and write the files of `output_files`.

    `moments` are the frames of the futures, if they exist already or are drawn in another way.
    The recording is shown beside the futures, unless it ends with the context.
    Frames are generated, decoded and written a few at a time, so memory does not grow with the
    length. The files appear at the end, all together. If the rollout fails, none appears. Returns
    the content of the JSON file.
    """
    files = output_files(out)
    futures = [
        replace(plan, label=f"{plan.label} #{number + 1}") if samples > 1 else plan
        for plan in plans
        for number in range(samples)
    ]
    length = len(plans[0].actions)
    largest = max(float(np.abs(plan.actions[:, STEERING]).max()) for plan in plans)
    steering_range = max(2 * world.statistics.steering_p95, largest) or 1.0
    # Pad with unknown actions, because no action leads to the first context frame, and because the
    # recording may end before the rollout.
    around = ((1, length), (0, 0))
    led, valid = np.pad(context.actions, around), np.pad(context.action_valid, around)
    past = ActionPlan(label="context", actions=led, valid=valid)
    now = len(context.tokens)
    recorded = ActionPlan(label="recorded", actions=led[now:], valid=valid[now:])
    ended = replace(recorded, label="recording ended")
    blank = np.full_like(context.frames[0], 40)
    seconds = {"generate": 0.0, "decode": 0.0}
    on_sheet = np.unique(np.linspace(0, length, _SHEET_COLUMNS).round().astype(int)).tolist()
    first_panel = ["recorded"] if context.has_future else []
    panels = len(first_panel) + len(futures)
    columns = [[context.frames[-1]] * panels]
    with disk_errors(files["video"]), ExitStack() as stack:
        temporary = {kind: stack.enter_context(atomic_file(path)) for kind, path in files.items()}
        tokens_out = _token_file(
            temporary["tokens"],
            context=context.tokens,
            actions=np.stack([plan.actions for plan in futures]),
            valid=np.stack([plan.valid for plan in futures]),
        )
        write_tokens = stack.enter_context(tokens_out)
        height, width = draw_moment([past] * panels, [blank] * panels, 0, steering_range).shape[:2]
        with video_writer(
            temporary["video"], fps=world.fps, height=height, width=width, x264=FAST
        ) as write:
            for index, frame in enumerate(context.frames):
                write(draw_moment([past] * panels, [frame] * panels, index, steering_range))
            if moments is None:
                moments = _rolled_out(world, context, plans, sampling, samples)
            decoded = _decoded(world, moments, len(futures), seconds)
            with progress(length, f"rollout -> {files['video']}", "frames") as bar:
                for index, (tokens, frames) in enumerate(bar.counted(decoded)):
                    truth = next(context.future, None)
                    shown, pictures = list(futures), list(frames)
                    if first_panel:
                        shown.insert(0, ended if truth is None else recorded)
                        pictures.insert(0, blank if truth is None else truth)
                    write_tokens(index, tokens)
                    write(draw_moment(shown, pictures, index, steering_range))
                    if index + 1 in on_sheet:
                        columns.append(pictures)
        report = _report(world, context, futures, sampling, seconds)
        titles = first_panel + report["futures"]
        rows = list(zip(titles, zip(*columns, strict=True), strict=True))
        sheet = contact_sheet(rows, [f"{step / world.fps:+.2f} s" for step in on_sheet])
        Image.fromarray(sheet).save(temporary["sheet"], compress_level=2)
        save_json(temporary["settings"], report)
    return report


@contextmanager
def _token_file(
    path: Path, *, context: torch.Tensor, actions: Floats32, valid: Mask
) -> Iterator[Callable[[int, torch.Tensor], None]]:
    """Create the safetensors file `path`; yield a function that writes the futures' tokens to it.

    The function takes a frame number, and that frame's tokens in all futures, int64 [F, r, c]. The
    file contains `tokens` U16 [F, N, r, c], `actions` F32 [F, N, 2], `action_valid` BOOL [F, N, 2]
    and `context_tokens` U16 [T, r, c]. Tokens go straight to the file, so that memory does not grow
    with N.
    """
    futures, frames, _ = actions.shape
    arrays = {
        "actions": ("F32", actions.astype("<f4")),
        "context_tokens": ("U16", context.cpu().numpy().astype("<u2")),
        "action_valid": ("BOOL", valid),
    }
    forms = {name: (code, array.shape) for name, (code, array) in arrays.items()}
    forms["tokens"] = ("U16", (futures, frames, *context.shape[1:]))
    write_safetensors(path, forms, (array for _, array in arrays.values()), metadata={})
    with path.open("r+b") as file:
        start = file.seek(0, os.SEEK_END)

        def write(index: int, tokens: torch.Tensor) -> None:
            for future, frame in enumerate(tokens.cpu().numpy().astype("<u2")):
                file.seek(start + (future * frames + index) * frame.nbytes)
                file.write(frame.tobytes())

        yield write


def _rolled_out(
    world: WorldModel,
    context: Context,
    plans: Sequence[ActionPlan],
    sampling: Sampling,
    samples: int,
) -> Iterator[Frame]:
    return world.generate(
        context.prefix(world),
        np.stack([plan.actions for plan in plans]),
        np.stack([plan.valid for plan in plans]),
        samples=samples,
        sampling=sampling,
    )


def _decoded(
    world: WorldModel, moments: Iterator[Frame], futures: int, seconds: dict[str, float]
) -> Iterator[tuple[torch.Tensor, list[Pixels]]]:
    """Decode the futures; for each moment, yield the F futures' tokens [F, r, c] and frames.

    Decodes several moments together, because decoding a few frames takes hardly longer than
    decoding one. Adds the time spent on generating and on decoding to `seconds`.
    """
    began = time.perf_counter()
    while chunk := list(islice(moments, -(-_DECODED_TOGETHER // futures))):
        generated = time.perf_counter()
        decoded = world.tokenizer.decode(torch.cat([moment.tokens for moment in chunk])).numpy()
        seconds["generate"] += generated - began
        seconds["decode"] += time.perf_counter() - generated
        for moment, frames in zip(chunk, np.split(decoded, len(chunk)), strict=True):
            yield moment.tokens, list(frames)
        began = time.perf_counter()


def _report(
    world: WorldModel,
    context: Context,
    futures: Sequence[ActionPlan],
    sampling: Sampling,
    seconds: dict[str, float],
) -> dict[str, Any]:
    length = len(futures[0].actions)
    return {
        "context": {
            "drive": context.label,
            "start_s": context.start_s,
            "frames": len(context.tokens),
        },
        "futures": [plan.label for plan in futures],
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
        "frames_per_second": length * len(futures) / sum(seconds.values()),
        "seconds": seconds,
    }
