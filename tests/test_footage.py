from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives
from driving_sim.data.token_store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.footage import Clip, Footage, choose_clips, recorded_footage
from driving_sim.evaluate.rollouts import imagine
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.sampler import Sampling
from driving_sim.world_model.world_model import WorldModel
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def footage(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Footage]:
    folder = tmp_path_factory.mktemp("footage")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder / "videos", drives=2, seconds=3, config=config)
    found = find_drives([folder / "videos"])
    tokenize(found, world.tokenizer, folder / "tokens")
    drives = TokenStore(folder / "tokens").drives
    return recorded_footage(drives, [sample(drive) for drive in found.drives], world.tokenizer)


def clip_of(footage: Footage, *, mirrored: bool = False) -> Clip:
    return Clip(footage=footage, start=6, context_frames=4, frames=5, mirrored=mirrored)


def test_frames_are_those_the_tokens_were_made_of(
    world: WorldModel, footage: list[Footage]
) -> None:
    for each in footage:
        frames = each.frames(3, 9)
        assert torch.equal(
            world.tokenizer.encode(frames), torch.from_numpy(each.drive.tokens[3:9].astype(int))
        )
        assert each.synthetic is not None
        # But for the codec, what the world looks like from there.
        rendered = each.synthetic.world.render(each.synthetic.states[3])
        assert np.abs(rendered.astype(float) - frames[0]).mean() < 12


def test_without_a_video_frames_are_reconstructions(world: WorldModel, tmp_path: Path) -> None:
    store = write_store(tmp_path / "tokens", [20], fingerprint=world.tokenizer.fingerprint)
    each = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    expected = world.tokenizer.decode(store.drives[0].tokens[2:5]).numpy()
    assert np.array_equal(each.frames(2, 5), expected)


def test_a_clip_is_a_context_and_what_followed(footage: list[Footage]) -> None:
    clip = clip_of(footage[1])
    drive = footage[1].drive
    assert np.array_equal(clip.context, footage[1].frames(2, 6))
    assert np.array_equal(clip.truth, footage[1].frames(6, 11))
    assert np.array_equal(clip.context_tokens.numpy(), drive.tokens[2:6])
    assert np.array_equal(clip.true_tokens.numpy(), drive.tokens[6:11])
    actions, valid = clip.actions
    # The first of the future's leads from the last context frame to the first new one.
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


def test_clips_are_spread_over_all_places_and_cross_no_gap(
    world: WorldModel, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "tokens", (40, 30), gap_at=15)
    footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
    every = choose_clips(footage, context_frames=4, frames=5, count=1000)
    places = [(clip.footage.drive.id, clip.start) for clip in every]
    assert len(places) == len(set(places)) == 7 + 17 + 7 + 7
    for clip in every:
        runs = clip.footage.drive.entry.segments
        assert any(b <= clip.start - 4 and clip.start + 5 <= e for b, e in runs)
    few = choose_clips(footage, context_frames=4, frames=5, count=4)
    chosen = [places.index((clip.footage.drive.id, clip.start)) for clip in few]
    assert chosen == [4, 14, 23, 33]
    with pytest.raises(DriveSimError, match="no run of 44 frames without a gap in 2"):
        choose_clips(footage, context_frames=4, frames=40, count=4)


def test_imagined_futures_are_those_of_each_context_alone(
    world: WorldModel, footage: list[Footage]
) -> None:
    clips = choose_clips(footage, context_frames=5, frames=4, count=9)  # more than one batch
    sampling = Sampling(seed=3)
    for clip, found in zip(clips, imagine(world, clips, sampling), strict=True):
        assert found.clip is clip
        actions, valid = clip.actions
        prefix = world.encode_prefix(clip.context_tokens, actions[:4], valid[:4])
        steps = world.generate(prefix, actions[4:], valid[4:], sampling=sampling)
        alone = torch.cat([step.tokens for step in steps])
        assert torch.equal(found.tokens, alone)
        assert np.array_equal(found.frames, world.tokenizer.decode(alone).numpy())
    free = list(imagine(world, clips, sampling, hide_actions=True))
    led = list(imagine(world, clips, sampling))
    assert any(
        not torch.equal(one.tokens, other.tokens) for one, other in zip(free, led, strict=True)
    )
