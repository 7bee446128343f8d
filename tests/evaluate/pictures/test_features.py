import hashlib
import math
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
from driving_sim.evaluate.pictures.features import (
    I3DFeatures,
    SeededFeatures,
    VideoFeatures,
    frechet_distance,
)

Array = NDArray[np.float64]
Clips = NDArray[np.uint8]
COUNT, FRAMES, HEIGHT, WIDTH = 24, 10, 64, 128

# torch deprecates TorchScript; the I3D of FVD comes as nothing else.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.s:DeprecationWarning")


class TinyI3D(nn.Module):
    """Called as the I3D file is; every flag changes what it returns."""

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
    """A file that stands for the one I3D that is trusted."""
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
    """A Gaussian blur of this many pixels, where the picture goes on beyond its edges."""
    rows, columns = (np.fft.fftfreq(size) for size in clips.shape[2:4])
    window = np.exp(-2 * (np.pi * sigma * np.hypot(rows[:, None], columns)) ** 2)[..., None]
    smooth = np.fft.ifft2(np.fft.fft2(clips, axes=(2, 3)) * window, axes=(2, 3)).real
    return smooth.round().clip(0, 255).astype(np.uint8)


def moving(seed: int) -> Clips:
    """Clips of textures that move to the right by one to four pixels a frame."""
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
def away(seeded: SeededFeatures) -> Callable[[Clips], float]:
    """Distance of clips from a set of moving textures."""
    features = seeded(moving(0))
    return lambda clips: frechet_distance(features, seeded(clips))


@pytest.fixture(scope="module")
def others() -> Clips:
    return moving(1)


@pytest.fixture(scope="module")
def alike(away: Callable[[Clips], float], others: Clips) -> float:
    """The distance between two sets of the same kind."""
    return away(others)


def test_distance_grows_with_blur(
    away: Callable[[Clips], float], others: Clips, alike: float
) -> None:
    mild, strong = (away(blurred(others, sigma)) for sigma in (0.7, 1.5))
    assert 3 * alike < mild
    assert 3 * mild < strong


@pytest.mark.parametrize(
    ("change", "times"), [("frozen", 10), ("shuffled", 2.5), ("slower", 2.5), ("reversed", 1.5)]
)
def test_distance_grows_where_only_time_is_wrong(
    away: Callable[[Clips], float], others: Clips, alike: float, change: str, times: float
) -> None:
    order = {
        "frozen": np.zeros(FRAMES, int),
        "shuffled": np.random.default_rng(0).permutation(FRAMES),
        "slower": np.arange(FRAMES) // 2,
        "reversed": np.arange(FRAMES)[::-1],
    }
    assert away(others[:, order[change]]) > times * alike


def test_still_clips_are_still_whatever_they_show(seeded: SeededFeatures) -> None:
    """The half of the first layer that sees change in time finds none, to rounding."""
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
    # Neither the batch nor the order in memory matters.
    np.testing.assert_allclose(again(clips[::-1])[::-1], features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again(clips[3:4])[0], features[3], rtol=1e-4, atol=1e-5)
    other = SeededFeatures(seed=1)
    assert other.fingerprint != seeded.fingerprint
    assert (seeded.name, other.name) == ("frechet_seeded_3d_0", "frechet_seeded_3d_1")
    assert not np.allclose(other(clips), features, rtol=1e-2)


def test_seeded_features_are_the_same_everywhere(seeded: SeededFeatures) -> None:
    """Another fingerprint is another metric: numbers from before no longer compare."""
    assert seeded.fingerprint == "34b60ce00e1282519df031a7b351c47edcb5f7b6a4a54c90d325b0e1f9145d97"


