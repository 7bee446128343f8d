"""`python -m benchmarks.pretrain`: make the packaged world model `synthetic` from nothing.

Draws the drives, trains the tokenizer, rounds it to bf16, tokenizes, trains the world model twice,
rounds it, cuts the contexts, trains the lane probe, and evaluates the result on drives that were
never trained on. After an interruption, the same command goes on where it stopped. `--install` then
copies the result into the package.
"""

import argparse
import shutil
from dataclasses import field, replace
from pathlib import Path

import torch
from torch import nn

import driving_sim
from benchmarks.bench import commit
from benchmarks.measuring.machine import machine_name
from benchmarks.measuring.paired import Settings
from benchmarks.training.scaling_runs import as_command
from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.drives import frame_count
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.index import INDEX
from driving_sim.engine.config import config, load_json, save_json, to_dict
from driving_sim.engine.progress import progress, say
from driving_sim.engine.run_folder import CONFIG, FINISHED, claim_folder, is_finished
from driving_sim.engine.threads import collect_rarely, leave_busy_cores, usable_cores
from driving_sim.env.lane_probe import PROBE_FILE, LaneProbe, train_lane_probe
from driving_sim.evaluate.measure import measure_world_model
from driving_sim.evaluate.world_model import FULL, EvaluationConfig
from driving_sim.pipeline import (
    TrainingRequest,
    tokenize_videos,
    train_tokenizer_on,
    train_world_model_on,
)
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.world_model import WorldModel

PACKAGED = Path(driving_sim.__file__).parent / "models" / "synthetic"
_FIGURES = "figures.json"
_COMMIT = "commit.txt"


@config
class Recipe:
    """Everything that decides the result, except the machine."""

    drives: int = 400
    """Number of training drives, each in a world of its own."""
    heldout_drives: int = 24
    """Number of drives that are only measured on, in other worlds."""
    seconds: float = 30.0
    """Length of a drive in s."""
    seed: int = 0
    """Seed of the drives."""
    world: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Frame size and frame rate, kinds of day and traffic, and the drivers of the held-out
    drives."""
    training_world: SyntheticConfig = field(
        # A player steers harder than a driver on a road, and stands for longer. So the training
        # drives reach full steering at every speed, and a minute of them stands for seconds.
        default_factory=lambda: SyntheticConfig(
            cruise_mps=(3.0, 18.0), stops_s=(0.5, 8.0), swerves_rad=(0.04, 0.2), lateral_mps2=25.0
        )
    )
    """The same, with the drivers of the training drives."""
    preset: str = "tiny"
    """Preset of all trainings."""
    every: int = 3
    """The tokenizer learns from every n-th frame, so that all of them fit in memory."""
    tokenizer: tuple[str, ...] = (
        "training.steps=6000",
        "training.minutes=null",
        # Narrower than `tiny`, whose decoder would be a third of the time of a frame.
        "model.widths=[48,96,192]",
        # There is enough video, so nothing is needed against overfitting.
        "data.gain=0",
        "data.cutmix=0",
    )
    """Settings of the tokenizer that differ from the preset's."""
    world_model_steps: tuple[int, ...] = (20_000, 22_000)
    """Number of steps of each training of the world model. Each begins with the weights of the one
    before, at the full learning rate."""
    world_model: tuple[str, ...] = (
        "training.minutes=null",
        "training.patience=null",
        "training.ema_decay=0.999",
        "training.validate_every=1000",
        "training.save_every=500",
        "model.dropout=0",
        "data.preview=false",
    )
    """Settings of the world model that differ from the preset's."""
    contexts: tuple[tuple[str, int, float], ...] = (
        ("autumn", 407, 15.5),
        ("evening", 420, 21.8),
        ("noon", 412, 2.3),
        ("overcast", 419, 6.0),
        ("standing", 418, 7.0),
        ("traffic", 400, 10.0),
    )
    """Name of each context, number of its held-out drive, and time of its first frame in s."""
    probe_worlds: int = 400
    """Number of worlds that the lane probe is trained on."""
    probe_steps: int = 1500
    """Number of training steps of the lane probe."""
    evaluation: EvaluationConfig = field(
        # The bits of 7,200 frames would take an hour: judge every sixth, and shuffle once.
        default_factory=lambda: replace(
            FULL, stride=6, shuffles=1, sweeps=10, long_rollouts=20, long_seconds=120.0
        )
    )
    """What is measured. Obedience and stability are those of `drivesim evaluate world-model` with
    `--sweeps 10 --long-rollouts 20 --long-seconds 120`."""


