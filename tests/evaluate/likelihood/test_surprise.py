import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.likelihood import surprise as surprise_module
from driving_sim.evaluate.likelihood.surprise import _file_names, find_surprises
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.panels import contact_sheet, draw_panel
from driving_sim.world_model.training.bits import streamed_bits_per_token
from driving_sim.world_model.transformer import Transformer, TransformerConfig
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS
from tests.fixtures.video_files import write_numbered
from tests.fixtures.world_models import W, new_world

H, WIDTH = 16 * ROWS, 16 * COLS
Cell = tuple[int, int]


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> WorldModel:
    """Model that expects every frame to repeat the last. Its tokens are either dark or bright."""
    world = new_world()
    config = TransformerConfig(
        layers=1, width=24, heads=2, kv_heads=2, context_frames=W, previous_reach=0
    )
    model = Transformer(config, world.config.grid, ActionStatistics())
    for parameter in model.parameters():
        parameter.data.zero_()
    for part in model.modules():
        if isinstance(part, nn.RMSNorm):
            part.weight.data.fill_(1)
    for table in (model.previous, model.output):
        table.codes.data[:, :9] = torch.eye(9)

    def encode(frames: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(8 * (frames[:, 8::16, 8::16].mean(-1) > 128).astype(np.int64))

    monkeypatch.setattr(world.tokenizer, "encode", encode)
    return WorldModel(model, world.tokenizer, fps=FPS, steering_kind=None)


def write_changes(path: Path, count: int, changes: dict[int, list[Cell]]) -> None:
    """Write a video of bright frames; `changes` says which cells turn dark for good, and when."""
    frames = np.full((count, H, WIDTH, 3), 255, np.uint8)
    for start, cells in changes.items():
        for row, col in cells:
            frames[start:, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, FPS)


def run(world: WorldModel, folder: Path) -> dict[str, Any]:
    return find_surprises(world, find_drives([folder]).drives, folder.parent / "out")


def video_frames(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frame.astype(np.uint8) for frame in decoded]


def test_tokens_cost_what_they_cost_when_streamed_from_a_store(
    world: WorldModel, tmp_path: Path
) -> None:
    """Drive "a" has actions. Drive "b" has a gap and no actions."""
    videos, rng = tmp_path / "videos", np.random.default_rng(0)
    videos.mkdir()
    write_video(videos / "a.mp4", rng.integers(256, size=(20, H, WIDTH, 3), dtype=np.uint8), FPS)
    rows = [f"{t / FPS},{rng.uniform(3, 9)},{rng.uniform(-0.3, 0.3)}" for t in range(21)]
    header = "timestamp_s,speed_mps,road_wheel_rad"
    (videos / "a.csv").write_text("\n".join([header, *rows]) + "\n")
    write_numbered(
        videos / "b.mp4", count=20, times_ms=[125 * t + 900 * (t > 8) for t in range(20)]
    )
    drives = find_drives([videos])
    report = find_surprises(world, drives.drives, tmp_path / "out")
    tokenize(drives, world.tokenizer, tmp_path / "tokens", fps=FPS)
    streamed = streamed_bits_per_token(world.transformer, TokenStore(tmp_path / "tokens").drives)
    for number, name in enumerate("ab"):
        drive, bits = report["drives"][name], streamed.bits[streamed.drive == number]
        np.testing.assert_allclose(drive["per_frame"]["bits_per_token"], bits, atol=1e-5)
        behind = [t - 9 * (name == "b" and t > 8) for t in range(20)]
        assert drive["per_frame"]["counted"] == [frames >= W - 1 for frames in behind]
        counted = bits[drive["per_frame"]["counted"]]
        assert drive["bits_per_token"] == pytest.approx(counted.mean(), abs=1e-5)
        p95 = np.quantile(counted, 0.95)
        assert drive["p95_bits_per_token"] == pytest.approx(p95, abs=1e-5)


def test_a_planted_change_is_the_top_moment_and_glows_at_its_cell(
    copying: WorldModel, tmp_path: Path
) -> None:
    write_changes(tmp_path / "videos" / "a.mp4", 30, {5: [(0, 0)], 25: [(1, 2)]})
    write_changes(tmp_path / "videos" / "b.mp4", 20, {12: [(2, 1), (2, 2)]})
    report = run(copying, tmp_path / "videos")
    places = [(moment["drive"], moment["time_s"] * FPS) for moment in report["moments"][:3]]
    assert places[0] == ("b", 12)
    assert sorted(places[1:]) == [("a", 5), ("a", 25)]  # Both have the same bits.
    for name, t, cell in [("a", 5, (0, 0)), ("a", 25, (1, 2))]:
        picture = video_frames(tmp_path / "out" / f"{name}.mp4")[t]
        real, heat = np.split(picture[30:].astype(float), 2, axis=1)
        glow = (heat - 0.35 * real).sum(-1)  # Subtract the grey frame below the colours.
        row, col = np.unravel_index(glow.argmax(), glow.shape)
        assert (row * ROWS // glow.shape[0], col * COLS // glow.shape[1]) == cell


def test_drives_are_ranked_by_the_bits_of_their_frames(copying: WorldModel, tmp_path: Path) -> None:
    write_changes(tmp_path / "videos" / "calm.mp4", 20, {})
    write_changes(tmp_path / "videos" / "more.mp4", 20, {9: [(0, 0)], 11: [(1, 1)], 15: [(2, 2)]})
    write_changes(tmp_path / "videos" / "some.mp4", 20, {9: [(0, 0)]})
    # A change before the model has a full window does not count.
    write_changes(tmp_path / "videos" / "start.mp4", 20, {1: [(0, c) for c in range(COLS)]})
    report = run(copying, tmp_path / "videos")
    assert report["ranking"][:2] == ["more", "some"]
    costs = [report["drives"][name]["bits_per_token"] for name in report["ranking"]]
    assert costs[0] > costs[1] > costs[2] == pytest.approx(costs[3], abs=1e-5)
    frames = [(moment["drive"], moment["time_s"]) for moment in report["moments"]]
    assert {name for name, _ in frames} == set(report["ranking"])
    for n, (name, time_s) in enumerate(frames):
        assert all(name != earlier or abs(time_s - at) >= 2 for earlier, at in frames[:n])


def test_the_top_moments_are_those_of_all_drives_together(
    copying: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected moments are chosen greedily from all frames, at least 2 s apart."""
    monkeypatch.setattr(surprise_module, "_MOMENTS", 3)
    rng = np.random.default_rng(0)
    for name in "abc":
        changes = {int(t): [(int(t) % ROWS, 0), (1, 1)] for t in rng.integers(4, 40, 6)}
        write_changes(tmp_path / "videos" / f"{name}.mp4", 40, changes)
    report = run(copying, tmp_path / "videos")
    frames = [
        (-bits, name, time_s)
        for name, drive in report["drives"].items()
        for bits, time_s, counted in zip(
            *(drive["per_frame"][k] for k in ("bits_per_token", "time_s", "counted")), strict=True
        )
        if counted
    ]
    expected: list[tuple[str, float]] = []
    for _, name, time_s in sorted(frames):
        if all(name != chosen or abs(time_s - at) >= 2 for chosen, at in expected):
            expected.append((name, time_s))
    moments = [(moment["drive"], moment["time_s"]) for moment in report["moments"]]
    assert moments == expected[:3]


def test_the_folder_holds_everything(copying: WorldModel, tmp_path: Path) -> None:
    for name in ("a/front.mp4", "b/front.mp4"):
        write_changes(tmp_path / "videos" / name, 20, {9: [(0, 0)]})
    report = run(copying, tmp_path / "videos")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "a_front.mp4",
        "b_front.mp4",
        "moments.png",
        "surprise.json",
        "surprise.png",
    ]
    assert json.loads((out / "surprise.json").read_text()) == report
    assert report["fingerprints"]["world_model"] == copying.fingerprint
    assert report["drives"]["a/front"]["video"] == "a_front.mp4"
    pictures = video_frames(out / "a_front.mp4")
    assert len(pictures) == 20
    real = pictures[10][-1:, : pictures[10].shape[1] // 2]
    assert np.abs(real.astype(int) - 255).max() < 4
    with Image.open(out / "moments.png") as sheet:
        assert sheet.width >= 3 * 256


def test_file_names_are_safe_and_different() -> None:
    names = _file_names(["a/b", "a_b", "A|b", "ä $ 1~mirror"])
    assert names == ["a_b", "a_b_", "A_b__", "ä_1~mirror"]


def test_an_existing_folder_is_refused_and_a_failure_leaves_no_folder(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_changes(tmp_path / "videos" / "a.mp4", 5, {})

    def full(*arguments: object) -> None:
        raise DriveSimError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(surprise_module, "_draw_curves", full)
        with pytest.raises(DriveSimError, match="disk is full"):
            run(world, tmp_path / "videos")
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]
    (tmp_path / "out").mkdir()
    with pytest.raises(DriveSimError, match="out: exists already; choose another `out`"):
        run(world, tmp_path / "videos")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_drive_shorter_than_a_window_is_judged_by_all_but_its_first_frame(
    world: WorldModel, tmp_path: Path
) -> None:
    write_changes(tmp_path / "videos" / "a.mp4", W - 1, {})
    report = run(world, tmp_path / "videos")
    frames = report["drives"]["a"]["per_frame"]
    assert frames["counted"] == [False, True]
    assert report["bits_per_token"] == frames["bits_per_token"][1]
    write_changes(tmp_path / "short" / "videos" / "a.mp4", 1, {})
    with pytest.raises(DriveSimError, match="a: the video has no two consecutive frames"):
        run(world, tmp_path / "short" / "videos")


def test_a_short_drive_is_marked_and_comes_last(
    copying: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its change surprises the model most, but only because the model has little context."""
    write_changes(tmp_path / "videos" / "a_short.mp4", W - 1, {1: [(r, 0) for r in range(ROWS)]})
    write_changes(tmp_path / "videos" / "calm.mp4", 20, {})
    write_changes(tmp_path / "videos" / "lively.mp4", 20, {9: [(0, 0)]})
    titles: list[str] = []

    def drawing(frame: Any, title: str, *led: Any) -> Any:
        titles.append(title)
        return draw_panel(frame, title, *led)

    def listing(rows: Any, headings: Any) -> Any:
        titles.extend(title for title, _ in rows)
        return contact_sheet(rows, headings)

    monkeypatch.setattr(surprise_module, "draw_panel", drawing)
    monkeypatch.setattr(surprise_module, "contact_sheet", listing)
    report = run(copying, tmp_path / "videos")
    drives = report["drives"]
    assert report["ranking"] == ["lively", "calm", "a_short"]
    assert drives["a_short"]["bits_per_token"] > drives["lively"]["bits_per_token"]
    marked = {name: drive["short_context"] for name, drive in drives.items()}
    assert marked == {"a_short": True, "calm": False, "lively": False}
    long = [drives[name]["bits_per_token"] for name in ("lively", "calm")]
    assert report["bits_per_token"] == pytest.approx(np.mean(long))
    assert report["moments"][-1]["drive"] == "a_short"
    # Marked are all frames of the short drive, the first frames of the others, and its moment.
    ends = [title.endswith("(short context)") for title in titles]
    first = [t < W - 1 for t in range(20)]
    moments = [moment["drive"] == "a_short" for moment in report["moments"]]
    assert ends == [True] * (W - 1) + first + first + moments


def test_frames_are_read_as_they_are_drawn(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_changes(tmp_path / "videos" / "a.mp4", 60, {})
    encode, heat_map = world.tokenizer.encode, surprise_module.heat_map
    encoded, drawn = [0], [0]

    def counting(frames: NDArray[np.uint8]) -> torch.Tensor:
        encoded[0] += len(frames)
        return encode(frames)

    def drawing(*arguments: Any) -> NDArray[np.uint8]:
        drawn[0] += 1
        assert encoded[0] <= drawn[0] + 16
        return heat_map(*arguments)

    monkeypatch.setattr(world.tokenizer, "encode", counting)
    monkeypatch.setattr(surprise_module, "heat_map", drawing)
    run(world, tmp_path / "videos")
    assert encoded == [60]


def test_the_legend_fits_the_narrowest_panel() -> None:
    pixels = surprise_module._legend(32, 256, 16.0)
    assert (pixels[:, -3:] == surprise_module._PAPER).all()
