"""Whether the model still drives after a minute: long rollouts, judged beside real footage.

Axes: F futures, N frames of each, r c token rows and columns, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from driving_sim.data.actions.action_file import SPEED
from driving_sim.data.arrays import Floats32, Ints, Mask
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.inverse_dynamics import STANDING_MPS
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.pictures.stability import (
    Appearance,
    RealFootage,
    StabilityConfig,
    mean_stability,
)
from driving_sim.evaluate.report.section import Media, Section, Table, photo, plot
from driving_sim.evaluate.rollouts import encode_contexts
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_CHUNK = 16
_COLUMNS = 7


def evaluate_stability(
    world: WorldModel,
    starts: Sequence[Clip],
    real: Sequence[DriveTokens],
    *,
    seconds: float,
    sampling: Sampling,
    config: StabilityConfig,
) -> Section:
    """Roll out from every start for `seconds`, under its recorded actions, over and over.

    `real` are drives that bound what is usual. Raises DriveSimError where these or the rollouts
    are too short to tell.
    """
    seen = []
    with progress(len(real), "real footage", "drives") as bar:
        for drive in bar.counted(real):
            # What leads to a frame is the action before it.
            led = np.arange(-1, len(drive) - 1).clip(min=0)
            seen.append(
                _appearance(world, drive.tokens, drive.actions[led], drive.action_valid[led])
            )
    footage = RealFootage(seen, world.fps, config)
    onward = (_onward(clip, round(seconds * world.fps)) for clip in starts)
    actions, valid = map(np.stack, zip(*onward, strict=True))
    steps = world.generate(encode_contexts(world, starts), actions, valid, sampling=sampling)
    with progress(actions.shape[1], "long rollouts", "frames") as bar:
        futures = torch.stack([step.tokens.cpu() for step in bar.counted(steps)], dim=1).numpy()
    rollouts = zip(futures, actions, valid, strict=True)
    judged = [footage.judge(_appearance(world, *rollout)) for rollout in rollouts]
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        **mean_stability(judged),
        "starts": {clip.name: each for clip, each in zip(starts, judged, strict=True)},
    }
    table = Table("All rollouts", ("", "value"), [(row, metrics[at]) for row, at in _ROWS.items()])
    return Section(
        "stability",
        "Stability of long rollouts",
        _TEXT.format(seconds=f"{seconds:g}"),
        metrics,
        (table, _plot(judged), _sheet(world, starts, futures)),
    )


_TEXT = """Rollouts of {seconds} s under the recorded actions, repeated where they end, judged by
what real footage shows of itself once it went through the tokenizer.

Drift: the Jensen-Shannon divergence of the tokens in each block of 5 s from those of real footage;
real blocks have one too, the floor. Sharpness: the spread of the Laplacian, beside the real
median. Frozen: the picture hardly changes although the car is told to move. Loop: the same tokens
come back, as they never do in real footage. Restless: the picture changes more than real ones
do. A rollout has collapsed where one of these sets in and stays for 2 s."""


def _appearance(
    world: WorldModel, tokens: NDArray[Any], actions: Floats32, valid: Mask
) -> Appearance:
    """See what tokens [N, r, c] look like, and where the actions [N, 2] to each tell it to move."""
    tokens = tokens.astype(np.int64)
    places = range(0, len(tokens), _CHUNK)
    chunks = (world.tokenizer.decode(tokens[at : at + _CHUNK]).numpy() for at in places)
    # Where nothing is known of its speed, the car moves.
    moving = ~valid[:, SPEED] | (actions[:, SPEED] >= STANDING_MPS)
    return Appearance.measure(tokens, chunks, moving)


def _onward(clip: Clip, frames: int) -> tuple[Floats32, Mask]:
    """The actions from a clip's start to the end of its run, then from the run's beginning on."""
    drive = clip.footage.drive
    begin, stop = next(run for run in drive.entry.segments if run[0] <= clip.start < run[1])
    # The last frame of a run leads nowhere.
    last = clip.start - 1 - begin
    places = begin + np.arange(last, last + frames) % (stop - 1 - begin)
    return np.asarray(drive.actions[places]), np.asarray(drive.action_valid[places])


_ROWS = {
    "rollouts": "rollouts",
    "collapsed": "collapsed",
    "lasted, s (mean)": "mean_lasted_s",
    "drift, bits": "drift_bits",
    "its floor, bits": "drift_floor_bits",
    "sharpness, of real": "sharpness_ratio",
    "frozen, share of frames": "frozen_share",
    "rollouts with a loop": "looped",
}


def _plot(judged: Sequence[dict[str, Any]]) -> Media:
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    drift, sharp, change = figure.subplots(1, 3)
    for each in judged:
        drift.plot(each["drift"]["time_s"], each["drift"]["bits"])
        for axes, values in (
            (sharp, each["sharpness"]["ratio"]),
            (change, each["freeze"]["change"]),
        ):
            axes.plot(np.arange(len(values)) / each["fps"], values, linewidth=0.8)
    first = judged[0]
    drift.axhline(first["drift"]["floor_bits"], color="#999999")
    for axes, label, bounds in (
        (drift, "divergence of the tokens, bits", [first["drift"]["threshold_bits"]]),
        (sharp, "sharpness, of the real median", first["sharpness"]["thresholds"].values()),
        (change, "change of the picture, share of white", [first["freeze"]["threshold"]]),
    ):
        axes.set(xlabel="seconds ahead", ylabel=label)
        for bound in bounds:
            axes.axhline(bound, color="#999999", linestyle=":")
    return plot(figure, "Each rollout over time; dotted: the bounds, grey line: the floor")


def _sheet(world: WorldModel, starts: Sequence[Clip], tokens: Ints) -> Media:
    chosen = np.linspace(0, tokens.shape[1] - 1, _COLUMNS).round().astype(int)
    rows = [
        (clip.name, list(world.tokenizer.decode(future[chosen]).numpy()))
        for clip, future in zip(starts, tokens, strict=True)
    ]
    headings = [f"{(t + 1) / world.fps:+.0f} s" for t in chosen]
    return photo(contact_sheet(rows, headings), "The rollouts over time")
