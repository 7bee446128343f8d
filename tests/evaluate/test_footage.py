from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.drive import Drive, DriveSet, SampledDrive, sample
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.index import frame_bytes
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.data.tokens.windows import WindowIndex
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.footage import (
    Clip,
    Footage,
    HeldOutStore,
    check_apart,
    check_tokens_apart,
    choose_clips,
    first_frames,
    footage_of,
    recording_digest,
    recording_digests,
    sampled_fingerprint,
)
from driving_sim.evaluate.rollouts import imagine
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS, write_store
from tests.fixtures.world_models import new_world


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def footage(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Footage]:
    folder = tmp_path_factory.mktemp("footage")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder / "videos", drives=2, seconds=3, config=config)
    videos = find_drives([folder / "videos"])
    tokenize(videos, world.tokenizer, folder / "tokens")
    drives = TokenStore(folder / "tokens").drives
    return footage_of(drives, [sample(drive) for drive in videos.drives], world.tokenizer)


def clip_of(footage: Footage, *, mirrored: bool = False) -> Clip:
    return Clip(footage=footage, start=6, context_frames=4, frames=5, mirrored=mirrored)


def test_frames_are_those_that_the_tokens_were_made_from(
    world: WorldModel, footage: list[Footage]
) -> None:
    for source in footage:
        frames = source.frames(3, 9)
        assert torch.equal(
            world.tokenizer.encode(frames), torch.from_numpy(source.drive.tokens[3:9].astype(int))
        )
        assert source.synthetic is not None
        # The video's codec makes a small difference to the rendered frame.
        rendered = source.synthetic.world.render(source.synthetic.states[3])
        assert np.abs(rendered.astype(float) - frames[0]).mean() < 12


def test_without_a_video_frames_are_reconstructions(world: WorldModel, tmp_path: Path) -> None:
    store = write_store(tmp_path / "tokens", [20], fingerprint=world.tokenizer.fingerprint)
    unrecorded = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    expected = world.tokenizer.decode(store.drives[0].tokens[2:5]).numpy()
    assert np.array_equal(unrecorded.frames(2, 5), expected)


def test_a_clip_is_a_context_and_the_recorded_future(footage: list[Footage]) -> None:
    clip = clip_of(footage[1])
    drive = footage[1].drive
    assert np.array_equal(clip.context, footage[1].frames(2, 6))
    assert np.array_equal(clip.truth, footage[1].frames(6, 11))
    assert np.array_equal(clip.context_tokens.numpy(), drive.tokens[2:6])
    assert np.array_equal(clip.true_tokens.numpy(), drive.tokens[6:11])
    actions, valid = clip.actions
    # The future's first action leads from the last context frame to the first new frame.
    assert np.array_equal(actions, drive.actions[2:10])
    assert np.array_equal(actions[clip.context_frames - 1], drive.actions[5])
    assert valid.all()


def test_the_mirror_image_turns_the_other_way(world: WorldModel, footage: list[Footage]) -> None:
    clip, mirrored = clip_of(footage[0]), clip_of(footage[0], mirrored=True)
    assert np.array_equal(mirrored.truth, clip.truth[:, :, ::-1])
    assert np.array_equal(mirrored.context, clip.context[:, :, ::-1])
    encoded = world.tokenizer.encode(np.ascontiguousarray(clip.context[:, :, ::-1]))
    assert torch.equal(mirrored.context_tokens, encoded)
    (actions, _), (flipped, _) = clip.actions, mirrored.actions
    assert np.array_equal(flipped[:, STEERING], -actions[:, STEERING])
    assert np.array_equal(flipped[:, SPEED], actions[:, SPEED])


