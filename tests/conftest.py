import platform
from functools import cache

import pytest

from driving_sim.engine import progress
from driving_sim.world_model.kernels import library as native_library


@pytest.fixture(autouse=True)
def steady_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that tests call here change no threads: results are compared bit by bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def plain_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command that an earlier test called words what this one says."""
    monkeypatch.setattr(progress, "wording", str)


@pytest.fixture(
    params=[
        "",
        native_library._WITHOUT_AMX,
        "-mno-avx512bf16 -mno-avx512dq",
        "-mno-avx512f",
    ]
)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way that the products can be computed, as far as this processor has them."""
    if request.param and platform.machine() != "x86_64":
        pytest.skip("these are ways of x86 processors")
    monkeypatch.setattr(native_library, "_FLAGS", f"{native_library._FLAGS} {request.param}")
    monkeypatch.setattr(native_library, "_library", cache(native_library._library.__wrapped__))
