"""Measure how long a rollout still looks like a drive, compared with real footage.

Axes: F futures, N frames of a future, r c token rows and columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from driving_sim.data.actions.action_log import SPEED
from driving_sim.data.arrays import Floats32, Ints, Mask
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.inverse_dynamics import STANDING_MPS
from driving_sim.evaluate.footage import Clip, Footage
from driving_sim.evaluate.pictures.stability import (
    Appearance,
    RealFootage,
    StabilityConfig,
    sharpness,
)
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.intervals import estimate_of, interval, number_and_interval
from driving_sim.evaluate.report.section import Media, Section, Table, photo, plot
from driving_sim.evaluate.rollouts import BATCH, encode_contexts
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_CHUNK = 16  # number of frames that are decoded together
_COLUMNS = 7  # number of frames of each rollout on the contact sheet


def evaluate_stability(
    world: WorldModel,
    starts: Sequence[Clip],
    real: Sequence[Footage],
    *,
    seconds: float,
    sampling: Sampling,
    config: StabilityConfig,
) -> Section:
    """Roll out from every start for `seconds`, and judge each rollout against real footage.

    The commands are the actions recorded after the start, repeated if they end too early. The
    bounds for faults come from the `real` drives. Raises TooLittleDataError if these drives or the
    rollouts are too short.
    """
    with progress(len(real), "real footage", "drives") as bar:
        appearances = [_real_appearance(world, source) for source in bar.counted(real)]
    footage = RealFootage(appearances, world.fps, config)
    onward = (_onward(clip, round(seconds * world.fps)) for clip in starts)
    actions, valid = map(np.stack, zip(*onward, strict=True))
    futures = _roll_out(world, starts, actions, valid, sampling)
    rollouts = zip(futures, actions, valid, strict=True)
    judged = [footage.judge(_appearance(world, *rollout)) for rollout in rollouts]
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        **mean_stability(judged),
        "starts": {clip.name: result for clip, result in zip(starts, judged, strict=True)},
    }
    recorded = judged[0]["sharpness"]["reference"] == "recorded"
    sharpness_is = _OF_RECORDED if recorded else _OF_RECONSTRUCTED
    rows: list[tuple[str, Cell]] = [
        (
            label.format(sharpness_is=sharpness_is),
            estimate_of(metrics, key) if key == "mean_lasted_s" else metrics[key],
        )
        for label, key in _ROWS.items()
    ]
    table = Table("Means and counts over all rollouts", ("", "value"), rows)
    return Section(
        "stability",
        "Stability of long rollouts",
        _TEXT.format(
            seconds=f"{seconds:g}",
            block_s=config.block_s,
            hold_s=config.hold_s,
            reference=_RECORDED if recorded else _RECONSTRUCTED,
        ),
        metrics,
        (table, _plot(judged, sharpness_is), _sheet(world, starts, futures)),
    )


_TEXT = """Question: does a rollout still look like a drive after {seconds} s? The commands are the
actions recorded in the held-out drive. When they end, they start again from the beginning. A
rollout is compared with real footage that was encoded and decoded by the same tokenizer. It can
have five faults, and the bounds for all of them come from the real footage.

Drift: the tokens of a block of {block_s:g} s are distributed differently from those of real
footage. The distance is the Jensen-Shannon divergence, from 0 to 1 bit. Real blocks also differ
from the rest of the real footage; the median of their divergences is the floor. Sharpness: the
picture is much softer or much harder than real footage after the tokenizer. {reference} Frozen: the
picture hardly changes although the car is commanded to move. Loop: the rollout repeats an earlier
stretch. Restless: the tokens change from frame to frame much more than in real footage, as in
noise.

How to read it. A rollout has collapsed when at least one fault is present for {hold_s:g} s without
a break. A rollout lasts until it collapses, or if it never does, until its end. Longer is better.
The interval of the mean time is over the rollouts. A rollout froze if it was frozen for {hold_s:g}
s. Drift and sharpness should be close to their floors. There should be no collapses, frozen frames
or loops.

