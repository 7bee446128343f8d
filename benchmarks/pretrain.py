"""`python -m benchmarks.pretrain`: make the packaged world model `synthetic` from nothing.

Draws the drives, trains the tokenizer, rounds it to bf16, tokenizes, trains the world model, rounds
it, cuts the contexts, and evaluates the result on drives that were never trained on. After an
interruption, the same command goes on where it stopped. `--install` then copies the result into the
package.
"""

import argparse
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import driving_sim
from benchmarks.training.scaling_runs import as_command
from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.drives import frame_count
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.index import INDEX
from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.progress import progress, say
from driving_sim.engine.run_folder import CONFIG, FINISHED, is_finished
from driving_sim.engine.threads import collect_rarely, leave_busy_cores, usable_cores
from driving_sim.evaluate.measure import measure_world_model
from driving_sim.evaluate.world_model import FULL
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
_FIGURES = "figures.json"
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
    """The folders and files of the work, all in the folder `root`."""

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


def evaluate(at: Folders) -> None:
    """Measure the rounded model on the held-out drives; keep the report and the key figures."""
    if (at.root / _FIGURES).exists():
        return
    config = replace(FULL, sweeps=10, long_rollouts=20, long_seconds=120.0)
    figures = measure_world_model(
        at.synthetic,
        [at.heldout],
        at.report,
        training_tokens=at.tokens,
        training_videos=[at.videos],
        config=config,
    )
    save_json(at.root / _FIGURES, figures)


def write_card(at: Folders) -> None:
    """Write what the model is, how it was made, and what was measured."""
    figures, protocol = load_json(at.root / _FIGURES), load_json(at.report / "protocol.json")
    world = WorldModel.from_run(at.synthetic, "cpu")
    (at.synthetic / "card.md").write_text(
        _CARD.format(
            drives=_DRIVES,
            held_out=_HELD_OUT,
            seconds=_SECONDS,
            hours=_DRIVES * _SECONDS / 3600,
            seed=_SEED,
            tokenizer_steps=_steps(at.tokenizer),
            world_model_steps=_steps(at.world_model),
            tokenizer_parameters=_millions(world.tokenizer.autoencoder),
            world_model_parameters=_millions(world.transformer),
            commit=_commit(),
            fingerprint=world.fingerprint,
            figures="\n".join(f"| {label} | {text} |" for label, text in figures.items()),
            protocol=protocol["hash"],
        ),
        "utf-8",
    )


def _steps(run: Path) -> int:
    return int(load_json(run / FINISHED)["steps"])


def _millions(module: nn.Module) -> str:
    return f"{sum(value.numel() for value in module.parameters()) / 1e6:.1f} M"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


_CARD = """# The packaged world model `synthetic`

A driving simulator of drivesim's own synthetic world, at 128x256 pixels and 10 frames/s: a road
through meadows with markings, posts, trees, houses, gantries and oncoming cars, on four kinds of
day. It is steered by speed (m/s) and road-wheel angle (rad, left positive).

- **Data**: {drives} drives of {seconds:g} s ({hours:.1f} hours), each in a world of its own, drawn
  by `drivesim synth --drives {drives} --seed {seed}`. {held_out} more drives, `--first {drives}`,
  in other worlds, were not trained on.
- **Recipe**: `python -m benchmarks.pretrain`, at commit {commit}. The tokenizer took
  {tokenizer_steps:,} steps, the world model {world_model_steps:,}, on 2 CPU cores with
  AVX512-BF16. Training for a set time makes another number of steps on another machine.
- **Size**: tokenizer {tokenizer_parameters}, world model {world_model_parameters} parameters, in
  bf16. The weights were rounded before anything was tokenized or measured.
- **Contexts**: six of 3 s, from held-out drives, with the state of the world at every frame. So
  their true futures can be drawn.
- **Licence**: MIT, like drivesim. No data of others was used.
- **Fingerprint**: `{fingerprint}`

## Figures

On the held-out drives, with seed 0 and guidance 1; brackets are 95 % intervals.

| figure | value |
|---|---|
{figures}

Protocol {protocol}.

## Limits

- It knows nothing but this world: no crossings, no pedestrians, no other lanes, no collisions.
- What leaves the picture is forgotten: after a full turn, the road is another one.
- It sees 0.8 s of the past. It was trained on speeds up to 13 m/s.
"""


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
        evaluate(at)
        write_card(at)
        if options.install:
            install(at)


if __name__ == "__main__":
    main()
