"""Measure whether the road stays the same while the car stands still.

A frame is at the same place as another if the car travels less than 0.1 m between them, and at
another place if it travels 20 m or more.

Legend: F frames of a segment, N frames of the future, r c token rows and columns, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Ints, Pixels
from driving_sim.engine.errors import TooLittleDataError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.footage import Clip, Footage
from driving_sim.evaluate.report.section import Media, Section, Table, photo
from driving_sim.evaluate.rollouts import encode_contexts
from driving_sim.tokenizer.metrics import psnr
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_SAME_M, _AWAY_M = 0.1, 20.0
_ALIKE_DB = 40.0
"""PSNR in dB from which two pictures look alike. Higher values count as this one.

Frames of a standing car often have equal tokens, whose PSNR says nothing.
"""
_COMPARED = 16  # most real frames of a kind that are compared with the start
_COLUMNS = 6  # number of frames of the rollout on the contact sheet


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StandingStart:
    """A start at which the car stands, or moves as slowly as anywhere in the drives."""

    clip: Clip
    """The start. The last frame of its context is the one that everything is compared with."""
    speed_mps: float
    """Highest recorded speed within the context."""
    same: Ints
    """Frames of the drive at the same place, or the frame before if there are none."""
    stands: bool
    """Whether `same` shows the same place."""
    elsewhere: Ints
    """Frames of the drive at another place."""


def choose_standing_start(footage: Sequence[Footage], context_frames: int) -> StandingStart:
    """Choose the start with the lowest top speed in its context; of equal starts, the first.

    All speeds within the context must be known, and the drive must also show another place without
    a gap in between. Raises TooLittleDataError if there is no such start.
    """
    candidates = [
        start
        for source in footage
        for begin, stop in source.drive.entry.segments
        if (start := _slowest(source, begin, stop, context_frames)) is not None
    ]
    if not candidates:
        raise TooLittleDataError(
            f"no held-out drive has {context_frames} frames in a row with known speeds, and "
            f"{_AWAY_M:g} m of road before or after them, so there is no start to stand at"
        )
    return min(candidates, key=lambda start: start.speed_mps)


def _slowest(footage: Footage, begin: int, stop: int, context_frames: int) -> StandingStart | None:
    """Return the slowest start within a segment, or None if there is none."""
    past, drive = context_frames - 1, footage.drive
    if past < 1 or stop - begin < context_frames:
        return None
    speed = np.abs(drive.actions[begin : stop - 1, SPEED].astype(np.float64))  # [F - 1]
    known = np.asarray(drive.action_valid[begin : stop - 1, SPEED])
    steps_m = np.where(known, speed, 0.0) / drive.info.fps
    travelled_m = np.concatenate([[0.0], np.cumsum(steps_m)])  # [F]
    # The n-th value belongs to the context whose last frame is the frame n + past of the segment.
    top_mps = sliding_window_view(np.where(known, speed, np.inf), past).max(axis=1)
    here_m = travelled_m[past:]
    top_mps[np.maximum(here_m, travelled_m[-1] - here_m) < _AWAY_M] = np.inf
    at = int(top_mps.argmin())
    if not np.isfinite(top_mps[at]):
        return None
    last = at + past
    distance_m = np.abs(travelled_m - travelled_m[last])
    # Across a stretch of unknown speed, the car may have driven farther than it seems.
    unknown = np.concatenate([[0], np.cumsum(~known)])
    is_same = (distance_m < _SAME_M) & (unknown == unknown[last])
    same = np.flatnonzero(is_same & (np.arange(stop - begin) != last))
    return StandingStart(
        clip=Clip(footage=footage, start=begin + last + 1, context_frames=context_frames, frames=0),
        speed_mps=float(top_mps[at]),
        same=begin + (_spread(same) if len(same) else np.array([last - 1])),
        stands=bool(len(same)),
        elsewhere=begin + _spread(np.flatnonzero(distance_m >= _AWAY_M)),
    )


def _spread(frames: Ints) -> Ints:
    """Return at most `_COMPARED` of the frames, evenly spread."""
    chosen = np.linspace(0, len(frames) - 1, min(_COMPARED, len(frames)))
    return np.asarray(frames[chosen.round().astype(int)])


def evaluate_standing(
    world: WorldModel, start: StandingStart, *, seconds: float, sampling: Sampling
) -> Section:
    """Roll out with a speed of 0 for `seconds`, and compare the last second with the start.

    The steering is held. All pictures are compared after the tokenizer, so that its errors do not
    count. Raises TooLittleDataError if the model learned no speed.
    """
    if not world.known_channels[SPEED]:
        raise TooLittleDataError("the model learned no speed, so it cannot be told to stand")
    tokens = _stand(world, start.clip, round(seconds * world.fps), sampling)
    drive_tokens = start.clip.footage.drive.tokens
    compared = {
        "model": tokens[-max(1, round(world.fps)) :],
        "floor": _tensor(drive_tokens[start.same]),
        "elsewhere": _tensor(drive_tokens[start.elsewhere]),
    }
    now = start.clip.context_tokens[-1]
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        "start": start.clip.name,
        "start_speed_mps": start.speed_mps,
        "floor_stands": start.stands,
        "seconds": len(tokens) / world.fps,
        "psnr_db": {name: _psnr_db(world, now, frames) for name, frames in compared.items()},
        "equal_tokens": {
            name: float((frames == now).flatten(1).double().mean(1).median())
            for name, frames in compared.items()
        },
    }
    psnr_db = metrics["psnr_db"]
    psnr_db["bound"] = (psnr_db["floor"] + psnr_db["elsewhere"]) / 2
    metrics["same_road"] = psnr_db["model"] >= psnr_db["bound"]
    text = _TEXT.format(
        seconds=f"{metrics['seconds']:g}",
        start=start.clip.name,
        speed=start.speed_mps,
        floor=_STANDS if start.stands else _MOVES,
        away_m=_AWAY_M,
        alike_db=_ALIKE_DB,
    )
    parts = _table(metrics), _sheet(world, start, tokens)
    return Section("standing", "Standing still", text, metrics, parts)


def _stand(world: WorldModel, clip: Clip, frames: int, sampling: Sampling) -> Tensor:
    """Roll out a speed of 0 and the last known steering; return the tokens [N, r, c]."""
    actions, valid = (array[clip.context_frames - 2].copy() for array in clip.actions)
    actions[SPEED], valid[SPEED] = 0.0, True
    if not valid[STEERING]:
        actions[STEERING] = 0.0
    shape = (1, max(1, frames), 2)
    commands, known = np.broadcast_to(actions, shape), np.broadcast_to(valid, shape)
    steps = world.generate(encode_contexts(world, [clip]), commands, known, sampling=sampling)
    with progress(shape[1], "standing still", "frames") as bar:
        return torch.cat([step.tokens.cpu() for step in bar.counted(steps)])


def _tensor(tokens: Any) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def _psnr_db(world: WorldModel, now: Tensor, tokens: Tensor) -> float:
    """Return the median PSNR of the decoded frames [n, r, c] with the decoded frame `now`."""
    frames = world.tokenizer.decode(tokens)
    reference = world.tokenizer.decode(now[None]).expand_as(frames)
    return float(psnr(frames, reference).clamp(max=_ALIKE_DB).median())


_ROWS = {"model": "the rollout's last second", "floor": "same place", "elsewhere": "another place"}


def _table(metrics: dict[str, Any]) -> Table:
    psnr_db, equal = metrics["psnr_db"], metrics["equal_tokens"]
    rows = [(label, psnr_db[name], equal[name]) for name, label in _ROWS.items()]
    verdict = "the same road" if metrics["same_road"] else "not the same road"
    caption = f"Compared with the start, medians over frames. Verdict: {verdict}; the bound is "
    caption += f"{psnr_db['bound']:.1f} dB"
    return Table(caption, ("", "PSNR, dB", "equal tokens (share)"), rows)


def _sheet(world: WorldModel, start: StandingStart, tokens: Tensor) -> Media:
    times = np.unique(np.linspace(0, len(tokens) - 1, _COLUMNS).round().astype(int))
    away = start.elsewhere[len(start.elsewhere) // 2]
    context, elsewhere = (
        _tensor(start.clip.footage.drive.tokens[frame : frame + 1])
        for frame in (start.clip.start - 1, away)
    )
    shown = torch.cat([context, tokens[torch.from_numpy(times)], elsewhere])
    frames: list[Pixels] = list(world.tokenizer.decode(shown).numpy())
    headings = ["start", *(f"{(t + 1) / world.fps:+.1f} s" for t in times), "another place"]
    caption = "The start, the rollout at a standstill, and a real frame from another place"
    return photo(contact_sheet([(start.clip.name, frames)], headings), caption)


_TEXT = """Question: is it still the same road after the car has stood for {seconds} s? The rollout
begins at {start}, where the recorded car drives at most {speed:.2g} m/s. Its commands are a speed
of 0 and the steering of the start. The last second is compared with the start, which is the last
frame of the context. The median over that second is taken, so that a passing car does not decide.

How to read it. "Same place" is the floor: {floor}. "Another place" is the baseline: real frames of
the same drive, {away_m:g} m or more away. All of them are decoded from tokens, like the rollout. A
PSNR above {alike_db:g} dB counts as {alike_db:g} dB, because such pictures look alike. The verdict
is "the same road" if the PSNR of the rollout is nearer to that of the same place than to that of
another place. The bound lies halfway between the two.

Limits. This is one rollout from one start. Light and traffic may change while a real car stands,
and the recorded car may stand for too short a time to show such changes."""
_STANDS = f"other real frames within {_SAME_M:g} m of the start"
_MOVES = "the real frame before the start. The car moves, so this floor is too low"
