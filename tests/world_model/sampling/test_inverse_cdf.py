import math

import torch

from driving_sim.world_model.sampling.inverse_cdf import draw, uniforms


def test_uniforms_are_fixed_uniform_and_independent() -> None:
    numbers = uniforms(0, torch.arange(64), 0, 8, 16)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.flatten().tolist())) > 0.999 * numbers.numel()
    flat = numbers.double().flatten()
    n = len(flat)
    assert abs(flat.mean() - 0.5) < 4 / math.sqrt(12 * n)
    counts = torch.histc(flat, 50, 0, 1)
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 90  # chi-square with 49 degrees of freedom
    neighbours = [
        uniforms(1, torch.arange(64), 0, 8, 16),
        uniforms(0, torch.arange(1, 65), 0, 8, 16),
        uniforms(0, torch.arange(64), 1, 8, 16),
        numbers.roll(1, 1),
        numbers.roll(1, 2),
    ]
    for other in neighbours:
        pair = torch.stack([flat, other.double().flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 4 / math.sqrt(n)
    assert torch.equal(uniforms(0, torch.tensor([5]), 0, 8, 16)[0], numbers[5])
    assert torch.equal(uniforms(0, torch.tensor([5]), 0, 2, 3)[0], numbers[5, :2, :3])
    assert uniforms(-1, torch.tensor([0]), 0, 1, 1) == uniforms(
        2**64 - 1, torch.tensor([0]), 0, 1, 1
    )


def test_draw_follows_the_distribution_and_its_edges() -> None:
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    uniform = torch.tensor([0.0, 0.24, 0.26, 1 - 2**-24])
    tokens = draw(log_probs.expand(4, 5), uniform)
    assert tokens.tolist() == [1, 1, 3, 3]
    torch.manual_seed(0)
    log_probs = torch.randn(4, 1000).mul(3).log_softmax(-1)
    edge = draw(log_probs, torch.full((4,), 1 - 2**-24))
    assert (log_probs.gather(-1, edge[:, None]) > -torch.inf).all()
    drawn = draw(log_probs[:1].expand(20_000, -1), torch.rand(20_000))
    share = torch.bincount(drawn, minlength=1000) / 20_000
    assert (share - log_probs[0].exp()).abs().max() < 0.02
    assert (draw(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.5])) < 5).all()
