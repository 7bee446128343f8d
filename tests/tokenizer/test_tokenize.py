import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.data.actions.action_file import write_action_file
from driving_sim.data.drive import Drive, DriveSet, FrameReader, sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.decoder_pool import LIMIT
from driving_sim.data.video.frame_size import FrameSize, transform_description
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import BadDriveError, DriveSimError
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from tests import ROOT
from tests.fixtures.video_files import make_hang

SIZE = FrameSize(height=32, width=64)
FRAMES, FPS, BATCH = 21, 10, 4
NAMES = ("a", "b", "c")


def make_tokenizer() -> Tokenizer:
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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in NAMES:
        picture = np.kron(rng.integers(0, 256, (4, 40, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = [np.roll(picture, 3 * n, axis=1)[:, : SIZE.width] for n in range(FRAMES)]
        write_video(folder / f"{name}.mp4", frames, FPS)
        times = np.arange(FRAMES) / FPS
        actions = np.stack([times + 5, times / 10], 1).astype(np.float32)
        write_action_file(folder / f"{name}.csv", times, actions, "road_wheel")
    return folder


@pytest.fixture(scope="module")
def drives(videos: Path) -> DriveSet:
    return find_drives([videos])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class Damaged(FrameReader):
    """Reads `good` frames, then raises an error, or just ends if `silent`."""

    def __init__(self, reader: FrameReader, good: int, *, silent: bool) -> None:
        self._reader, self._good, self._silent = reader, good, silent

    def read(self, indices: Any, size: FrameSize | None) -> NDArray[np.uint8]:
        return self._reader.read(indices, size)

    def files(self, indices: Any) -> list[Path]:
        return self._reader.files(indices)

    def stream(self, indices: Any, size: FrameSize | None) -> Iterator[NDArray[np.uint8] | None]:
        for number, frame in enumerate(self._reader.stream(indices, size)):
            if number == self._good:
                if self._silent:
                    return
                raise DriveSimError("/there/b.mp4: frame 7 is damaged")
            yield frame


def with_damage(drives: DriveSet, *, silent: bool = False) -> DriveSet:
    return DriveSet(
        [
            replace(drive, reader=Damaged(drive.reader, 7, silent=silent))
            if drive.id == "b"
            else drive
            for drive in drives.drives
        ]
    )


def test_the_store_holds_the_tokens_of_the_chosen_frames_and_their_actions(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    index = tokenize(drives, tokenizer, tmp_path / "tokens", every=2, batch_size=BATCH)
    store = TokenStore(tmp_path / "tokens")
    assert store.drive_ids == NAMES
    assert len({drive.tokens.tobytes() for drive in store.drives}) == len(NAMES)
    for drive, stored in zip(drives.drives, store.drives, strict=True):
        sampled = sample(drive, every=2)
        frames = np.stack(list(drive.stream(SIZE, sampled.indices)))
        expected = tokenizer.encode(frames, batch_size=BATCH).numpy()
        np.testing.assert_array_equal(stored.tokens, expected)
        np.testing.assert_array_equal(stored.actions, sampled.actions)
        np.testing.assert_array_equal(stored.action_valid, sampled.action_valid)
        np.testing.assert_array_equal(stored.timestamps, sampled.timestamps)
        assert stored.entry.segments == tuple(sampled.segments)
    assert str(index) == "tokens of 3 drives, 33 frames at 5 fps"


def test_a_rate_that_is_no_whole_stride_is_stored(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    faster = DriveSet([slower(drives.drives[0], 10 / 14)])
    index = tokenize(faster, tokenizer, tmp_path / "tokens", fps=10)
    (stored,) = TokenStore(tmp_path / "tokens").drives
    assert len(stored) < FRAMES
    assert stored.entry.segments == ((0, len(stored)),)
    assert index.info.fps == pytest.approx(10, rel=0.03)


def test_the_store_says_what_a_model_needs_to_know(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenize(drives, tokenizer, tmp_path / "tokens", fps=5.2)
    info = TokenStore(tmp_path / "tokens").info
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    assert (info.rows, info.cols, info.height, info.width) == (2, 4, SIZE.height, SIZE.width)
    assert (info.levels, info.codebook_size) == ((5, 4), 20)
    assert info.fps == pytest.approx(5.0)
    assert (info.requested_fps, info.every) == (5.2, None)
    assert info.steering_kind == "road_wheel"
    assert info.transform == transform_description(SIZE)
    assert {drive.entry.source for drive in TokenStore(tmp_path / "tokens").drives} == {"video"}


def test_a_mirrored_drive_is_flipped_and_steers_the_other_way(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenize(drives, tokenizer, tmp_path / "tokens", mirror=True, batch_size=BATCH)
    store = TokenStore(tmp_path / "tokens")
    assert store.drive_ids == ("a", "a~mirror", "b", "b~mirror", "c", "c~mirror")
    plain, mirrored = store.drives[:2]
    frames = np.stack(list(drives.drives[0].stream(SIZE)))
    flipped = np.ascontiguousarray(frames[:, :, ::-1])
    expected = tokenizer.encode(flipped, batch_size=BATCH).numpy()
    np.testing.assert_array_equal(mirrored.tokens, expected)
    assert (mirrored.tokens != plain.tokens).any()
    np.testing.assert_array_equal(mirrored.actions, plain.actions * [1, -1])
    assert (plain.actions[:, 1] > 0).any()
    assert (plain.entry.mirrored, mirrored.entry.mirrored) == (False, True)


def test_videos_without_actions_have_no_valid_actions(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bare = DriveSet([replace(drive, log=None) for drive in drives.drives])
    tokenize(bare, tokenizer, tmp_path / "tokens")
    store = TokenStore(tmp_path / "tokens")
    assert store.info.steering_kind is None
    assert not any(drive.action_valid.any() for drive in store.drives)


KILLED = """
import os, signal, sys
from pathlib import Path
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.tokenizer.tokenize import tokenize
from tests.tokenizer.test_tokenize import BATCH, make_tokenizer

add = TokenStoreWriter.add

def add_and_die(*arguments):
    add(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

TokenStoreWriter.add = add_and_die
tokenize(find_drives([Path(sys.argv[1])]), make_tokenizer(), Path(sys.argv[2]), mirror=True,
         batch_size=BATCH)
"""


def test_a_killed_run_continues_to_the_same_bytes(
    drives: DriveSet, videos: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(videos), str(out)],
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    done = list((out / ".unfinished").glob("part-*"))
    written = {part.name: part.stat().st_mtime_ns for part in done}
    assert len(done) == 1
    with pytest.raises(DriveSimError, match=r"fps was 10\.0 and is now 5\.0"):
        tokenize(drives, tokenizer, out, fps=5, mirror=True, batch_size=BATCH)
    assert {part.name: part.stat().st_mtime_ns for part in done} == written

    encoded = 0

    class Counting(Tokenizer):
        def encode(self, frames: Any, *, batch_size: int = BATCH) -> torch.Tensor:
            nonlocal encoded
            encoded += len(frames)
            return super().encode(frames, batch_size=batch_size)

    counting = Counting(tokenizer.autoencoder)
    tokenize(drives, counting, out, mirror=True, batch_size=BATCH)
    assert encoded == (6 - len(done)) * FRAMES  # finished drives are not encoded again
    tokenize(drives, tokenizer, uninterrupted, mirror=True, batch_size=BATCH)
    assert contents(out) == contents(uninterrupted)
    assert str(videos).encode() not in b"".join(contents(out).values())


def test_a_finished_store_is_not_written_over(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenize(drives, tokenizer, tmp_path / "tokens")
    before = contents(tmp_path)
    with pytest.raises(DriveSimError, match="finished"):
        tokenize(drives, tokenizer, tmp_path / "tokens")
    assert contents(tmp_path) == before


def test_a_file_that_is_no_video_stops_at_once_or_is_skipped(
    videos: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for file in videos.iterdir():
        os.link(file, folder / file.name)
    (folder / "bad one.mp4").write_text("no video")
    with pytest.raises(BadDriveError, match=r"bad one\.mp4: .*repair or remove it$") as caught:
        tokenize(find_drives([folder]), tokenizer, tmp_path / "tokens")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokens").exists()

    index = tokenize(find_drives([folder]), tokenizer, tmp_path / "tokens", skip_bad=True)
    store = TokenStore(tmp_path / "tokens")
    assert store.drive_ids == NAMES
    assert [skipped.id for skipped in store.index.skipped] == ["bad one"]
    assert "1 skipped" in str(index)
    assert str(tmp_path) not in (tmp_path / "tokens" / "index.json").read_text()


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("mirror", [True, False])
def test_damage_found_while_decoding_stops_or_is_skipped(
    drives: DriveSet,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    silent: bool,
    mirror: bool,
) -> None:
    damaged = with_damage(drives, silent=silent)
    reason = "only 7 of 21 frames" if silent else "frame 7 is damaged"
    with pytest.raises(BadDriveError, match=f"{reason}.*repair or remove it$"):
        tokenize(damaged, tokenizer, tmp_path / "tokens", mirror=mirror)
    parts = list((tmp_path / "tokens" / ".unfinished").glob("part-*"))
    assert len(parts) == 1 + mirror  # the drive before the bad one is kept

    tokenize(damaged, tokenizer, tmp_path / "tokens", mirror=mirror, skip_bad=True)
    assert reason in capsys.readouterr().err
    store = TokenStore(tmp_path / "tokens")
    assert [skipped.id for skipped in store.index.skipped] == ["b", "b~mirror"][: 1 + mirror]
    assert all(reason in skipped.reason for skipped in store.index.skipped)
    assert "/there" not in (tmp_path / "tokens" / "index.json").read_text()
    tokenize(damaged, tokenizer, tmp_path / "at once", mirror=mirror, skip_bad=True)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "at once")


def slower(drive: Drive, factor: float) -> Drive:
    assert drive.log is not None
    return replace(drive, timestamps=drive.timestamps * factor)


def test_a_video_that_hangs_its_decoder_is_skipped(
    videos: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    drives = find_drives([tmp_path / "videos"])
    make_hang(tmp_path / "videos" / "b.mp4")
    monkeypatch.setenv(LIMIT, "1")
    with pytest.raises(BadDriveError, match=r"b\.mp4: its decoder gave no sign "):
        tokenize(drives, tokenizer, tmp_path / "tokens")
    tokenize(drives, tokenizer, tmp_path / "tokens", skip_bad=True)
    store = TokenStore(tmp_path / "tokens")
    assert store.drive_ids == ("a", "c")
    assert [skipped.id for skipped in store.index.skipped] == ["b"]


def test_a_drive_of_another_rate_is_bad(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second, third = drives.drives
    mixed = DriveSet([first, slower(second, 1.6), third])
    with pytest.raises(DriveSimError, match=r"b: has 6\.25 frames per second.*`fps`\); "):
        tokenize(mixed, tokenizer, tmp_path / "tokens")
    tokenize(mixed, tokenizer, tmp_path / "tokens", skip_bad=True)
    assert TokenStore(tmp_path / "tokens").drive_ids == ("a", "c")
    alike = DriveSet([first, slower(second, 1.1), third])
    tokenize(alike, tokenizer, tmp_path / "alike")


def test_short_drives_and_no_drives_are_errors(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DriveSimError, match="1 frame at this rate"):
        tokenize(drives, tokenizer, tmp_path / "tokens", every=FRAMES)
    with pytest.raises(DriveSimError, match="nothing to tokenize: a: 1 frame"):
        tokenize(drives, tokenizer, tmp_path / "tokens", every=FRAMES, skip_bad=True)
    with pytest.raises(DriveSimError, match="no drives"):
        tokenize(DriveSet([]), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_kinds_of_steering_do_not_mix(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second, third = drives.drives
    assert second.log is not None
    mixed = replace(second, log=replace(second.log, steering_kind="curvature"))
    with pytest.raises(DriveSimError, match="mix"):
        tokenize(DriveSet([first, mixed, third]), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_other_actions_change_the_plan(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DriveSimError, match="damaged"):
        tokenize(with_damage(drives), tokenizer, tmp_path / "tokens")
    first, second, third = drives.drives
    assert third.log is not None
    assert third.log.speed is not None
    faster = replace(third.log.speed, values=third.log.speed.values * 2)
    changed = replace(third, log=replace(third.log, speed=faster))
    with pytest.raises(DriveSimError, match="their actions differ"):
        tokenize(DriveSet([first, second, changed]), tokenizer, tmp_path / "tokens")


@pytest.mark.parametrize(
    ("drive", "frame", "call"),
    [(0, BATCH, 1), (1, 0, -(-FRAMES // BATCH))],
    ids=["next batch", "next drive"],
)
def test_the_next_batch_is_decoded_while_a_batch_is_encoded(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path, drive: int, frame: int, call: int
) -> None:
    """The frame is decoded before the encoder's call number `call` returns."""
    decoded = threading.Event()

    class Watched(Damaged):
        def stream(
            self, indices: Any, size: FrameSize | None
        ) -> Iterator[NDArray[np.uint8] | None]:
            for number, picture in enumerate(super().stream(indices, size)):
                if number == frame:
                    decoded.set()
                yield picture

    class Waiting(Tokenizer):
        calls = 0

        def encode(self, frames: Any, *, batch_size: int = BATCH) -> torch.Tensor:
            self.calls += 1
            assert self.calls != call or decoded.wait(timeout=20)
            return super().encode(frames, batch_size=batch_size)

    two = list(drives.drives[:2])
    two[drive] = replace(two[drive], reader=Watched(two[drive].reader, FRAMES, silent=True))
    waiting = Waiting(tokenizer.autoencoder)
    tokenize(DriveSet(two), waiting, tmp_path / "tokens", batch_size=BATCH)
    assert [len(stored) for stored in TokenStore(tmp_path / "tokens").drives] == [FRAMES] * 2


class StoppedError(Exception):
    """An error that is not the fault of a drive, so not a DriveSimError."""


def test_a_drive_is_written_even_if_the_next_one_fails(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    class Broken(Damaged):
        def stream(
            self, indices: Any, size: FrameSize | None
        ) -> Iterator[NDArray[np.uint8] | None]:
            raise StoppedError

    first, second = drives.drives[:2]
    broken = replace(second, reader=Broken(second.reader, FRAMES, silent=True))
    out = tmp_path / "tokens"
    with pytest.raises(StoppedError):
        tokenize(DriveSet([first, broken]), tokenizer, out)
    encoded: list[int] = []

    class Counting(Tokenizer):
        def encode(self, frames: Any, *, batch_size: int = BATCH) -> torch.Tensor:
            encoded.append(len(frames))
            return super().encode(frames, batch_size=batch_size)

    tokenize(DriveSet([first, second]), Counting(tokenizer.autoencoder), out)
    assert sum(encoded) == FRAMES


def test_an_error_while_encoding_waits_for_the_decoder_to_end(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    begun, end, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow(Damaged):
        def stream(
            self, indices: Any, size: FrameSize | None
        ) -> Iterator[NDArray[np.uint8] | None]:
            begun.set()
            assert end.wait(timeout=20)
            try:
                yield from super().stream(indices, size)
            finally:
                closed.set()

    class Failing(Tokenizer):
        def encode(self, frames: Any, *, batch_size: int = BATCH) -> torch.Tensor:
            assert begun.wait(timeout=20)
            threading.Timer(0.2, end.set).start()
            raise StoppedError

    first, second = drives.drives[:2]
    slow = replace(second, reader=Slow(second.reader, FRAMES, silent=True))
    failing = Failing(tokenizer.autoencoder)
    with pytest.raises(StoppedError):
        tokenize(DriveSet([first, slow]), failing, tmp_path / "tokens", batch_size=FRAMES)
    assert closed.is_set()


def test_without_skip_bad_no_drive_is_decoded_after_a_bad_one(
    drives: DriveSet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    opened = []

    class Watched(Damaged):
        def stream(
            self, indices: Any, size: FrameSize | None
        ) -> Iterator[NDArray[np.uint8] | None]:
            opened.append(True)
            return super().stream(indices, size)

    first, second = drives.drives[:2]
    bad = replace(first, reader=Damaged(first.reader, 2, silent=False))
    watched = replace(second, reader=Watched(second.reader, FRAMES, silent=True))
    with pytest.raises(BadDriveError, match=r"repair or remove it$"):
        tokenize(DriveSet([bad, watched]), tokenizer, tmp_path / "tokens")
    assert not opened


def test_drives_of_8_to_11_frames_per_second_make_one_store(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for rate in (8, 10, 11):
        write_video(tmp_path / f"at_{rate}.mp4", np.zeros((30, 32, 64, 3), np.uint8), rate)
    drives = find_drives([tmp_path])
    index = tokenize(drives, tokenizer, tmp_path / "tokens", fps=10)
    assert index.drives == 3
    notices = {entry.id: entry.notices for shard in index.shards for entry in shard.drives}
    assert notices["at_10"] == ()
    assert "makes 8 frames/s, not the 10 asked for" in notices["at_8"][0]
    assert "makes 11 frames/s, not the 10 asked for" in notices["at_11"][0]
