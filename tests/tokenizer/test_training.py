import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from driving_sim.data.arrays import Ints, Pixels
from driving_sim.data.drive import Drive, SampledDrive, sample
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.config import from_dict, to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.tokenizer import Tokenizer
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.discriminator import DiscriminatorConfig
from driving_sim.tokenizer.objective import TokenizerObjective, TokenizerObjectiveConfig
from driving_sim.tokenizer.presets import PRESETS
from driving_sim.tokenizer.training import (
    TokenizerDataConfig,
    TokenizerRunConfig,
    Validator,
    reconstruction_grid,
    train_tokenizer,
    validation_frames,
)

SIZE = FrameSize(height=32, width=32)
FRAMES = 12


@dataclass(frozen=True)
class Gradients:
    """Reads frames that are easy to learn: a horizon whose height depends on the frame number."""

    shade: int

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        rows = np.arange(SIZE.height)[None, :, None, None]
        sky = rows < 10 + np.asarray(indices)[:, None, None, None]
        frames = np.where(sky, 200, self.shade) + np.zeros((1, 1, SIZE.width, 3))
        return frames.astype(np.uint8)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        assert indices is not None
        assert size == SIZE
        yield from self.read(indices, size)

    def files(self, indices: Ints) -> list[Path]:
        return []


def drives(count: int) -> list[SampledDrive]:
    timestamps = np.arange(FRAMES) / 10
    return [
        sample(
            Drive(
                id=f"drive_{n}", source="video", timestamps=timestamps, reader=Gradients(40 + 9 * n)
            )
        )
        for n in range(count)
    ]


@dataclass(frozen=True)
class Damaged(Gradients):
    """Reads frames up to number 5; frame 6 and all later ones raise an error."""

    def read(self, indices: Ints, size: FrameSize | None) -> Pixels:
        if np.max(indices) >= 6:
            raise DriveSimError("/there/bad.mp4: decoding stopped at 0.6 s")
        return super().read(indices, size)

    def stream(self, indices: Ints | None, size: FrameSize | None) -> Iterator[Pixels]:
        assert indices is not None
        for index in indices:
            yield self.read(np.array([index]), size)[0]


def with_damage(count: int, bad: str) -> list[SampledDrive]:
    return [
        sample(replace(good.drive, reader=Damaged(0))) if good.drive.id == bad else good
        for good in drives(count)
    ]


def run_config(**training: Any) -> TokenizerRunConfig:
    values: dict[str, Any] = {
        "steps": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "validate_every": 3,
        "save_every": 3,
        "log_every": 1,
        "workers": 0,
        "threads": 1,
        "precision": "fp32",
        "keep_last": 9,
    }
    return TokenizerRunConfig(
        model=AutoencoderConfig(
            height=32,
            width=32,
            widths=(16, 16, 16),
            blocks=(0, 0, 0),
            attention_blocks=1,
            head_size=16,
        ),
        objective=TokenizerObjectiveConfig(
            lpips_weight=0.0, gan_start=0.5, discriminator=DiscriminatorConfig(width=16)
        ),
        data=TokenizerDataConfig(batch_size=4),
        training=TrainingConfig(**(values | training)),
    )


