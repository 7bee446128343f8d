"""Written videos can be played and read back; after an error there is no file at all."""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from driving_sim.data.video.file_facts import read_facts
from driving_sim.data.video.reader import stream_frames
from driving_sim.data.video.writer import (
    FAST,
    SMALL,
    video_writer,
    write_animation,
    write_video,
)
from driving_sim.engine.errors import DriveSimError


def gradient(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Make smooth frames that survive compression; every frame is brighter than the last."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([y, x, (x + y) / 2], axis=-1)[None] + 8 * np.arange(count)[:, None, None, None]
    return base.astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 97)])
@pytest.mark.parametrize("x264", [SMALL, FAST], ids=["small", "fast"])
def test_frames_come_back_with_their_times(
    tmp_path: Path, height: int, width: int, x264: Mapping[str, str]
) -> None:
    frames = gradient(12, height, width)
    with video_writer(tmp_path / "x.mp4", fps=12.5, height=height, width=width, x264=x264) as write:
        for frame in frames:
            write(frame)
    facts = read_facts(tmp_path / "x.mp4")
    read = np.stack([frame for frame in stream_frames(facts) if frame is not None])
    assert (facts.width % 2, facts.height % 2) == (0, 0)
    padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    padded = np.pad(frames, padding, mode="edge").astype(int)
    assert np.abs(read - padded).mean(axis=(1, 2, 3)).max() < 3
    assert np.abs(read - padded)[:, -1].mean() < 4
    assert np.abs(read - padded)[:, :, -1].mean() < 4
    np.testing.assert_allclose(facts.timestamps, np.arange(12) / 12.5, atol=1e-4)


def test_file_is_h264_yuv420p_with_its_index_in_front(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    write_video(path, gradient(3, 32, 32), fps=10)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_an_animation_loops_at_its_rate(tmp_path: Path) -> None:
    path, frames = tmp_path / "x.webp", gradient(4, 48, 64)
    write_animation(path, frames, fps=8)
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        pictures = ImageSequence.all_frames(animation, lambda frame: frame.convert("RGB"))
    assert [picture.info["duration"] for picture in pictures] == [125] * 4
    difference = np.stack([np.asarray(picture) for picture in pictures]).astype(int) - frames
    assert np.abs(difference).mean(axis=(1, 2, 3)).max() < 4


def test_an_animation_needs_frames(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match=r"x\.webp: no frames to write"):
        write_animation(tmp_path / "x.webp", [], fps=8)
    assert list(tmp_path.iterdir()) == []


def test_the_fast_options_reach_the_encoder(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    with video_writer(path, fps=10, height=32, width=32, x264=FAST) as write:
        write(gradient(1, 32, 32)[0])
    content = path.read_bytes()  # x264 writes its settings into the stream.
    for setting in (b"cabac=1", b"deblock=0", b"bframes=0"):
        assert setting in content


def test_an_error_while_writing_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    two_sizes = [*gradient(3, 32, 32), *gradient(1, 32, 34)]
    with pytest.raises(ValueError, match="expected uint8"):
        write_video(path, two_sizes, fps=10)
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
    assert path.read_bytes() == b"old"


def test_no_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no frames"):
        write_video(tmp_path / "x.mp4", [], fps=10)
    with (
        pytest.raises(DriveSimError, match="no frames"),
        video_writer(tmp_path / "y.mp4", fps=10, height=32, width=32),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_gives_a_one_line_error_and_leaves_no_file(tmp_path: Path, limit: int) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import DriveSimError
noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
try:
    write_video(Path(sys.argv[1]), noise, fps=10)
except DriveSimError as error:
    sys.exit(f"one line: {error}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.mp4")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("one line: ")
    assert "x.mp4" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
