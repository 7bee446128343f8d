import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.world_model import WorldModel
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.bits import FullWindows, bits_per_token, streamed_token_bits
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective
from driving_sim.world_model.training.presets import PRESETS
from driving_sim.world_model.training.train import (
    WorldModelDataConfig,
    WorldModelRunConfig,
    _in_scale_of,
    action_statistics,
    train_world_model,
)
from driving_sim.world_model.training.validation import WindowValidation
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from tests.fixtures.token_drives import tiny_tokenizer, turning_drive, write_store

CONFIG = WorldModelRunConfig(
    model=TransformerConfig(layers=2, width=32, heads=2, kv_heads=1, context_frames=4),
    objective=InputNoiseConfig(token_noise=0.02),
    data=WorldModelDataConfig(batch_size=4, validation=("2",), validation_windows=6),
    training=TrainingConfig(
        steps=900,
        learning_rate=1e-2,
        warmup_steps=20,
        ema_decay=0.9,
        validate_every=50,
        save_every=1000,
        workers=0,
        threads=1,
        precision="fp32",
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, its token store, and a run that was trained on them."""
    path = tmp_path_factory.mktemp("training")
    tokenizer = tiny_tokenizer()
    tokenizer.save(path / "tokenizer")
    write_store(path / "tokens", (400, 400, 60, 400), fingerprint=tokenizer.fingerprint)
    train_world_model(path / "tokens", CONFIG, path / "run", tokenizer=path / "tokenizer")
    return path


def test_training_learns_what_steering_does(folder: Path) -> None:
    """The most probable next frame is the last one, shifted by the steering."""
    world = WorldModel.from_run(folder / "run", device="cpu")
    assert world.steering_kind == "road_wheel"
    assert world.fps == 8.0
    assert world.statistics.steering_p95 == pytest.approx(0.3)
    tokens, actions, _ = turning_drive(8, 99)
    prefix = world.encode_prefix(tokens[:4], actions[:3])
    plans = np.zeros((3, 1, 2), np.float32)
    plans[:, 0] = [[5.0, -0.3], [5.0, 0.0], [5.0, 0.3]]
    (frame,) = world.generate(prefix, plans, sampling=Sampling(temperature=0))
    for shift, imagined in zip((-1, 0, 1), frame.tokens, strict=True):
        expected = np.roll(tokens[3], shift, axis=1)
        assert (imagined.numpy() == expected).mean() > 0.8


def test_guidance_amplifies_the_effect_of_steering(folder: Path) -> None:
    """With guidance, more tokens move as steered, and fewer the other way."""
    world = WorldModel.from_run(folder / "run", device="cpu")
    tokens, actions, _ = turning_drive(8, 99)
    prefix = world.encode_prefix(tokens[:4], actions[:3])
    plans = np.array([[[5.0, 0.3]], [[5.0, -0.3]]])
    left, right = (np.roll(tokens[3], shift, axis=1) for shift in (1, -1))

    def difference(guidance: float) -> float:
        sampling = Sampling(guidance=guidance)
        (frame,) = world.generate(prefix, plans, samples=64, sampling=sampling)
        leftness = frame.tokens.numpy() == left
        shares = leftness.mean(axis=(1, 2)) - (frame.tokens.numpy() == right).mean(axis=(1, 2))
        return float(shares[:64].mean() - shares[64:].mean())

    assert difference(0.0) == 0
    plain = difference(1.0)
    assert plain > 0.5
    assert difference(3.0) > plain + 0.1


def test_the_run_folder_holds_the_best_model_and_its_tokenizer(folder: Path) -> None:
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["score"] for row in rows if row["phase"] == "validation"}
    assert sorted(scores) == list(range(50, 901, 50))
    assert len(set(scores.values())) == len(scores)
    validate = WindowValidation(
        TokenStore(folder / "tokens").select(CONFIG.data.validation or ()),
        frames=CONFIG.model.context_frames,
        windows=CONFIG.data.validation_windows,
        batch_size=CONFIG.data.batch_size,
    )
    world = WorldModel.from_run(run, device="cpu")
    kept = WorldModelObjective(CONFIG.objective, world.transformer).eval()
    assert validate(kept).score == pytest.approx(min(scores.values()), rel=1e-5)
    assert (run / "tokenizer" / "model.safetensors").is_file()
    assert (run / "config.yaml").is_file()
    assert any((run / "tensorboard").iterdir())


def test_validation_score_is_bits_on_the_validation_drive(folder: Path) -> None:
    """The model predicts the held-out drive almost perfectly, but not under shuffled actions."""
    drives = TokenStore(folder / "tokens").select(["2"])
    windows = FullWindows(drives, frames=4)
    world = WorldModel.from_run(folder / "run", device="cpu")
    entropy = -(5 / 6 + 1 / 54) * np.log2(5 / 6 + 1 / 54) - 8 / 54 * np.log2(1 / 54)
    assert entropy < bits_per_token(world.transformer, windows).mean < entropy + 0.5
    (drive,) = drives
    actions = np.stack([drive.actions, np.roll(drive.actions, 1, axis=0)])
    run = streamed_token_bits(
        world.transformer, drive.tokens, actions, np.stack([drive.action_valid] * 2)
    )
    true, shuffled = np.mean([frame.means()[0] for frame in run], axis=0)
    assert true < entropy + 0.5
    assert shuffled > entropy + 1


def test_fine_tuning_starts_from_the_other_run(folder: Path, tmp_path: Path) -> None:
    short = replace(CONFIG, training=replace(CONFIG.training, steps=1, learning_rate=1e-9))
    begin = partial(
        train_world_model,
        folder / "tokens",
        tokenizer=folder / "tokenizer",
        init_from=folder / "run",
        device="cpu",
    )
    begin(short, tmp_path / "run")
    before = WorldModel.from_run(folder / "run", device="cpu").transformer
    after = WorldModel.from_run(tmp_path / "run", device="cpu").transformer
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0, msg=name)
    smaller = replace(short, model=replace(CONFIG.model, layers=1))
    with pytest.raises(DriveSimError, match="its configuration differs"):
        begin(smaller, tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


def test_fine_tuning_keeps_the_action_scale_of_the_other_run(folder: Path, tmp_path: Path) -> None:
    """Means and spreads come from the other run, the percentiles from the new drives."""
    before = WorldModel.from_run(folder / "run", device="cpu")
    store = write_store(tmp_path / "tokens", (30, 30), fingerprint=before.tokenizer.fingerprint)
    data = replace(CONFIG.data, validation=("1",), preview=False)
    train_world_model(
        tmp_path / "tokens",
        replace(CONFIG, data=data, training=replace(CONFIG.training, steps=1)),
        tmp_path / "run",
        tokenizer=folder / "tokenizer",
        init_from=folder / "run",
        device="cpu",
    )
    after = WorldModel.from_run(tmp_path / "run", device="cpu")
    measured = action_statistics(store.select(["0"]))
    assert measured.mean != before.statistics.mean
    expected = replace(measured, mean=before.statistics.mean, std=before.statistics.std)
    assert after.statistics == expected
    assert torch.equal(after.transformer.action.mean, before.transformer.action.mean)
    assert torch.equal(after.transformer.action.std, before.transformer.action.std)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        ((5.0, 2.0), (5.0, 2.0)),
        ((0.0, 1.0), (9.0, 3.0)),  # trained without speed
        ((0.0, 0.0), (9.0, 3.0)),  # the car was parked
    ],
)
def test_channels_that_the_other_run_did_not_learn_have_the_scale_of_the_new_drives(
    learned: tuple[float, float], expected: tuple[float, float]
) -> None:
    mean, std = learned
    grid = TokenGrid(rows=2, cols=4, levels=(5, 3))
    transformer = Transformer(
        CONFIG.model, grid, ActionStatistics(mean=(mean, 0.1), std=(std, 0.2))
    )
    source = WorldModel(transformer, tiny_tokenizer(), fps=5.0, steering_kind="road_wheel")
    measured = ActionStatistics(mean=(9.0, 0.3), std=(3.0, 0.4), steering_p95=0.5)
    kept = _in_scale_of(source, measured)
    assert (kept.mean, kept.std) == ((expected[0], 0.1), (expected[1], 0.2))
    assert kept.steering_p95 == 0.5


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_tokenizer(seed=1).save(tmp_path / "other")
    with pytest.raises(DriveSimError, match="was not made by the tokenizer"):
        train_world_model(folder / "tokens", CONFIG, tmp_path / "run", tokenizer=tmp_path / "other")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(DriveSimError, match="`resume`"):
        train_world_model(folder / "tokens", CONFIG, folder / "run", tokenizer=folder / "tokenizer")


def test_validation_drives_are_not_trained_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, validation=("0",), preview=False),
        training=replace(CONFIG.training, steps=1),
    )
    train_world_model(
        folder / "tokens", config, tmp_path / "run", tokenizer=folder / "tokenizer", device="cpu"
    )
    assert "training on 3 drives, validating on 0" in capsys.readouterr().err
    store = TokenStore(folder / "tokens")
    world = WorldModel.from_run(tmp_path / "run", device="cpu")
    assert world.statistics == action_statistics(store.select(["1", "2", "3"]))
    assert world.validation_drives == ("0",)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_they_claim(name: str) -> None:
    millions = {"demo": (1.5, 3), "tiny": (3, 7), "base": (70, 130), "large": (450, 700)}
    config = PRESETS[name].model
    grid = TokenGrid(rows=16, cols=32, levels=(8, 5, 5, 5))
    with torch.device("meta"):
        model = Transformer(config, grid, ActionStatistics())
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    low, high = millions[name]
    assert low < size < high
