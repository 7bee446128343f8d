"""How the logs of drives are read, where they are."""

from dataclasses import dataclass
from typing import get_args

from driving_sim.data.actions.action_file import SteeringKind
from driving_sim.engine.errors import DriveSimError


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """What a user says of the logs. Raises DriveSimError for a kind of steering there is not."""

    steering_kind: SteeringKind | None = None
    """What a bare `steering` column measures, and any other one must."""
    wanted_by: str = "--steering-kind is"
    """What messages say before that kind."""
    time_offset: float = 0.0
    """Added to the times of every log, in seconds."""

    def __post_init__(self) -> None:
        kinds = get_args(SteeringKind)
        if self.steering_kind is not None and self.steering_kind not in kinds:
            raise DriveSimError(
                f"--steering-kind {self.steering_kind}: kinds are {', '.join(kinds)}"
            )

    def check_kind(self, steering: str, kind: SteeringKind) -> None:
        """Raise DriveSimError where a steering of this kind is not the one that is wanted."""
        if self.steering_kind not in (None, kind):
            raise DriveSimError(f"{steering} is {kind}, but {self.wanted_by} {self.steering_kind}")
