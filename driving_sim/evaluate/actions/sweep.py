"""One start, many commands: a grid of steering and speeds, all branched from one cached prefix.

Axes: L steering levels, V speeds, N frames of the future, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from driving_sim.data.actions.action_file import SPEED, STEERING
from driving_sim.data.arrays import Floats32, Pixels
from driving_sim.data.synthetic.true_future import replay
from driving_sim.engine.progress import progress
from driving_sim.evaluate.actions.fidelity import read
from driving_sim.evaluate.actions.following import monotonicity
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics
from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.report.section import Media, Section, Table, photo
from driving_sim.evaluate.rollouts import encode_contexts
from driving_sim.tokenizer.metrics import psnr
from driving_sim.tokenizer.tokenizer import frames_from_images, images_from_frames
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_LEVELS = 7
_SPEEDS = (0.6, 1.0, 1.4)  # of the speed at the start


def evaluate_sweep(
    world: WorldModel, probe: InverseDynamics, starts: Sequence[Clip], sampling: Sampling
) -> Section:
    """Steer from full left to full right at three speeds from each start, and read what happens.

    Steering goes to the training data's 99th percentile both ways. Where the world behind a
    start is synthetic, the true future of every command is rendered and compared.
    """
    found: list[dict[str, Any]] = []
    pictures: list[Media] = []
    with progress(len(starts), "sweep of commands", "starts") as bar:
        for clip in bar.counted(starts):
            commands = _commands(world, clip)
            futures = _roll_out(world, clip, commands, sampling)
            measured: dict[str, Any] = {"model": _monotonicity(probe, clip, commands, futures)}
            truths = _truths(clip, commands)
            if truths is not None:
                measured["truth"] = _monotonicity(probe, clip, commands, truths)
                measured["nearest"] = _nearest(futures, truths, clip)
                measured["nearest_by_chance"] = 1 / (commands.shape[0] * commands.shape[1])
            found.append(measured)
            if not pictures:
                pictures.append(_picture(clip, commands, futures, "the model's"))
                if truths is not None:
                    pictures.append(_picture(clip, commands, truths, "the true"))
    truths_known = sum("truth" in each for each in found)
    metrics = {"starts": len(found), "starts_with_truth": truths_known, **_mean(found)}
    return Section("sweep", "Counterfactual sweep", _TEXT, metrics, (_table(metrics), *pictures))


_TEXT = """From each start the model is steered from full left to full right, at speeds below, at
and above the one it starts with. More commanded must be more realised: the rank correlation is
Spearman's, "in order" the share of neighbouring commands of which the higher realised more.

On the synthetic world the true future of every command is rendered: a rollout is right where, over
its last second, it is nearer (PSNR) to the truth of its own command than to that of any other."""


def _commands(world: WorldModel, clip: Clip) -> Floats32:
    """Actions [V, L, N, 2], constant over each future; the speed at the start is known."""
    actions, _ = clip.actions
    speed = float(actions[clip.context_frames - 2, SPEED])
    steering = np.linspace(world.statistics.steering_p99, -world.statistics.steering_p99, _LEVELS)
    grid = np.zeros((len(_SPEEDS), _LEVELS, clip.frames, 2), np.float32)
    grid[..., SPEED] = (speed * np.array(_SPEEDS))[:, None, None]
    grid[..., STEERING] = steering[None, :, None]
    return grid


def _roll_out(world: WorldModel, clip: Clip, commands: Floats32, sampling: Sampling) -> Pixels:
    """Return the futures' frames [V, L, N, H, W, 3]."""
    prefix = encode_contexts(world, [clip])
    branches = rearrange(commands, "v l n a -> (v l) n a")
    known = np.broadcast_to(world.known_channels, branches.shape)
    steps = world.generate(prefix, branches, known, sampling=sampling)
    tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
    frames = [world.tokenizer.decode(branch).numpy() for branch in tokens]
    return rearrange(np.stack(frames), "(v l) n h w c -> v l n h w c", v=len(commands))


