import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from driving_sim.data.video.frame_size import fit
from driving_sim.engine import run_folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.tokenizer import Tokenizer
from driving_sim.tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.tokenizer import frames_from_images, images_from_frames

CONFIG: dict[str, Any] = {
    "height": 32,
    "width": 64,
    "widths": (16, 16, 32),
    "blocks": (1, 0, 0),
    "attention_blocks": 1,
    "head_size": 16,
}


def make(**changes: Any) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(Autoencoder(AutoencoderConfig(**(CONFIG | changes))))


def frames(count: int = 5, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    size = (count, height, width, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def test_shapes_and_kinds() -> None:
    tokenizer = make()
    tokens = tokenizer.encode(frames())
    assert tokens.shape == (5, tokenizer.rows, tokenizer.cols) == (5, 2, 4)
    assert tokens.dtype is torch.int64
    assert tokens.max() < tokenizer.codebook_size == 1000
    rebuilt = tokenizer.decode(tokens)
    assert rebuilt.shape == (5, tokenizer.height, tokenizer.width, 3)
    assert rebuilt.dtype is torch.uint8


def test_it_gives_the_results_of_the_autoencoder() -> None:
    tokenizer = make()
    images = frames().permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = tokenizer.autoencoder(images)
    tokens = tokenizer.encode(frames())
    assert torch.equal(tokens, expected.tokens)
    rebuilt = tokenizer.decode(tokens).permute(0, 3, 1, 2)
    difference = rebuilt - (expected.images.clamp(-1, 1) + 1) * 127.5
    assert difference.abs().max() <= 0.51


def test_batch_size_and_kind_of_array_do_not_matter() -> None:
    tokenizer = make()
    tokens = tokenizer.encode(frames())
    assert torch.equal(tokenizer.encode(frames().numpy(), batch_size=2), tokens)
    few = tokenizer.decode(tokens.numpy().astype(np.uint16), batch_size=2)
    assert (few.int() - tokenizer.decode(tokens).int()).abs().max() <= 1


def test_bf16_changes_pixels_little() -> None:
    exact = make(widths=(32, 32, 32))
    half = Tokenizer(exact.autoencoder, precision="bf16")
    tokens = torch.randint(exact.codebook_size, (3, exact.rows, exact.cols))
    moved = (half.decode(tokens).int() - exact.decode(tokens).int()).abs()
    assert 0 < moved.float().mean() < 0.5
    assert moved.max() <= 2
    frames = exact.decode(tokens)
    assert (half.encode(frames) == exact.encode(frames)).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_frames_give_no_tokens(precision: str) -> None:
    tokenizer = Tokenizer(make().autoencoder, precision=precision)
    tokens = tokenizer.encode(frames(0))
    assert tokens.shape == (0, 2, 4)
    assert tokenizer.decode(tokens).shape == (0, 32, 64, 3)


def test_grey_levels_survive_the_scaling_to_images() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    size = AutoencoderConfig(height=16, width=16).frame_size
    images = images_from_frames(ramp, size)
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(frames_from_images(images), ramp)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (40, 120), (90, 100), (20, 40)])
def test_other_sizes_are_scaled_as_videos_are(height: int, width: int) -> None:
    rows, columns = np.mgrid[0:height, 0:width] / 9
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1)
    frame = (waves * 100 + 128).astype(np.uint8)
    size = make().frame_size
    own = frames_from_images(images_from_frames(torch.from_numpy(frame)[None], size))[0]
    geometry = fit(height, width, size)
    read = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        width=geometry.width, height=geometry.height, interpolation="BILINEAR"
    )
    expected = read.to_ndarray()[geometry.rows, geometry.columns].astype(float)
    assert np.abs(own.numpy() - expected).mean() < 2


def test_a_saved_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path / "run")
    loaded = Tokenizer.from_run(tmp_path / "run", device="cpu", precision="fp32")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.config == tokenizer.config
    tokens = tokenizer.encode(frames())
    assert torch.equal(loaded.encode(frames()), tokens)
    assert torch.equal(loaded.decode(tokens), tokenizer.decode(tokens))
    assert not any(p.requires_grad for p in loaded.autoencoder.parameters())
    assert not loaded.autoencoder.training


def test_a_rounded_tokenizer_is_saved_in_bf16_without_a_change(tmp_path: Path) -> None:
    tokenizer = make()
    before = tokenizer.fingerprint
    with pytest.raises(ValueError, match="round the weights"):
        tokenizer.save(tmp_path / "exact", torch.bfloat16)
    rounded = tokenizer.rounded()
    assert make().fingerprint == tokenizer.fingerprint == before != rounded.fingerprint
    assert rounded.rounded().fingerprint == rounded.fingerprint
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        rounded.save(tmp_path / name, dtype)
        loaded = Tokenizer.from_run(tmp_path / name, "cpu", "fp32")
        assert loaded.fingerprint == rounded.fingerprint
        assert torch.equal(loaded.encode(frames()), rounded.encode(frames()))
    half, full = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")
    )
    assert half < 0.6 * full


def test_the_tokenizer_of_a_packaged_model_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MODELS", tmp_path)
    tokenizer = make()
    tokenizer.save(tmp_path / "town" / "tokenizer")
    (tmp_path / "town" / "config.json").touch()
    assert Tokenizer.from_run("town", "cpu", "fp32").fingerprint == tokenizer.fingerprint
    with pytest.raises(DriveSimError, match="did you mean town"):
        Tokenizer.from_run("twon")


def test_the_fingerprint_covers_weights_and_config() -> None:
    tokenizer = make()
    assert tokenizer.fingerprint == make().fingerprint
    weight = next(tokenizer.autoencoder.parameters())
    weight[0, 0, 0, 0] += 1e-6
    assert Tokenizer(tokenizer.autoencoder).fingerprint != make().fingerprint
    assert make(patching="unshuffle").fingerprint != make().fingerprint


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="drivesim train-tokenizer"):
        Tokenizer.from_run(tmp_path / "nowhere")


def spoil_config(run: Path, key: str, value: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    part = next((config[name] for name in ("model", "frames") if key in config[name]), config)
    part[key] = value
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 99, "prepares frames differently"),
        ("quantiser", "rounding half as far", "rounds to codes differently"),
        ("patching", "unshuffle", "do not belong together"),
        ("attention_blocks", 2, "not this tokenizer's weights"),
        ("levels", [1], "levels"),
    ],
)
def test_a_changed_config_is_noticed(tmp_path: Path, key: str, value: Any, message: str) -> None:
    make().save(tmp_path)
    spoil_config(tmp_path, key, value)
    with pytest.raises(DriveSimError, match=message) as caught:
        Tokenizer.from_run(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    make().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DriveSimError, match="do not belong together"):
        Tokenizer.from_run(tmp_path, device="cpu")
    weights.write_bytes(content[:1000])
    with pytest.raises(DriveSimError, match="copy it again"):
        Tokenizer.from_run(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "bad", [frames()[0], frames().float(), frames()[..., :2]], ids=["one", "float", "channels"]
)
def test_other_arrays_are_no_frames(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        make().encode(bad)


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [((2, 4), 0, "shape"), ((1, 4, 2), 0, "shape"), ((1, 2, 4), 1000, "999"), ((1, 2, 4), -1, "0")],
)
def test_other_arrays_are_no_tokens(shape: tuple[int, ...], value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().decode(torch.full(shape, value))
