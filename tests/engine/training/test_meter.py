import torch

from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.training.meter import Meter


def test_means_count_only_what_came() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(3.0), "late": torch.tensor(5, dtype=torch.int64)})
    assert meter.read(Ranks()) == {"loss": 2.0, "late": 5.0}
    assert meter.read(Ranks()) == {}


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    meter = Meter()
    meter.add({"loss": weight * 2})
    assert not meter._sums["loss"].requires_grad
