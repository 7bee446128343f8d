"""Roll out a grid of commands from the same start: every steering level at every speed.

The context of a start is run through the model once, and all rollouts share its cache.

Axes: L steering levels, V speeds, N frames of the future, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Floats32, Pixels
from driving_sim.data.synthetic.true_future import replay
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.fidelity import read
from driving_sim.evaluate.actions.following import monotonicity
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.intervals import estimate_of, interval, number_and_interval
from driving_sim.evaluate.report.section import Media, Section, Table, photo
from driving_sim.evaluate.rollouts import encode_contexts
from driving_sim.tokenizer.metrics import psnr
from driving_sim.tokenizer.tokenizer import frames_from_images, images_from_frames
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_LEVELS = 7
_OTHER_SEED = 2**31  # no drive has this seed
_SPEEDS = (0.6, 1.0, 1.4)  # multiples of the speed at the start


def evaluate_sweep(
    world: WorldModel, probe: InverseDynamics, starts: Sequence[Clip], sampling: Sampling
) -> Section:
    """Roll out commands from full left to full right at three speeds, and test their effect.

    Higher commands should give higher realised values. Full steering is the training data's 99th
    percentile of |steering|. For a start in a synthetic drive, the true future of every command is
    rendered as well and compared with the rollout.
    """
    results: list[dict[str, Any]] = []
    pictures: list[Media] = []
    with progress(len(starts), "sweep of commands", "starts") as bar:
        for clip in bar.counted(starts):
            commands = _commands(world, clip)
            futures = _roll_out(world, clip, commands, sampling)
            result: dict[str, Any] = {"model": _monotonicity(probe, clip, commands, futures)}
            truths = _truths(clip, commands)
            if truths is not None:
                result["truth"] = _monotonicity(probe, clip, commands, truths)
                result["nearest"] = _nearest(futures, truths, clip)
                guesses = _truths(clip, commands, redrawn=True)
                assert guesses is not None
                result["nearest_by_sight"] = _nearest(guesses, truths, clip)
                result["nearest_by_chance"] = 1 / (commands.shape[0] * commands.shape[1])
            results.append(result)
            if not pictures:
                pictures.append(_picture(clip, commands, futures, "the model's"))
                if truths is not None:
                    pictures.append(_picture(clip, commands, truths, "the true"))
    truths_known = sum("truth" in result for result in results)
    metrics = {"starts": len(results), "starts_with_truth": truths_known, **_mean(results)}
    if truths_known:
        shares = [result["nearest"] for result in results if "nearest" in result]
        metrics |= number_and_interval("nearest", interval(shares))
    parts: list[Table | Media] = [*_tables(metrics), *pictures]
    return Section("sweep", "Counterfactual sweep", _TEXT, metrics, parts)


_TEXT = """Question: from the same start, do different commands lead to different futures, and in
the right order? From each start the model is steered from full left to full right, at three speeds:
slower than at the start, equally fast, and faster. The inverse-dynamics probe reads the mean speed
and steering from each rollout.

How to read it. A higher command should give a higher realised value. The rank correlation is
Spearman's. 1 is best, 0 means no relation, and below 0 the reaction is reversed. "In order" is the
share of pairs of neighbouring commands for which the higher command gives the higher value. 1 is
best, and 0.5 is chance.

In the synthetic world the true future of every command can be rendered. The rows "truth" show what
the probe reads from these true futures, so a perfect model would reach these values. A rollout is
nearest to its own truth if its last second has a higher PSNR with the true future of its own
command than with the true future of any other command. No model can know what its camera has not
seen. So the row "by sight" is the score of the simulator itself if the sky, the meadow and the
things that are not in view at the start are drawn anew, at random.