def test_clips_are_spread_over_the_drives_and_cross_no_gap(
    world: WorldModel, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "tokens", (40, 30), gap_at=15)
    footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
    all_clips = choose_clips(footage, context_frames=4, frames=5, count=1000)
    places = [(clip.footage.drive.id, clip.start) for clip in all_clips]
    # Runs of 15, 25, 15 and 15 frames, minus a context, have room for 2, 4, 2 and 2 futures of 5.
    assert [start for name, start in places if name == "0"] == [4, 9, 19, 24, 29, 34]
    assert [start for name, start in places if name == "1"] == [4, 9, 19, 24]
    for clip in all_clips:
        runs = clip.footage.drive.entry.segments
        assert any(b <= clip.start - 4 and clip.start + 5 <= e for b, e in runs)
    few = choose_clips(footage, context_frames=4, frames=5, count=4)
    chosen = [places.index((clip.footage.drive.id, clip.start)) for clip in few]
    assert chosen == [1, 3, 6, 8]
    with pytest.raises(DriveSimError, match="no stretch of 44 frames without a gap in 2"):
        choose_clips(footage, context_frames=4, frames=40, count=4)


@pytest.mark.parametrize("count", [3, 7, 1000])
def test_no_two_futures_share_a_frame(world: WorldModel, tmp_path: Path, count: int) -> None:
    """Overlapping clips are not independent, so an interval over them would be too narrow."""
    store = write_store(tmp_path / "tokens", (40, 30), gap_at=15)
    footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
    clips = choose_clips(footage, context_frames=4, frames=3, count=count)
    seen = [(clip.footage.drive.id, clip.start + n) for clip in clips for n in range(clip.frames)]
    assert len(seen) == len(set(seen)) == 3 * min(count, 3 + 7 + 3 + 3)


def test_a_future_does_not_depend_on_the_other_clips_of_its_batch(
    world: WorldModel, footage: list[Footage]
) -> None:
    # Nine clips fill more than one batch.
    clips = choose_clips(footage, context_frames=5, frames=3, count=9)
    assert len(clips) == 9
    sampling = Sampling(seed=3)
    pairs = zip(clips, imagine(world, clips, sampling), strict=True)
    for number, (clip, imagined) in enumerate(pairs):
        assert imagined.clip is clip
        actions, valid = clip.actions
        prefix = world.encode_prefix(clip.context_tokens, actions[:4], valid[:4])
        steps = world.generate(prefix, actions[4:], valid[4:], sampling=sampling, first_draw=number)
        alone = torch.cat([step.tokens for step in steps])
        assert torch.equal(imagined.tokens, alone)
        assert np.array_equal(imagined.frames, world.tokenizer.decode(alone).numpy())
    free = list(imagine(world, clips, sampling, hide_actions=True))
    led = list(imagine(world, clips, sampling))
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(free, led, strict=True))


def split_into_parts(source: Footage, out: Path) -> tuple[DriveTokens, ...]:
    """Tokenize the drive again, in parts of 10 frames."""
    assert source.recorded is not None
    videos = find_drives([source.recorded.drive.video.path])  # type: ignore[union-attr]
    tokenize(videos, source.tokenizer, out, shard_bytes=10 * frame_bytes(ROWS, COLS))
    return TokenStore(out).drives


def test_a_view_of_a_drive_has_fewer_frames_and_channels(tmp_path: Path) -> None:
    drive = write_store(tmp_path / "tokens", (30, 40), gap_at=15).drives[1]
    view = replace(first_frames(drive, 20), channels=(True, False))
    assert (len(view), view.id, view.info) == (20, drive.id, drive.info)
    assert view.entry.segments == ((0, 15), (15, 20))
    assert first_frames(view, 15).entry.segments == ((0, 15),)
    for name in ("tokens", "actions", "timestamps"):
        assert np.array_equal(getattr(view, name), getattr(drive, name)[:20])
    assert view.action_valid.shape == (20, 2)
    assert view.action_valid[:, SPEED].all()
    assert not view.action_valid[:, STEERING].any()
    assert drive.action_valid.all()
    index = WindowIndex([view], frames=4)
    assert len(index) == 12 + 2
    batch = index.load(np.array([3]))
    assert batch["tokens"][0].equal(torch.from_numpy(view.tokens[3:7].astype(np.int64)))
    assert batch["actions"][0].equal(torch.from_numpy(view.actions[2:6].copy()))
    assert batch["action_valid"][0].equal(torch.from_numpy(view.action_valid[2:6]))
    assert len(first_frames(drive, 1000)) == 40


