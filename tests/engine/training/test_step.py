import torch

from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.training.step import Meter

TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def test_means_count_only_added_values() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)}, TAKEN)
    meter.add({"loss": torch.tensor(3.0), "late": torch.tensor(5, dtype=torch.int64)}, TAKEN)
    assert meter.read(Ranks()) == {"loss": 2.0, "late": 5.0}
    assert meter.read(Ranks()) == {}


def test_skipped_steps_do_not_count() -> None:
    meter = Meter()
    nothing = {"loss": torch.tensor(float("nan")), "late": torch.tensor(1.0)}
    meter.add(nothing, SKIPPED)
    meter.add({"loss": torch.tensor(3.0)}, TAKEN)
    meter.add(nothing, SKIPPED)
    assert meter.read(Ranks()) == {"loss": 3.0}


def test_the_meter_keeps_no_autograd_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    meter = Meter()
    meter.add({"loss": weight * 2}, TAKEN)
    assert not meter._sums["loss"].requires_grad
