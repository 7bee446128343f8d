"""`python -m benchmarks.training.scaling_runs TOKENS TOKENIZER`: small models and their law.

Five models from width 64 to 192, deeper and trained for longer as they are wider, so that their
compute spans 1.7 decades. Stopped, it goes on where it was: finished runs are kept, the last one is
resumed.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.run_folder import CONFIG, is_finished
from driving_sim.engine.threads import keep_freed_memory
from driving_sim.scaling.report import scale
from driving_sim.world_model.training.presets import TINY
from driving_sim.world_model.training.train import WorldModelRunConfig, train_world_model

# Width, layers, share of the longest run's steps.
SIZES = ((64, 2, 0.3), (96, 3, 0.45), (128, 4, 0.6), (160, 5, 0.8), (192, 6, 1.0))
_HEAD = 16


def run_config(width: int, layers: int, steps: int) -> WorldModelRunConfig:
    """The `tiny` preset at another size: the same data, recipe and window."""
    heads = width // _HEAD
    return replace(
        TINY,
        model=replace(TINY.model, width=width, layers=layers, heads=heads, kv_heads=heads // 2),
        data=replace(TINY.data, preview=False),
        training=replace(
            TINY.training,
            steps=steps,
            minutes=None,
            # All the same share of warm-up; the best weights are mostly the last.
            warmup_steps=max(1, steps // 10),
            validate_every=max(1, steps // 4),
            save_every=max(1, steps // 4),
            patience=None,
        ),
    )


def train_all(tokens: Path, tokenizer: Path, out: Path, *, steps: int, device: str) -> list[Path]:
    """Train what is not there yet; return the runs' folders."""
    runs = []
    for width, layers, share in SIZES:
        run = out / f"width-{width:03d}"
        runs.append(run)
        if is_finished(run):
            continue
        train_world_model(
            tokens,
            run_config(width, layers, max(1, round(share * steps))),
            run,
            tokenizer=tokenizer,
            resume=(run / CONFIG).is_file(),
            device=device,
        )
    return runs


@contextmanager
def as_command(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Do what is inside as `drivesim` does: keep freed memory, end in a line if it has to end."""
    keep_freed_memory()
    try:
        yield
    except Interrupted as stopped:
        line = str(stopped).replace("`resume`", "the same command")
        parser.exit(stopped.exit_code, f"{line}\n")
    except DriveSimError as error:
        parser.exit(1, f"error: {error}\n")


def main() -> None:
    """Parse, train, fit, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.training.scaling_runs"
    )
    parser.add_argument("tokens", type=Path, help="token store")
    parser.add_argument("tokenizer", type=Path, help="the tokenizer run that made it")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling-runs"))
    parser.add_argument("--steps", type=int, default=1000, help="of the largest model")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    with as_command(parser):
        runs = train_all(
            given.tokens, given.tokenizer, given.out, steps=given.steps, device=given.device
        )
        print(scale(runs, given.out / "law"))


if __name__ == "__main__":
    main()
