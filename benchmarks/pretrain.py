"""`python -m benchmarks.pretrain`: make the packaged world model `synthetic` from nothing.

Draws the drives, trains the tokenizer, rounds it to bf16, tokenizes, trains the world model, rounds
it, cuts the contexts, and evaluates the result on drives that were never trained on. After an
interruption, the same command goes on where it stopped. `--install` then copies the result into the
package.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import driving_sim
from benchmarks.training.scaling_runs import as_command
from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.drives import frame_count
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.index import INDEX
from driving_sim.engine.progress import progress, say
from driving_sim.engine.run_folder import CONFIG, is_finished
from driving_sim.engine.threads import collect_rarely, leave_busy_cores, usable_cores
from driving_sim.pipeline import (
    TrainingRequest,
    tokenize_videos,
    train_tokenizer_on,
    train_world_model_on,
)
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.world_model import WorldModel

NAME = "synthetic"
PACKAGED = Path(driving_sim.__file__).parent / "models" / NAME
_DRIVES, _HELD_OUT, _SECONDS, _SEED = 400, 24, 30.0, 0
_EVERY = 3  # the tokenizer learns from every third frame, so that all of them fit in memory
_TOKENIZER = (
    # Narrower than `tiny`, whose decoder would be a third of the time of a frame. There is enough
    # video to leave out the augmentations against overfitting.
    "model.widths=[48,96,192]",
    "data.gain=0",
    "data.cutmix=0",
)
_WORLD_MODEL = (
    "model.dropout=0",
    "training.ema_decay=0.999",
    "training.patience=null",
    "training.validate_every=1000",
    "training.save_every=500",
    "data.preview=false",
)
# The contexts: a held-out drive each, and the time of the first frame in s. In all of them the car
# keeps to its lane.
_CONTEXTS = {
    "autumn": (407, 15.5),
    "evening": (420, 21.8),
    "noon": (412, 2.3),
    "overcast": (419, 6.0),
    "standing": (418, 7.0),
    "traffic": (400, 10.0),
}


@dataclass(frozen=True)
class Folders:
    """Where everything lies."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        """Return the path of a part, such as `videos` or `world_model`."""
        return self.root / name.replace("_", "-")


def draw_drives(at: Folders) -> None:
    """Draw the training drives, each in a world of its own, and the held-out ones."""
    for out, first, count in ((at.videos, 0, _DRIVES), (at.heldout, _DRIVES, _HELD_OUT)):
        if len(list(out.glob("drive_*.json"))) == count:
            continue
        config = SyntheticConfig()
        with progress(count * frame_count(_SECONDS, config), f"drive -> {out}", "frames") as bar:
            write_synthetic_drives(
                out,
                drives=count,
                first=first,
                seconds=_SECONDS,
                seed=_SEED,
                config=config,
                workers=usable_cores(),
                progress=bar.advance,
            )


def train(at: Folders, tokenizer_minutes: float, world_model_minutes: float) -> None:
    """Train both models; the world model on the tokens of the rounded tokenizer."""
    if not is_finished(at.tokenizer):
        train_tokenizer_on(
            [at.videos],
            at.tokenizer,
            TrainingRequest(
                preset="tiny",
                minutes=tokenizer_minutes,
                assignments=_TOKENIZER,
                resume=(at.tokenizer / CONFIG).exists(),
            ),
            every=_EVERY,
        )
    if not at.rounded_tokenizer.exists():
        Tokenizer.from_run(at.tokenizer, "cpu").rounded().save(at.rounded_tokenizer)
    if not (at.tokens / INDEX).exists():
        tokenize_videos([at.videos], at.rounded_tokenizer, at.tokens)
    if not is_finished(at.world_model):
        train_world_model_on(
            at.tokens,
            at.rounded_tokenizer,
            at.world_model,
            TrainingRequest(
                preset="tiny",
                minutes=world_model_minutes,
                assignments=_WORLD_MODEL,
                resume=(at.world_model / CONFIG).exists(),
            ),
        )


def package(at: Folders) -> None:
    """Write the rounded models and the contexts to the folder `synthetic`."""
    world = WorldModel.from_run(at.world_model, "cpu")
    world.rounded().save(at.synthetic, torch.bfloat16)
    write_contexts(
        at.synthetic / "contexts",
        {
            name: (at.heldout / f"drive_{number:03d}.json", start_s)
            for name, (number, start_s) in _CONTEXTS.items()
        },
    )


def install(at: Folders) -> None:
    """Copy the folder `synthetic` into the package."""
    if PACKAGED.exists():
        shutil.rmtree(PACKAGED)
    shutil.copytree(at.synthetic, PACKAGED)
    size = sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file())
    say(f"{size / 1e6:.1f} MB -> {PACKAGED}")


def main() -> None:
    """Parse the options and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.pretrain")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="working folder")
    parser.add_argument("--tokenizer-minutes", type=float, default=30.0)
    parser.add_argument("--world-model-minutes", type=float, default=60.0)
    parser.add_argument("--install", action="store_true", help="copy the model into the package")
    options = parser.parse_args()
    collect_rarely()
    leave_busy_cores()
    at = Folders(options.out)
    with as_command(parser):
        draw_drives(at)
        train(at, options.tokenizer_minutes, options.world_model_minutes)
        package(at)
        if options.install:
            install(at)
    print(json.dumps({"model": str(at.synthetic)}))


if __name__ == "__main__":
    main()