def rows(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


def test_a_run_saves_a_tokenizer_and_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = train_tokenizer(drives(3), run_config(steps=40, validate_every=20), run, device="cpu")
    assert result.steps == 40
    tokenizer = Tokenizer.from_run(run, device="cpu")
    assert (tokenizer.rows, tokenizer.cols) == (2, 2)
    first, *_, last = rows(run, "validation")
    assert {"psnr", "ssim", "l1", "codebook/perplexity", "codebook/entropy_bits"} <= last.keys()
    assert last["psnr"] > first["psnr"]
    assert rows(run, "train")[-1]["gan/weight"] > 0
    shown = capsys.readouterr().err
    assert "without the perceptual loss LPIPS" in shown
    assert "training on 2 drives, validating on drive_" in shown
    # The saved tokenizer gives the same error as the last validation.
    held_out = next(d for d in drives(3) if f"validating on {d.drive.id}" in shown)
    frames = torch.from_numpy(held_out.drive.reader.read(np.arange(FRAMES), SIZE))
    rebuilt = tokenizer.decode(tokenizer.encode(frames))
    l1 = (rebuilt.float() - frames.float()).abs().mean() / 127.5
    assert float(l1) == pytest.approx(last["l1"], abs=0.005)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train_tokenizer(drives(2), run_config(), uninterrupted, device="cpu")
    shutil.copytree(uninterrupted, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    (resumed / "model.safetensors").unlink()
    train_tokenizer(drives(2), run_config(), resumed, resume=True, device="cpu")
    last = Path("checkpoints") / "step-00000006" / "model.safetensors"
    for name in ("model.safetensors", last):
        assert (uninterrupted / name).read_bytes() == (resumed / name).read_bytes()


def test_a_run_is_not_resumed_on_other_frames(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_tokenizer(drives(2), run_config(steps=1), run, device="cpu")
    for other_drives, field in (
        (drives(3), "drives.count=2"),
        ([sample(sampled.drive, every=2) for sampled in drives(2)], "drives.frames=24"),
        (drives(3)[1:], "drives.sha256"),
    ):
        with pytest.raises(DriveSimError, match=field):
            train_tokenizer(other_drives, run_config(steps=1), run, resume=True, device="cpu")


@pytest.mark.parametrize(
    ("bad", "cache_gigabytes"), [("drive_1", 1.0), ("drive_2", 1.0), ("drive_2", 0.0)]
)
def test_a_bad_drive_stops_the_run_or_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, cache_gigabytes: float
) -> None:
    """Holds for a validation drive (drive_1) or a training drive, cached or not, resumed or not."""
    config = run_config()
    config = replace(config, data=replace(config.data, cache_gigabytes=cache_gigabytes))
    with_bad = with_damage(3, bad)
    with pytest.raises(DriveSimError, match=r"^/there/bad\.mp4: decoding stopped at 0\.6 s$"):
        train_tokenizer(with_bad, config, tmp_path / "stopped", device="cpu")

    kept, run = tmp_path / "kept", tmp_path / "run"
    good = [sampled for sampled in drives(3) if sampled.drive.id != bad]
    train_tokenizer(good, config, kept, device="cpu")
    capsys.readouterr()
    train_tokenizer(with_bad, config, run, skip_bad=True, device="cpu")
    assert f"skipped {bad}: /there/bad.mp4" in capsys.readouterr().err
    weights = (kept / "model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == weights

    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "model.safetensors").unlink()
    train_tokenizer(with_bad, config, run, resume=True, skip_bad=True, device="cpu")
    assert (run / "model.safetensors").read_bytes() == weights


def test_only_bad_drives_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="every drive was skipped"):
        train_tokenizer(
            with_damage(1, "drive_0"), run_config(), tmp_path / "run", skip_bad=True, device="cpu"
        )


def test_one_drive_validates_on_itself_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(drives(1), run_config(steps=1), tmp_path / "run", device="cpu")
    assert "only one drive" in capsys.readouterr().err


def test_validation_drives_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(steps=1)
    config = replace(config, data=replace(config.data, validation=("drive_2",)))
    train_tokenizer(drives(4), config, tmp_path / "run", device="cpu")
    assert "training on 3 drives, validating on drive_2\n" in capsys.readouterr().err


def test_missing_lpips_weights_are_reported_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    config = replace(run_config(), objective=TokenizerObjectiveConfig())
    with pytest.raises(DriveSimError, match=r"`objective\.lpips_weight=0`"):
        train_tokenizer(drives(2), config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_no_drives_and_a_used_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no drives"):
        train_tokenizer([], run_config(), tmp_path / "run")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DriveSimError, match="not a run"):
        train_tokenizer(drives(2), run_config(), tmp_path)


def objective() -> TokenizerObjective:
    torch.manual_seed(0)
    config = run_config()
    return TokenizerObjective(config.model, config.objective)


@torch.no_grad()
def test_validation_is_in_full_precision() -> None:
    model, validate = objective(), Validator(validation_frames(drives(1), SIZE, most=4))
    exact = validate(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert validate(model).metrics == exact.metrics


@torch.no_grad()
def test_validation_measures_every_frame_once() -> None:
    model = objective()
    frames = validation_frames(drives(2), SIZE, most=20)
    assert len(frames) == 20
    measured = Validator(frames)(model).metrics
    rebuilt = Tokenizer(Autoencoder(model.autoencoder.config))
    rebuilt.autoencoder.load_state_dict(model.autoencoder.state_dict())
    tokens = rebuilt.encode(frames)
    mse = (rebuilt.decode(tokens).float() - frames.float()).square().mean((1, 2, 3))
    assert measured["psnr"] == pytest.approx(float((10 * (255**2 / mse).log10()).mean()), abs=0.01)
    assert measured["codebook/used"] == len(torch.unique(tokens)) / 1000
    assert measured["loss"] == pytest.approx(measured["l1"])


@torch.no_grad()
def test_the_score_is_provisional_before_the_discriminator_starts() -> None:
    model = objective()
    validator = Validator(validation_frames(drives(1), SIZE, most=4))
    before = validator(model)
    model.gan_share.fill_(1.0)
    after = validator(model)
    assert (before.provisional, after.provisional) == (True, False)
    assert before.score == after.score == after.metrics["loss"]


def test_validation_frames_are_spread_over_the_drives() -> None:
    frames = validation_frames(drives(3), SIZE, most=6)
    shades = [int(frame[-1, 0, 0]) for frame in frames]
    assert shades == sorted(shades)
    assert set(shades) == {40, 49, 58}


@pytest.mark.parametrize(("count", "shape"), [(3, (24, 16, 3)), (4, (16, 32, 3))])
def test_the_grid_shows_each_frame_beside_its_reconstruction(
    count: int, shape: tuple[int, ...]
) -> None:
    originals = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    grid = reconstruction_grid(originals, originals + 100)
    assert grid.shape == shape
    assert (grid[0, 0, 0], grid[0, 8, 0]) == (0, 100)
    assert (grid[-1, -9, 0], grid[-1, -1, 0]) == (count - 1, count + 99)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name: str) -> None:
    preset = PRESETS[name]
    assert from_dict(TokenizerRunConfig, to_dict(preset)) == preset
    with torch.device("meta"):
        model, autoencoder = preset.model, Autoencoder(preset.model)
        patches = torch.zeros(1, 48, model.height // 4, model.width // 4)
        z = autoencoder.encoder(patches)
        assert z.shape == (1, len(model.levels), model.rows, model.cols)
        assert autoencoder.decoder(z).shape == patches.shape


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("validation_frames", 0), ("validation_fraction", 1.0)],
)
def test_a_bad_config_names_its_field(name: str, value: float) -> None:
    values: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}: must .*, found {value}"):
        TokenizerDataConfig(**values)
