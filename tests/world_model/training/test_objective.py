import math

import pytest
import torch

from driving_sim.world_model.actions import ActionDropoutConfig, ActionStatistics
from driving_sim.world_model.kernels.operators import is_bounded
from driving_sim.world_model.training.objective import (
    InputNoiseConfig,
    WorldModelObjective,
    replace_tokens,
)
from driving_sim.world_model.transformer import Block, Transformer
from tests.fixtures.world_models import CONFIG, GRID, random_inputs, random_model


def test_loss_is_the_cross_entropy_of_the_true_tokens() -> None:
    model = random_model()
    batch = random_inputs(3)
    loss, metrics = WorldModelObjective(InputNoiseConfig(), model).eval()(batch)
    logits = model(**random_inputs(3))
    expected = -logits.log_softmax(-1).gather(-1, batch["tokens"].unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["bits_per_token"].item() == pytest.approx(expected.item() / math.log(2))
    assert metrics["accuracy"] == (logits.argmax(-1) == batch["tokens"]).float().mean()


def test_an_untrained_model_needs_log2_of_the_codebook_size_in_bits() -> None:
    objective = WorldModelObjective(
        InputNoiseConfig(), Transformer(CONFIG, GRID, ActionStatistics())
    )
    _, metrics = objective(random_inputs(2))
    assert metrics["bits_per_token"].item() == pytest.approx(math.log2(9), abs=1e-5)


def test_noise_is_in_the_input_and_not_in_the_target() -> None:
    """Noise does not change the loss of a model that ignores its input."""
    quiet = ActionDropoutConfig(both=0.0, channel=0.0)
    model = random_model().train()
    batch = random_inputs(3)

    def loss(noise: float, seed: int = 0) -> float:
        torch.manual_seed(seed)
        config = InputNoiseConfig(token_noise=noise, action_dropout=quiet)
        return float(WorldModelObjective(config, model)(batch)[0].item())

    assert loss(0.0) == loss(0.0, seed=1)
    assert loss(0.9) != loss(0.9, seed=1)
    model.output_norm.weight.data.zero_()  # from here on the model ignores its input
    assert loss(0.0) == loss(0.9) == loss(0.9, seed=1)


def test_replaced_tokens_are_a_share_of_each_window_and_come_from_the_batch() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(100, 110, (500, 4, 3, 4))
    noisy = replace_tokens(tokens, 0.4)
    assert set(noisy.unique().tolist()) <= set(range(100, 110))  # type: ignore[no-untyped-call]
    share = (noisy != tokens).float().mean((1, 2, 3)) / 0.9  # a tenth of the replacements are equal
    assert share.mean().item() == pytest.approx(0.2, abs=0.02)
    assert share.std().item() == pytest.approx(0.4 / math.sqrt(12), abs=0.05)
    assert replace_tokens(tokens, 0.0) is tokens


def test_hidden_actions_change_the_loss_only_in_training() -> None:
    objective = WorldModelObjective(
        InputNoiseConfig(token_noise=0.0, action_dropout=ActionDropoutConfig(both=1.0)),
        random_model(),
    )
    batch = random_inputs(3)
    hidden = {**batch, "action_valid": torch.zeros_like(batch["action_valid"])}
    known = objective.eval()(batch)[0].item()
    assert known != objective(hidden)[0].item()
    torch.manual_seed(1)
    assert known not in {objective.train()(batch)[0].item() for _ in range(5)}


def test_gains_stay_in_the_range_of_the_compiled_code() -> None:
    model = random_model()
    objective = WorldModelObjective(InputNoiseConfig(), model)
    (first, *_) = [block.attention for block in model.blocks if isinstance(block, Block)]
    with torch.no_grad():
        first.q_norm.weight.mul_(-100)
        first.k_norm.weight.mul_(100)
    assert not is_bounded(first.q_norm.weight, first.k_norm.weight)
    objective.limit_parameters()
    rounded = [norm.weight.bfloat16().float() for norm in (first.q_norm, first.k_norm)]
    assert is_bounded(*rounded)
    assert rounded[0].max() < 0 < rounded[1].min()


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"token_noise: must .*, found 2"):
        InputNoiseConfig(token_noise=2)
