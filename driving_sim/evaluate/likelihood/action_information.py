"""Measure in bits how much the true actions help a world model to predict a drive.

A run is a stretch of a drive without a time gap.

Axes: N frames of a run, V variants of its actions.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats32, Ints, Mask, Reals
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.engine.errors import TooLittleDataError
from driving_sim.engine.progress import progress
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.intervals import block_frames, bootstrap, mean_of_sums, mean_sums
from driving_sim.evaluate.report.section import Section, Table
from driving_sim.world_model.training.bits import streamed_token_bits
from driving_sim.world_model.world_model import WorldModel

_CHANNELS = {"speed": [SPEED], "steering": [STEERING], "both": [SPEED, STEERING]}
_AT_ONCE = 24
"""Maximum number of variants of a run's actions that are measured in one batch.

Each variant needs its own cache in memory.
"""


def evaluate_action_information(
    world: WorldModel, heldout: TokenStore, *, shuffles: int = 20, seed: int = 0
) -> Section:
    """Measure how many bits per frame the true actions save, compared with wrong actions.

    There are two kinds of wrong actions: null and shuffled. Null actions are marked as unknown.
    Shuffled actions are cut into blocks, and every block moves to the place of another block. A
    block lasts 3 s, or as long as the model's window if that is longer. Both kinds are made for
    speed alone, for steering alone, and for both together.

    Only frames with a full window of past frames count. The 95 % interval comes from a bootstrap
    over the same blocks (Künsch 1989, https://doi.org/10.1214/aos/1176347265). Blocks never cross a
    time gap, and a stretch without gaps is left out if it is shorter than two blocks. Raises
    TooLittleDataError if no stretch is long enough, or if no action is known.
    """
    world.check_store(heldout)
    block = block_frames(world.fps, world.context_frames)
    known = _known_channels(heldout.drives)
    runs = _runs(heldout, block)
    rng = np.random.default_rng(seed)
    sums: dict[tuple[str, str], list[Reals]] = defaultdict(list)
    variants = 1 + len(known) * (shuffles + 1)
    with progress(len(runs) * variants, "shuffle actions", "variants") as bar:
        for drive, begin, stop in runs:
            tokens = drive.tokens[begin:stop]
            actions, valid = _variants(drive, begin, stop, known, shuffles, block, rng)
            bits = []
            for first in range(0, variants, _AT_ONCE):
                batch = slice(first, first + _AT_ONCE)
                run = streamed_token_bits(world.transformer, tokens, actions[batch], valid[batch])
                bits.append(np.stack([frame.means()[0] for frame in run], axis=1))
                bar.advance(len(bits[-1]))
            true, *by_channel = np.split(np.concatenate(bits), range(1, variants, shuffles + 1))
            # Count only frames in whole blocks. The actions after the last whole block were not
            # shuffled.
            frames = np.arange(world.context_frames, (stop - begin) // block * block)
            for name, changed in zip(known, by_channel, strict=True):
                for over, worse in (("shuffled", changed[:-1]), ("null", changed[-1:])):
                    gain = worse.mean(axis=0) - true[0]
                    sums[over, name].append(mean_sums(gain[frames], frames // block))
    per_frame = world.tokenizer.rows * world.tokenizer.cols
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        "shuffles": shuffles,
        "block_frames": block,
        "blocks": sum(map(len, next(iter(sums.values())))),
    }
    rows: list[tuple[str, str, Cell]] = []
    for over in ("shuffled", "null"):
        gains = dict.fromkeys(_CHANNELS) | {
            name: bootstrap(np.concatenate(sums[over, name]) * [per_frame, 1], mean_of_sums)
            for name in known
        }
        metrics[f"gain_over_{over}_bits_per_frame"] = gains
        rows += [(name, over, gain) for name, gain in gains.items()]
    caption = "Gain of the true actions, with 95 % intervals; more is better"
    table = Table(caption, ("channel", "compared with", "gain, bits per frame"), rows)
    return Section("action_information", "What the actions are worth", _TEXT, metrics, (table,))


def _runs(heldout: TokenStore, block: int) -> list[tuple[DriveTokens, int, int]]:
    """Return the runs of at least two blocks, as (drive, first frame, end).

    In a shorter run there are no two blocks to swap.
    """
    runs = [
        (drive, begin, stop)
        for drive in heldout.drives
        for begin, stop in drive.entry.segments
        if stop - begin >= 2 * block
    ]
    if not runs:
        raise TooLittleDataError(
            f"no stretch of {2 * block} frames without a gap in {len(heldout.drives)} held-out "
            "drives, so there is nothing to shuffle; use longer drives"
        )
    return runs


def _known_channels(drives: Sequence[DriveTokens]) -> dict[str, list[int]]:
    """Return the entries of `_CHANNELS` whose channels are all known somewhere in the drives."""
    somewhere = np.any([drive.action_valid.any(axis=0) for drive in drives], axis=0)
    known = {name: channels for name, channels in _CHANNELS.items() if somewhere[channels].all()}
    if not known:
        raise TooLittleDataError(
            "the held-out drives have no known action of a kind that the model learned"
        )
    return known


_TEXT = """Does the model use the actions to predict the next frame? The model predicts the
held-out drives again with wrong actions. "Shuffled" means actions from another moment of the same
drive. "Null" means that the model is told that the actions are unknown. The gain is how many more
bits a frame costs with the wrong actions than with the true ones.

A larger gain means that the model gets more information from that channel. A gain below zero means
that the true actions mislead the model on these drives. If the interval contains zero, no benefit
was detected. The model may ignore the channel, the past frames may already tell as much, or there
may be too few drives. The gain does not show whether a rollout obeys a command; the sections on
action fidelity and the sweep do."""


def _variants(
    drive: DriveTokens,
    begin: int,
    stop: int,
    channels: Mapping[str, list[int]],
    shuffles: int,
    block: int,
    rng: np.random.Generator,
) -> tuple[Floats32, Mask]:
    """Return variants of a run's actions and validity, [V, N, 2] each.

    The first variant has the true actions. Then each entry of `channels` adds `shuffles` variants
    in which its channels are shuffled, and one in which they are unknown.
    """
    count = 1 + len(channels) * (shuffles + 1)
    actions = np.repeat(drive.actions[None, begin:stop], count, axis=0)
    valid = np.repeat(drive.action_valid[None, begin:stop], count, axis=0)
    number = 0
    for columns in channels.values():
        for _ in range(shuffles):
            number += 1
            # Move the validity together with the action, so an unknown action stays unknown.
            order = _displaced_blocks(stop - begin, block, rng)
            actions[number][:, columns] = actions[0, order][:, columns]
            valid[number][:, columns] = valid[0, order][:, columns]
        number += 1
        valid[number][:, columns] = False
    return actions, valid


def _displaced_blocks(length: int, block: int, rng: np.random.Generator) -> Ints:
    """Return indices that move every whole block to the place of another block.

    Frames after the last whole block keep their places. A plain random permutation would leave one
    block in place on average, and the measured gain would be too small.
    """
    blocks = length // block
    ring, order = rng.permutation(blocks), np.arange(blocks)
    order[ring] = np.roll(ring, rng.integers(1, blocks))
    moved = (order[:, None] * block + np.arange(block)).ravel()
    return np.concatenate([moved, np.arange(blocks * block, length)])
