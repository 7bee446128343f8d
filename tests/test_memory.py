import subprocess
import sys

import pytest

_NEW_PAGES = """
import ctypes, resource
{}
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = ctypes.CDLL(None)
    memory.malloc.restype = ctypes.c_void_p
    memory.malloc.argtypes = [ctypes.c_size_t]
    memory.free.argtypes = [ctypes.c_void_p]
    block = memory.malloc(2 ** 26)
    ctypes.memset(block, 1, 2 ** 26)
    memory.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""


def new_pages(line: str) -> int:
    """How many pages a process gets from the system for 64 MiB that it has just freed."""
    command = [sys.executable, "-c", _NEW_PAGES.format(line)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize(
    "line",
    [
        "from driving_sim.engine.memory import keep_freed_memory as act; act()",
        "from driving_sim.cli import main as act; act()",
        "import benchmarks",
    ],
)
def test_freed_memory_is_used_again(line: str) -> None:
    if new_pages("") < 1000:
        pytest.skip("this C library keeps it anyway")
    assert new_pages(line) < 100
