from dataclasses import replace

import pytest
import torch
from torch import Tensor

from driving_sim.world_model.cache import RingCache, encode_frame
from driving_sim.world_model.sampling.draw_waves import FrameSample, FrameSampler
from driving_sim.world_model.sampling.sampling import (
    Sampling,
    draw,
    truncated_log_probs,
    uniforms,
)
from driving_sim.world_model.transformer import Transformer
from tests.fixtures.world_models import CONFIG, GRID, random_inputs, random_model


def prefix_of(model: Transformer, inputs: dict[str, Tensor], frames: int) -> RingCache:
    """Return a cache with the first frames of the first sequence."""
    cache = RingCache(model, model.tables(), 1)
    previous = inputs["previous"][:1].flatten(1)
    with torch.inference_mode():
        for t in range(frames):
            tokens = inputs["tokens"][:1, t].flatten(1)
            now = inputs["actions"][:1, t], inputs["action_valid"][:1, t]
            encode_frame(cache, tokens, previous, *now)
            previous = tokens
    return cache


def roll(
    model: Transformer,
    sampling: Sampling,
    *,
    samples: list[int],
    frames: int = 5,
    known: int = 2,
    actions: Tensor | None = None,
) -> list[FrameSample]:
    inputs = random_inputs(known + frames)
    if actions is None:
        actions = inputs["actions"][:1, known:].expand(len(samples), -1, -1)
    sampler = FrameSampler(
        prefix_of(model, inputs, known),
        inputs["tokens"][:1, known - 1].flatten(1),
        samples=torch.tensor(samples),
        sampling=sampling,
    )
    valid = torch.ones(len(samples), 2, dtype=torch.bool)
    return [sampler.step(actions[:, t], valid) for t in range(frames)]


def stacked(frames: list[FrameSample]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.stack([frame.tokens for frame in frames], dim=1),
        torch.stack([frame.log_probs for frame in frames], dim=1),
        torch.stack([frame.sampling_log_probs for frame in frames], dim=1),
    )


def teacher_forced(model: Transformer, tokens: Tensor, known: int, *, null: bool) -> Tensor:
    """Return the uncached logits [B, N, r, c, K] of sampled tokens after `known` true frames."""
    inputs = random_inputs(known + tokens.shape[1])
    batch = len(tokens)
    past = inputs["tokens"][:1, :known].expand(batch, -1, -1, -1)
    valid = inputs["action_valid"][:1].repeat(batch, 1, 1)
    if null:
        valid[:, known:] = False
    with torch.no_grad():
        logits: Tensor = model(
            torch.cat([past, tokens], dim=1),
            inputs["previous"][:1].expand(batch, -1, -1),
            inputs["has_previous"][:1].expand(batch),
            inputs["actions"][:1].expand(batch, -1, -1),
            valid,
        )
    return logits[:, known:]


SAMPLINGS = [
    Sampling(seed=3),
    Sampling(temperature=0.7, top_k=4, seed=4),
    Sampling(temperature=0.9, min_p=0.2, guidance=1.5, seed=6),
    Sampling(top_p=0.6, guidance=2.5, seed=5),
    Sampling(temperature=0.0, guidance=3.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_log_probs_of_a_rollout_equal_teacher_forced_ones(sampling: Sampling, lag: int) -> None:
    model = random_model(replace(CONFIG, lag=lag))
    frames = 3 * CONFIG.context_frames
    tokens, log_probs, sampling_log_probs = stacked(
        roll(model, sampling, samples=[0, 1, 7], frames=frames)
    )
    plain = teacher_forced(model, tokens, 2, null=False)
    null = teacher_forced(model, tokens, 2, null=True)
    drawn_from = truncated_log_probs(null + sampling.guidance * (plain - null), sampling)
    index = tokens.unsqueeze(-1)
    expected = plain.log_softmax(-1).gather(-1, index).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
    expected = drawn_from.gather(-1, index).squeeze(-1)
    torch.testing.assert_close(sampling_log_probs, expected, atol=1e-4, rtol=0)


def test_the_tokens_are_the_inverse_cdf_of_teacher_forced_probabilities() -> None:
    model = random_model()
    sampling = Sampling(temperature=1.3, top_k=5, seed=11)
    tokens, _, _ = stacked(roll(model, sampling, samples=[4, 2]))
    log_probs = truncated_log_probs(teacher_forced(model, tokens, 2, null=False), sampling)
    for t in range(tokens.shape[1]):
        uniform = uniforms(11, torch.tensor([4, 2]), torch.tensor([t]), GRID.rows, GRID.cols)
        assert torch.equal(draw(log_probs[:, t], uniform), tokens[:, t])


def test_guidance_one_is_the_plain_model() -> None:
    model = random_model()
    plain = stacked(roll(model, Sampling(), samples=[0, 1]))
    nearly = stacked(roll(model, Sampling(guidance=1 + 1e-7), samples=[0, 1]))
    assert torch.equal(plain[0], nearly[0])
    torch.testing.assert_close(plain[1], nearly[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(plain[1], plain[2], atol=1e-5, rtol=0)
    strong = stacked(roll(model, Sampling(guidance=4.0), samples=[0, 1]))
    assert not torch.equal(plain[0], strong[0])


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_draws_do_not_depend_on_the_batch(sampling: Sampling) -> None:
    model = random_model()
    together, _, _ = stacked(roll(model, sampling, samples=[0, 1, 2, 3]))
    for sample in range(4):
        alone, _, _ = stacked(roll(model, sampling, samples=[sample]))
        assert torch.equal(alone[0], together[sample])
    assert not torch.equal(together[0], together[1])


def test_draws_do_not_depend_on_the_lag() -> None:
    """The model's logits are constant, so tokens depend only on the uniform numbers."""
    drawn = []
    for lag in (1, 2, GRID.cols + 1):
        model = random_model(replace(CONFIG, lag=lag))
        model.output_norm.weight.data.zero_()
        drawn.append(stacked(roll(model, Sampling(seed=9), samples=[0, 1]))[0])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_branches_share_their_draws() -> None:
    """The same sample number and actions give the same future, whatever the other branches do."""
    model = random_model()
    actions = torch.zeros(4, 5, 2)
    actions[2:] = torch.tensor([5.0, 0.2])
    tokens, _, _ = stacked(roll(model, Sampling(), samples=[0, 1, 0, 1], actions=actions))
    first, _, _ = stacked(roll(model, Sampling(), samples=[0, 1], actions=actions[:2]))
    assert torch.equal(tokens[:2], first)
    assert not torch.equal(tokens[:2], tokens[2:])
