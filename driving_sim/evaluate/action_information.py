"""What the true actions are worth to a world model, in bits.

Axes: N frames of a drive, V variants of its actions.
"""

from typing import Any

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.token_store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress
from driving_sim.world_model.bits import streamed_bits
from driving_sim.world_model.world_model import WorldModel

_RESAMPLES = 2000


def evaluate_action_information(
    world: WorldModel, heldout: TokenStore, *, shuffles: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Bits per frame that the true actions are worth over actions shuffled between windows.

    A shuffle permutes a drive's windows of `context_frames` frames, for speed, for steering and for
    both. The interval is the 95 % percentile block bootstrap over these windows (Künsch 1989,
    https://doi.org/10.1214/aos/1176347265).
    """
    world.check_store(heldout)
    rng = np.random.default_rng(seed)
    channels = {"speed": [SPEED], "steering": [STEERING], "both": [SPEED, STEERING]}
    gains: dict[str, list[NDArray[np.float64]]] = {name: [] for name in channels}
    runs = [(drive, *segment) for drive in heldout.drives for segment in drive.entry.segments]
    with progress(len(runs) * len(channels), "shuffle actions", "runs") as bar:
        for drive, begin, stop in runs:
            for name, chosen in channels.items():
                # An action that is not known stays so wherever it is moved to.
                actions = np.repeat(drive.actions[None, begin:stop], shuffles + 1, axis=0)
                valid = np.repeat(drive.action_valid[None, begin:stop], shuffles + 1, axis=0)
                for number in range(1, shuffles + 1):
                    order = _block_permutation(stop - begin, world.context_frames, rng)
                    actions[number][:, chosen] = actions[0, order][:, chosen]
                    valid[number][:, chosen] = valid[0, order][:, chosen]
                bits = streamed_bits(world.transformer, drive, begin, actions, valid)
                gains[name].append(_gain_per_block(bits, world.context_frames))
                bar.advance(1)
    tokens = world.tokenizer.rows * world.tokenizer.cols
    return {
        "shuffles": shuffles,
        "gain_bits_per_frame": {
            name: _bootstrap(np.concatenate(values) * tokens, rng) for name, values in gains.items()
        },
        "fingerprint": world.fingerprint,
    }


def _block_permutation(length: int, block: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices that permute whole blocks; what is left over at the end stays."""
    blocks = length // block
    order = (rng.permutation(blocks)[:, None] * block + np.arange(block)).ravel()
    left_over = np.arange(blocks * block, length)
    return np.concatenate([order, left_over]).astype(np.int64)


def _gain_per_block(bits: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Mean gain of variant 0 of `bits` [V, N] over the others, per whole block after the first."""
    gain = bits[1:].mean(axis=0) - bits[0]
    blocks = len(gain) // block
    whole = gain[block : blocks * block]
    return reduce(whole, "(b n) -> b", "mean", n=block)


def _bootstrap(values: NDArray[np.float64], rng: np.random.Generator) -> dict[str, float]:
    if not len(values):
        raise DriveSimError("the held-out drives are shorter than two windows: nothing to shuffle")
    means = values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
