"""`python -m benchmarks.training.scaling_runs TOKENS TOKENIZER`: fit a scaling law to small models.

Trains five models of width 64 to 192. Wider models are also deeper and train for more steps, so the
compute spans 1.7 decades. After an interruption, the same command keeps the finished runs and
resumes the unfinished one.
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

# Width, number of layers, and number of steps as a share of the longest run's.
SIZES = ((64, 2, 0.3), (96, 3, 0.45), (128, 4, 0.6), (160, 5, 0.8), (192, 6, 1.0))
_HEAD = 16


def run_config(width: int, layers: int, steps: int) -> WorldModelRunConfig:
    """Return the preset `tiny` at another size, with the same data, recipe and window."""
    heads = width // _HEAD
    return replace(
        TINY,
        model=replace(TINY.model, width=width, layers=layers, heads=heads, kv_heads=heads // 2),
        data=replace(TINY.data, preview=False),
        training=replace(
            TINY.training,
            steps=steps,
            minutes=None,
            # Every run has the same share of warm-up steps. A few validations are enough, because
            # the last weights are usually the best.
            warmup_steps=max(1, steps // 10),
            validate_every=max(1, steps // 4),
            save_every=max(1, steps // 4),
            patience=None,
        ),
    )


def train_all(tokens: Path, tokenizer: Path, out: Path, *, steps: int, device: str) -> list[Path]:
    """Train the models that are not finished yet; return the folders of all runs."""
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
    """Run the body of a `with` statement as `drivesim` runs a command.

    Freed memory is kept for reuse, and errors are printed as one line.
    """
    keep_freed_memory()
    try:
        yield
    except Interrupted as stopped:
        line = str(stopped).replace("`resume`", "the same command")
        parser.exit(stopped.exit_code, f"{line}\n")
    except DriveSimError as error:
        parser.exit(1, f"error: {error}\n")


def main() -> None:
    """Parse the options, train the models, fit the law and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.training.scaling_runs"
    )
    parser.add_argument("tokens", type=Path, help="token store")
    parser.add_argument("tokenizer", type=Path, help="run of the tokenizer that made the store")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scaling-runs"), help="folder of the runs"
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps of the largest model")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu; default: auto")
    options = parser.parse_args()
    with as_command(parser):
        runs = train_all(
            options.tokens,
            options.tokenizer,
            options.out,
            steps=options.steps,
            device=options.device,
        )
        print(scale(runs, options.out / "law"))


if __name__ == "__main__":
    main()
