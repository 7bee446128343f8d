"""The errors a user can cause.

Their messages name settings as Python does, in backticks: `out`, or with a value `fps=10`. The
command line shows its flags instead.
"""


class DriveSimError(Exception):
    """A mistake in the input or the request: one line: what is wrong, where, and what to do."""


class BadDriveError(DriveSimError):
    """A drive that cannot be read, or only in part: who can do without it may skip it."""


class TooLittleDataError(DriveSimError):
    """Data that cannot tell what is asked: too short, or without what it takes."""


class Interrupted(Exception):  # noqa: N818 - not a failure: the work is saved
    """SIGTERM or Ctrl-C stopped the work after it was saved.

    The message is one line: what happened, then how to go on; `exit_code` is 128 + the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