def test_a_held_out_store_has_only_original_drives_and_learned_channels(
    world: WorldModel, footage: list[Footage], tmp_path: Path
) -> None:
    drives = [source.recorded.drive for source in footage if source.recorded is not None]
    videos = find_drives([drive.video.path for drive in drives if drive.video is not None])
    tokenize(videos, world.tokenizer, tmp_path / "tokens", mirror=True)
    assert len(TokenStore(tmp_path / "tokens").drives) == 4
    store = HeldOutStore(tmp_path / "tokens", (True, False))
    assert store.drive_ids == ("drive_000", "drive_001")
    for drive, source in zip(store.drives, footage, strict=True):
        assert np.array_equal(drive.tokens, source.drive.tokens)
        assert drive.action_valid[:-1, SPEED].all()
        assert not drive.action_valid[:, STEERING].any()
    actions, valid = Clip(
        footage=Footage(drive=store.drives[0], tokenizer=world.tokenizer),
        start=6,
        context_frames=4,
        frames=5,
    ).actions
    assert valid[:, SPEED].all()
    assert not valid[:, STEERING].any()
    assert len(actions) == 8


def test_reading_in_order_gives_the_same_frames(
    world: WorldModel, footage: list[Footage], tmp_path: Path
) -> None:
    recorded, unrecorded = footage[1], replace(footage[1], recorded=None)
    assert recorded.recorded is not None
    for source in (recorded, unrecorded):
        beginning = source.frames(0, 10, in_order=True)
        assert len(beginning) == 10
        assert np.abs(beginning.astype(int) - source.frames(0, 10)).max() <= 1
    part = split_into_parts(recorded, tmp_path / "parts")[1]
    (later,) = footage_of([part], [recorded.recorded], world.tokenizer)
    expected = recorded.frames(10, 16)
    assert np.abs(later.frames(0, 6, in_order=True).astype(int) - expected).max() <= 1
    assert later.place == ["drive_001", 10]


def test_the_parts_of_a_drive_have_different_places_and_fingerprints(
    footage: list[Footage], tmp_path: Path
) -> None:
    parts = [
        Footage(drive=drive, tokenizer=footage[0].tokenizer)
        for drive in split_into_parts(footage[0], tmp_path / "parts")
    ]
    assert [part.place for part in parts] == [["drive_000", n] for n in (0, 10, 20)]
    assert len({part.fingerprint for part in parts}) == 3


def changed(array: Any, place: Any, value: Any) -> Any:
    copy = array.copy()
    copy[place] = value
    return copy