Limits. A rollout without faults is not necessarily right, because this section does not check
whether it follows its commands. The faults are detected by simple rules, so look at the pictures
too. With few rollouts the numbers are rough."""
_RECORDED = """The sharpness of the recorded frames, before the tokenizer, is 1; that of the same
frames after it is the floor, because no rollout can be expected to be sharper."""
_RECONSTRUCTED = """The sharpness of real footage after the tokenizer is 1. The recorded frames are
sharper than that, but these drives have no videos to say by how much."""
_OF_RECORDED = "relative to recorded frames"
_OF_RECONSTRUCTED = "relative to real frames after the tokenizer"


def _roll_out(
    world: WorldModel, starts: Sequence[Clip], actions: Floats32, valid: Mask, sampling: Sampling
) -> Ints:
    """Roll out actions [F, N, 2] from the starts, and return the tokens [F, N, r, c].

    At most `BATCH` futures are generated together, so memory does not grow with the starts.
    """
    futures = []
    firsts = range(0, len(starts), BATCH)
    with progress(len(firsts) * actions.shape[1], "long rollouts", "frames") as bar:
        for first in firsts:
            batch = slice(first, first + BATCH)
            steps = world.generate(
                encode_contexts(world, starts[batch]),
                actions[batch],
                valid[batch],
                sampling=sampling,
                first_draw=first,
            )
            tokens = [step.tokens.cpu() for step in bar.counted(steps)]
            futures.append(torch.stack(tokens, dim=1).numpy())
    return np.concatenate(futures)


def _real_appearance(world: WorldModel, source: Footage) -> Appearance:
    drive = source.drive
    # The action that leads to a frame is stored with the frame before it.
    before = np.arange(-1, len(drive) - 1).clip(min=0)
    actions, valid = drive.actions[before], drive.action_valid[before]
    appearance = _appearance(world, drive.tokens, actions, valid)
    if source.recorded is None:
        return appearance
    return replace(appearance, recorded_sharpness=sharpness(source.stream(0, len(drive))))


def _appearance(
    world: WorldModel, tokens: NDArray[Any], actions: Floats32, valid: Mask
) -> Appearance:
    """Decode tokens [N, r, c] and measure the pictures.

    `actions` [N, 2] are the commands that lead to the frames. They show whether the car should
    move.
    """
    tokens = tokens.astype(np.int64)
    chunk_starts = range(0, len(tokens), _CHUNK)
    chunks = (world.tokenizer.decode(tokens[at : at + _CHUNK]).numpy() for at in chunk_starts)
    # If the speed is unknown, assume that the car moves.
    moving = ~valid[:, SPEED] | (actions[:, SPEED] >= STANDING_MPS)
    return Appearance.measure(tokens, chunks, moving)


def mean_stability(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the results of `judge` for one or more rollouts.

    A rollout lasts until it collapses, or if it never does, until its end. The interval of the mean
    time resamples the rollouts. `lasted` counts the rollouts that never collapse, and `froze` those
    that are frozen for `hold_s` without a break.
    """

    def mean(*path: str) -> float:
        values: Any = rollouts
        for key in path:
            values = [value[key] for value in values]
        return float(np.mean(values))

    collapses = [(rollout["collapse_s"], rollout["seconds"]) for rollout in rollouts]
    lasted = [seconds if at is None else at for at, seconds in collapses]
    return {
        "rollouts": len(rollouts),
        "seconds": mean("seconds"),
        "collapsed": sum(at is not None for at, _ in collapses),
        "lasted": sum(at is None for at, _ in collapses),
        **number_and_interval("mean_lasted_s", interval(lasted)),
        "drift_bits": mean("drift", "mean_bits"),
        "drift_floor_bits": rollouts[0]["drift"]["floor_bits"],
        "sharpness_ratio": mean("sharpness", "mean_ratio"),
        "sharpness_floor_ratio": rollouts[0]["sharpness"]["floor_ratio"],
        "sharpness_reference": rollouts[0]["sharpness"]["reference"],
        "froze": sum(rollout["freeze"]["froze"] for rollout in rollouts),
        "frozen_share": mean("freeze", "share"),
        "longest_freeze_s": max(rollout["freeze"]["longest_s"] for rollout in rollouts),
        "looped": sum(rollout["loops"]["found"] for rollout in rollouts),
        "fault_shares": {name: mean("fault_shares", name) for name in rollouts[0]["fault_shares"]},
    }


