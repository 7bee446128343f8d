"""`python -m benchmarks.rollouts.lag train|plot`: what the tokens' order costs and gives.

    python -m benchmarks.rollouts.lag train TOKENS --tokenizer RUN --video VIDEO [--lags ...]
        [--seeds ...]
    python -m benchmarks.rollouts.lag plot

`train` trains the `tiny` preset for each lag (waves between a row of tokens and the next) and seed,
for the same number of steps, which cost the same, and steers each model both ways from ten starts
in VIDEO, which is one of the validation drives. Stopped, it goes on where it was; two processes may
share the work by lags or seeds. `plot` measures the rollouts' frames/s of all lags in one run, one
after the other, draws it all and prints it.
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
    """Where a model is."""
    return out / f"lag-{lag}-seed-{seed}"


def train_one(given: argparse.Namespace, lag: str, seed: int, cols: int) -> None:
    """Train and steer one model, as far as that is not done."""
    run = run_of(given.out, lag, seed)
    waves = cols + 1 if lag == "raster" else int(lag)
    config = replace(
        TINY,
        model=replace(TINY.model, lag=waves),
        data=replace(TINY.data, preview=False),
        training=replace(
            TINY.training, steps=given.steps, minutes=None, patience=None, seed=seed,
            threads=given.threads, validate_every=max(1, given.steps // 2),
        ),
    )  # fmt: skip
    if not is_finished(run):
        resume = (run / CONFIG).exists()
        train_world_model(
            given.tokens, config, run, tokenizer=given.tokenizer, resume=resume, device="cpu"
        )
    if not (run / _CONTROL).exists():
        drives = find_frames([given.video], skip_bad=False).drives
        world = WorldModel.from_run(run, device="cpu")
        found = measure_control(world, drives, starts=given.starts, sampling=Sampling(seed=seed))
        save_json(run / _CONTROL, found)


def train(given: argparse.Namespace) -> None:
    """Every lag of a seed, then the next seed's."""
    cols = TokenStore(given.tokens).info.cols
    for seed in given.seeds:
        for lag in given.lags:
            train_one(given, lag, seed, cols)


def figures(run: Path) -> dict[str, float]:
    """What is known of one model."""
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
    """Frames/s of a rollout of each lag's model as tokens, in turns."""

    def several(frames: Any) -> None:
        for _ in range(_FRAMES):
            next(frames)

    acts: dict[str, Callable[[], None]] = {}
    for lag, run in runs.items():
        world = WorldModel.from_run(run, device="cpu")
        acts[lag] = partial(several, endless(world, context=world.context_frames))
    found = alternate(acts, Settings(device=torch.device("cpu"), rounds=rounds))
    return {lag: _FRAMES / float(np.median(taken)) for lag, taken in found.items()}


_AXES: Sequence[tuple[str, str]] = (
    ("bits", "bits per token, a full window behind"),
    ("gain", "bits a token more under another drive's actions"),
    ("turned", "left minus right, picture widths a frame"),
)


def plot(given: argparse.Namespace) -> None:
    """Measure the speeds, draw and print."""
    done: dict[str, list[Path]] = {}
    for lag in LAGS:
        runs = [run_of(given.out, lag, seed) for seed in given.seeds]
        if found := [run for run in runs if (run / _CONTROL).exists()]:
            done[lag] = found
    if not done:
        raise DriveSimError(f"{given.out} holds no finished run: `train` comes first")
    rates = frame_rates({lag: runs[0] for lag, runs in done.items()}, given.rounds)
    values = {lag: [figures(run) for run in runs] for lag, runs in done.items()}
    picture = Figure(figsize=(5 * len(_AXES), 4), layout="constrained")
    for axes, (name, label) in zip(picture.subplots(1, len(_AXES)), _AXES, strict=True):
        for lag, seeds in values.items():
            each = [one[name] for one in seeds]
            axes.plot([rates[lag]] * len(each), each, "o", color="#2a5db0", alpha=0.5)
            axes.annotate(
                lag if lag == "raster" else f"lag {lag}",
                (rates[lag], float(np.mean(each))),
                textcoords="offset points",
                xytext=(7, 0),
            )
        means = [(rates[lag], np.mean([one[name] for one in values[lag]])) for lag in values]
        axes.plot(*np.array(means).T, color="#2a5db0")
        axes.set(xlabel="rollout, frames/s", ylabel=label)
        axes.margins(x=0.2)
    with atomic_file(given.picture) as temporary:
        picture.savefig(temporary, dpi=110, format="png")
    for lag, seeds in values.items():
        print(
            f"{lag}: {rates[lag]:.1f} frames/s; "
            + "; ".join(
                f"{name} {np.mean(each):.4g} ({min(each):.4g} to {max(each):.4g})"
                for name in seeds[0]
                for each in [[one[name] for one in seeds]]
            )
            + f"; {len(seeds)} seeds"
        )


def main() -> None:
    """Parse; train or plot."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m benchmarks.rollouts.lag",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lag"))
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("tokens", type=Path, help="token store")
    training.add_argument("--tokenizer", type=Path, required=True, help="the run that made it")
    training.add_argument("--video", type=Path, required=True, help="a validation drive")
    training.add_argument("--lags", choices=LAGS, nargs="+", default=LAGS)
    training.add_argument("--steps", type=int, default=700, help="5 minutes on a core")
    training.add_argument("--starts", type=int, default=10)
    training.add_argument("--threads", type=int, default=1)
    training.set_defaults(act=train)
    drawing = commands.add_parser("plot")
    drawing.add_argument("--picture", type=Path, default=Path("docs/lag.png"))
    drawing.add_argument("--rounds", type=int, default=5)
    drawing.set_defaults(act=plot)
    for each in (training, drawing):
        each.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    with as_command(parser):
        given.act(given)


if __name__ == "__main__":
    main()
