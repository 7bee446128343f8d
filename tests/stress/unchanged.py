"""`python -m tests.stress.unchanged REVISION`: compare all commands with an earlier commit's.

Runs every command in this checkout and in a checkout of the earlier commit, with one thread. The
inputs are synthetic drives, and recordings if there are any beside the checkout. Both checkouts
read the videos that the earlier commit wrote, because an H.264 encoder does not write the same
bytes twice. Compares what the commands write and print: weights, stores, tokens and pictures byte
by byte, JSON and YAML value by value, texts word by word, and videos by their frames. Times and
rates are ignored. Then this checkout resumes the earlier commit's trainings. Prints all
differences; the exit code is 1 if there are any. Takes about half an hour.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.against import checked_out
from tests import ROOT, SHARED

_CLOCK = re.compile(r"second|minute|rate|time|date|eta|memory|speed_of|elapsed|version|commit|took")
_FAILED = "exit code"
_OF_CLOCKS = ("checksums.json",)
"""Files that are not compared: they contain checksums of files that contain times."""
_LAST_OF_VIDEOS = "synth heldout"
MOST_GREY_LEVELS = 1.0
"""Largest mean difference in grey levels at which two videos count as equal."""
_PROGRESS = re.compile(r"(?m)^.*\d/\d+ .* left.*\n?")
_CLOCK_TEXT = re.compile(
    r"(?<![\w.])\d[\d,.]*\s*(?:/s|s|ms|min|h|it/s|frames/s|steps/s|MB|GB|MiB|GiB)\b"
    r"|\d+:\d\d(:\d\d)?|in \d[\d.]* (?:s|min|seconds|minutes)\b|20\d\d-\d\d-\d\d|/tmp/\w+"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command with its environment variables and its expected exit code."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    code: int = 0
    """Exit code that both checkouts must return; -1 allows any."""


_SMALL = ("--steps", "40", "--set", "training.save_every=20", "--set", "training.validate_every=20")
_STARTS = ("--actions", "left", "--actions", "speed=6 steer=0.1 for 1s; accel=-2 for 1s")


def synthetic_steps() -> Iterator[Step]:
    """Yield steps that use every command on synthetic drives, in a few minutes."""

    def step(name: str, command: str, *more: str, code: int = 0, **environment: str) -> Step:
        arguments = (*command.split(), *more)
        return Step(name=name, arguments=arguments, environment=environment, code=code)

    size = "--height 64 --width 128 --fps 5"
    yield step("synth", f"synth videos --drives 6 --seconds 12 {size}")
    yield step("synth heldout", f"synth heldout --drives 2 --first 6 --seconds 12 {size}")
    yield step("inspect", "inspect videos --steering-kind road_wheel --out inspected")
    yield step("inspect --json", "inspect videos --json")
    train = "train-tokenizer videos --preset demo --set objective.gan_start=0.4"
    yield step("train-tokenizer", train, *_SMALL, "--set", "objective.gan_weight=0.1")
    yield step(
        "train-tokenizer in bf16, AdamW, accumulated",
        f"{train} --out runs/tokenizer-2 --precision bf16 --set training.accumulate=2",
        *_SMALL,
        *("--set", "training.optimizer=adamw", "--set", "objective.gan_weight=0.1"),
    )
    yield step("tokenize", "tokenize videos --mirror")
    yield step("tokenize, every second", "tokenize videos --every 2 --out runs/tokens-2")
    yield step("train-world-model", "train-world-model --preset demo", *_SMALL)
    options = ("training.accumulate=2", "training.optimizer=adamw", "training.grad_clip=0.5")
    yield step(
        "train-world-model in fp32, AdamW, accumulated",
        "train-world-model --preset demo --precision fp32 --out runs/world-2",
        *_SMALL,
        *(word for option in options for word in ("--set", option)),
    )
    yield step(
        "train-world-model, not compiled",
        "train-world-model --preset demo --precision fp32 --out runs/world-3",
        *_SMALL,
        CXX="false",
    )
    yield step(
        "train-world-model --init-from",
        "train-world-model --preset demo --init-from runs/world-model --out runs/world-4",
        *_SMALL,
    )
    for name, options_ in {
        "rollout": "--samples 2",
        "rollout in fp32": "--samples 3 --precision fp32 --top-p 0.9",
        "rollout in bf16": "--samples 1 --precision bf16 --top-k 50 --temperature 0.8",
        "rollout, guided": "--guidance 1.5 --samples 2 --seed 3",
        "rollout of a video": "--context heldout/drive_006.mp4 --actions recorded --start 4",
    }.items():
        out = f"futures/{name.replace(' ', '-').replace(',', '')}.mp4"
        yield step(name, f"rollout {options_} --out {out} --seconds 3", *_STARTS)
    yield step(
        "rollout, not compiled",
        "rollout --samples 2 --precision fp32 --out futures/torch.mp4 --seconds 3",
        *_STARTS,
        CXX="false",
    )
    yield step(
        "evaluate tokenizer", "evaluate tokenizer runs/tokenizer heldout --out reports/tokenizer"
    )
    world = "evaluate world-model runs/world-model heldout --quick --training-videos videos"
    yield step("evaluate world-model", f"{world} --out reports/a")
    yield step(
        "evaluate world-model --probe",
        f"{world} --out reports/b --probe reports/a --guidance 1.5 --seed 0",
    )
    other = world.replace("runs/world-model", "runs/world-2")
    yield step("evaluate another", f"{other} --out reports/c --probe reports/a")
    yield step("evaluate compare", "evaluate compare reports/a reports/c --out reports/ac.html")
    yield step("evaluate compare, refused", "evaluate compare reports/a reports/b", code=1)
    yield step(
        "evaluate control",
        "evaluate control runs/world-model heldout --starts 4 --out control.json --sheet c.png",
    )
    yield step("surprise", "surprise runs/world-model heldout --out surprise")
    for width in (48, 96, 192):
        run = f"train-world-model --preset demo --out runs/scale-{width} --set model.width={width}"
        yield step(f"scaling run {width}", f"{run} --set model.heads=6 --set model.kv_heads=3",
                   *_SMALL)  # fmt: skip
    yield step("scaling", "scaling runs/scale-48 runs/scale-96 runs/scale-192 --out law")


def recorded_steps() -> Iterator[Step]:
    """Yield steps that inspect the recordings beside the checkout, and tokenize some of them."""
    for folder in sorted(path for path in SHARED.iterdir() if path.is_dir()):
        if folder.name not in ("torcs", "track", "lake_test"):
            yield Step(name=f"inspect {folder.name}", arguments=("inspect", str(folder), "--json"),
                       code=-1)  # fmt: skip
    drive = str(SHARED / "track" / "drive_05.mp4")
    kind = ("--steering-kind", "road_wheel")
    yield Step(name="inspect track", arguments=("inspect", drive, "--json", *kind))
    every = ("--every", "4", "--tokenizer", "runs/tokenizer")
    yield Step(name="tokenize track", arguments=("tokenize", drive, *every, *kind, "--out", "t"))
    raw = str(SHARED / "udacity_raw")
    yield Step(name="tokenize Udacity", arguments=("tokenize", raw, "--tokenizer",
               "runs/tokenizer", "--out", "u"), code=-1)  # fmt: skip


def wrong_steps() -> Iterator[Step]:
    """Yield steps with a user's mistakes, which must end with a one-line error.

    A difference in the wording of the error need not be a fault.
    """
    for command in (
        "inspect nowhere",
        "tokenize videos --out runs/tokens",
        "tokenize videos --fps 3 --out runs/tokens",
        "tokenize videos --fps -3 --out x",
        "train-tokenizer videos --preset huge --out x",
        "train-tokenizer videos --preset demo --steps 40",
        "train-tokenizer videos --preset demo --steps 60",
        "train-tokenizer videos --preset demo --steps 0 --out x",
        "train-tokenizer videos --preset demo --out x --set model.widht=3",
        "train-tokenizer videos --preset demo --out x --set model.levels=[1,2]",
        "train-tokenizer videos --preset demo --out x --set objective.gan_weight=-1",
        "train-tokenizer videos --preset demo --out x --set training.learning_rate=fast",
        "train-tokenizer videos --preset demo --out x --set data.batch_size=true",
        "train-world-model nowhere --preset demo --out x",
        "train-world-model --preset demo --steps 40",
        "train-world-model --preset demo --out x --set model.heads=5",
        "train-world-model --preset demo --out x --set model.heads=-5",
        "train-world-model --preset demo --out x --set data.batch_size=100000",
        "train-world-model --tokenizer runs/tokenizer-2 --preset demo --out x",
        "train-world-model --steps 10 --minutes 3 --preset demo --out x",
        "rollout --actions sideways --out x.mp4",
        "rollout --actions left --out futures/rollout.mp4",
        "rollout --actions left --temperature -1 --out x.mp4",
        "rollout --actions left --top-k 0 --out x.mp4",
        "rollout --actions steer=0.1for --out x.mp4",
        "rollout --actions speed=4000 --out x.mp4",
        "rollout --actions left --model nowhere --out x.mp4",
        "rollout --actions left --context videos --out x.mp4",
        "rollout --actions recorded --start 100 --context heldout/drive_006.mp4 --out x.mp4",
        "evaluate tokenizer nowhere heldout --out x",
        "evaluate tokenizer runs/tokenizer heldout --out reports/a",
        "evaluate world-model runs/world-model videos --quick --out x",
        "evaluate compare reports/a nowhere",
        "scaling runs/scale-48 --out x",
        "scaling runs/scale-48 runs/world-2 runs/scale-96 --out x",
        "surprise runs/tokenizer heldout --out x",
    ):
        yield Step(name=f"wrong: {command}", arguments=command.split(), code=1)


def run(tree: Path, folder: Path, step: Step) -> str:
    """Run a step in `folder` with the code of the checkout `tree`. Return its output.

    If the exit code is not the expected one, the output begins with it.
    """
    plain = {name: text for name, text in os.environ.items() if not name.startswith("DRIVESIM_")}
    own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "driving_sim.cli", *step.arguments],
        cwd=folder,
        env=plain | own | dict(step.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if step.code >= 0 and done.returncode != step.code:
        return f"{_FAILED} {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def without_clock(value: Any) -> Any:
    """Return a JSON value without entries that depend on the time or the machine."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not _CLOCK.search(str(k))}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """Return the content of a file in a form that can be compared."""
    if path.suffix == ".json":
        return without_clock(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    if path.suffix == ".txt":
        return words(path.read_text())
    if path.suffix == ".html":  # ignore numbers, which are times or are compared in metrics.json
        page = re.sub(r">\s*|\s*<", lambda edge: edge[0].strip(), path.read_text())
        return re.sub(r"base64,[\w+/=]+|\d[\d.]*|\bmin\b", "", html.unescape(page)).split()
    return path.read_bytes()


def words(text: str) -> list[str]:
    """Return the words of a text, with `#` in place of times and rates."""
    return _CLOCK_TEXT.sub("#", _PROGRESS.sub("", text)).split()


def differing_files(before: Path, now: Path) -> list[str]:
    """Return the names of files that differ or that only one of the folders has."""
    names = {
        str(path.relative_to(folder))
        for folder in (before, now)
        for path in folder.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts and path.name not in _OF_CLOCKS
    }
    return [name for name in sorted(names) if not same(before / name, now / name)]


def same(before: Path, now: Path) -> bool:
    """Return whether two files have the same content. Videos need only look nearly the same."""
    if not (before.is_file() and now.is_file()):
        return False
    if before.suffix == ".mp4":
        old, new = frames(before), frames(now)
        return old.shape == new.shape and bool(np.abs(old - new).mean() < MOST_GREY_LEVELS)
    return bool(content(before) == content(now))


def frames(path: Path) -> NDArray[np.float32]:
    """Return the frames of a video as grey levels [T, H, W]."""
    with av.open(path) as container:
        grey = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return np.stack(grey).astype(np.float32)


def run_all(
    tree: Path, folder: Path, steps: Sequence[Step], videos: Path | None = None
) -> dict[str, str]:
    """Run all steps and return their outputs by name.

    If an earlier call has left its results for the folder, returns those instead. If `videos` is
    given, its drives replace the drives that the first steps make.
    """
    record = folder.with_suffix(".json")
    if record.exists():
        said: dict[str, str] = json.loads(record.read_text())
        return said
    folder.mkdir(parents=True)
    said = {}
    for step in steps:
        said[step.name] = run(tree, folder, step)
        if videos and step.name == _LAST_OF_VIDEOS:
            for name in ("videos", "heldout"):
                (folder / name).rename(folder / f"{name}-made")
                shutil.copytree(videos / name, folder / name)
        print(f"{folder.name}: {step.name}", flush=True)
    record.write_text(json.dumps(said))
    return said


def differing_texts(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Yield a text for each step whose output differs, or that failed in both checkouts."""
    for name, text in before.items():
        if words(text) != words(now[name]):
            yield f"{name}: output\n  before: {text.strip()}\n  now:    {now[name].strip()}"
        elif text.startswith(_FAILED):
            yield f"{name}: failed in both checkouts: {text.strip()}"


