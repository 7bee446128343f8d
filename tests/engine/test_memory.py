import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)

_NEW_PAGES = """
import ctypes, resource
{}
memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
memory.malloc.argtypes = [ctypes.c_size_t]
memory.free.argtypes = [ctypes.c_void_p]
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = memory.malloc(2 ** 26)
    ctypes.memset(block, 1, 2 ** 26)
    memory.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""
_KEEPING = "from driving_sim.engine.memory import keep_freed_memory as act; act()"


def new_pages(line: str, **environment: str) -> int:
    """How many pages a process gets from the system for 64 MiB that it has just freed."""
    done = subprocess.run(
        [sys.executable, "-c", _NEW_PAGES.format(line)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("line", [_KEEPING, "from driving_sim.cli import main as act; act()"])
def test_commands_use_freed_memory_again(line: str) -> None:
    assert new_pages(line) < 16


@pytest.mark.parametrize(
    ("line", "environment"),
    [("", {}), ("import driving_sim.cli", {}), (_KEEPING, {"MALLOC_MMAP_MAX_": "65536"})],
)
def test_the_library_and_the_environment_leave_it(line: str, environment: dict[str, str]) -> None:
    assert new_pages(line, **environment) >= 32  # of 2 MiB, where the system makes them so large
