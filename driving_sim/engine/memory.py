"""How this process gets its memory from the system."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next.

    Large tensors would go back to the system, and those of the next step be made of pages that it
    has to find and to clear first (https://man7.org/linux/man-pages/man3/mallopt.3.html). It is for
    the whole process: commands do it, the library does not. Other C libraries stay as they are, and
    so does glibc where the environment tells it what to do.
    """
    if sys.platform != "linux" or any(
        name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ
    ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)