def test_i3d_is_called_as_the_field_calls_it(i3d: TinyI3D, i3d_file: Path) -> None:
    extractor: VideoFeatures = I3DFeatures(i3d_file)
    clips = noise(6)
    assert extractor.name == "fvd_i3d"
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float()
    with torch.no_grad():
        expected = i3d(videos, rescale=True, resize=True, return_features=True)
    np.testing.assert_allclose(extractor(clips), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_i3d_is_known_by_its_file(i3d_file: Path) -> None:
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
    """TorchScript that writes a file when it is loaded."""

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


def test_torchscript_of_another_source_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pickle is needed to do harm: a script's own operators write files, before it is called."""
    script: Any = torch.jit.script(WritesOnLoading(str(tmp_path / "made")))
    script.save(str(tmp_path / "bad.pt"))
    with pytest.raises(DriveSimError, match="not the I3D") as caught:
        I3DFeatures(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    # Trusted, it would have run: the checksum is what stopped it.
    trust(tmp_path / "bad.pt", monkeypatch)
    I3DFeatures(tmp_path / "bad.pt")
    assert (tmp_path / "made").read_bytes() == b"AAAA"


class Intruder:
    """Where Python unpickles it, it makes a folder."""

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


def test_the_shortest_clips_have_features(seeded: SeededFeatures, i3d_file: Path) -> None:
    i3d = I3DFeatures(i3d_file)
    assert seeded(noise(1, frames=seeded.least_frames)).shape == (1, 240)
    assert len(i3d(noise(1, frames=i3d.least_frames))) == 1


def with_moments(mean: Array, covariance: Array, n: int, seed: int = 0) -> Array:
    """Features [n, d] that have exactly this mean and this covariance over n - 1."""
    random = np.random.default_rng(seed).normal(size=(n, len(mean)))
    orthonormal, _ = np.linalg.qr(random - random.mean(axis=0))
    return mean + math.sqrt(n - 1) * orthonormal @ np.linalg.cholesky(covariance).T


def random_covariance(d: int, seed: int) -> Array:
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


def sets(n: int, m: int, d: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(n + m + d)
    return rng.normal(size=(n, d)), 1 + rng.normal(size=(m, d)) @ rng.normal(size=(d, d))


def test_diagonal_gaussians_have_the_closed_form() -> None:
    mean, other_mean = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    deviation, other_deviation = np.array([1.0, 2.0, 0.3]), np.array([0.5, 2.0, 1.7])
    found = frechet_distance(
        with_moments(mean, np.diag(deviation**2), 9),
        with_moments(other_mean, np.diag(other_deviation**2), 30, seed=1),
    )
    expected = ((mean - other_mean) ** 2).sum() + ((deviation - other_deviation) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-12)


def test_full_covariances_in_the_plane_have_the_closed_form() -> None:
    """There, by Cayley-Hamilton, tr sqrt(M) is sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    assert not np.allclose(a @ b, b @ a)
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    found = frechet_distance(with_moments(zero, a, 5), with_moments(zero, b, 12, seed=1))
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * cross, rel=1e-12)


def test_full_covariances_have_the_closed_form() -> None:
    a, b = random_covariance(6, 0), random_covariance(6, 1)
    mean = np.arange(6.0)
    # S S' is similar to a positive matrix: the roots of its eigenvalues sum to tr sqrt(S S').
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = (mean**2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    found = frechet_distance(with_moments(mean, a, 20), with_moments(0 * mean, b, 40, seed=1))
    assert found == pytest.approx(expected, rel=1e-12)


def test_many_samples_come_near_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = random_covariance(4, 2), random_covariance(4, 3)
    features = rng.multivariate_normal(np.zeros(4), a, size=20_000)
    others = rng.multivariate_normal(np.ones(4), b, size=30_000)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = 4 + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(features, others) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("n", "d"), [(50, 8), (8, 8), (5, 40), (2, 40)])
def test_a_set_is_at_no_distance_from_itself(n: int, d: int) -> None:
    _, features = sets(n, n, d)
    assert 0 <= frechet_distance(features, features) < 1e-12 * np.square(features).sum()


@pytest.mark.parametrize(("n", "m", "d"), [(50, 30, 8), (5, 7, 40), (60, 3, 20)])
def test_neither_order_nor_axes_matter(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    features, others = sets(n, m, d)
    found = frechet_distance(features, others)
    assert frechet_distance(others, features) == pytest.approx(found, rel=1e-10)
    assert frechet_distance(rng.permutation(features), others) == pytest.approx(found, rel=1e-10)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    moved = frechet_distance(3 * features @ rotation + 7, 3 * others @ rotation + 7)
    assert moved == pytest.approx(9 * found, rel=1e-10)


def test_fewer_clips_than_features_lose_nothing() -> None:
    """Three dimensions stay three, wherever they lie in 40."""
    features, others = sets(10, 12, 3)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)))[0].T
    found = frechet_distance(features @ rows, others @ rows)
    assert found == pytest.approx(frechet_distance(features, others), rel=1e-10)


def test_sets_that_share_no_direction_are_apart_by_all_they_have() -> None:
    features, others = np.zeros((6, 40)), np.zeros((9, 40))
    features[:, :20], others[:, 20:] = sets(6, 9, 20)
    variances = features.var(axis=0, ddof=1).sum() + others.var(axis=0, ddof=1).sum()
    means = np.square(features.mean(axis=0) - others.mean(axis=0)).sum()
    assert frechet_distance(features, others) == pytest.approx(means + variances, rel=1e-10)


def test_float32_far_from_zero_is_measured_in_float64() -> None:
    features, others = (np.round(each * 64) / 64 for each in sets(50, 60, 8))  # exact in float32
    far = [(each + 2**14).astype(np.float32) for each in (features, others)]
    assert frechet_distance(*far) == pytest.approx(frechet_distance(features, others), rel=1e-10)
