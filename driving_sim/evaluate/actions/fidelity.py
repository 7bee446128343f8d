"""Compare the speed and steering that rollouts show with the commands that they were given.

An inverse-dynamics probe estimates the realised actions from the pictures of a rollout. It was
trained on the training drives. ACT-Bench (arXiv 2412.05337) works the same way. The probe's own
error on the held-out drives is the floor, because no rollout can be judged more precisely.

Axes: C clips, N frames of the future, H W pixels, A = 2 channels (speed, steering).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats, Pixels
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.following import follow
from driving_sim.evaluate.actions.inverse_dynamics import (
    CHANNELS,
    STANDING_MPS,
    InverseDynamics,
)
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.report.intervals import estimate_of
from driving_sim.evaluate.report.section import Media, Section, Table, plot
from driving_sim.evaluate.rollouts import Imagined, imagine
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_OF_CHANGE = ("correlation", "gain", "gain_interval", "delay_frames", "sign_accuracy")
"""Metrics that are left out if the commands vary less than the probe's error."""
CURVE = 0.5
"""Smallest |steering| that counts as a curve, as a share of the training data's 95th percentile."""


def evaluate_fidelity(
    world: WorldModel,
    probe: InverseDynamics,
    floor: dict[str, Any],
    rollouts: Sequence[Imagined],
    sampling: Sampling,
) -> Section:
    """Compare the actions that the probe estimates from `rollouts` with the commands.

    The mirror image of every clip is rolled out as well. On a circuit, a car turns mostly one way,
    and a model that always turns that way must not score well. As a baseline, all clips are also
    rolled out without actions. `floor` is the probe's own error on the held-out drives.
    """
    mirrored = [replace(imagined.clip, mirrored=True) for imagined in rollouts]
    clips = [*(imagined.clip for imagined in rollouts), *mirrored]
    with progress(3 * len(rollouts), "action fidelity", "rollouts") as bar:
        commanded = chain(rollouts, bar.counted(imagine(world, mirrored, sampling)))
        free = bar.counted(imagine(world, clips, sampling, hide_actions=True))
        realised = {
            "recorded": [read(probe, clip.context, clip.truth) for clip in clips],
            "model": [read(probe, future.clip.context, future.frames) for future in commanded],
            "action_free": [read(probe, future.clip.context, future.frames) for future in free],
        }
    return compare_actions(world, clips, realised, floor)


def compare_actions(
    world: WorldModel,
    clips: Sequence[Clip],
    realised: Mapping[str, Sequence[Floats]],
    floor: dict[str, Any],
) -> Section:
    """Compare the realised actions with the commands, which are the clips' recorded actions.

    `realised` maps each kind of footage ("recorded", "model", "action_free") to the actions that
    the probe read from it: one array [N, A] for each clip. `floor` is the probe's own error. For
    the intervals of the metrics, a clip and its mirror image are resampled together.
    """
    commanded = np.stack([_commanded(clip) for clip in clips])
    units = [
        f"{clip.footage.drive.id} {clip.footage.drive.entry.start + clip.start}" for clip in clips
    ]
    metrics: dict[str, Any] = {
        "clips": len(units),
        "independent_clips": len(set(units)),
        "recorded": all(clip.footage.recorded is not None for clip in clips),
        "probe": floor,
    }
    sources = {source: np.stack(actions) for source, actions in realised.items()}
    sources["constant"] = np.broadcast_to(world.statistics.mean, commanded.shape)
    for name, channel in CHANNELS.items():
        commands = commanded[..., channel]
        threshold = CURVE * world.statistics.steering_p95 if channel == STEERING else None
        metrics[name] = {
            source: follow(commands, actions[..., channel], units=units, sign_threshold=threshold)
            for source, actions in sources.items()
        }
        # Commands that vary less than the probe's error cannot show whether rollouts follow them.
        error, known = floor.get(name, {}).get("rmse"), commands[np.isfinite(commands)]
        if error is not None and not (len(known) and float(known.std()) > error):
            for of_source in metrics[name].values():
                of_source |= dict.fromkeys(_OF_CHANGE)
    text = _TEXT.format(
        truth=_RECORDED if metrics["recorded"] else _RECONSTRUCTED, standing=STANDING_MPS
    )
    parts = _floor_table(floor), _table(metrics), _plot(commanded, sources)
    return Section("fidelity", "Action fidelity", text, metrics, parts)


