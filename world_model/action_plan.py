"""Turn an action file, a script or a name such as `left` into a rollout's actions, one per frame.

The last context frame is frame 0, at time 0. Action i leads from frame i to frame i + 1 and is the
mean over the time interval [i / fps, (i + 1) / fps). Speed is in m/s. Steering is in the unit of
the model's steering kind, and positive to the left.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from driving_sim.data.actions.action_file import read_action_file
from driving_sim.data.actions.action_log import SPEED, STEERING, STEERING_LIMIT, UNITS, SteeringKind
from driving_sim.data.actions.alignment import EXTRAPOLATION_S, align
from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.arrays import Floats, Floats32, Mask
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import shown
from driving_sim.engine.progress import say

LONGEST_S = 86400.0
NAMES = ("straight", "left", "right", "brake", "recorded")
BRAKE_MPS2 = -4.0
_KEYS = ("speed", "accel", "steer")
_GRAMMAR = 'a script looks like "speed=8 steer=0.1 for 2s; steer=0" (keys: speed, accel, steer)'
# To get the action of a frame from a script, split the frame's time interval into this many equal
# parts, and average the values at their midpoints. The average is exact for constants, and for
# ramps that begin and end at the border between two parts.
_PARTS = 64
# Tolerance for times, because action files may round them and may end one microsecond early.
_ROUNDING_S = 1e-5
_LAST_PART_S = 1.0
_LARGEST = 1000.0  # largest number in a script, in m/s, m/s2 or rad; no car reaches it
_AT_ONCE = 2**16
"""Maximum number of frames whose actions are computed at once, to limit the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """The state of the car when a plan begins, and the actions that the model can follow."""

    fps: float
    steering_kind: SteeringKind | None
    """Kind of steering that the model was trained on; None if it was trained without steering."""
    steering_limit: float
    """95th percentile of |steering| in training. The plan `left` steers this much to the left."""
    known_channels: tuple[bool, bool]
    """Whether the model was trained with speed, and whether it was trained with steering.

    The model can follow only channels that it was trained with.
    """
    last_action: Floats32
    """[2]: speed in m/s and steering that led to the last context frame."""
    last_valid: Mask
    """[2]: whether the speed and the steering of `last_action` are known."""
    recorded: tuple[Floats32, Mask] | None
    """Recorded actions [N, 2] after the last context frame, and whether they are valid [N, 2].

    None if the recording has no actions there.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionPlan:
    """The `actions` that a future follows, float32 [N, 2], and whether they are `valid` [N, 2]."""

    label: str
    actions: Floats32
    valid: Mask


_Segment = dict[str, float]
"""One part of a script: the values that it sets for `speed`, `accel`, `steer` and `seconds`."""
_Planned = tuple[float | None, Callable[[int], ActionPlan]]
"""A plan whose number of frames is not chosen yet: its own length, and a function that makes it.

