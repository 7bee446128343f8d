import pytest
import torch
from torch import nn

from driving_sim.engine.training.ema import Ema


def linear(value: float) -> nn.Linear:
    module = nn.Linear(3, 2)
    fill(module, value)
    return module


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_average_of_constant_parameters_is_exact() -> None:
    module = linear(0.3)
    ema = Ema(module, 0.999)
    for _ in range(5):
        ema.update()
    assert all((value == module.bias[0]).all() for value in ema.averages.values())


def test_average_follows_its_recurrence() -> None:
    module, decay = linear(0.0), 0.5
    ema, expected = Ema(module, decay), 0.0
    for update in range(1, 20):
        fill(module, float(update))
        ema.update()
        used_decay = min(decay, (1 + update) / (10 + update))
        expected = used_decay * expected + (1 - used_decay) * update
    torch.testing.assert_close(ema.averages["weight"], torch.full((2, 3), expected))


def test_a_skipped_update_changes_nothing() -> None:
    module, reference = linear(0.0), linear(0.0)
    ema, without = Ema(module, 0.9), Ema(reference, 0.9)
    for value, skipped in ((1.0, 0.0), (2.0, 1.0), (3.0, 0.0)):
        fill(module, value)
        ema.update(torch.tensor(skipped))
        if not skipped:
            fill(reference, value)
            without.update()
    assert torch.equal(ema.averages["weight"], without.averages["weight"])
    assert ema.updates == without.updates == 2


def test_warm_up_forgets_the_initialisation() -> None:
    module = linear(100.0)
    ema = Ema(module, 0.9999)
    fill(module, 1.0)
    for _ in range(100):
        ema.update()
    assert (ema.averages["bias"] - 1.0).abs().max() < 1e-3


def test_without_decay_the_average_is_the_parameter() -> None:
    module = linear(0.0)
    ema = Ema(module, 0.0)
    fill(module, 2.0)
    ema.update()
    assert torch.equal(ema.averages["weight"], module.weight)


def test_swap_is_undone_after_an_error_too() -> None:
    module = linear(1.0)
    ema = Ema(module, 0.9)
    fill(module, 3.0)
    weight = module.weight
    with ema.swapped():
        assert module.weight is weight
        assert (module(torch.ones(1, 3)) == 4.0).all()
    assert (module.weight == 3.0).all()
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert (module.weight == 3.0).all()
    assert (ema.averages["weight"] == 1.0).all()


def test_swap_reaches_the_optimiser_and_gradients() -> None:
    """After a swap, training continues from the module's own parameters."""
    module = linear(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    ema = Ema(module, 0.9)
    fill(module, 3.0)
    with ema.swapped():
        pass
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (module.weight == 2.0).all()
    assert (ema.averages["weight"] == 1.0).all()


def test_frozen_weights_and_buffers_are_not_averaged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    assert Ema(module, 0.9).averages.keys() == {"0.bias", "1.weight", "1.bias"}


def test_a_copied_state_continues_in_the_same_way() -> None:
    module, copied_module = linear(1.0), linear(5.0)
    ema, copy = Ema(module, 0.99), Ema(copied_module, 0.99)
    ema.update()
    fill(module, 2.0)
    fill(copied_module, 2.0)
    copy.averages["weight"].copy_(ema.averages["weight"])
    copy.updates = ema.updates
    ema.update()
    copy.update()
    assert torch.equal(ema.averages["weight"], copy.averages["weight"])
