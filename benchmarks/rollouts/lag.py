"""`python -m benchmarks.rollouts.lag train|plot`: how the order of tokens affects the results.

    python -m benchmarks.rollouts.lag train TOKENS --tokenizer RUN --video VIDEO [--lags ...]
        [--seeds ...]
    python -m benchmarks.rollouts.lag plot

A world model samples a frame in waves. A wave is a group of tokens that are sampled together, at
most one in each row. The lag is the number of waves by which each row is behind the row above it.

`train` trains the preset `tiny` for each seed and each lag, always for the same number of steps. It
then steers each model left and right from ten starts in VIDEO, which must be a validation drive.
After an interruption, the same command continues. Two processes may share the work: give them
different lags or seeds.

`plot` measures the speed of all lags in one process, in turns, then draws and prints all results.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.measuring.paired import Settings, alternate
from benchmarks.rollouts.speed import endless
from benchmarks.training.scaling_runs import as_command
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.config import save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.run_folder import CONFIG, is_finished
from driving_sim.engine.training.run_log import METRICS
from driving_sim.evaluate.actions.control import measure_control
from driving_sim.pipeline import find_frames
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.presets import TINY
from driving_sim.world_model.training.train import train_world_model
from driving_sim.world_model.world_model import WorldModel

LAGS = ("raster", "3", "2", "1", "0")
_CONTROL = "control.json"
_FRAMES = 4


def run_of(out: Path, lag: str, seed: int) -> Path:
    """Return the folder of the run with this lag and seed."""
    return out / f"lag-{lag}-seed-{seed}"


def train_one(options: argparse.Namespace, lag: str, seed: int, cols: int) -> None:
    """Train one model and measure how well it can be steered, unless that is done already."""
    run = run_of(options.out, lag, seed)
    waves = cols + 1 if lag == "raster" else int(lag)
    config = replace(
        TINY,
        model=replace(TINY.model, lag=waves),
        data=replace(TINY.data, preview=False),
        training=replace(
            TINY.training, steps=options.steps, minutes=None, patience=None, seed=seed,
            threads=options.threads, validate_every=max(1, options.steps // 2),
        ),
    )  # fmt: skip
    if not is_finished(run):
        resume = (run / CONFIG).exists()
        train_world_model(
            options.tokens, config, run, tokenizer=options.tokenizer, resume=resume, device="cpu"
        )
    if not (run / _CONTROL).exists():
        drives = find_frames([options.video], skip_bad=False).drives
        world = WorldModel.from_run(run, device="cpu")
        control = measure_control(
            world, drives, starts=options.starts, sampling=Sampling(seed=seed)
        )
        save_json(run / _CONTROL, control)


def train(options: argparse.Namespace) -> None:
    """Train the models of all lags, seed after seed, and measure how well they can be steered."""
    cols = TokenStore(options.tokens).info.cols
    for seed in options.seeds:
        for lag in options.lags:
            train_one(options, lag, seed, cols)


def figures(run: Path) -> dict[str, float]:
    """Return the results of one run: bits per token, action gain, and the effect of steering.

    The action gain is the number of extra bits per token if a window gets another window's actions.
    """
    rows = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    best = min((row for row in rows if row["phase"] == "validation"), key=lambda row: row["score"])
    steered = json.loads((run / _CONTROL).read_text("utf-8"))
    return {
        "bits": best["full_window/bits_per_token"],
        "gain": best["action_gain"],
        "turned": steered["mean_left_minus_right"],
        "obeyed": steered["obeyed"] / steered["starts"],
    }


def frame_rates(runs: dict[str, Path], rounds: int) -> dict[str, float]:
    """Return the frames/s at which the model of each lag samples tokens, timed in turns."""

    def several(frames: Any) -> None:
        for _ in range(_FRAMES):
            next(frames)

    acts: dict[str, Callable[[], None]] = {}
    for lag, run in runs.items():
        world = WorldModel.from_run(run, device="cpu")
        acts[lag] = partial(several, endless(world, context=world.context_frames))
    times = alternate(acts, Settings(device=torch.device("cpu"), rounds=rounds))
    return {lag: _FRAMES / float(np.median(taken)) for lag, taken in times.items()}


_AXES: Sequence[tuple[str, str]] = (
    ("bits", "bits per token, after a full window"),
    ("gain", "extra bits per token under another drive's actions"),
    ("turned", "left minus right, picture widths per frame"),
)


def plot(options: argparse.Namespace) -> None:
    """Measure the speed of each lag, then draw and print all results."""
    done: dict[str, list[Path]] = {}
    for lag in LAGS:
        runs = [run_of(options.out, lag, seed) for seed in options.seeds]
        if finished := [run for run in runs if (run / _CONTROL).exists()]:
            done[lag] = finished
    if not done:
        raise DriveSimError(f"{options.out} contains no finished run; run `train` first")
    rates = frame_rates({lag: runs[0] for lag, runs in done.items()}, options.rounds)
    values = {lag: [figures(run) for run in runs] for lag, runs in done.items()}
    picture = Figure(figsize=(5 * len(_AXES), 4), layout="constrained")
    for axes, (name, label) in zip(picture.subplots(1, len(_AXES)), _AXES, strict=True):
        for lag, seeds in values.items():
            points = [result[name] for result in seeds]
            axes.plot([rates[lag]] * len(points), points, "o", color="#2a5db0", alpha=0.5)
            axes.annotate(
                lag if lag == "raster" else f"lag {lag}",
                (rates[lag], float(np.mean(points))),
                textcoords="offset points",
                xytext=(7, 0),
            )
        means = [(rates[lag], np.mean([result[name] for result in values[lag]])) for lag in values]
        axes.plot(*np.array(means).T, color="#2a5db0")
        axes.set(xlabel="rollout, frames/s", ylabel=label)
        axes.margins(x=0.2)
    with atomic_file(options.picture) as temporary:
        picture.savefig(temporary, dpi=110, format="png")
    for lag, seeds in values.items():
        print(
            f"{lag}: {rates[lag]:.1f} frames/s; "
            + "; ".join(
                f"{name} {np.mean(points):.4g} ({min(points):.4g} to {max(points):.4g})"
                for name in seeds[0]
                for points in [[result[name] for result in seeds]]
            )
            + f"; {len(seeds)} seeds"
        )


def main() -> None:
    """Parse the options, then train or plot."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m benchmarks.rollouts.lag",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lag"), help="folder of the runs; default: runs/lag"
    )
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("tokens", type=Path, help="token store")
    training.add_argument(
        "--tokenizer", type=Path, required=True, help="run of the tokenizer that made the store"
    )
    training.add_argument("--video", type=Path, required=True, help="a validation drive")
    training.add_argument(
        "--lags", choices=LAGS, nargs="+", default=LAGS, help="lags to train; default: all"
    )
    training.add_argument(
        "--steps", type=int, default=700, help="default: 700, about 5 minutes on one core"
    )
    training.add_argument(
        "--starts", type=int, default=10, help="number of starts to steer from; default: 10"
    )
    training.add_argument("--threads", type=int, default=1, help="torch's threads; default: 1")
    training.set_defaults(act=train)
    drawing = commands.add_parser("plot")
    drawing.add_argument(
        "--picture", type=Path, default=Path("docs/lag.png"), help="default: docs/lag.png"
    )
    drawing.add_argument("--rounds", type=int, default=5, help="rounds of timing; default: 5")
    drawing.set_defaults(act=plot)
    for command in (training, drawing):
        command.add_argument(
            "--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2"
        )
    options = parser.parse_args()
    with as_command(parser):
        options.act(options)


if __name__ == "__main__":
    main()