CHANGES: dict[str, Callable[[SampledDrive], SampledDrive]] = {
    "validity": lambda s: replace(s, action_valid=changed(s.action_valid, (3, STEERING), False)),
    "actions": lambda s: replace(s, actions=changed(s.actions, (3, STEERING), 9)),
    "times": lambda s: replace(s, timestamps=s.timestamps * 2),
    "frames": lambda s: replace(s, indices=s.indices + 1),
    "segments": lambda s: replace(s, segments=[(0, 5), (5, len(s.indices))]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_the_data_changes_the_fingerprint(
    footage: list[Footage], name: str
) -> None:
    recorded = footage[0].recorded
    assert recorded is not None
    modified = CHANGES[name](recorded)
    assert sampled_fingerprint(modified) != sampled_fingerprint(recorded)
    assert sampled_fingerprint(recorded) == footage[0].fingerprint


def test_a_changed_image_file_changes_the_fingerprint(tmp_path: Path) -> None:
    """A simulator's recording is a folder of images instead of a video."""
    paths = tuple(tmp_path / f"{number}.png" for number in range(3))
    for number, path in enumerate(paths):
        Image.fromarray(np.full((4, 8, 3), number, np.uint8)).save(path)
    times = np.arange(3) / FPS
    drive = Drive(id="a", source="udacity", timestamps=times, reader=ImageFrames(paths))
    before = sampled_fingerprint(sample(drive))
    assert sampled_fingerprint(sample(drive)) == before
    Image.fromarray(np.full((4, 8, 3), 7, np.uint8)).save(paths[2])
    assert sampled_fingerprint(sample(drive)) != before


@dataclass(frozen=True)
class ArrayFrames:
    """A source that exists only in this test: all frames of a drive in one .npy file."""

    path: Path

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        frames: Pixels = np.load(self.path)[indices]
        return frames

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        yield from np.load(self.path)[slice(None) if indices is None else indices]

    def files(self, indices: Ints) -> list[Path]:
        return [self.path]


def test_a_new_source_can_be_evaluated(world: WorldModel, tmp_path: Path) -> None:
    path, size = tmp_path / "frames.npy", world.tokenizer.frame_size
    np.save(path, np.zeros((9, size.height, size.width, 3), np.uint8))
    drive = Drive(id="a", source="new", timestamps=np.arange(9) / FPS, reader=ArrayFrames(path))
    sampled = sample(drive)
    tokenize(DriveSet([drive]), world.tokenizer, tmp_path / "tokens")
    (footage,) = footage_of(TokenStore(tmp_path / "tokens").drives, [sampled], world.tokenizer)
    before = footage.fingerprint
    assert not footage.frames(2, 5).any()
    np.save(path, np.ones((9, size.height, size.width, 3), np.uint8))
    assert footage.fingerprint == sampled_fingerprint(sampled) != before


def test_a_recording_is_recognised_in_all_its_forms(
    world: WorldModel, footage: list[Footage], tmp_path: Path
) -> None:
    """Its video, tokens, mirror image and parts share a digest. Another drive has its own."""
    sampled, stranger = (source.recorded for source in footage)
    assert sampled is not None
    assert stranger is not None
    digest = recording_digest(sampled.timestamps, sampled.actions, sampled.action_valid)
    assert np.array_equal(sampled.timestamps, stranger.timestamps)
    assert digest != recording_digest(stranger.timestamps, stranger.actions, stranger.action_valid)
    unknown = sampled.action_valid & False
    assert recording_digest(sampled.timestamps, sampled.actions, unknown) is None
    parts = split_into_parts(footage[0], tmp_path / "parts")
    assert recording_digests(parts) == {"drive_000": digest}
    tokenize(
        find_drives([sampled.drive.video.path]),  # type: ignore[union-attr]
        world.tokenizer,
        tmp_path / "tokens",
        mirror=True,
    )
    training = TokenStore(tmp_path / "tokens")
    assert recording_digests(training.drives) == {"drive_000": digest, "drive_000~mirror": digest}
    assert digest is not None
    for drives, name in ((training.drives, "drive_000"), (training.drives[1:], "~mirror")):
        training.drives = drives
        with pytest.raises(
            DriveSimError, match=f"held-out drive 'mine' as '[^~]*{name}'; evaluate"
        ):
            check_apart({"yours": "f00d", "mine": digest}, training)
    check_apart({"yours": "f00d"}, training)


def test_a_trained_drive_is_recognised_by_its_tokens(tmp_path: Path) -> None:
    """Tokens from another device differ in a few places; those of another drive in many."""
    training = write_store(tmp_path / "training", (40, 40))
    drive = training.drives[1]
    for count, is_same in ((24, True), (240, False)):
        tokens = drive.tokens.copy()
        tokens.ravel()[: count * 2 : 2] = (tokens.ravel()[: count * 2 : 2] + 1) % 9
        similar = SimpleNamespace(id="x", tokens=tokens, timestamps=drive.timestamps)
        heldout: Any = SimpleNamespace(drives=[similar])
        if is_same:
            with pytest.raises(DriveSimError, match=r"the training tokens contain .* 'x' as '1'"):
                check_tokens_apart(heldout, training)
        else:
            check_tokens_apart(heldout, training)


def test_a_drive_of_a_parked_car_has_no_digest() -> None:
    """Two recordings of parked cars can have equal actions and times without being the same."""
    times, valid = np.arange(5) / 5.0, np.ones((5, 2), np.bool_)
    actions = np.tile(np.array([0.0, 0.1], np.float32), (5, 1))
    assert recording_digest(times, actions, valid) is None
    actions[2, 1] = -0.2
    assert recording_digest(times, actions, valid) is not None
    valid[:, 1] = False
    assert recording_digest(times, actions, valid) is None
