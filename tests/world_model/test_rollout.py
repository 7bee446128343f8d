import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.numpy import load_file

from driving_sim.data.drive import VideoFrames
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import video_writer, write_video
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model import panels, rollout
from driving_sim.world_model.action_plan import make_plans
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.panels import draw_panel
from driving_sim.world_model.rollout import (
    Context,
    context_from_drive,
    context_from_tokens,
    output_files,
    write_rollout,
)
from driving_sim.world_model.sampling.draw_waves import FrameSample
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS, write_store
from tests.fixtures.world_models import new_world

H, W = 16 * ROWS, 16 * COLS


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 40 frames; frame t has brightness 5 t, speed t and steering 0.1."""
    path = tmp_path_factory.mktemp("context") / "drive.mp4"
    frames = (np.full((H, W, 3), 5 * t, np.uint8) for t in range(40))
    write_video(path, frames, fps=FPS)
    rows = [f"{t / FPS},{t},0.1" for t in range(41)]
    header = "timestamp_s,speed_mps,road_wheel_rad"
    path.with_suffix(".csv").write_text("\n".join([header, *rows]) + "\n")
    return path


def context(world: WorldModel, video: Path, start_s: float | None = None) -> Context:
    return context_from_drive(world, find_drives([video]).drives[0], start_s)


def test_context_ends_at_the_start_time_and_the_recording_continues(
    world: WorldModel, video: Path
) -> None:
    past = context(world, video, start_s=20 / FPS)
    assert past.start_s == pytest.approx(20 / FPS)
    assert abs(float(past.frames[-1].mean()) - 100) < 3
    assert abs(float(next(past.future).mean()) - 105) < 3
    assert len(past.tokens) == world.context_frames + 1
    assert torch.equal(past.tokens, world.tokenizer.encode(past.frames))


def test_the_first_new_action_leads_from_the_last_context_frame(
    world: WorldModel, video: Path
) -> None:
    """The speed in the CSV rises by 1 m/s per frame, so its mean over [t, t + 1) is t + 1/2."""
    situation = context(world, video, start_s=20 / FPS).situation(world)
    assert situation.last_action[0] == pytest.approx(19.5, abs=1e-3)
    assert situation.recorded is not None
    assert situation.recorded[0][0, 0] == pytest.approx(20.5, abs=1e-3)
    assert situation.recorded[0][-1, 0] == pytest.approx(38.5, abs=1e-3)  # leads to frame 39


def test_channels_that_the_model_never_saw_are_unknown(world: WorldModel, video: Path) -> None:
    """Steering of any kind is accepted and ignored if the model was trained without steering."""
    drive = find_drives([video]).drives[0]
    for mean, known in (((5.0, 0.0), [True, False]), ((0.0, 0.0), [False, False])):
        model = Transformer(world.config.model, world.config.grid, ActionStatistics(mean=mean))
        unsteered = WorldModel(model, world.tokenizer, fps=FPS, steering_kind=None)
        situation = context_from_drive(unsteered, drive, None).situation(unsteered)
        assert situation.last_valid.tolist() == known
        assert (situation.recorded is not None) == any(known)
    model = Transformer(world.config.model, world.config.grid, world.statistics)
    curved = WorldModel(model, world.tokenizer, fps=FPS, steering_kind="curvature")
    with pytest.raises(DriveSimError, match="trained on curvature"):
        context_from_drive(curved, drive, None)


def test_a_damaged_context_is_refused(world: WorldModel, video: Path) -> None:
    class Damaged(VideoFrames):
        def stream(self, indices: Any, size: FrameSize | None) -> Iterator[Any]:
            return (None if index == 8 else frame for index, frame in self.numbered(indices, size))

        def numbered(self, indices: Any, size: FrameSize | None) -> Iterator[Any]:
            return zip(indices, super().stream(indices, size), strict=True)

    (drive,) = find_drives([video]).drives
    assert drive.video is not None
    damaged = replace(drive, reader=Damaged(drive.video))
    with pytest.raises(DriveSimError, match=r"damaged at 1\.0 s"):
        context_from_drive(world, damaged, 9 / FPS)
    assert len(context_from_drive(world, damaged, 30 / FPS).frames) == world.context_frames + 1


def test_a_start_outside_the_drive_is_refused(world: WorldModel, video: Path) -> None:
    with pytest.raises(DriveSimError, match=r"`start_s` 99.*4\.9 s"):
        context(world, video, start_s=99)


def test_a_context_from_tokens_has_the_stored_tokens_and_their_future(
    world: WorldModel, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "tokens")
    past = context_from_tokens(world, store.drives[0], 20 / FPS)
    stored = store.drives[0].tokens.astype(np.int64)
    last = 21
    np.testing.assert_array_equal(past.tokens, stored[last - len(past.tokens) : last])
    true_next = world.tokenizer.decode(stored[last : last + 1]).numpy()[0]
    np.testing.assert_array_equal(next(past.future), true_next)


def roll(world: WorldModel, video: Path, out: Path, **options: object) -> dict[str, object]:
    past = context(world, video, start_s=30 / FPS)
    plans = make_plans(["left", "right"], past.situation(world), seconds=12 / FPS)
    return write_rollout(world, past, plans, out, sampling=Sampling(seed=3), **options)  # type: ignore[arg-type]


def test_everything_is_written_and_playable(world: WorldModel, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "rollout.mp4"
    report = roll(world, video, out, samples=2)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert sum(1 for _ in container.decode(stream)) == world.context_frames + 1 + 12
    tokens = load_file(tmp_path / "rollout.safetensors")
    assert tokens["tokens"].shape == (4, 12, ROWS, COLS)
    saved = json.loads((tmp_path / "rollout.json").read_text())
    assert saved == report
    assert saved["fingerprints"]["world_model"] == world.fingerprint
    assert saved["sampling"]["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rollout.json",
        "rollout.mp4",
        "rollout.png",
        "rollout.safetensors",
    ]


def test_a_recording_that_ends_with_the_context_has_no_panel(
    world: WorldModel, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, titles = [], []

    def watched_sheet(rows: Any, headings: Any) -> Any:
        titles.append([title for title, _ in rows])
        return panels.contact_sheet(rows, headings)

    monkeypatch.setattr(rollout, "contact_sheet", watched_sheet)
    for start in (20, 39):
        past = context(world, video, start_s=start / FPS)
        plans = make_plans(["left"], past.situation(world), seconds=2 / FPS)
        write_rollout(world, past, plans, tmp_path / f"{start}.mp4", sampling=Sampling())
        with av.open(str(tmp_path / f"{start}.mp4")) as container:
            widths.append(container.streams.video[0].codec_context.width)
    assert widths == [2 * widths[1], widths[1]]
    assert titles == [["recorded", "left"], ["left"]]


def test_the_tokens_are_those_of_the_library(
    world: WorldModel, video: Path, tmp_path: Path
) -> None:
    roll(world, video, tmp_path / "rollout.mp4")
    past = context(world, video, start_s=30 / FPS)
    plans = make_plans(["left", "right"], past.situation(world), seconds=12 / FPS)
    past_actions = past.actions[: len(past.frames) - 1]
    actions = np.stack([plan.actions for plan in plans])
    future = world.rollout(past.frames, past_actions, actions, seed=3)
    saved = load_file(tmp_path / "rollout.safetensors")["tokens"]
    np.testing.assert_array_equal(saved, future.tokens.numpy())


def test_panels_show_the_recording_and_the_futures_under_their_actions(
    world: WorldModel, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame t has brightness 5 t, and the action that leads to it has speed t - 1/2."""
    written: list[np.ndarray] = []

    @contextmanager
    def watched_writer(*arguments: Any, **options: Any) -> Iterator[Callable[[np.ndarray], None]]:
        def watched(frame: np.ndarray) -> None:
            written.append(frame)
            write(frame)

        with video_writer(*arguments, **options) as write:
            yield watched

    monkeypatch.setattr(rollout, "video_writer", watched_writer)
    past = context(world, video, start_s=30 / FPS)
    plans = make_plans(["right", "brake"], past.situation(world), seconds=12 / FPS)
    write_rollout(world, past, plans, tmp_path / "rollout.mp4", sampling=Sampling())
    commanded = [abs(plan.actions[0, 1]) for plan in plans]
    steering_range = max(2 * world.statistics.steering_p95, *commanded)
    saved = load_file(tmp_path / "rollout.safetensors")["tokens"]

    def panel(frame: np.ndarray, title: str, speed: float | None, steering: float | None) -> Any:
        action = np.array([speed or 0.0, steering or 0.0], np.float32)
        valid = np.array([speed is not None, steering is not None])
        return draw_panel(frame, title, action, valid, steering_range).astype(int)

    first = 30 - world.context_frames
    for t, picture in enumerate(written, start=first):
        true = panel(np.full((H, W, 3), 5 * t, np.uint8), "recorded", t - 0.5, 0.1)
        height, width, _ = true.shape
        drawn = rearrange(picture.astype(int), "(r h) (c w) k -> (r c) h w k", h=height, w=width)
        expected = [true]
        if t <= 30:
            known = (None, None) if t == first else (t - 0.5, 0.1)
            expected = [panel(np.full((H, W, 3), 5 * t, np.uint8), "context", *known)] * 3
        else:
            if t >= 40:
                grey = np.full((H, W, 3), 40, np.uint8)
                expected = [panel(grey, "recording ended", None, None)]
            frames = world.tokenizer.decode(saved[:, t - 31].astype(np.int64)).numpy()
            for frame, plan in zip(frames, plans, strict=True):
                expected.append(panel(frame, plan.label, *plan.actions[t - 31].tolist()))
        # The codec changes grey levels by one or two.
        assert np.abs(drawn[:3] - expected).max() <= 3
    assert len(written) == world.context_frames + 1 + 12