class Folders:
    """The folders of the work, all in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.videos, self.heldout = root / "videos", root / "heldout"
        self.tokenizer = root / "tokenizer"
        self.rounded_tokenizer, self.tokens = root / "rounded-tokenizer", root / "tokens"
        self.synthetic = root / "synthetic"
        """The model, as it is packaged."""
        self.report = root / "report"

    def world_model(self, training: int) -> Path:
        """Return the run folder of the world model's first, second, ... training, from 0."""
        return self.root / ("world-model" if training == 0 else f"world-model-{training + 1}")


def pretrain(out: Path, recipe: Recipe) -> Path:
    """Do what is missing in the folder `out`; return the folder of the model.

    Raises DriveSimError if another recipe was begun in `out`.
    """
    claim_folder(out, "recipe.json", to_dict(recipe), "a pretraining")
    at = Folders(out)
    if not (out / _COMMIT).exists():
        (out / _COMMIT).write_text(commit())
    _draw_drives(at, recipe)
    _train(at, recipe)
    _package(at, recipe)
    _evaluate(at, recipe)
    _write_card(at, recipe)
    return at.synthetic


def _draw_drives(at: Folders, recipe: Recipe) -> None:
    count, more = recipe.drives, recipe.heldout_drives
    for out, first, drives, world in (
        (at.videos, 0, count, recipe.training_world),
        (at.heldout, count, more, recipe.world),
    ):
        if len(list(out.glob("drive_*.json"))) == drives:
            continue
        total = drives * frame_count(recipe.seconds, world)
        with progress(total, f"drive -> {out}", "frames") as bar:
            write_synthetic_drives(
                out,
                drives=drives,
                first=first,
                seconds=recipe.seconds,
                seed=recipe.seed,
                config=world,
                workers=usable_cores(),
                progress=bar.advance,
            )


def _train(at: Folders, recipe: Recipe) -> None:
    """Train both models; the world model on the tokens of the rounded tokenizer."""

    def request(
        run: Path, assignments: tuple[str, ...], init_from: Path | None = None
    ) -> TrainingRequest:
        resume = (run / CONFIG).exists()
        return TrainingRequest(
            preset=recipe.preset, assignments=assignments, resume=resume, init_from=init_from
        )

    if not is_finished(at.tokenizer):
        settings = request(at.tokenizer, recipe.tokenizer)
        train_tokenizer_on([at.videos], at.tokenizer, settings, every=recipe.every)
    if not (at.tokens / INDEX).exists():
        Tokenizer.from_run(at.tokenizer, "cpu").rounded().save(at.rounded_tokenizer)
        tokenize_videos([at.videos], at.rounded_tokenizer, at.tokens, fps=recipe.world.fps)
    before = None
    for training, steps in enumerate(recipe.world_model_steps):
        run = at.world_model(training)
        if not is_finished(run):
            settings = request(run, (*recipe.world_model, f"training.steps={steps}"), before)
            train_world_model_on(at.tokens, at.rounded_tokenizer, run, settings)
        before = run


def _package(at: Folders, recipe: Recipe) -> None:
    """Write the rounded models, the contexts and the lane probe to the folder of the model."""
    trained = at.world_model(len(recipe.world_model_steps) - 1)
    WorldModel.from_run(trained, "cpu").rounded().save(at.synthetic, torch.bfloat16)
    moments = {
        name: (at.heldout / f"drive_{number:03d}.json", start_s)
        for name, number, start_s in recipe.contexts
    }
    write_contexts(at.synthetic / "contexts", moments)
    if (at.synthetic / PROBE_FILE).exists():
        return
    tokenizer = Tokenizer.from_run(at.rounded_tokenizer, "cpu")
    worlds, steps = recipe.probe_worlds, recipe.probe_steps
    with progress(worlds + steps, "train the lane probe", "worlds and steps") as bar:
        probe = train_lane_probe(
            tokenizer, recipe.world, worlds=worlds, steps=steps, advance=bar.advance
        )
    probe.save(at.synthetic / PROBE_FILE)


def _evaluate(at: Folders, recipe: Recipe) -> None:
    """Measure the rounded model on the held-out drives; keep the report and the key figures."""
    if (at.root / _FIGURES).exists():
        return
    shutil.rmtree(at.report, ignore_errors=True)
    figures = measure_world_model(
        at.synthetic,
        [at.heldout],
        at.report,
        training_tokens=at.tokens,
        training_videos=[at.videos],
        config=recipe.evaluation,
    )
    save_json(at.root / _FIGURES, figures)


