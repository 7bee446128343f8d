"""The errors a user can cause."""


class DriveSimError(Exception):
    """A mistake in the input or the request: one line: what is wrong, where, and what to do."""


class TooLittleDataError(DriveSimError):
    """Data that cannot tell what is asked: too short, or without what it takes."""


class Interrupted(Exception):  # noqa: N818 - not a failure: the work is saved
    """SIGTERM or Ctrl-C stopped the work after it was saved.

    The message is one line: `what` happened, then how to go on; `exit_code` is 128 + the signal.
    """

    def __init__(self, what: str, to_go_on: str, exit_code: int) -> None:
        super().__init__(f"{what}; to go on, {to_go_on}")
        self.what, self.exit_code = what, exit_code
