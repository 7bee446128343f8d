import pytest
import torch

from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError


def test_auto_is_the_best_available_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


def test_missing_and_unknown_devices_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DriveSimError, match=r"`device` cuda: .*try auto"):
        resolve_device("cuda")
    with pytest.raises(DriveSimError, match="auto, cuda, mps, cpu"):
        resolve_device("gpu")
