"""`python -m benchmarks.rollouts.video`: the speed of rollouts that are written as a video.

Times two kinds of work in turns. The first is everything that `drivesim rollout` does after it has
loaded its models: it samples and decodes frames, draws them beside the recording, and writes an
H.264 video, tokens, settings and a contact sheet. The second only samples the tokens of as many
frames. The difference of the two times is the time of decoding, drawing and writing. It is small,
so there are three times as many rounds as in other benchmarks.

The time to write a picture depends on its content, and random weights decode to noise. So the
tokenizer and the world model are first trained for about three minutes, until they show blurred
roads.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.measuring.machine import limits, precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Figure,
    Settings,
    alternate,
    run_command,
)
from benchmarks.measuring.shapes import FPS, Shape, shape_of
from benchmarks.rollouts.speed import pass_flops
from driving_sim.data.synthetic.drives import SyntheticDrive, drive
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.data.synthetic.writer import seeds, write_synthetic_drives
from driving_sim.engine.config import to_dict
from driving_sim.engine.precision import name_of
from driving_sim.engine.threads import usable_cores
from driving_sim.pipeline import TrainingRequest, tokenize_videos, train_world_model_on
from driving_sim.tokenizer.autoencoder import AutoencoderConfig
from driving_sim.world_model.action_plan import ActionPlan
from driving_sim.world_model.rollout import Context, write_rollout
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import TransformerConfig
from driving_sim.world_model.world_model import WorldModel


def context_of(world: WorldModel, recorded: SyntheticDrive) -> Context:
    """Return the context of a rollout that continues the beginning of a recorded drive.

    The beginning is one frame longer than the model's window. The context also contains the drive's
    later frames, which are drawn beside the rollout.
    """
    past = world.context_frames + 1
    frames = recorded.frames
    actions = recorded.actions[: len(frames) - 1]
    return Context(
        label="synthetic",
        tokens=world.tokenizer.encode(frames[:past]),
        frames=frames[:past],
        actions=actions,
        action_valid=np.ones(actions.shape, np.bool_),
        future=iter(frames[past:]),
        start_s=0.0,
    )


def _trained(shape: Shape, size: SyntheticConfig, folder: Path, settings: Settings) -> WorldModel:
    """Train a tokenizer and a world model on 48 s of driving through one synthetic world."""
    write_synthetic_drives(
        folder / "videos", drives=4, seconds=12.0, worlds=1, config=size, workers=usable_cores()
    )

    def request(config: AutoencoderConfig | TransformerConfig, steps: int) -> TrainingRequest:
        shaped = (f"model.{name}={value}" for name, value in to_dict(config).items())
        return TrainingRequest(
            preset="tiny",
            steps=2 if settings.toy else steps,
            assignments=("training.warmup_steps=10", "training.workers=0", *shaped),
            device=str(settings.device),
        )

    videos, tokenizer, tokens = [folder / "videos"], folder / "tokenizer", folder / "tokens"
    tokenize_videos(videos, tokenizer, tokens, every=1, training=request(shape.frames, 150))
    train_world_model_on(tokens, tokenizer, folder / "world-model", request(shape.model, 80))
    return WorldModel.from_run(folder / "world-model", str(settings.device))


def measure(settings: Settings) -> list[Claim]:
    """Return the frames per second, and the share of time for decoding, drawing and writing."""
    settings = replace(settings, rounds=3 * settings.rounds)
    shape = shape_of("tiny", settings)
    size = SyntheticConfig(height=shape.frames.height, width=shape.frames.width, fps=FPS)
    with tempfile.TemporaryDirectory() as folder:
        world = _trained(shape, size, Path(folder), settings)
    past, length = shape.model.context_frames + 1, 3 if settings.toy else 70
    recorded = drive(
        SyntheticWorld(seeds(0, 0)[0], size), (past + length) / world.fps, driver_seed=1
    )
    plan = ActionPlan(
        label="left",
        actions=np.full((length, 2), (8.0, 0.1), np.float32),
        valid=np.ones((length, 2), np.bool_),
    )

    def tokens_only(context: Context) -> None:
        known = context.actions[: past - 1], context.action_valid[: past - 1]
        prefix = world.encode_prefix(context.tokens, *known)
        for _ in world.generate(prefix, plan.actions, plan.valid):
            pass

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rollout.mp4"
        # Make a context for each rollout, because a rollout uses up the recorded frames in its
        # context.
        contexts = iter([context_of(world, recorded) for _ in range(settings.rounds + 1)])
        reused = context_of(world, recorded)
        times = alternate(
            {
                "video": lambda: write_rollout(
                    world, next(contexts), [plan], out, sampling=Sampling()
                ),
                "tokens": lambda: tokens_only(reused),
            },
            settings,
        )
    shares = [1 - b / a for a, b in zip(times["video"], times["tokens"], strict=True)]
    return [
        Claim(
            what="rollout as video, tiny-sized",
            figure=Figure.of([length / taken for taken in times["video"]]),
            bar=7,
            unit="frames/s",
            # Count only the operations of sampling, not those of decoding.
            limits=limits(settings, precision(settings)).share(
                float(np.median(times["video"])), flops=pass_flops(world) * length
            ),
            details=(f"{shape}, {name_of(world.dtype)}",),
        ),
        Claim(
            what="share of decoding, drawing and writing in it",
            figure=Figure.of(shares),
            unit="%",
        ),
    ]


BENCHMARKS: dict[str, Benchmark] = {"tiny": measure}


if __name__ == "__main__":
    run_command(__doc__, "rollouts.video", BENCHMARKS, sys.argv[1:])
