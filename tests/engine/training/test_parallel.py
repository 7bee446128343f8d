"""Options that compute the same in another way: recomputed, accumulated, compiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.training import parallel as parallel_module
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.parallel import parallel
from driving_sim.engine.training.trainable import Trainable
from tests.fixtures.rank_training import MODELS, Halves, rank_train, world_model
from tests.fixtures.ranks import assert_same_losses, exported

CPU = torch.device("cpu")


def prepared(model: str, **options: Any) -> Trainable:
    trained = parallel(MODELS[model](), TrainingConfig(steps=1, **options), Ranks(), CPU)
    assert isinstance(trained, Trainable)
    return trained


def batch_of(model: str) -> dict[str, Tensor]:
    return Halves(model)[0] | {"step": torch.tensor(0), "progress": torch.tensor(0.0)}


@pytest.mark.parametrize("model", ["tokenizer", "world_model"])
def test_recomputed_training_equals_kept(tmp_path: Path, model: str) -> None:
    rank_train(model, tmp_path / "kept")
    rank_train(model, tmp_path / "recomputed", gradient_checkpointing=True)
    kept, recomputed = exported(tmp_path / "kept"), exported(tmp_path / "recomputed")
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recomputation_draws_dropout_again_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "world_model", lambda: world_model(dropout=0.5))
    gradients = []
    for checkpointing in (False, True):
        model = prepared("world_model", gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model(batch_of("world_model"))[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("model", ["tokenizer", "world_model"])
def test_signals_get_in_between_the_backward_passes_of_layers(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python answers them, and torch runs a backward pass without a line of it."""
    passed: list[Any] = []
    monkeypatch.setattr(parallel_module, "_pass", passed.append)
    prepared(model)(batch_of(model))[0].backward()
    assert not passed  # where that takes no time, nothing holds it up
    monkeypatch.setattr(parallel_module, "LARGE", 0)
    trained = prepared(model)
    trained(batch_of(model))[0].backward()
    assert len(passed) > 3 * len(list(trained.blocks()))


def test_recomputation_keeps_less() -> None:
    """What a pass keeps for the backward one, in bytes."""
    kept = []
    for checkpointing in (False, True):
        model, saved = prepared("world_model", gradient_checkpointing=checkpointing), [0]

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved[0] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch_of("world_model"))
        kept.append(saved[0])
    assert kept[1] < 0.7 * kept[0]


def test_a_copy_of_a_recomputed_model_has_weights_of_its_own() -> None:
    model = prepared("world_model", gradient_checkpointing=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        other, batch = copy.deepcopy(model), batch_of("world_model")
        before = model(batch)[0]
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(batch)[0], before)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_passes_equal_interpreted_ones() -> None:
    """The world model's only: compiling takes seconds for each kind of block."""
    outcomes = []
    for compiled in (False, True):
        model = prepared("world_model", compile=compiled)
        loss, _ = model(batch_of("world_model"))
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_accumulated_halves_equal_the_whole(tmp_path: Path) -> None:
    rank_train("world_model", tmp_path / "halves", accumulate=2)
    rank_train("world_model", tmp_path / "wholes", halves=False)
    assert_same_losses(tmp_path / "halves", tmp_path / "wholes")


def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriveSimError, match="torchrun --nproc-per-node=N, or leave `shard` out"):
        prepared("world_model", shard=True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DriveSimError, match="compile needs a compiler"):
        prepared("world_model", compile=True)