def _write_card(at: Folders, recipe: Recipe) -> None:
    """Write what the model is, how it was made, and what was measured."""
    figures, protocol = load_json(at.root / _FIGURES), load_json(at.report / "protocol.json")
    world = WorldModel.from_run(at.synthetic, "cpu")
    probe = LaneProbe.load(at.synthetic / PROBE_FILE)
    offset_m, heading_rad = probe.errors(world.tokenizer, recipe.world)
    card = _CARD.format(
        size=f"{world.tokenizer.height}x{world.tokenizer.width}",
        fps=world.fps,
        recipe=recipe,
        drivers=recipe.training_world,
        hours=recipe.drives * recipe.seconds / 3600,
        tokenizer_steps=_steps(at.tokenizer),
        world_model_steps=" and then, from these weights, ".join(
            f"{steps:,}" for steps in recipe.world_model_steps
        ),
        tokenizer_parameters=_millions(world.tokenizer.autoencoder),
        world_model_parameters=_millions(world.transformer),
        commit=(at.root / _COMMIT).read_text(),
        machine=machine_name(Settings()),
        contexts=len(recipe.contexts),
        sampling=recipe.evaluation.sampling,
        fingerprint=world.fingerprint,
        figures="\n".join(f"| {label} | {text} |" for label, text in figures.items()),
        protocol=protocol["hash"],
        sight_s=world.context_frames / world.fps,
        offset_m=offset_m,
        heading_rad=heading_rad,
        fastest_mps=world.statistics.highest[0] if world.statistics.highest else 0.0,
    )
    (at.synthetic / "card.md").write_text(card, "utf-8")


def _steps(run: Path) -> int:
    return int(load_json(run / FINISHED)["steps"])


def _millions(module: nn.Module) -> str:
    return f"{sum(value.numel() for value in module.parameters()) / 1e6:.1f} M"


_CARD = """# The packaged world model `synthetic`

A driving simulator of drivesim's own synthetic world, at {size} pixels and {fps:g} frames/s: a road
through meadows with markings, posts, trees, houses, gantries and oncoming cars, on four kinds of
day. It is steered by speed (m/s) and road-wheel angle (rad, left positive).

- **Data**: {recipe.drives} drives of {recipe.seconds:g} s ({hours:.1f} hours), each in a world of
  its own. Their drivers steer hard at any speed, up to {drivers.swerves_rad[1]:g} rad and
  {drivers.cruise_mps[1]:g} m/s, and stand for up to {drivers.stops_s[1]:g} s. Another
  {recipe.heldout_drives}, in other worlds and with calmer drivers, were not trained on:
  `drivesim synth heldout --drives {recipe.heldout_drives} --first {recipe.drives} --seed
  {recipe.seed}`.
- **Recipe**: `python -m benchmarks.pretrain`, at commit {commit}. The tokenizer took
  {tokenizer_steps:,} steps, the world model {world_model_steps}, on
  {machine}.
- **Size**: tokenizer {tokenizer_parameters}, world model {world_model_parameters} parameters, in
  bf16. The weights were rounded before anything was tokenized or measured.
- **Contexts**: {contexts} of 3 s, from held-out drives, with the state of the world at every
  frame. So their true futures can be drawn.
- **Lane probe**: reads the car's place in its lane off a picture, for `driving_sim.env.KeepLane`.
  Its mean errors on the roads of worlds that it was not trained on are {offset_m:.2f} m and
  {heading_rad:.3f} rad.
- **Licence**: MIT, like drivesim. No data of others was used.
- **Fingerprint**: `{fingerprint}`

## Figures

On the held-out drives, with seed {sampling.seed} and guidance {sampling.guidance:g}; brackets are
95 % intervals.

| figure | value |
|---|---|
{figures}

Protocol {protocol}.

## Limits

- It knows nothing but this world: no crossings, no pedestrians, no other lanes, no collisions.
- What leaves the picture is forgotten: after a full turn, the road is another one.
- It sees {sight_s:.1f} s of the past. It was trained on speeds up to {fastest_mps:.0f} m/s.
"""


def install(model: Path) -> None:
    """Copy the folder of the model into the package."""
    if PACKAGED.exists():
        shutil.rmtree(PACKAGED)
    shutil.copytree(model, PACKAGED)
    size = sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file())
    say(f"{size / 1e6:.1f} MB -> {PACKAGED}")


def main() -> None:
    """Parse the options and run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.pretrain")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="working folder")
    parser.add_argument("--install", action="store_true", help="copy the model into the package")
    options = parser.parse_args()
    collect_rarely()
    leave_busy_cores()
    with as_command(parser):
        model = pretrain(options.out, Recipe())
        if options.install:
            install(model)


if __name__ == "__main__":
    main()
