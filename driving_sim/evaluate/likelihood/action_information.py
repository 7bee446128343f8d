"""What the true actions are worth to a world model, in bits.

Axes: N frames of a run without a gap, V variants of its actions, U blocks of frames.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driving_sim.data.actions.action_file import SPEED, STEERING
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
"""Variants that are judged in one pass over a run: each takes a cache."""


def evaluate_action_information(
    world: WorldModel, heldout: TokenStore, *, shuffles: int = 20, seed: int = 0
) -> Section:
    """Bits per frame that the true actions are worth over shuffled ones, and over none.

    A shuffle puts every block of a run's actions, 3 s or a window of the model, in the place of
    another one: for speed, for steering and for both. Null actions are those that the model is told
    it does not know. The frames that count have a full window behind them. The 95 % interval is the
    bootstrap over the same blocks (Künsch 1989, https://doi.org/10.1214/aos/1176347265). Runs of
    less than two blocks are left out; DriveSimError where there are no others.
    """
    world.check_store(heldout)
    block = block_frames(world.fps, world.context_frames)
    known = _known_channels(heldout.drives)
    runs = _runs(heldout, block)
    rng = np.random.default_rng(seed)
    sums: dict[tuple[str, str], list[Reals]] = defaultdict(list)
    variants = 1 + len(known) * (shuffles + 1)
    with progress(len(runs) * variants, "shuffle actions", "runs") as bar:
        for drive, begin, stop in runs:
            tokens = drive.tokens[begin:stop]
            actions, valid = _variants(drive, begin, stop, known, shuffles, block, rng)
            bits = []
            for at in range(0, variants, _AT_ONCE):
                some = slice(at, at + _AT_ONCE)
                run = streamed_token_bits(world.transformer, tokens, actions[some], valid[some])
                bits.append(np.stack([frame.means()[0] for frame in run], axis=1))
                bar.advance(len(bits[-1]))
            true, *others = np.split(np.concatenate(bits), range(1, variants, shuffles + 1))
            # Whole blocks count, of frames with a full window behind them.
            frames = np.arange(world.context_frames, (stop - begin) // block * block)
            for name, own in zip(known, others, strict=True):
                for over, chosen in (("shuffled", own[:-1]), ("null", own[-1:])):
                    gain = chosen.mean(axis=0) - true[0]
                    sums[over, name].append(mean_sums(gain[frames], frames // block))
    per_frame = world.tokenizer.rows * world.tokenizer.cols
    metrics: dict[str, Any] = {
        "per_tokenizer": True,
        "shuffles": shuffles,
        "block_frames": block,
        "blocks": sum(map(len, next(iter(sums.values())))),
    }
    rows: list[tuple[str, Cell]] = []
    for over in ("shuffled", "null"):
        found = dict.fromkeys(_CHANNELS) | {
            name: bootstrap(np.concatenate(sums[over, name]) * [per_frame, 1], mean_of_sums)
            for name in known
        }
        metrics[f"gain_over_{over}_bits_per_frame"] = found
        rows += [(f"{name}, over {over}", gain) for name, gain in found.items()]
    caption = "Gain of the true actions; in brackets the 95 % interval"
    table = Table(caption, ("actions", "bits per frame"), rows)
    return Section("action_information", "What the actions are worth", _TEXT, metrics, (table,))


def _runs(heldout: TokenStore, block: int) -> list[tuple[DriveTokens, int, int]]:
    """Drives with the ends of their runs of two blocks or more: others cannot be shuffled."""
    runs = [
        (drive, begin, stop)
        for drive in heldout.drives
        for begin, stop in drive.entry.segments
        if stop - begin >= 2 * block
    ]
    if not runs:
        raise TooLittleDataError(
            f"no run of {2 * block} frames without a gap in {len(heldout.drives)} held-out drives: "
            "nothing to shuffle; use longer drives"
        )
    return runs


def _known_channels(drives: Sequence[DriveTokens]) -> dict[str, list[int]]:
    """Those that are known somewhere: of the others the drives tell nothing."""
    somewhere = np.any([drive.action_valid.any(axis=0) for drive in drives], axis=0)
    known = {name: channels for name, channels in _CHANNELS.items() if somewhere[channels].all()}
    if not known:
        raise TooLittleDataError("no action that the model learned is known of the held-out drives")
    return known


_TEXT = """How many bits a frame costs more where the model is given the actions of another moment
of the drive (shuffled), or is told that it does not know them (null). An interval that holds zero:
the model makes nothing of that channel, or the drive's past already shows it."""


def _variants(
    drive: DriveTokens,
    begin: int,
    stop: int,
    channels: Mapping[str, list[int]],
    shuffles: int,
    block: int,
    rng: np.random.Generator,
) -> tuple[Floats32, Mask]:
    """Actions and validity [V, N, 2]: the true ones; for each channel, shuffled ones and none."""
    count = 1 + len(channels) * (shuffles + 1)
    actions = np.repeat(drive.actions[None, begin:stop], count, axis=0)
    valid = np.repeat(drive.action_valid[None, begin:stop], count, axis=0)
    number = 0
    for chosen in channels.values():
        for _ in range(shuffles):
            number += 1
            # An action that is not known stays so wherever it is moved to.
            order = _displaced_blocks(stop - begin, block, rng)
            actions[number][:, chosen] = actions[0, order][:, chosen]
            valid[number][:, chosen] = valid[0, order][:, chosen]
        number += 1
        valid[number][:, chosen] = False
    return actions, valid


def _displaced_blocks(length: int, block: int, rng: np.random.Generator) -> Ints:
    """Indices that put every whole block in another one's place; what is left over stays.

    Were blocks left in place, as a random permutation leaves one on average, the gain would be
    diluted.
    """
    blocks = length // block
    ring, order = rng.permutation(blocks), np.arange(blocks)
    order[ring] = np.roll(ring, rng.integers(1, blocks))
    moved = (order[:, None] * block + np.arange(block)).ravel()
    return np.concatenate([moved, np.arange(blocks * block, length)])
