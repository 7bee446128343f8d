"""Whether rollouts do what they are told: commanded against realised speed and steering.

What a rollout realised is read off its pictures by an inverse-dynamics probe that learned from the
training drives (as ACT-Bench, arXiv 2412.05337, does). Its own error on held-out ones is the floor.

Axes: C clips, N frames of the future, H W pixels, A = 2 channels (speed, steering).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from driving_sim.data.actions.action_file import SPEED, STEERING
from driving_sim.data.arrays import Floats, Pixels
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.following import follow
from driving_sim.evaluate.actions.inverse_dynamics import (
    CHANNELS,
    STANDING_MPS,
    InverseDynamics,
)
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.report.section import Media, Section, Table, plot
from driving_sim.evaluate.rollouts import Imagined, imagine
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_OF_CHANGE = ("correlation", "gain", "delay_frames", "sign_accuracy")
"""What is not told where the commands vary less than the probe errs."""
CURVE = 0.5
"""A curve: |steering| beyond this share of the training data's 95th percentile."""


def evaluate_fidelity(
    world: WorldModel,
    probe: InverseDynamics,
    floor: dict[str, Any],
    rollouts: Sequence[Imagined],
    sampling: Sampling,
) -> Section:
    """Read off what rollouts did, and what those of the mirror images and without actions do.

    Every clip comes with its mirror image: a car that drives a circuit turns mostly one way, and a
    model that always says right must not be right. `floor` is the probe's own error on held-out
    footage, for the report.
    """
    mirrored = [replace(imagined.clip, mirrored=True) for imagined in rollouts]
    clips = [*(imagined.clip for imagined in rollouts), *mirrored]
    with progress(3 * len(rollouts), "action fidelity", "rollouts") as bar:
        told = chain(rollouts, bar.counted(imagine(world, mirrored, sampling)))
        free = bar.counted(imagine(world, clips, sampling, hide_actions=True))
        realised = {
            "recorded": [read(probe, clip.context, clip.truth) for clip in clips],
            "model": [read(probe, each.clip.context, each.frames) for each in told],
            "action_free": [read(probe, each.clip.context, each.frames) for each in free],
        }
    return compare_actions(world, clips, realised, floor)


def compare_actions(
    world: WorldModel,
    clips: Sequence[Clip],
    realised: Mapping[str, Sequence[Floats]],
    floor: dict[str, Any],
) -> Section:
    """How well each source's actions, of each clip [N, A], follow what the clips were told.

    A clip and its mirror image are one unit of the intervals.
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
    sources = {source: np.stack(found) for source, found in realised.items()}
    sources["constant"] = np.broadcast_to(world.statistics.mean, commanded.shape)
    for name, channel in CHANNELS.items():
        told = commanded[..., channel]
        threshold = CURVE * world.statistics.steering_p95 if channel == STEERING else None
        metrics[name] = {
            source: follow(told, found[..., channel], units=units, sign_threshold=threshold)
            for source, found in sources.items()
        }
        # Whether the commands vary by more than the probe errs.
        error, spread = floor.get(name, {}).get("rmse"), told[np.isfinite(told)]
        if error is not None and not (len(spread) and float(spread.std()) > error):
            for found in metrics[name].values():
                found |= dict.fromkeys(_OF_CHANGE)
    text = _TEXT.format(
        truth=_RECORDED if metrics["recorded"] else _RECONSTRUCTED, standing=STANDING_MPS
    )
    parts = _floor_table(floor), _table(metrics), _plot(commanded, sources)
    return Section("fidelity", "Action fidelity", text, metrics, parts)


def _commanded(clip: Clip) -> Floats:
    """The future's actions [N, A]; NaN where not known, or where they cannot show."""
    actions, valid = clip.actions
    future = slice(clip.context_frames - 1, None)
    commanded = np.where(valid, actions, np.nan)[future].astype(np.float64)
    commanded[commanded[:, SPEED] < STANDING_MPS, STEERING] = np.nan
    return commanded


def read(probe: InverseDynamics, context: Pixels, future: Pixels) -> Floats:
    """Estimate the action [N, 2] that led to each frame of `future` [N, H, W, 3]."""
    frames = np.concatenate([context[-probe.look_back :], future])
    return np.asarray(probe.estimate(frames)[-len(future) :], np.float64)


_TEXT = """An inverse-dynamics probe, which learned from the training drives, reads speed and
steering off pictures. It is run on {truth} of the same clips (its error there is the floor), on the
model's rollouts, and on rollouts in which the model knew the actions of the context but none of the
future's (action-free); the constant is the training drives' mean.

Correlation, gain (1: what was commanded is what happens) and delay compare the commanded with the
realised course. Sign accuracy is over frames in curves, left and right averaged, over the clips
and their mirror images: always the same way scores 0.5. Where the commands vary less than the probe
errs, nothing is said of how the rollouts follow them. The steering of a car that is told to go
slower than {standing:g} m/s does not show, and is not judged. Intervals are over clips; one and its
mirror image count as one."""
_RECORDED = "the recorded frames"
_RECONSTRUCTED = "the tokenizer's reconstructions of the recorded frames"


def _floor_table(floor: dict[str, Any]) -> Table:
    names = next(iter(floor.values()))
    rows = [
        (name.replace("_", " "), *(errors[name] for errors in floor.values())) for name in names
    ]
    return Table("The floor: the probe's own error on the held-out drives", ("", *floor), rows)


def _table(metrics: dict[str, Any]) -> Table:
    names = ("correlation", "gain", "mean_absolute_error", "delay_frames", "sign_accuracy")
    rows = [
        (f"{channel}, {source.replace('_', '-')}", *(found[name] for name in names))
        for channel in CHANNELS
        for source, found in metrics[channel].items()
    ]
    columns = ("", *(name.replace("_", " ") for name in names))
    return Table("Commanded against realised", columns, rows)


def _plot(commanded: Floats, sources: Mapping[str, Floats]) -> Media:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, channel) in zip(figure.subplots(1, 2), CHANNELS.items(), strict=True):
        told = commanded[..., channel].ravel()
        for source, colour in (("recorded", "#b9bec8"), ("model", "#2a5db0")):
            shown = sources[source][..., channel].ravel()
            axes.plot(told, shown, ".", color=colour, markersize=3, label=source)
        if np.isfinite(told).any():
            ends = np.nanmin(told), np.nanmax(told)
            axes.plot(ends, ends, color="#999999", linewidth=1)
        axes.set(title=name, xlabel="commanded", ylabel="realised")
    axes.legend(frameon=False)
    return plot(figure, "Every frame: what was commanded and what the probe reads")
