"""Whether the model still drives after a minute: long rollouts, judged beside real footage.

Axes: F futures, N frames of each, r c token rows and columns, H W pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from driving_sim.data.actions.action_file import SPEED
from driving_sim.data.tokens.store import DriveTokens
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.inverse_dynamics import STANDING_MPS
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.pictures.stability import (
    Appearance,
    RealBounds,
    StabilityConfig,
    judge,
    mean_stability,
)
from driving_sim.evaluate.report.section import Media, Section, Table, photo, plot
from driving_sim.evaluate.rollouts import encode_contexts
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampler import Sampling
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
    config: StabilityConfig | None = None,
) -> Section:
    """Roll out from every start for `seconds`, under its recorded actions, over and over.

    `real` are drives that bound what is usual. Raises DriveSimError where these or the rollouts
    are too short to tell.
    """
    frames = round(seconds * world.fps)
    with progress(len(real), "real footage", "drives") as bar:
        seen = []
        for drive in real:
            decoded = _decoded(world.tokenizer, drive.tokens.astype(np.int64))
            moving = _moving(drive.actions, drive.action_valid)
            # What leads to a frame is the action before it.
            moving = np.concatenate([moving[:1], moving[:-1]])
            seen.append(Appearance.measure(drive.tokens.astype(np.int64), decoded, moving))
            bar.advance(1)
    bounds = RealBounds.fit(seen, world.fps, config or StabilityConfig())
    tokens, actions, valid = _roll_out(world, starts, frames, sampling)
    judged = []
    for future, led, known in zip(tokens, actions, valid, strict=True):
        decoded = _decoded(world.tokenizer, future)
        judged.append(judge(Appearance.measure(future, decoded, _moving(led, known)), bounds))
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        **mean_stability(judged),
        "starts": {clip.name: each for clip, each in zip(starts, judged, strict=True)},
    }
    return Section(
        name="stability",
        title="Stability of long rollouts",
        text=_TEXT.format(seconds=f"{seconds:g}"),
        metrics=metrics,
        parts=(
            Table(
                caption="All rollouts",
                columns=("", "value"),
                rows=tuple((label, metrics[name]) for label, name in _ROWS.items()),
            ),
            _plot(judged),
            _sheet(world, starts, tokens),
        ),
    )


_TEXT = """Rollouts of {seconds} s under the recorded actions, repeated where they end, judged by
what real footage shows of itself once it went through the tokenizer.

Drift: the Jensen-Shannon divergence of the tokens in each block of 5 s from those of real footage;
real blocks have one too, the floor. Sharpness: the spread of the Laplacian, beside the real
median. Frozen: the picture hardly changes although the car is told to move. Loop: the same tokens
come back, as they never do in real footage. Restless: the picture changes more than real ones
do. A rollout has collapsed where one of these sets in and stays for 2 s."""


def _decoded(tokenizer: Tokenizer, tokens: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    for at in range(0, len(tokens), _CHUNK):
        yield tokenizer.decode(tokens[at : at + _CHUNK]).numpy()


def _moving(actions: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where the car is told to move, [N]; where nothing is known of its speed, it does."""
    fast: NDArray[np.bool_] = ~valid[:, SPEED] | (actions[:, SPEED] >= STANDING_MPS)
    return fast


def _roll_out(
    world: WorldModel, starts: Sequence[Clip], frames: int, sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """Return the futures' tokens [F, N, r, c] and the actions and validity [F, N, 2]."""
    onward = [_onward(clip, frames) for clip in starts]
    actions = np.stack([led for led, _ in onward])
    valid = np.stack([known for _, known in onward])
    prefix = encode_contexts(world, starts)
    found = []
    with progress(frames, "long rollouts", "frames") as bar:
        for step in world.generate(prefix, actions, valid, sampling=sampling):
            found.append(step.tokens.cpu())
            bar.advance(1)
    return torch.stack(found, dim=1).numpy(), actions, valid


def _onward(clip: Clip, frames: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The actions from a clip's start to the end of its run, then from the run's beginning on."""
    drive = clip.footage.drive
    begin, stop = next(run for run in drive.entry.segments if run[0] <= clip.start < run[1])
    # The last frame of a run leads nowhere.
    places = begin + np.arange(clip.start - 1 - begin, clip.start - 1 - begin + frames) % (
        stop - 1 - begin
    )
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


def _sheet(world: WorldModel, starts: Sequence[Clip], tokens: NDArray[np.int64]) -> Media:
    chosen = np.linspace(0, tokens.shape[1] - 1, _COLUMNS).round().astype(int)
    rows = [
        (clip.name, list(world.tokenizer.decode(future[chosen]).numpy()))
        for clip, future in zip(starts, tokens, strict=True)
    ]
    headings = [f"{(t + 1) / world.fps:+.0f} s" for t in chosen]
    return photo(contact_sheet(rows, headings), "The rollouts over time")