Limits. This section tests the order of the reactions, not their strength. The interval of the
share of nearest rollouts resamples the starts, so it needs many of them. The rank correlations have
no intervals."""


def _commands(world: WorldModel, clip: Clip) -> Floats32:
    """Return the grid of commands [V, L, N, 2]. A command is constant over its future.

    The speed at the start of the clip must be known.
    """
    actions, _ = clip.actions
    speed = float(actions[clip.context_frames - 2, SPEED])
    steering = np.linspace(world.statistics.steering_p99, -world.statistics.steering_p99, _LEVELS)
    grid = np.zeros((len(_SPEEDS), _LEVELS, clip.frames, 2), np.float32)
    grid[..., SPEED] = (speed * np.array(_SPEEDS))[:, None, None]
    grid[..., STEERING] = steering[None, :, None]
    return grid


def _roll_out(world: WorldModel, clip: Clip, commands: Floats32, sampling: Sampling) -> Pixels:
    """Roll out `commands` [V, L, N, 2], and return the frames [V, L, N, H, W, 3]."""
    prefix = encode_contexts(world, [clip])
    branches = rearrange(commands, "v l n a -> (v l) n a")
    known = np.broadcast_to(world.known_channels, branches.shape)
    steps = world.generate(prefix, branches, known, sampling=sampling)
    tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
    frames = [world.tokenizer.decode(branch).numpy() for branch in tokens]
    return rearrange(np.stack(frames), "(v l) n h w c -> v l n h w c", v=len(commands))


def _truths(clip: Clip, commands: Floats32, *, redrawn: bool = False) -> Pixels | None:
    """Render the true futures [V, L, N, H, W, 3] of the commands.

    If `redrawn` is set, all that the camera does not see at the start is drawn anew, at random.
    Returns None if the clip is mirrored, if it is not from the video of a synthetic drive, or if
    the number of simulation steps between its frames varies.
    """
    footage = clip.footage
    synthetic = footage.synthetic
    if synthetic is None or footage.recorded is None or clip.mirrored:
        return None
    strides = np.unique(np.diff(footage.recorded.indices))
    if len(strides) != 1:
        return None  # the number of simulation steps between frames varies
    stride = int(strides[0])
    last = footage.drive.entry.start + clip.start - 1
    state = synthetic.states[footage.recorded.indices[last]]
    world = synthetic.world.seen_from(state, _OTHER_SEED) if redrawn else synthetic.world
    size = footage.tokenizer.frame_size
    truths = []
    for actions in rearrange(commands, "v l n a -> (v l) n a"):
        frames = replay(world, state, actions, steps=stride)
        images = images_from_frames(torch.from_numpy(frames), size)
        truths.append(frames_from_images(images).numpy())
    return rearrange(np.stack(truths), "(v l) n h w c -> v l n h w c", v=len(commands))


def _monotonicity(
    probe: InverseDynamics, clip: Clip, commands: Floats32, futures: Pixels
) -> dict[str, Any]:
    """Measure whether higher commands give higher realised values in `futures`.

    Returns the mean `monotonicity` of each channel.
    """
    context = clip.context
    realised = np.array(
        [[read(probe, context, future).mean(axis=0) for future in row] for row in futures]
    )
    commanded = commands[:, :, 0]
    # Steering is judged separately at each speed, and speed at each steering level.
    levels = {
        "steering": zip(commanded[..., STEERING], realised[..., STEERING], strict=True),
        "speed": zip(commanded[..., SPEED].T, realised[..., SPEED].T, strict=True),
    }
    return {name: _mean([monotonicity(*pair) for pair in pairs]) for name, pairs in levels.items()}


def _nearest(futures: Pixels, truths: Pixels, clip: Clip) -> float:
    """Return the share of rollouts that are nearest to the true future of their own command.

    The nearest future is the one with the highest PSNR over the last second.
    """
    last = min(clip.frames, max(1, round(clip.footage.drive.info.fps)))
    rollouts, true_videos = (
        torch.from_numpy(rearrange(videos[:, :, -last:], "v l n h w c -> (v l) n h w c"))
        for videos in (futures, truths)
    )
    psnr_db = torch.tensor(
        [[float(psnr(rollout, truth).mean()) for truth in true_videos] for rollout in rollouts]
    )
    return float((psnr_db.argmax(1) == torch.arange(len(rollouts))).double().mean())


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, ignoring None. Return None if all values are None.

    For dicts, return a dict with the mean of each key.
    """
    known = [value for value in values if value is not None]
    if known and isinstance(known[0], dict):
        names = dict.fromkeys(name for mapping in known for name in mapping)
        return {name: _mean([mapping.get(name) for mapping in known]) for name in names}
    return float(np.mean(known)) if known else None


def _tables(metrics: dict[str, Any]) -> list[Table]:
    rows = [
        (f"{channel}, {source}", order["rank_correlation"], order["in_order"])
        for source in ("model", "truth")
        for channel, order in metrics.get(source, {}).items()
    ]
    caption = "Do higher commands give higher realised values? Means over the starts; 1 is best"
    tables = [Table(caption, ("", "rank correlation", "in order"), rows)]
    if "nearest" in metrics:
        caption = "Share of the rollouts that are nearest to their own truth; 1 is best"
        shares: list[tuple[str, Cell]] = [
            ("model", estimate_of(metrics, "nearest")),
            ("by sight", metrics["nearest_by_sight"]),
            ("by chance", metrics["nearest_by_chance"]),
        ]
        tables.append(Table(caption, ("", "share"), shares))
    return tables


def _picture(clip: Clip, commands: Floats32, futures: Pixels, whose: str) -> Media:
    rows = [
        (f"{actions[0, 0, SPEED]:.1f} m/s", [future[-1] for future in row])
        for actions, row in zip(commands, futures, strict=True)
    ]
    headings = [f"steering {actions[0, STEERING]:+.2f}" for actions in commands[0]]
    seconds = clip.frames / clip.footage.drive.info.fps
    caption = (
        f"Start: {clip.name}. Each cell is {whose} picture after {seconds:.1f} s of one command. "
        "Columns: steering from left (positive) to right. Rows: speed"
    )
    return photo(contact_sheet(rows, headings), caption)
