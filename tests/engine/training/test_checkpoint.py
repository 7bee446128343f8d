from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.checkpoint import (
    CHECKSUMS,
    checkpoints,
    damage,
    load_checkpoint,
    newest_whole,
    prune,
    remove_after,
    save_checkpoint,
)
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.ema import Ema
from driving_sim.engine.training.optimizer import Optimizers, Player


class Run:
    """Everything that a checkpoint holds, for a small model with channels-last convolutions."""

    def __init__(self, seed: int, width: int = 4) -> None:
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.GroupNorm(2, width), nn.Tanh(), nn.Conv2d(width, width, 1)
        )
        self.model = layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.model, 0.9)
        config = TrainingConfig(steps=1, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.99))
        self.optimizers = Optimizers(self.model, [Player("net", self.model)], config)

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model.zero_grad()
        self.model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        self.optimizers.step()
        self.ema.update()

    def save(self, folder: Path, step: int) -> Path:
        return save_checkpoint(
            folder,
            step=step,
            model=self.model,
            optimizers=self.optimizers,
            ema=self.ema,
            state={"step": step},
        )

    def load(self, path: Path) -> dict[str, int]:
        return load_checkpoint(path, model=self.model, optimizers=self.optimizers, ema=self.ema)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.state_dict().values(), *self.ema.averages.values()]


@pytest.mark.parametrize("width", [4, 32])  # with 32, Muon updates the second convolution
def test_loaded_run_continues_bit_for_bit(tmp_path: Path, width: int) -> None:
    run, loaded = Run(0, width), Run(1, width)
    for step in range(3):
        run.step(step)
    assert loaded.load(run.save(tmp_path, 3)) == {"step": 3}
    for step in range(3, 6):
        run.step(step)
        loaded.step(step)
    assert all(map(torch.equal, run.tensors(), loaded.tensors()))
    loaded_tensors = loaded.optimizers.tensors()
    for name, tensor in run.optimizers.tensors().items():
        assert torch.equal(tensor, loaded_tensors[name])
        assert tensor.stride() == loaded_tensors[name].stride()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> Run:
        run = Run(0)
        run.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        run.model[1].weight = run.model[0].weight
        run.ema = Ema(run.model, 0.9)
        return run

    saved, loaded = tied(), tied()
    with torch.no_grad():
        saved.model[0].weight.fill_(7.0)
    loaded.load(saved.save(tmp_path, 1))
    assert loaded.model[0].weight is loaded.model[1].weight
    assert (loaded.model[1].weight == 7.0).all()


def test_buffers_are_saved_but_frozen_weights_are_not(tmp_path: Path) -> None:
    def with_frozen(value: float) -> Run:
        run = Run(0)
        run.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        run.ema = Ema(run.model, 0.9)
        run.model.append(nn.Linear(3, 300).requires_grad_(False))
        with torch.no_grad():
            run.model[1].running_mean.fill_(value)
            run.model[2].weight.fill_(value)
        return run

    saved, loaded = with_frozen(1.0), with_frozen(2.0)
    path = saved.save(tmp_path, 1)
    assert (path / "model.safetensors").stat().st_size < 3 * 300 * 4
    loaded.load(path)
    assert (loaded.model[1].running_mean == 1.0).all()
    assert (loaded.model[2].weight == 2.0).all()


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_checkpoints_are_sorted_by_step_number(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "missing") == []
    for step in (5, 123_456_789, 99_999_999):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / ".step-99999999.1.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000005",
        "step-99999999",
        "step-123456789",
    ]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / ".step-00000003.77.partial").mkdir()
    prune(tmp_path, keep_last=2, best_step=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}" for step in (3, 5, 6)
    ]


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    run = Run(0, width=64)
    before = run.save(tmp_path, 1)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DriveSimError, match=r"cannot write .*step-00000002: File too large"):
            run.save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [before]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty_the_folder(file: Path) -> None:
    for entry in file.parent.iterdir():
        entry.unlink()


def add_a_file(file: Path) -> None:
    (file.parent / "more.safetensors").touch()


def make_it_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [truncate, flip_a_bit, Path.unlink, empty_the_folder, add_a_file, make_it_a_folder]


@pytest.mark.parametrize("damaged", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"]
)
def test_damage_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path: Path, name: str, damaged: Callable[[Path], None]
) -> None:
    run = Run(0)
    run.step(0)
    previous, newest = run.save(tmp_path, 1), run.save(tmp_path, 2)
    assert newest_whole(tmp_path) == (newest, [])
    damaged(newest / name)
    path, (notice,) = newest_whole(tmp_path)
    assert path == previous
    assert notice.startswith(f"{newest} is damaged (")
    assert "\n" not in notice
    damaged(previous / name)
    with pytest.raises(DriveSimError, match=r"every checkpoint is damaged, .*step-00000002"):
        newest_whole(tmp_path)


def test_damaged_checksums_count_as_damage(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    for content in (b"", b"[]", b"{}", b'{"model.safetensors": 3}'):
        (path / CHECKSUMS).write_bytes(content)
        assert damage(path) is not None


def test_checkpoints_of_later_steps_can_be_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
    remove_after(tmp_path / "step-00000010")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    longer = Run(0)
    longer.model.append(nn.Linear(2, 2))
    for changed in (Run(0, width=6), longer):
        with pytest.raises(DriveSimError, match="another model") as caught:
            changed.load(path)
        assert "\n" not in str(caught.value)