def _truths(clip: Clip, commands: Floats32) -> Pixels | None:
    """The true futures [V, L, N, H, W, 3] where the world can be asked."""
    footage = clip.footage
    synthetic = footage.synthetic
    if synthetic is None or footage.recorded is None or clip.mirrored:
        return None
    strides = np.unique(np.diff(footage.recorded.indices))
    if len(strides) != 1:
        return None  # no whole number of the world's steps from one frame to the next
    stride = int(strides[0])
    last = footage.drive.entry.start + clip.start - 1
    state = synthetic.states[footage.recorded.indices[last]]
    size = footage.tokenizer.frame_size
    truths = []
    for actions in rearrange(commands, "v l n a -> (v l) n a"):
        frames = replay(synthetic.world, state, actions, steps=stride)
        images = images_from_frames(torch.from_numpy(frames), size)
        truths.append(frames_from_images(images).numpy())
    return rearrange(np.stack(truths), "(v l) n h w c -> v l n h w c", v=len(commands))


def _monotonicity(
    probe: InverseDynamics, clip: Clip, commands: Floats32, futures: Pixels
) -> dict[str, Any]:
    """How much more of what is commanded is realised, by channel."""
    context = clip.context
    realised = np.array(
        [[read(probe, context, future).mean(axis=0) for future in row] for row in futures]
    )
    told = commands[:, :, 0]
    # Steering is judged at each speed, speed at each steering.
    levels = {
        "steering": zip(told[..., STEERING], realised[..., STEERING], strict=True),
        "speed": zip(told[..., SPEED].T, realised[..., SPEED].T, strict=True),
    }
    return {name: _mean([monotonicity(*pair) for pair in pairs]) for name, pairs in levels.items()}


def _nearest(futures: Pixels, truths: Pixels, clip: Clip) -> float:
    """Share of the rollouts that are nearest, over the last second, to their own truth."""
    last = min(clip.frames, max(1, round(clip.footage.drive.info.fps)))
    ours, true = (
        torch.from_numpy(rearrange(each[:, :, -last:], "v l n h w c -> (v l) n h w c"))
        for each in (futures, truths)
    )
    apart = torch.tensor([[float(psnr(one, other).mean()) for other in true] for one in ours])
    return float((apart.argmax(1) == torch.arange(len(ours))).float().mean())


def _mean(values: Sequence[Any]) -> Any:
    """The mean of numbers that are known, or of each that mappings hold; None where none is."""
    known = [value for value in values if value is not None]
    if known and isinstance(known[0], dict):
        names = dict.fromkeys(name for each in known for name in each)
        return {name: _mean([each.get(name) for each in known]) for name in names}
    return float(np.mean(known)) if known else None


def _table(metrics: dict[str, Any]) -> Table:
    rows = [
        (f"{channel}, {source}", found["rank_correlation"], found["in_order"])
        for source in ("model", "truth")
        for channel, found in metrics.get(source, {}).items()
    ]
    if "nearest" in metrics:
        by_chance = f"(by chance: {metrics['nearest_by_chance']:.3f})"
        rows.append((f"rollouts nearest to their own truth {by_chance}", metrics["nearest"], None))
    return Table("Mean over the starts", ("", "rank correlation", "in order"), rows)


def _picture(clip: Clip, commands: Floats32, futures: Pixels, whose: str) -> Media:
    rows = [
        (f"{told[0, 0, SPEED]:.1f} m/s", [future[-1] for future in row])
        for told, row in zip(commands, futures, strict=True)
    ]
    headings = [f"steering {told[0, STEERING]:+.2f}" for told in commands[0]]
    seconds = clip.frames / clip.footage.drive.info.fps
    caption = f"From {clip.name}: {whose} picture after {seconds:.1f} s of each command"
    return photo(contact_sheet(rows, headings), caption)
