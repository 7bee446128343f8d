import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.pictures import features as video_features
from driving_sim.evaluate.pictures.features import I3DFeatures, SeededFeatures, VideoFeatures
from driving_sim.evaluate.pictures.frechet import frechet_distance

Clips = NDArray[np.uint8]
COUNT, FRAMES, HEIGHT, WIDTH = 24, 10, 64, 128

# torch deprecates TorchScript, but the I3D of FVD exists only as TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.s:DeprecationWarning")


class TinyI3D(nn.Module):
    """A small network with the flags of the I3D file; every flag changes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 5, 3)

    def forward(
        self,
        x: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        if resize:
            x = F.interpolate(x, size=[x.size(2), 16, 16], mode="trilinear")
        if rescale:
            x = 2 * x / 255 - 1
        logits: Tensor = self.conv(x).relu().mean(dim=[2, 3, 4])
        return logits if return_features else logits.softmax(dim=1)


@pytest.fixture(scope="module")
def i3d() -> TinyI3D:
    torch.manual_seed(0)
    return TinyI3D().eval()


@pytest.fixture
def i3d_file(i3d: TinyI3D, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file that passes for the trusted I3D."""
    path = tmp_path / "i3d_torchscript.pt"
    script: Any = torch.jit.script(i3d)
    script.save(str(path))
    trust(path, monkeypatch)
    return path


