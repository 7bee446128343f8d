"""Exceptions for errors that a user can cause.

Their messages name settings as Python does, in backticks: `out`, or `fps=10` with a value. The
command line replaces these names with its flags.
"""

import errno


class DriveSimError(Exception):
    """An error in the user's input or request. The message says what is wrong and what to do."""


class BadDriveError(DriveSimError):
    """A drive cannot be read completely. The caller may skip the drive and continue."""


class TooLittleDataError(DriveSimError):
    """The data is too short for a measurement, or does not contain what it needs."""


class MissingExtraError(DriveSimError, ImportError):
    """A package is missing that only an optional part of drivesim needs."""


class Interrupted(Exception):  # noqa: N818 - not named an error, because the work is saved
    """SIGTERM or Ctrl-C stopped the program after its work was saved.

    The message is one line that says what happened and how to continue. `exit_code` is 128 plus
    the signal number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the system, torch's CPU allocator or a GPU has run out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Outside CUDA, torch raises a plain RuntimeError if memory runs out, so look at its text.
    torch_is_out = isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)
    )
    return torch_is_out or isinstance(error, MemoryError)
