"""The errors a user can cause."""


class DriveSimError(Exception):
    """A mistake in the input or the request: one line saying what is wrong, where, and what to do."""
