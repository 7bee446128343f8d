import platform
from functools import cache

import pytest

from driving_sim.engine import progress
from driving_sim.world_model.kernels import library as native_library


@pytest.fixture(autouse=True)
def steady_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands from changing the number of threads, because tests compare exact results."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def plain_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the wording of progress lines, which a command in an earlier test may have changed."""
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
    """Compile the kernels for one set of instructions.

    A test that uses this fixture runs once for each set of instructions.
    """
    if request.param and platform.machine() != "x86_64":
        pytest.skip("this instruction set exists on x86-64 processors only")
    monkeypatch.setattr(native_library, "_FLAGS", f"{native_library._FLAGS} {request.param}")
    monkeypatch.setattr(native_library, "_library", cache(native_library._library.__wrapped__))
