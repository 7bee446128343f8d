import math

import pytest
import torch

from driving_sim.tokenizer.fsq import FSQ

LEVELS = [(8, 5, 5, 5), (8, 8, 8, 6, 5), (3,), (2, 7, 4)]


@pytest.mark.parametrize("levels", LEVELS)
def test_indices_round_trip_through_codes(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    indices = torch.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(indices)
    assert torch.equal(fsq.codes_to_indices(codes), indices)
    assert len(torch.unique(codes, dim=0)) == fsq.codebook_size == math.prod(levels)
    assert codes.abs().max() <= 1


@pytest.mark.parametrize("levels", LEVELS)
def test_quantised_values_are_codes_and_every_code_is_reached(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    z = torch.linspace(-20, 20, 4001)[:, None].repeat(1, len(levels))
    codes = fsq(z)
    torch.testing.assert_close(fsq.indices_to_codes(fsq.codes_to_indices(codes)), codes)
    for channel, level in enumerate(levels):
        steps = codes[:, channel]
        assert len(torch.unique((steps * 1000).round())) == level
        assert (steps.diff() >= -1e-6).all()


def test_all_levels_are_equally_wide() -> None:
    """Values spread evenly over the squashed range use all levels equally often."""
    fsq = FSQ((8, 5))
    even = torch.linspace(-1, 1, 40001)[1:-1]
    codes = fsq(torch.atanh(even)[:, None] - fsq.shift)
    for channel, level in enumerate(fsq.levels):
        _, counts = codes[:, channel].unique(return_counts=True)
        torch.testing.assert_close(
            counts / len(even), torch.full((level,), 1 / level), atol=2e-3, rtol=0
        )


def test_quantising_a_code_far_from_the_edges_keeps_it() -> None:
    fsq = FSQ((5,))
    z = torch.atanh(torch.tensor([[-1.0], [0.0], [1.0]]) / fsq.half_range)
    torch.testing.assert_close(fsq(z), torch.tensor([[-0.5], [0.0], [0.5]]))


def test_gradient_is_that_of_the_squashing_without_rounding() -> None:
    fsq = FSQ((8, 5))
    z = torch.randn(6, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(fsq(z).sum(), z)
    slope = (1 - torch.tanh(z.detach() + fsq.shift) ** 2) * fsq.half_range / fsq.scale
    torch.testing.assert_close(gradient, slope)


def test_autocast_does_not_lower_the_precision() -> None:
    fsq = FSQ((8, 8, 8, 6, 5))
    z = torch.randn(500, 5)
    with torch.autocast("cpu", torch.bfloat16):
        from_low = fsq(z.bfloat16())
    assert from_low.dtype is torch.float32
    assert torch.equal(from_low, fsq(z.bfloat16().float()))


def test_a_state_dict_holds_no_constants() -> None:
    assert not FSQ((8, 5)).state_dict()
