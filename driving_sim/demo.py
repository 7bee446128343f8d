"""Run the whole pipeline on a synthetic world and compare its predictions with the true futures."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from driving_sim.data.arrays import Floats, Pixels
from driving_sim.data.synthetic.drives import SyntheticDrive, drive, frame_count
from driving_sim.data.synthetic.road import LANE_OFFSET
from driving_sim.data.synthetic.true_future import replay
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from driving_sim.data.synthetic.writer import seeds, write_synthetic_drives
from driving_sim.data.tokens.index import INDEX
from driving_sim.data.video.writer import write_animation, write_video
from driving_sim.engine.config import config, save_json, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.precision import resolve_precision
from driving_sim.engine.progress import progress
from driving_sim.engine.run_folder import CONFIG, claim_folder, is_finished
from driving_sim.engine.threads import usable_cores
from driving_sim.pipeline import (
    TrainingRequest,
    tokenize_videos,
    train_world_model_on,
)
from driving_sim.tokenizer.metrics import psnr
from driving_sim.world_model.action_plan import ActionPlan, make_plans
from driving_sim.world_model.panels import contact_sheet, draw_moment
from driving_sim.world_model.rollout import Context
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

ACTIONS = ["straight", "left", "right", "brake"]
_SHEET_TIMES = 5
_PLAN = "demo.json"


@config
class DemoConfig:
    """Size of the demo. With the defaults it takes about 10 minutes on 2 CPU cores."""

    drives: int = 160
    """Number of training drives, all in the same world."""
    heldout_drives: int = 8
    """Number of held-out drives in the same world, for `drivesim evaluate`."""
    drive_seconds: float = 24.0
    """Length of a drive in seconds."""
    world: SyntheticConfig = SyntheticConfig(
        height=64,
        width=128,
        fps=5.0,
        stretch_m=300.0,
        cruise_mps=(2.0, 8.0),
        traffic=0.0,
        palettes=("noon",),
    )
    """Frame size, frame rate, road and traffic of the world."""
    preset: str = "demo"
    """Name of the preset for training the tokenizer and the world model."""
    steps: int | None = None
    """Training steps of each model. If None, the preset sets the length."""
    precision: str = "auto"
    """Number format of training and inference: auto, fp32 or bf16."""
    seconds: float = 4.0
    """Length of the predicted futures in seconds."""
    judged_seconds: float = 2.0
    """Predicted and true futures are compared during one second.

    That second ends this many seconds after the start of the futures.
    """
    sampling: Sampling = Sampling(temperature=0.85)
    """Sampling settings for the predicted futures, without the seed."""

    def __post_init__(self) -> None:
        if not 1 <= self.judged_seconds <= self.seconds:
            raise ValueError(
                f"judged_seconds: must be from 1 to seconds={self.seconds:g}, "
                f"found {self.judged_seconds:g}"
            )


def run_demo(out: Path, *, seed: int = 0, config: DemoConfig | None = None) -> str:
    """Make drives, train both models, and predict four futures; return a summary as text.

    The futures start at the same frame and follow different actions. They are compared with the
    true futures of the synthetic world.

    In `out`, the training drives are in `videos`, the held-out drives in `heldout`, the token store
    in `tokens`, and the two training runs in `tokenizer` and `world-model`. `demo.mp4`, `demo.webp`
    and `demo.png` show the true futures above the predicted ones. `summary.json` contains the
    measurements. `demo.json` contains the seed and the config.

    An interrupted demo is continued if the seed and the config are the same. Raises DriveSimError
    if `out` contains anything else.
    """
    config = config or DemoConfig()
    if (out / "summary.json").exists():
        raise DriveSimError(f"{out} contains a finished demo; choose another `out`, or delete it")
    # Check the precision before anything is written, so that a wrong one leaves no files behind.
    resolve_precision(config.precision, resolve_device("auto"))
    claim_folder(out, _PLAN, {"seed": seed, **to_dict(config)}, "a demo")
    _train(out, seed, config)
    world = WorldModel.from_run(out / "world-model", precision=config.precision)
    driven, start = _find_start(config, seed, world.context_frames + 1)
    plans, futures = _roll_out(world, driven, start, config, seed)
    truths = [replay(driven.world, driven.states[start], plan.actions) for plan in plans]
    matrix = _psnr_matrix(futures, truths, _judged_frames(config))
    correct = int((matrix.argmax(axis=1) == np.arange(len(ACTIONS))).sum())
    steering_range = 2 * world.statistics.steering_p95
    _write_pictures(out, plans, truths, futures, config.world.fps, steering_range)
    save_json(
        out / "summary.json",
        {
            "seed": seed,
            "actions": ACTIONS,
            "judged_seconds": config.judged_seconds,
            "psnr_db": matrix.round(2).tolist(),
            "nearest_to_own_action": correct,
        },
    )
    return _summary(out, matrix, correct, config.judged_seconds)


def _train(out: Path, seed: int, config: DemoConfig) -> None:
    """Make the drives and train both models; skip the steps that an interrupted demo finished."""
    videos, tokens, world_model = out / "videos", out / "tokens", out / "world-model"
    if not tokens.exists():
        _make_drives(videos, seed, config, range(config.drives))
        last = config.drives + config.heldout_drives
        _make_drives(out / "heldout", seed, config, range(config.drives, last))
    request = TrainingRequest(
        preset=config.preset,
        steps=config.steps,
        precision=config.precision,
        assignments=(f"training.seed={seed}",),
    )
    if not (tokens / INDEX).exists():
        tokenize_videos(
            [videos],
            out / "tokenizer",
            tokens,
            every=1,
            training=request,
            precision=config.precision,
        )
    if not is_finished(world_model):
        resume = (world_model / CONFIG).exists()
        request = replace(request, resume=resume)
        train_world_model_on(tokens, out / "tokenizer", world_model, request)


def _make_drives(videos: Path, seed: int, config: DemoConfig, numbers: range) -> None:
    total = len(numbers) * frame_count(config.drive_seconds, config.world)
    if len(list(videos.glob("drive_*.json"))) == len(numbers):
        return
    with progress(total, f"drive -> {videos}", "frames") as bar:
        write_synthetic_drives(
            videos,
            drives=len(numbers),
            first=numbers.start,
            seconds=config.drive_seconds,
            seed=seed,
            worlds=1,
            config=config.world,
            workers=usable_cores(),
            progress=bar.advance,
        )


def _find_start(config: DemoConfig, seed: int, context_frames: int) -> tuple[SyntheticDrive, int]:
    """Find a frame from which to predict, in a drive that the models were not trained on.

    Before this frame, the car keeps to its lane, drives at a moderate speed and hardly steers.
    Returns the drive and the index of the frame.
    """
    world = SyntheticWorld(seeds(seed, 0)[0], config.world)
    for driver_seed in np.random.default_rng([seed, 2]).integers(2**31, size=100):
        driven = drive(world, 30.0, int(driver_seed))
        for index in range(context_frames, len(driven.states)):
            past, state = driven.actions[index - context_frames : index], driven.states[index]
            _, offset, _ = world.road.project(np.array([state.x_m]), np.array([state.y_m]))
            if (
                2.5 <= past[-1, 0] <= 4.5
                and past[:, 0].min() > 1.5
                and np.abs(past[:, 1]).max() < 0.08
                and abs(offset[0] - LANE_OFFSET) < 1.5
            ):
                return driven, index
    raise AssertionError("none of 100 drives has a frame with calm driving before it")


def _roll_out(
    world: WorldModel, driven: SyntheticDrive, start: int, config: DemoConfig, seed: int
) -> tuple[list[ActionPlan], list[Pixels]]:
    """Return the action plans from frame `start` of a drive, and the future predicted for each.

    The frames of a future are uint8 [N, H, W, 3].
    """
    first = start - world.context_frames
    frames = np.stack([driven.world.render(state) for state in driven.states[first : start + 1]])
    past = driven.actions[first:start]
    context = Context(
        label="demo",
        tokens=world.tokenizer.encode(frames),
        frames=frames,
        actions=past,
        action_valid=np.ones(past.shape, np.bool_),
        future=iter(()),
        start_s=start / world.fps,
    )
    plans = make_plans(ACTIONS, context.situation(world), seconds=config.seconds)
    actions = np.stack([plan.actions for plan in plans])
    sampling = replace(config.sampling, seed=seed)
    with progress(actions.shape[1], "roll out", "frames") as bar:
        steps = bar.counted(world.generate(context.prefix(world), actions, sampling=sampling))
        moments = [step.tokens.cpu() for step in steps]
    tokens_of_plans = torch.stack(moments, dim=1)
    return plans, [world.tokenizer.decode(tokens).numpy() for tokens in tokens_of_plans]


def _judged_frames(config: DemoConfig) -> slice:
    """Return which frames of the futures lie in the judged second."""
    begin, end = config.judged_seconds - 1, config.judged_seconds
    return slice(round(begin * config.world.fps), round(end * config.world.fps))


def _psnr_matrix(futures: list[Pixels], truths: list[Pixels], judged: slice) -> Floats:
    """Return the PSNR in dB between each predicted and each true future.

    Rows are predicted futures, columns are true ones. PSNR is averaged over the `judged` frames.
    """
    predicted, true = (
        [torch.from_numpy(frames[judged]) for frames in clips] for clips in (futures, truths)
    )
    values = [float(psnr(*pair).mean()) for pair in product(predicted, true)]
    return np.array(values).reshape(len(futures), len(truths))


def _write_pictures(
    out: Path,
    plans: list[ActionPlan],
    truths: list[Pixels],
    futures: list[Pixels],
    fps: float,
    steering_range: float,
) -> None:
    """Write a video, an animation and a contact sheet: each true future above its prediction."""
    kinds = ("true", "predicted")
    titled = [replace(plan, label=f"{plan.label}: {kind}") for kind in kinds for plan in plans]
    clips, times = [*truths, *futures], len(futures[0])
    moments = [
        draw_moment(titled, [clip[t] for clip in clips], t, steering_range, columns=len(plans))
        for t in range(times)
    ]
    write_video(out / "demo.mp4", moments, fps=fps)
    write_animation(out / "demo.webp", moments, fps=fps)
    chosen = np.linspace(0, times - 1, _SHEET_TIMES).round().astype(int)
    by_plan = np.arange(len(clips)).reshape(len(kinds), -1).T.flat
    rows = [(titled[n].label, [clips[n][t] for t in chosen]) for n in by_plan]
    sheet = contact_sheet(rows, [f"{(t + 1) / fps:+.2f} s" for t in chosen])
    with atomic_file(out / "demo.png") as temporary:
        Image.fromarray(sheet).save(temporary)


def _summary(out: Path, matrix: Floats, correct: int, judged_seconds: float) -> str:
    """Return a text with the PSNR matrix as a table and the paths of the video and the picture."""
    lines = [
        "PSNR (dB) of each predicted future (row) against each true future (column), "
        f"from {judged_seconds - 1:g} to {judged_seconds:g} s:",
        " " * 10 + "".join(f"{name:>10}" for name in ACTIONS),
    ]
    for name, row in zip(ACTIONS, matrix, strict=True):
        best = row.argmax()
        cells = (f"{value:.1f}{'*' if i == best else ' '}" for i, value in enumerate(row))
        lines.append(f"{name:>10}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"{correct} of {len(ACTIONS)} predicted futures are closest (*) to the true future of "
        "their own action"
    )
    lines.append(f"video: {out / 'demo.mp4'}, picture: {out / 'demo.png'}")
    return "\n".join(lines)
