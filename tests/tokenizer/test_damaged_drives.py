"""A damaged stretch of a video costs this stretch of the store, and is named there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.tokens.windows import WindowIndex
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import BadDriveError
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.tokenizer.training import _decodable, validation_frames
from tests.fixtures.video_files import damage, read_numbers, write_numbered

SIZE = FrameSize(height=48, width=128)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        height=SIZE.height,
        width=SIZE.width,
        levels=(5, 4),
        widths=(16, 16, 16),
        blocks=(0, 0, 0),
        attention_blocks=0,
        head_size=16,
    )
    return Tokenizer(Autoencoder(config))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_numbered(folder / "a.mp4", count=60)
    write_numbered(folder / "b.mp4", count=60)
    return folder


def test_no_window_contains_a_lost_frame(
    videos: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize(find_drives([videos]), tokenizer, tmp_path / "clean")
    damage(videos / "b.mp4", 24, 24)
    drives = find_drives([videos])
    frames = list(drives.drives[1].stream_with_losses(SIZE))
    lost = np.array([frame is None for frame in frames])
    assert set(range(24, 36)) <= set(np.flatnonzero(lost).tolist()) <= set(range(20, 36))
    for mirror, name in ((False, "tokens"), (True, "mirrored")):
        index = tokenize(drives, tokenizer, tmp_path / name, mirror=mirror, batch_size=7)
        assert (index.skipped, index.frames) == ((), 120 * (1 + mirror))
        for drive in TokenStore(tmp_path / name).drives:
            if not drive.entry.id.startswith("b"):
                assert (drive.entry.segments, drive.entry.notices) == (((0, 60),), ())
                continue
            (notice,) = drive.entry.notices
            assert notice.startswith(f"damaged at {np.flatnonzero(lost)[0] / 20:.2f} to 1.")
            windows = WindowIndex([drive], frames=2)
            _, starts, has_previous = windows.places(np.arange(len(windows)))
            used = {start + n for start in starts for n in (0, 1)}
            used |= set((starts - 1)[has_previous].tolist())
            assert used == set(np.flatnonzero(~lost).tolist())
    assert capsys.readouterr().err.count("frames there are left out (b)") == 2
    clean, damaged = (TokenStore(tmp_path / name).drives[1] for name in ("clean", "tokens"))
    np.testing.assert_array_equal(damaged.tokens[~lost], clean.tokens[~lost])


def test_a_drive_that_is_damaged_all_over_is_bad(
    videos: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    drives = find_drives([videos])
    damage(videos / "b.mp4", 0, 59)
    with pytest.raises(BadDriveError, match=r"b: all but 0 of its 60 frames are damaged"):
        tokenize(drives, tokenizer, tmp_path / "tokens")
    index = tokenize(drives, tokenizer, tmp_path / "tokens", skip_bad=True)
    assert [skipped.id for skipped in index.skipped] == ["b"]


def test_training_uses_the_intact_frames_of_a_damaged_drive(videos: Path) -> None:
    damage(videos / "b.mp4", 24, 24)
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    kept = _decodable(drives, SIZE, "cpu")
    assert [sampled.drive.id for sampled in kept] == ["a", "b"]
    numbers = read_numbers(validation_frames([drives[1]], SIZE, 60).numpy())
    assert set(numbers) <= {*range(24), *range(36, 60)}
    assert len(numbers) > 40