def trust(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(video_features, "I3D_SHA256", digest)


def noise(count: int, frames: int = FRAMES, height: int = 20, width: int = 24) -> Clips:
    shape = (count, frames, height, width, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def blurred(clips: Clips, sigma: float) -> Clips:
    """Blur clips with a Gaussian of `sigma` pixels that wraps around the picture's edges."""
    rows, columns = (np.fft.fftfreq(size) for size in clips.shape[2:4])
    window = np.exp(-2 * (np.pi * sigma * np.hypot(rows[:, None], columns)) ** 2)[..., None]
    smooth = np.fft.ifft2(np.fft.fft2(clips, axes=(2, 3)) * window, axes=(2, 3)).real
    return smooth.round().clip(0, 255).astype(np.uint8)


def moving(seed: int) -> Clips:
    """Return clips of textures that move to the right by one to four pixels per frame."""
    rng = np.random.default_rng(seed)
    clips = []
    for number in range(COUNT):
        scene = rng.integers(256, size=(1, 1, HEIGHT, WIDTH, 3), dtype=np.uint8)
        scene = blurred(scene, 1.0)[0, 0].astype(float)
        scene = (rng.uniform(60, 190) + 3 * (scene - scene.mean())).clip(0, 255).astype(np.uint8)
        speed = 1 + number % 4
        clips.append([np.roll(scene, speed * t, axis=1) for t in range(FRAMES)])
    return np.array(clips)


@pytest.fixture(scope="module")
def seeded() -> SeededFeatures:
    return SeededFeatures()


@pytest.fixture(scope="module")
def distance_of(seeded: SeededFeatures) -> Callable[[Clips], float]:
    """Return a function that measures the distance of clips from a set of moving textures."""
    features = seeded(moving(0))
    return lambda clips: frechet_distance(features, seeded(clips))


@pytest.fixture(scope="module")
def others() -> Clips:
    return moving(1)


@pytest.fixture(scope="module")
def baseline(distance_of: Callable[[Clips], float], others: Clips) -> float:
    """Return the distance between two sets of moving textures."""
    return distance_of(others)


def test_distance_grows_with_blur(
    distance_of: Callable[[Clips], float], others: Clips, baseline: float
) -> None:
    mild, strong = (distance_of(blurred(others, sigma)) for sigma in (0.7, 1.5))
    assert 3 * baseline < mild
    assert 3 * mild < strong


@pytest.mark.parametrize(
    ("change", "times"), [("frozen", 10), ("shuffled", 2.5), ("slower", 2.5), ("reversed", 1.5)]
)
def test_distance_grows_if_only_the_order_of_frames_is_wrong(
    distance_of: Callable[[Clips], float], others: Clips, baseline: float, change: str, times: float
) -> None:
    order = {
        "frozen": np.zeros(FRAMES, int),
        "shuffled": np.random.default_rng(0).permutation(FRAMES),
        "slower": np.arange(FRAMES) // 2,
        "reversed": np.arange(FRAMES)[::-1],
    }
    assert distance_of(others[:, order[change]]) > times * baseline


def test_temporal_channels_are_0_for_still_clips(seeded: SeededFeatures) -> None:
    """Half of the first layer's channels see only changes in time; rounding errors remain."""
    means = seeded(noise(3)[:, :1].repeat(FRAMES, axis=1))[:, :16]
    assert np.abs(means[:, :8]).max() < 1e-5
    assert means[:, 8:].min() > 1e-2


def test_seeded_features_are_a_function_of_seed_and_clip(seeded: SeededFeatures) -> None:
    clips = noise(5)
    features = seeded(clips)
    assert features.shape == (5, 240)
    assert features.dtype == np.float32
    again = SeededFeatures(seed=0)
    assert again.fingerprint == seeded.fingerprint
    # The features depend neither on the batch nor on the memory layout.
    np.testing.assert_allclose(again(clips[::-1])[::-1], features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again(clips[3:4])[0], features[3], rtol=1e-4, atol=1e-5)
    other = SeededFeatures(seed=1)
    assert other.fingerprint != seeded.fingerprint
    assert (seeded.name, other.name) == ("frechet_seeded_3d_0", "frechet_seeded_3d_1")
    assert not np.allclose(other(clips), features, rtol=1e-2)


def test_seeded_features_are_the_same_everywhere(seeded: SeededFeatures) -> None:
    """If the fingerprint changes, new results can no longer be compared with old reports."""
    assert seeded.fingerprint == "34b60ce00e1282519df031a7b351c47edcb5f7b6a4a54c90d325b0e1f9145d97"


def test_i3d_is_called_with_the_usual_flags(i3d: TinyI3D, i3d_file: Path) -> None:
    extractor: VideoFeatures = I3DFeatures(i3d_file)
    clips = noise(6)
    assert extractor.name == "fvd_i3d"
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float()
    with torch.no_grad():
        expected = i3d(videos, rescale=True, resize=True, return_features=True)
    np.testing.assert_allclose(extractor(clips), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_fingerprint_of_i3d_is_its_files_digest(i3d_file: Path) -> None:
    digest = hashlib.sha256(i3d_file.read_bytes()).hexdigest()
    assert I3DFeatures(i3d_file).fingerprint == digest


@pytest.mark.parametrize("name", ["missing", "folder", "weights", "text", "empty", "cut"])
def test_other_files_are_refused_in_one_line(i3d_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("not\na network")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(i3d_file.read_bytes()[:-500])
    with pytest.raises(DriveSimError, match=r"i3d_torchscript\.pt.*leave out `i3d`") as caught:
        I3DFeatures(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: not the I3D")
    assert "\n" not in str(caught.value)


class WritesOnLoading(nn.Module):
    """A TorchScript module that writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.made = path, torch.zeros(4, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        self.made = torch.from_file(self.path, True, 4, dtype=torch.uint8).fill_(65)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_torchscript_from_another_source_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a script can do harm without any pickle, because its operators can write files."""
    script: Any = torch.jit.script(WritesOnLoading(str(tmp_path / "made")))
    script.save(str(tmp_path / "bad.pt"))
    with pytest.raises(DriveSimError, match="not the I3D") as caught:
        I3DFeatures(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    # Once the file is trusted it does run, so the checksum is what stopped it before.
    trust(tmp_path / "bad.pt", monkeypatch)
    I3DFeatures(tmp_path / "bad.pt")
    assert (tmp_path / "made").read_bytes() == b"AAAA"


class Intruder:
    """An object that makes a folder when Python unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_no_python_object_is_unpickled(
    i3d_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intruder = pickle.dumps(Intruder(tmp_path / "made"), protocol=2)
    bad = tmp_path / "bad.pt"
    with zipfile.ZipFile(i3d_file) as good, zipfile.ZipFile(bad, "w") as file:
        for name in good.namelist():
            file.writestr(name, intruder if name.endswith("/data.pkl") else good.read(name))
    trust(bad, monkeypatch)
    with pytest.raises(DriveSimError, match="cannot load it"):
        I3DFeatures(bad)
    assert not (tmp_path / "made").exists()
    pickle.loads(intruder)
    assert (tmp_path / "made").is_dir()


def test_clips_of_the_minimum_length_have_features(seeded: SeededFeatures, i3d_file: Path) -> None:
    i3d = I3DFeatures(i3d_file)
    assert seeded(noise(1, frames=seeded.least_frames)).shape == (1, 240)
    assert len(i3d(noise(1, frames=i3d.least_frames))) == 1
