"""What rewards compare a moment with: the surprise of real footage, and the lane in the picture."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from driving_sim.engine.errors import DriveSimError
from driving_sim.env.lane_probe import PROBE_FILE, LaneProbe
from driving_sim.env.starts import Start
from driving_sim.world_model.training.bits import streamed_token_bits
from driving_sim.world_model.world_model import WorldModel

_MOST_CONTEXTS = 4


@dataclass(frozen=True, eq=False)
class Gauges:
    """Measures of a model and its contexts, each computed when a reward first asks for it."""

    world: WorldModel
    starts: list[Start]

    @cached_property
    def usual_surprise_nats(self) -> float:
        """Mean surprise of a token of real footage in nats: that of up to four contexts.

        Only frames with a full window before them count.
        """
        first = self.world.context_frames - 1
        bits = []
        for start in self.starts[:_MOST_CONTEXTS]:
            # The action of the last frame leads nowhere; repeat the one before it.
            pairs = [np.concatenate([x, x[-1:]])[None] for x in (start.actions, start.valid)]
            frames = streamed_token_bits(self.world.transformer, start.tokens.numpy(), *pairs)
            bits += [float(frame.bits.mean()) for frame in frames][first:]
        return float(np.mean(bits) * np.log(2))

    @cached_property
    def lane_probe(self) -> LaneProbe:
        """The lane probe in the model's run folder. Raises DriveSimError if there is none."""
        run = self.world.run
        if run is None or not (run / PROBE_FILE).is_file():
            raise DriveSimError(
                f"{run or 'the model'} has no lane probe ({PROBE_FILE}); use another `reward`, or "
                "train a probe with `driving_sim.env.train_lane_probe` and save it in the run"
            )
        return LaneProbe.load(run / PROBE_FILE)
