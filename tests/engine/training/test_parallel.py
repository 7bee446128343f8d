"""Settings that compute the same result in another way: recomputed, accumulated, compiled."""

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
def test_training_with_recomputation_equals_training_without(tmp_path: Path, model: str) -> None:
    rank_train(model, tmp_path / "kept")
    rank_train(model, tmp_path / "recomputed", gradient_checkpointing=True)
    kept, recomputed = exported(tmp_path / "kept"), exported(tmp_path / "recomputed")
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_recomputation_draws_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "world_model", lambda: world_model(dropout=0.5))
    gradients = []
    for checkpointing in (False, True):
        model = prepared("world_model", gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model(batch_of("world_model"))[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("model", ["tokenizer", "world_model"])
def test_backward_pass_of_a_large_model_lets_python_handle_signals(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hooks, a backward pass runs no Python code, so signals would have to wait."""
    calls: list[Any] = []
    monkeypatch.setattr(parallel_module, "_pass", calls.append)
    prepared(model)(batch_of(model))[0].backward()
    assert not calls  # a small model has no hooks, because its backward pass is fast
    monkeypatch.setattr(parallel_module, "LARGE", 0)
    trained = prepared(model)
    trained(batch_of(model))[0].backward()
    assert len(calls) > 3 * len(list(trained.blocks()))


def test_recomputation_stores_less_for_the_backward_pass() -> None:
    stored_bytes = []
    for checkpointing in (False, True):
        model, saved = prepared("world_model", gradient_checkpointing=checkpointing), [0]

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved[0] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(batch_of("world_model"))
        stored_bytes.append(saved[0])
    assert stored_bytes[1] < 0.7 * stored_bytes[0]


def test_a_copy_of_a_recomputed_model_has_weights_of_its_own() -> None:
    model = prepared("world_model", gradient_checkpointing=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        copied, batch = copy.deepcopy(model), batch_of("world_model")
        before = model(batch)[0]
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(batch)[0], before)


@pytest.mark.filterwarnings("ignore")  # torch prints warnings while it compiles
def test_compiled_passes_equal_interpreted_ones() -> None:
    """Only the world model is tested, because compiling takes seconds per kind of block."""
    outcomes = []
    for compiled in (False, True):
        model = prepared("world_model", compile=compiled)
        loss, _ = model(batch_of("world_model"))
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    for interpreted, compiled_outcome in zip(*outcomes, strict=True):
        torch.testing.assert_close(interpreted, compiled_outcome, rtol=1e-5, atol=1e-6)


def test_two_accumulated_half_batches_equal_one_whole_batch(tmp_path: Path) -> None:
    rank_train("world_model", tmp_path / "halves", accumulate=2)
    rank_train("world_model", tmp_path / "wholes", halves=False)
    assert_same_losses(tmp_path / "halves", tmp_path / "wholes")


def test_unsupported_settings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriveSimError, match="torchrun --nproc-per-node=N, or leave out `shard`"):
        prepared("world_model", shard=True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DriveSimError, match="compile needs a compiler"):
        prepared("world_model", compile=True)
