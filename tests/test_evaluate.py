from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from driving_sim import evaluate
from driving_sim.data.action_file import SPEED, STEERING
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import SyntheticConfig, write_synthetic_drives
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate import (
    _block_permutation,
    _bootstrap,
    evaluate_action_information,
    evaluate_control,
    evaluate_likelihood,
    evaluate_tokenizer,
)
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.baselines import CopyLast
from driving_sim.world_model.bits import (
    FullWindows,
    bits_per_token,
    streamed_bits,
    streamed_bits_per_token,
)
from driving_sim.world_model.sampler import FrameSample, Sampling
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import Prefix, WorldModel
from tests.test_motion import smooth_noise
from tests.test_world_model import new_world
from tests.token_drives import FPS, write_store


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder, drives=2, seconds=6, config=config)
    return folder


def test_tokenizer_means_are_those_of_all_frames(world: WorldModel, videos: Path) -> None:
    drives = [sample(drive) for drive in find_drives([videos]).drives]
    both = evaluate_tokenizer(world.tokenizer, drives)
    apart = [evaluate_tokenizer(world.tokenizer, [drive]) for drive in drives]
    assert both["frames"] == sum(each["frames"] for each in apart)
    assert both["psnr_db"] == pytest.approx(np.mean([each["psnr_db"] for each in apart]))
    frames = drives[0].drive.frames(drives[0].indices)
    rebuilt = world.tokenizer.decode(world.tokenizer.encode(frames)).numpy()
    errors = np.square(rebuilt.astype(float) - frames).mean(axis=(1, 2, 3))
    assert apart[0]["psnr_db"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=1e-3)


def test_likelihood_of_an_untrained_model_is_that_of_its_codebook(
    world: WorldModel, tmp_path: Path
) -> None:
    """Every code is as likely as any other; the baselines know the drives that were trained on."""
    plain = Transformer(world.config.model, world.config.grid, world.statistics)
    untrained = WorldModel(
        plain,
        world.tokenizer,
        fps=FPS,
        steering_kind="road_wheel",
        validation_drives=("0", "3"),
    )
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", (41, 40, 40, 40), fingerprint=fingerprint)
    # Its drive has the id of one of the training drives, but is another.
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=fingerprint)
    found = evaluate_likelihood(untrained, heldout, training)
    frames = untrained.context_frames
    assert found["frames"] == 40 - frames + 1
    assert found["bits_per_token"] == pytest.approx(np.log2(9), abs=1e-5)
    windows = FullWindows(heldout.drives, frames=frames)
    copied = CopyLast.fit(training.select(["1", "2"]))
    assert found["copy_last_bits_per_token"] == copied.bits_per_token(windows).mean
    assert found["unigram_bits_per_token"] == copied.unigram.bits_per_token(windows).mean
    everywhere = CopyLast.fit(training.drives).bits_per_token(windows).mean
    assert found["copy_last_bits_per_token"] != everywhere


def test_drives_that_were_trained_on_are_refused(world: WorldModel, tmp_path: Path) -> None:
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", fingerprint=fingerprint)
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=fingerprint)
    with pytest.raises(DriveSimError, match="held out"):
        evaluate_likelihood(world, heldout, training)


def test_tokens_of_another_tokenizer_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40])
    with pytest.raises(DriveSimError, match="another tokenizer"):
        evaluate_action_information(world, heldout)


def test_tokens_of_another_rate_or_steering_are_refused(world: WorldModel, tmp_path: Path) -> None:
    heldout = write_store(tmp_path / "heldout", [40], fingerprint=world.tokenizer.fingerprint)
    for change, message in (
        ({"fps": FPS * 1.5}, "--fps 12"),
        ({"steering_kind": "steering_wheel"}, "its steering is road_wheel"),
    ):
        options = {"fps": FPS, "steering_kind": "road_wheel"} | change
        other = WorldModel(world.transformer, world.tokenizer, **options)  # type: ignore[arg-type]
        with pytest.raises(DriveSimError, match=message):
            evaluate_action_information(other, heldout)


def test_streamed_bits_are_compared_on_frames_that_the_cache_outlived(
    world: WorldModel, tmp_path: Path
) -> None:
    fingerprint = world.tokenizer.fingerprint
    training = write_store(tmp_path / "training", [30], fingerprint=fingerprint)
    frames = world.context_frames
    for length in (2 * frames, 5 * frames):
        heldout = write_store(tmp_path / str(length), [length], fingerprint=fingerprint)
        share = evaluate_likelihood(world, heldout, training)["streamed_over_recomputed"]
        if length == 2 * frames:
            assert share is None
            continue
        windows = FullWindows(heldout.drives, frames=frames)
        recomputed = bits_per_token(world.transformer, windows)
        judged = (recomputed.frame >= 2 * frames) & (recomputed.frame < 4 * frames)
        streamed = streamed_bits_per_token(world.transformer, heldout.drives)
        expected = streamed.bits[2 * frames : 4 * frames].mean() / recomputed.bits[judged].mean()
        assert share == pytest.approx(expected, abs=1e-6)
        assert share != 1.0