def _onward(clip: Clip, frames: int) -> tuple[Floats32, Mask]:
    """Return `frames` recorded actions from the clip's start on, and their validity, [N, 2] each.

    After the end of the drive's segment, the actions continue at the segment's beginning.
    """
    drive = clip.footage.drive
    begin, stop = next(
        segment for segment in drive.entry.segments if segment[0] <= clip.start < segment[1]
    )
    # The last action of a segment leads to no frame, so it is left out.
    last_context_frame = clip.start - 1 - begin
    offsets = np.arange(last_context_frame, last_context_frame + frames) % (stop - 1 - begin)
    chosen = begin + offsets
    return np.asarray(drive.actions[chosen]), np.asarray(drive.action_valid[chosen])


_ROWS = {
    "rollouts": "rollouts",
    "rollouts that collapsed": "collapsed",
    "rollouts that lasted to their end": "lasted",
    "mean time until the collapse or the end, s": "mean_lasted_s",
    "drift, bits": "drift_bits",
    "drift of real footage (floor), bits": "drift_floor_bits",
    "sharpness, {sharpness_is}": "sharpness_ratio",
    "sharpness of real footage after the tokenizer (floor)": "sharpness_floor_ratio",
    "rollouts that froze": "froze",
    "frozen frames, share of the frames that should move": "frozen_share",
    "rollouts with a loop": "looped",
}
"""Labels of the table's rows, with the key of each metric."""


def _plot(judged: Sequence[dict[str, Any]], sharpness_is: str) -> Media:
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    drift, sharp, change = figure.subplots(1, 3)
    for rollout in judged:
        drift.plot(rollout["drift"]["time_s"], rollout["drift"]["bits"])
        for axes, values in (
            (sharp, rollout["sharpness"]["ratio"]),
            (change, rollout["freeze"]["change"]),
        ):
            axes.plot(np.arange(len(values)) / rollout["fps"], values, linewidth=0.8)
    first = judged[0]
    drift.axhline(first["drift"]["floor_bits"], color="#999999")
    if (floor := first["sharpness"]["floor_ratio"]) is not None:
        sharp.axhline(floor, color="#999999")
    for axes, label, bounds in (
        (drift, "drift, bits", [first["drift"]["threshold_bits"]]),
        (
            sharp,
            f"sharpness, {sharpness_is}",
            first["sharpness"]["thresholds"].values(),
        ),
        (change, "change of the picture, share of white", [first["freeze"]["threshold"]]),
    ):
        axes.set(xlabel="seconds ahead", ylabel=label)
        for bound in bounds:
            axes.axhline(bound, color="#999999", linestyle=":")
    return plot(
        figure,
        "One line for each rollout. Dotted lines are bounds. Drift above its bound, sharpness "
        "outside its two bounds, and change below its bound are faults. Grey lines are the "
        "values of real footage after the tokenizer. Loops and restlessness are not shown",
    )


def _sheet(world: WorldModel, starts: Sequence[Clip], tokens: Ints) -> Media:
    chosen = np.linspace(0, tokens.shape[1] - 1, _COLUMNS).round().astype(int)
    rows = [
        (clip.name, list(world.tokenizer.decode(future[chosen]).numpy()))
        for clip, future in zip(starts, tokens, strict=True)
    ]
    headings = [f"{(t + 1) / world.fps:+.0f} s" for t in chosen]
    caption = "One row for each rollout. The headings are times after the start"
    return photo(contact_sheet(rows, headings), caption)