def continued(before: Path, now: Path) -> Iterator[str]:
    """Resume the earlier commit's trainings in this checkout. Yield a text for each difference."""
    tokenizer = "train-tokenizer videos --preset demo --set objective.gan_start=0.4"
    for name, command in (
        ("tokenizer", f"{tokenizer} --set objective.gan_weight=0.1"),
        ("world-model", "train-world-model --preset demo"),
    ):
        whole, folder = before / "runs" / name, now / "runs" / name
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / "finished.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000040")
        text = run(ROOT, now, Step(name=name, arguments=[*command.split(), *_SMALL, "--resume"]))
        for file in ("model.safetensors", "metrics.jsonl", "config.json"):
            if not same(whole / file, folder / file):
                yield f"{name} resumed from the earlier checkpoint: {file} differs; {text}"


def main() -> None:
    """Parse the options, run both checkouts, compare, print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.stress.unchanged")
    parser.add_argument("revision", help="commit to compare with, or the folder of a checkout")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the results of both checkouts; results that are already there are used",
    )
    options = parser.parse_args()
    tree = Path(options.revision)
    keep = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    checkout = nullcontext(tree.resolve()) if tree.is_dir() else checked_out(options.revision)
    recorded = recorded_steps() if SHARED.is_dir() else ()
    steps = [*synthetic_steps(), *recorded, *wrong_steps()]
    with checkout as old, keep as name:
        folders = Path(name).resolve() / "before", Path(name).resolve() / "now"
        before = run_all(old, folders[0], steps)
        now = run_all(ROOT, folders[1], steps, videos=folders[0])
        for name in ("videos", "heldout"):
            shutil.copytree(folders[0] / name, folders[0] / f"{name}-made", dirs_exist_ok=True)
        differences = [
            *differing_texts(before, now), *differing_files(*folders), *continued(*folders)
        ]  # fmt: skip
    print(*differences, f"{len(differences)} differences", sep="\n")
    raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