def test_memory_does_not_grow_with_the_length(
    world: WorldModel, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaces the sampler, whose memory another test measures, by random tokens.

    A rollout may keep only frames of the contact sheet, and has none between the two measurements.
    """
    traced: list[int] = []

    def generate(*arguments: object, **options: object) -> Iterator[FrameSample]:
        for number in range(1050):
            if number in (50, 1049):
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
            tokens = torch.randint(9, (1, ROWS, COLS))
            yield FrameSample(tokens, *[tokens.float()] * 3)

    monkeypatch.setattr(world, "generate", generate)
    monkeypatch.setattr(rollout, "_SHEET_COLUMNS", 2)
    monkeypatch.setattr(panels, "draw_panel", lambda frame, *caption: frame)
    past = context(world, video)
    plans = make_plans(["left"], past.situation(world), seconds=1050 / FPS)
    tracemalloc.start()
    try:
        write_rollout(world, past, plans, tmp_path / "rollout.mp4", sampling=Sampling())
    finally:
        tracemalloc.stop()
    assert load_file(tmp_path / "rollout.safetensors")["tokens"].shape == (1, 1050, ROWS, COLS)
    before, after = traced
    # Even an empty array takes 112 bytes, so one that is kept per frame exceeds this bound. torch's
    # own strings, up to 9 kB in 2,000 frames, stay below it.
    assert (after - before) / 999 < 4000 / 149


def test_recorded_and_repeated_plans_have_rows_of_their_own(
    world: WorldModel, video: Path, tmp_path: Path
) -> None:
    past = context(world, video, start_s=30 / FPS)
    plans = make_plans(["recorded", "left", "left"], past.situation(world), seconds=4 / FPS)
    report = write_rollout(world, past, plans, tmp_path / "r.mp4", sampling=Sampling())
    assert report["futures"] == ["recorded", "left", "left"]
    saved = load_file(tmp_path / "r.safetensors")["tokens"]
    np.testing.assert_array_equal(saved[1], saved[2])


def test_a_video_of_another_rate_is_refused(world: WorldModel, tmp_path: Path) -> None:
    slow = tmp_path / "slow.mp4"
    write_video(slow, (np.zeros((H, W, 3), np.uint8) for _ in range(20)), fps=FPS / 2)
    with pytest.raises(DriveSimError, match="too far from the model's"):
        context(world, slow)


def test_a_full_disk_leaves_nothing_behind(world: WorldModel, video: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DriveSimError, match="cannot write"):
            roll(world, video, tmp_path / "rollout.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_all_files_of_a_rollout(
    world: WorldModel, video: Path, tmp_path: Path
) -> None:
    """The folder may exist, even with a name like that of a video, or not."""
    roll(world, video, tmp_path / "rollout.mp4")
    (tmp_path / "there.mp4").mkdir()
    for folder in (tmp_path / "new" / "run-1.5", tmp_path / "there.mp4"):
        assert output_files(folder) == output_files(folder / "rollout.mp4")
        roll(world, video, folder)
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in tmp_path.iterdir() if path.is_file()
        }
        saved, expected = (
            load_file(path / "rollout.safetensors")["tokens"] for path in (folder, tmp_path)
        )
        np.testing.assert_array_equal(saved, expected)


@pytest.mark.parametrize("name", ["rollout.gif", "rollout.m4v"])
def test_an_output_that_is_neither_an_mp4_nor_a_folder_is_refused(name: str) -> None:
    with pytest.raises(DriveSimError, match=r"neither an \.mp4 file nor a folder"):
        output_files(Path(name))