def test_constant_actions_carry_no_information(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffling what is the same everywhere changes nothing; shuffling what varies does."""
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    gains = evaluate_action_information(world, heldout, shuffles=2)["gain_bits_per_frame"]
    assert gains["steering"]["mean"] != 0.0
    drive = heldout.drives[0]
    constant = np.ones_like(drive.actions)
    monkeypatch.setattr(type(drive), "actions", property(lambda self: constant))
    gains = evaluate_action_information(world, heldout, shuffles=2)["gain_bits_per_frame"]
    assert abs(gains["both"]["mean"]) < 1e-4


def test_an_unknown_action_is_shuffled_as_unknown(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shuffle holds the same known actions as the drive, whatever stands where none is."""
    heldout = write_store(tmp_path / "heldout", [60], fingerprint=world.tokenizer.fingerprint)
    drive = heldout.drives[0]
    known = np.arange(60) % 7 < 4
    monkeypatch.setattr(
        type(drive), "action_valid", property(lambda self: np.stack([known, known], axis=1))
    )
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(arguments[3:])
        return streamed_bits(*arguments)

    monkeypatch.setattr(evaluate, "streamed_bits", watched)
    evaluate_action_information(world, heldout, shuffles=2)
    assert len(seen) == 3
    for actions, valid in seen:
        for variant, mask in zip(actions, valid, strict=True):
            for channel in range(2):
                found = np.sort(variant[mask[:, channel], channel])
                assert np.array_equal(found, np.sort(drive.actions[known, channel]))
    moved = [[(mask != valid[0]).any(axis=0).tolist() for mask in valid[1:]] for _, valid in seen]
    assert moved == [[[True, False]] * 2, [[False, True]] * 2, [[True, True]] * 2]


def test_block_permutation_moves_whole_blocks() -> None:
    order = _block_permutation(23, 5, np.random.default_rng(0))
    assert sorted(order) == list(range(23))
    assert order[20:].tolist() == [20, 21, 22]
    assert all(np.diff(block).tolist() == [1] * 4 for block in order[:20].reshape(4, 5))


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_data() -> None:
    rng = np.random.default_rng(0)
    few, many = (_bootstrap(rng.normal(1.0, 1.0, n), rng) for n in (20, 2000))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 3


def test_control_judges_both_ways_from_every_start(
    world: WorldModel, videos: Path, tmp_path: Path
) -> None:
    drives, sheet = find_drives([videos]).drives, tmp_path / "control.png"
    found = evaluate_control(world, drives, starts=3, seconds=0.5, sampling=Sampling(), sheet=sheet)
    with Image.open(sheet) as picture:
        assert picture.height > 3 * picture.width / 5 / 2  # five columns of 2:1, three rows
    trials = [trial for each in found["trials"].values() for trial in each]
    assert len(trials) == 3
    assert [len(each) for each in found["trials"].values()] == [2, 1]
    first, second = (trial["start_s"] for trial in trials[:2])
    assert second > first
    obeyed = sum(trial["left_motion"] > 0 > trial["right_motion"] for trial in trials)
    assert found["obeyed"] == obeyed


@pytest.mark.parametrize(("turns", "obeyed"), [(1, 2), (0, 0), (-1, 0)])
def test_control_tells_obedience_from_its_opposite(
    world: WorldModel, videos: Path, monkeypatch: pytest.MonkeyPatch, turns: int, obeyed: int
) -> None:
    """Where the car turns left (steering is left positive), the scene moves right."""
    scene = smooth_noise(np.random.default_rng(0), 48, 64)[..., None].repeat(3, axis=-1)

    def generate(
        prefix: Prefix, actions: Any, valid: Any, *, sampling: Sampling
    ) -> Iterator[FrameSample]:
        assert valid.all()
        assert (actions[0, :, SPEED] == actions[1, :, SPEED]).all()
        np.testing.assert_allclose(np.abs(actions[..., STEERING]), world.steering_p99)
        for steering in actions[..., STEERING].T:
            tokens = torch.from_numpy(1 + np.sign(steering)).long()[:, None, None]
            yield FrameSample(tokens, tokens.float(), tokens.float())

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        places = np.cumsum(tokens.numpy().flatten() - 1) * 2 * turns
        frames = [np.roll(scene, int(place), axis=1) for place in places]
        return torch.from_numpy(np.stack(frames).astype(np.uint8))

    monkeypatch.setattr(world, "generate", generate)
    monkeypatch.setattr(world.tokenizer, "decode", decode)
    drives = find_drives([videos]).drives
    found = evaluate_control(world, drives, starts=2, seconds=2, sampling=Sampling())
    assert found["obeyed"] == obeyed
    assert np.sign(found["mean_left_minus_right"]) == turns


def test_control_that_cannot_be_measured_is_refused(world: WorldModel, videos: Path) -> None:
    drives = find_drives([videos]).drives
    with pytest.raises(DriveSimError, match=r"--sheet a\.txt: a picture is"):
        evaluate_control(world, drives, sampling=Sampling(), sheet=Path("a.txt"))
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(DriveSimError, match=f"--seconds {seconds:g}"):
            evaluate_control(world, drives, seconds=seconds, sampling=Sampling())
    model = Transformer(world.config.model, world.config.grid, ActionStatistics())
    still = WorldModel(model, world.tokenizer, fps=FPS, steering_kind=None)
    with pytest.raises(DriveSimError, match="no steering"):
        evaluate_control(still, drives, sampling=Sampling())
