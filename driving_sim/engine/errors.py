"""The errors a user can cause."""


class DriveSimError(Exception):
    """A mistake in the input or the request: one line: what is wrong, where, and what to do."""


class Interrupted(Exception):  # noqa: N818 - not a failure: the work is saved
    """SIGTERM or Ctrl-C stopped the work after it was saved.

    The message is one line that says how to continue; `exit_code` is 128 + the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