The length is in s, or None if the plan has none of its own. The function takes the number of frames
and returns the plan.
"""


def make_plans(
    specs: Sequence[str],
    situation: Situation,
    *,
    seconds: float | None = None,
    reading: Reading = AS_NAMED,
) -> list[ActionPlan]:
    """Turn each file, script or name in `specs` into a plan; all plans have the same length.

    The length is `seconds` if given. Otherwise it is the length of the longest file, recording or
    script with times such as "for 2s", or 4 s if there is none of these. If the last part of a
    script has no time, but other parts have one, it lasts 1 s. A file, recording or script that is
    shorter than the plan is extended with its last action. `reading` says how to read files, except
    for the time offset, because files begin with the future.
    """
    planned = [_plan(spec, situation, reading) for spec in specs]
    return _rendered(planned, situation.fps, seconds)


def _rendered(
    planned: Sequence[_Planned], fps: float, seconds: float | None, longest_s: float = LONGEST_S
) -> list[ActionPlan]:
    """Make plans of the same length, as `make_plans` describes it."""
    lengths = [own_s for own_s, _ in planned if own_s is not None]
    length_s = seconds if seconds is not None else max(lengths, default=4.0)
    if not length_s <= longest_s:
        raise DriveSimError(
            f"`seconds` {length_s:g}: a future lasts at most {longest_s:g} s; give a shorter time"
        )
    frames = round(length_s * fps)
    if frames < 1:
        raise DriveSimError(
            f"the actions last {length_s:g} s, less than one frame at {fps:g} frames/s; "
            "make them longer"
        )
    return [render(frames) for _, render in planned]


def make_plan_without_files(spec: str, situation: Situation, longest_s: float) -> ActionPlan:
    """Turn a script or a name into a plan, as `make_plans` does. No file is looked at."""
    if spec in NAMES:
        planned = _from_name(spec, situation)
    else:
        planned = _from_script(shown(spec), parse_script(" ".join(spec.split())), situation)
    return _rendered([planned], situation.fps, None, longest_s)[0]


def _plan(spec: str, situation: Situation, reading: Reading) -> _Planned:
    if spec in NAMES:
        return _from_name(spec, situation)
    path = Path(spec)
    # Ignore folders, because a folder may have the same name as a script (`steer=0.1`).
    # Use os.path, because Path.exists raises OSError for very long names.
    is_file = os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112
    if spec.isprintable() and (path.suffix.lower() == ".csv" or is_file):
        return _from_file(path, situation, reading)
    if "=" in spec:
        return _from_script(" ".join(spec.split()), parse_script(spec), situation)
    near = difflib.get_close_matches(spec, NAMES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DriveSimError(
        f"`actions` {shown(spec)} is not a file, a script or a name{hint}; "
        f"names are {', '.join(NAMES)}; {_GRAMMAR}"
    )


def _from_name(name: str, situation: Situation) -> _Planned:
    if name == "recorded":
        if situation.recorded is None or len(situation.recorded[0]) == 0:
            raise DriveSimError(
                "`actions` recorded: the context has no recorded actions after its last frame; "
                "use a context with a CSV, an earlier `start_s`, or other `actions`"
            )
        return _then_hold(name, *situation.recorded, situation.fps)
    limit = situation.steering_limit
    steers = situation.known_channels[STEERING]
    if limit == 0 and steers and name in ("left", "right"):
        raise DriveSimError(
            f"`actions` {name}: the training data has too little steering to tell how far to turn; "
            'give an angle, as in "steer=0.1 for 2s"'
        )
    segments: dict[str, _Segment] = {
        # A model that was trained without steering cannot follow "steer", so leave it out.
        "straight": {"steer": 0.0} if steers else {},
        "left": {"steer": limit},
        "right": {"steer": -limit},
        "brake": {"accel": BRAKE_MPS2},
    }
    return _from_script(name, [segments[name]], situation)


def _then_hold(label: str, actions: Floats32, valid: Mask, fps: float) -> _Planned:
    """Plan these actions. If the plan has more frames, it repeats the last action."""

    def render(frames: int) -> ActionPlan:
        index = np.minimum(np.arange(frames), len(actions) - 1)
        return ActionPlan(label=label, actions=actions[index], valid=valid[index])

    return len(actions) / fps, render


def _from_file(path: Path, situation: Situation, reading: Reading) -> _Planned:
    kind = reading.steering_kind or situation.steering_kind
    log = read_action_file(path, replace(reading, steering_kind=kind, time_offset=0.0))
    for line in log.notices:
        say(f"{path}: {line}")
    first, last = log.span
    frames = int((min(last, LONGEST_S) + _ROUNDING_S) * situation.fps)
    if first > EXTRAPOLATION_S or frames < 1:
        raise DriveSimError(
            f"{path}: its times go from {first:g} to {last:g} s; they must begin "
            "at 0 s, the time of the last context frame, and cover at least one frame"
        )
    obeyed = log.has & situation.known_channels
    if not obeyed.any():
        raise DriveSimError(
            f"{path}: the model was trained without the actions in this file, so it cannot follow "
            "them; train on drives that have them"
        )
    # Align one frame more than needed and drop its action, because `align` only estimates the
    # length of the last interval.
    actions, valid = align(log, np.arange(frames + 1) / situation.fps)
    actions, valid = actions[:frames], valid[:frames]
    for channel, name in enumerate(("speed", "steering")):
        if not obeyed[channel]:
            actions[:, channel] = situation.last_action[channel]
            valid[:, channel] = situation.last_valid[channel]
        elif not valid[:, channel].all():
            first = int(np.flatnonzero(~valid[:, channel])[0]) / situation.fps
            raise DriveSimError(
                f"{path}: {name} has a gap at {first:.2f} s; give its rows at a steady rate"
            )
    return _then_hold(path.stem, actions, valid, situation.fps)


def parse_script(script: str) -> list[_Segment]:
    """Split a script such as "speed=8 steer=0.1 for 2s; accel=-4 for 1s" into its parts.

    Only the last part may have no time. The DriveSimError for a wrong script names the wrong part.
    """
    parts = [part.strip() for part in script.split(";") if part.strip()]
    segments = [_parse_part(part) for part in parts]
    for part, segment in zip(parts[:-1], segments[:-1], strict=True):
        if "seconds" not in segment:
            raise DriveSimError(
                f"`actions`: {shown(part)} needs a time such as 'for 2s'; {_GRAMMAR}"
            )
    if not segments:
        raise DriveSimError(f"`actions`: the script is empty; {_GRAMMAR}")
    return segments


def _parse_part(part: str) -> _Segment:
    head, _, duration = part.partition(" for ")
    values: _Segment = {}
    if duration:
        match = re.fullmatch(r"\s*([0-9.]+)\s*s?\s*", duration)
        if match is None:
            raise DriveSimError(
                f"`actions`: the 'for' in {shown(part)} has no time in seconds; write 'for 2s'"
            )
        values["seconds"] = _number(match.group(1), part, LONGEST_S)
    for word in head.split():
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DriveSimError(
                f"`actions`: unknown word {shown(word)} in {shown(part)}{hint}; {_GRAMMAR}"
            )
        if key in values:
            raise DriveSimError(f"`actions`: {key!r} is given twice in {shown(part)}; give it once")
        values[key] = _number(value, part, _LARGEST)
    if "speed" in values and "accel" in values:
        raise DriveSimError(f"`actions`: {shown(part)} sets both speed and accel; give only one")
    if values.get("speed", 0.0) < 0:
        raise DriveSimError(f"`actions`: speed in {shown(part)} is negative; give 0 m/s or more")
    return values


def _number(text: str, part: str, largest: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DriveSimError(f"`actions`: {shown(text)} in {shown(part)} is not a finite number")
    if abs(value) > largest:
        raise DriveSimError(
            f"`actions`: {shown(text)} in {shown(part)} is too large; give at most {largest:g}"
        )
    return value


def _from_script(label: str, segments: list[_Segment], situation: Situation) -> _Planned:
    seconds = math.fsum(segment.get("seconds", 0.0) for segment in segments)
    if "seconds" not in segments[-1] and seconds:
        seconds += _LAST_PART_S
    _check_script(label, segments, situation)

    def means(begin: int, stop: int) -> Floats32:
        parts = np.arange(begin * _PARTS, stop * _PARTS, dtype=np.float64)
        midpoints = (parts + 0.5) / (_PARTS * situation.fps)
        followed = _follow(segments, midpoints, situation.last_action)
        mean: Floats32 = followed.reshape(-1, _PARTS, 2).mean(axis=1).astype(np.float32)
        return mean

    def render(frames: int) -> ActionPlan:
        actions = np.concatenate(
            [means(at, min(at + _AT_ONCE, frames)) for at in range(0, frames, _AT_ONCE)]
        )
        begins = np.arange(frames)[:, None] / situation.fps + _ROUNDING_S
        valid = (situation.last_valid | (begins >= _first_set_s(segments))) & np.array(
            situation.known_channels
        )
        return ActionPlan(label=label, actions=np.where(valid, actions, 0.0), valid=valid)

    return seconds or None, render


def _first_set_s(segments: list[_Segment]) -> Floats:
    """Return the times (s) at which a script first sets speed and steering, [2]; inf if never."""
    starts = np.cumsum([0.0, *(segment.get("seconds", 0.0) for segment in segments)])[:-1]
    named = np.array([("speed" in s or "accel" in s, "steer" in s) for s in segments])
    first: Floats = np.where(named, starts[:, None], math.inf).min(axis=0)
    return first


def _check_script(label: str, segments: list[_Segment], situation: Situation) -> None:
    """Raise DriveSimError if the model cannot follow a script, or if a value is impossible."""
    kind = situation.steering_kind or "steering_wheel"
    limit = STEERING_LIMIT[kind]
    speed_known = bool(situation.last_valid[SPEED])
    is_set = np.isfinite(_first_set_s(segments))
    for channel, name in ((SPEED, "speed"), (STEERING, "steering")):
        if is_set[channel] and not situation.known_channels[channel]:
            raise DriveSimError(
                f"`actions` {label}: the model was trained without {name}, so it cannot follow it; "
                f"leave {name} out, or train on drives that have it"
            )
    for segment in segments:
        if abs(segment.get("steer", 0.0)) > limit:
            raise DriveSimError(
                f"`actions`: steer={segment['steer']:g} is too large; the model's steering "
                f"({kind}) is at most {limit:g} {UNITS[kind]}"
            )
        if "accel" in segment and not speed_known:
            raise DriveSimError(
                f"`actions` {label}: the context's speed is unknown, so there is nothing to brake "
                "or speed up from; set it first, as in 'speed=8 for 0.1s; accel=-4'"
            )
        speed_known = speed_known or "speed" in segment


def _follow(segments: list[_Segment], times: Floats, last_action: Floats32) -> Floats:
    """Return the speed and steering [N, 2] that a script asks for at N ascending times (s)."""
    actions = np.empty((len(times), 2))
    speed, steer = (float(value) for value in last_action)
    start = 0.0
    for number, segment in enumerate(segments):
        lasting = segment.get("seconds", math.inf)
        # The last part continues to the end of the plan.
        end = start + lasting if number < len(segments) - 1 else math.inf
        here = slice(*np.searchsorted(times, (start, end)))
        speed, steer = segment.get("speed", speed), segment.get("steer", steer)
        accel = segment.get("accel", 0.0)
        ramp = np.minimum(times[here] - start, lasting)
        actions[here, 0] = np.maximum(0.0, speed + accel * ramp)
        actions[here, 1] = steer
        speed, start = max(0.0, speed + accel * lasting), end
    return actions
