import pytest
import torch

from driving_sim.engine import precision
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512f", torch.float32)],
)
def test_auto_chooses_bf16_if_an_x86_processor_supports_it(
    monkeypatch: pytest.MonkeyPatch, feature: str, expected: torch.dtype
) -> None:
    """The choice is not measured, because the result would depend on the load of the machine."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(precision, "processor_features", lambda: ("fpu", feature))
    monkeypatch.delattr(precision, "_cpu_seconds")
    precision._bf16_is_faster_on_cpu.cache_clear()
    try:
        assert resolve_precision("auto", CPU) is expected
    finally:
        precision._bf16_is_faster_on_cpu.cache_clear()


@pytest.mark.parametrize(
    ("bf16_seconds", "expected"), [(0.5, torch.bfloat16), (0.95, torch.float32)]
)
def test_on_other_processors_auto_chooses_bf16_if_it_measures_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, expected: torch.dtype
) -> None:
    seconds = {torch.bfloat16: bf16_seconds, torch.float32: 1.0}
    monkeypatch.setattr(precision, "processor_features", lambda: ())
    monkeypatch.setattr(precision, "_cpu_seconds", seconds.__getitem__)
    precision._bf16_is_faster_on_cpu.cache_clear()
    try:
        assert resolve_precision("auto", CPU) is expected
    finally:
        precision._bf16_is_faster_on_cpu.cache_clear()


def test_named_precision_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "_bf16_is_faster_on_cpu")
    assert resolve_precision("fp32", CPU) is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    with pytest.raises(DriveSimError, match="auto, fp32, bf16"):
        resolve_precision("fp16", CPU)