def _commanded(clip: Clip) -> Floats:
    """Return the actions of a clip's future [N, A], with NaN for unknown values.

    The steering of a standing car is NaN as well.
    """
    actions, valid = clip.actions
    future = slice(clip.context_frames - 1, None)
    commanded = np.where(valid, actions, np.nan)[future].astype(np.float64)
    commanded[commanded[:, SPEED] < STANDING_MPS, STEERING] = np.nan
    return commanded


def read(probe: InverseDynamics, context: Pixels, future: Pixels) -> Floats:
    """Estimate the action [N, 2] that led to each frame of `future` [N, H, W, 3]."""
    frames = np.concatenate([context[-probe.look_back :], future])
    return np.asarray(probe.estimate(frames)[-len(future) :], np.float64)


_TEXT = """Question: does the model drive at the commanded speed and steer as commanded? An
inverse-dynamics probe, a small network trained on the training drives, reads speed and steering
from the pictures. A clip is a short piece of a held-out drive, and its recorded actions are the
commands. The mirror image of every clip is rolled out too, with the steering negated.

The second table compares the commands with four sources of actions. "recorded": the probe reads
{truth}. A perfect model would reach about these values. "model": the probe reads the rollouts that
were given the commands. "action-free": the probe reads rollouts in which the model does not see the
future actions. A model that uses its actions is clearly better than action-free. "constant": every
answer is the mean action of the training drives.

How to read the columns. Correlation: 1 is best, and 0 means that the rollouts ignore the commands.
Gain: 1 is best, and 0.5 means that the rollouts react half as strongly as commanded. Mean absolute
error: lower is better. Delay: how many frames after the command the pictures react; 0 is best. Sign
accuracy: the share of frames in curves that turn to the commanded side, averaged over left and
right. 1 is best, and always turning the same way scores 0.5.

Limits. The probe makes errors too, and the first table shows them. If the commands vary less than
the probe's error, only the mean absolute error is given. Steering is not judged while the commanded
speed is below {standing:g} m/s, because a standing car does not turn. Intervals are over clips; a
clip and its mirror image count as one."""
_RECORDED = "the recorded frames"
_RECONSTRUCTED = "the tokenizer's reconstructions of the recorded frames"

_UNITS = """Speed in m/s, steering in the unit of the training data; "–" means not measured."""
_FLOOR_CAPTION = f"""The probe's own error on the held-out drives, which limits what the other
table can show. The errors should be well below the errors of "constant", which always guesses the
mean of the probe's training clips. For correlation, R squared and sign accuracy, 1 is best.
{_UNITS}"""
_FOLLOWING_CAPTION = f"""How well realised actions follow the commands, for each channel and source.
The model should be close to "recorded" and far from "action-free". {_UNITS}"""


def _floor_table(floor: dict[str, Any]) -> Table:
    names = next(iter(floor.values()))
    rows = [
        (name.replace("_", " "), *(errors[name] for errors in floor.values())) for name in names
    ]
    return Table(_FLOOR_CAPTION, ("", *floor), rows)


def _table(metrics: dict[str, Any]) -> Table:
    names = ("correlation", "gain", "mean_absolute_error", "delay_frames", "sign_accuracy")
    rows = [
        (
            f"{channel}, {source.replace('_', '-')}",
            *(estimate_of(measured, name) if name == "gain" else measured[name] for name in names),
        )
        for channel in CHANNELS
        for source, measured in metrics[channel].items()
    ]
    columns = ("", *(name.replace("_", " ") for name in names))
    return Table(_FOLLOWING_CAPTION, columns, rows)


def _plot(commanded: Floats, sources: Mapping[str, Floats]) -> Media:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, channel) in zip(figure.subplots(1, 2), CHANNELS.items(), strict=True):
        commands = commanded[..., channel].ravel()
        for source, colour in (("recorded", "#b9bec8"), ("model", "#2a5db0")):
            actions = sources[source][..., channel].ravel()
            axes.plot(commands, actions, ".", color=colour, markersize=3, label=source)
        if np.isfinite(commands).any():
            ends = np.nanmin(commands), np.nanmax(commands)
            axes.plot(ends, ends, color="#999999", linewidth=1)
        axes.set(title=name, xlabel="commanded", ylabel="realised")
    axes.legend(frameon=False)
    return plot(
        figure,
        "Each dot is a frame: the commanded value, and the value that the probe reads from the "
        "picture. The two are equal on the grey line. The scatter of the recorded frames is the "
        "probe's own error",
    )
