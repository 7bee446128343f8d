"""What the true actions are worth to a world model, in bits.

Axes: N frames of a drive, V variants of its actions.
"""

from typing import Any

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.token_store import DriveTokens, TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.intervals import interval
from driving_sim.evaluate.section import Section, Table
from driving_sim.world_model.bits import streamed_bits
from driving_sim.world_model.world_model import WorldModel

_CHANNELS = {"speed": [SPEED], "steering": [STEERING], "both": [SPEED, STEERING]}


def evaluate_action_information(
    world: WorldModel, heldout: TokenStore, *, shuffles: int = 20, seed: int = 0
) -> Section:
    """Bits per frame that the true actions are worth over shuffled ones, and over none.

    A shuffle permutes a drive's windows of `context_frames` frames, for speed, for steering and for
    both; null actions are those that the model is told it does not know. The interval is the 95 %
    percentile block bootstrap over these windows (Künsch 1989, 10.1214/aos/1176347265).
    """
    world.check_store(heldout)
    rng = np.random.default_rng(seed)
    gains: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        over: {name: [] for name in _CHANNELS} for over in ("shuffled", "null")
    }
    runs = [(drive, *segment) for drive in heldout.drives for segment in drive.entry.segments]
    with progress(len(runs) * len(_CHANNELS), "shuffle actions", "runs") as bar:
        for drive, begin, stop in runs:
            for name in _CHANNELS:
                actions, valid = _variants(drive, begin, stop, name, shuffles, world, rng)
                bits = streamed_bits(world.transformer, drive, begin, actions, valid)
                for over, chosen in (("shuffled", bits[1:-1]), ("null", bits[-1:])):
                    gain = chosen.mean(axis=0) - bits[0]
                    gains[over][name].append(_per_block(gain, world.context_frames))
                bar.advance(1)
    tokens = world.tokenizer.rows * world.tokenizer.cols
    metrics: dict[str, Any] = {"per_tokenizer": True, "shuffles": shuffles}
    for over, by_channel in gains.items():
        metrics[f"gain_over_{over}_bits_per_frame"] = {
            name: _interval(np.concatenate(values) * tokens) for name, values in by_channel.items()
        }
    return Section(
        name="action_information",
        title="What the actions are worth",
        text=_TEXT,
        metrics=metrics,
        parts=(_table(metrics),),
    )


_TEXT = """How many bits a frame costs more where the model is given the actions of another moment
of the drive (shuffled), or is told that it does not know them (null). An interval that holds zero:
the model makes nothing of that channel, or the drive's past already shows it."""


def _variants(
    drive: DriveTokens,
    begin: int,
    stop: int,
    name: str,
    shuffles: int,
    world: WorldModel,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Actions and validity [1 + shuffles + 1, N, 2]: the true ones, shuffled ones, none."""
    chosen = _CHANNELS[name]
    actions = np.repeat(drive.actions[None, begin:stop], shuffles + 2, axis=0)
    valid = np.repeat(drive.action_valid[None, begin:stop], shuffles + 2, axis=0)
    for number in range(1, shuffles + 1):
        # An action that is not known stays so wherever it is moved to.
        order = _block_permutation(stop - begin, world.context_frames, rng)
        actions[number][:, chosen] = actions[0, order][:, chosen]
        valid[number][:, chosen] = valid[0, order][:, chosen]
    valid[-1][:, chosen] = False
    return actions, valid


def _block_permutation(length: int, block: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices that permute whole blocks; what is left over at the end stays."""
    blocks = length // block
    order = (rng.permutation(blocks)[:, None] * block + np.arange(block)).ravel()
    left_over = np.arange(blocks * block, length)
    return np.concatenate([order, left_over]).astype(np.int64)


def _per_block(gain: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Mean of `gain` [N] in each whole block after the first."""
    blocks = len(gain) // block
    return reduce(gain[block : blocks * block], "(b n) -> b", "mean", n=block)


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        raise DriveSimError("the held-out drives are shorter than two windows: nothing to shuffle")
    return interval(values)


def _table(metrics: dict[str, Any]) -> Table:
    rows = tuple(
        (f"{name}, over {over}", gain["mean"], f"{gain['low']:.1f} to {gain['high']:.1f}")
        for over in ("shuffled", "null")
        for name, gain in metrics[f"gain_over_{over}_bits_per_frame"].items()
    )
    return Table(
        caption="Gain of the true actions",
        columns=("actions", "bits per frame", "95 % interval"),
        rows=rows,
    )
