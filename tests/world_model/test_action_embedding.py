import numpy as np
import pytest
import torch

from driving_sim.world_model.actions import (
    ActionDropoutConfig,
    ActionEmbedding,
    ActionEmbeddingConfig,
    ActionStatistics,
    drop_actions,
)

STATISTICS = ActionStatistics(mean=(10.0, 0.0), std=(4.0, 0.2))


def embedding() -> ActionEmbedding:
    torch.manual_seed(0)
    return ActionEmbedding(ActionEmbeddingConfig(octaves=3, hidden=16), 8, STATISTICS)


def test_statistics_ignore_invalid_actions() -> None:
    rng = np.random.default_rng(0)
    actions = rng.normal([8.0, -0.1], [2.0, 0.3], (1000, 2)).astype(np.float32)
    valid = np.ones((1000, 2), np.bool_)
    valid[:300, 0] = False
    valid[600:, 1] = False
    spoilt = np.where(valid, actions, np.float32(1e6))
    measured = ActionStatistics.measure(spoilt, valid)
    speed, steering = actions[300:, 0].astype(float), actions[:600, 1].astype(float)
    assert measured.mean == pytest.approx((speed.mean(), steering.mean()))
    assert measured.std == pytest.approx((speed.std(), steering.std()))
    assert measured.steering_p95 == pytest.approx(np.quantile(np.abs(steering), 0.95))
    assert measured.steering_p99 == pytest.approx(np.quantile(np.abs(steering), 0.99))


def test_no_actions_and_constant_ones_have_statistics() -> None:
    actions = np.full((5, 2), 3.0, np.float32)
    none = ActionStatistics.measure(actions, np.zeros((5, 2), np.bool_))
    assert none == ActionStatistics()
    constant = ActionStatistics.measure(actions, np.ones((5, 2), np.bool_))
    assert constant.mean == (3.0, 3.0)
    assert constant.std == (0.0, 0.0)
    parked = ActionStatistics.measure(0 * actions, np.ones((5, 2), np.bool_))
    assert (parked.mean, parked.std) == ((0.0, 0.0), (0.0, 0.0))
    assert parked != none  # a recorded speed of 0 differs from an unknown speed


def test_statistics_cancel_the_units() -> None:
    """A drive has the same embedding in km/h and degrees, if the statistics are in them too."""
    mps = embedding()
    kmh = embedding()
    factor = torch.tensor([3.6, 57.3])
    kmh.mean, kmh.std = kmh.mean * factor, kmh.std * factor
    actions = torch.randn(6, 2) * mps.std + mps.mean
    valid = torch.ones(6, 2, dtype=torch.bool)
    torch.testing.assert_close(mps(actions, valid), kmh(actions * factor, valid))


@pytest.mark.parametrize("channel", [0, 1])
def test_an_unknown_channel_is_null_whatever_its_value(channel: int) -> None:
    module = embedding()
    action, with_nan = torch.tensor([[12.0, 0.1]]), torch.tensor([[12.0, 0.1]])
    with_nan[0, channel] = torch.nan
    valid = torch.ones(1, 2, dtype=torch.bool)
    known = module(action, valid)
    unknown = module(with_nan, valid)  # NaN is unknown even if `valid` says otherwise
    valid[0, channel] = False
    assert torch.equal(module(action, valid), module(with_nan, valid))
    assert torch.equal(module(action, valid), unknown)
    assert not torch.allclose(module(action, valid), known)


def test_left_and_right_embed_differently() -> None:
    actions = torch.tensor([[10.0, 0.2], [10.0, -0.2], [10.0, 0.0]])
    out = embedding()(actions, torch.ones(3, 2, dtype=torch.bool))
    assert torch.cdist(out, out)[0, 1] > 0.1
    assert torch.cdist(out, out)[0, 2] > 0.1


def test_dropout_hides_a_channel_from_a_frame_on() -> None:
    torch.manual_seed(0)
    valid = torch.ones(4000, 6, 2, dtype=torch.bool)
    hidden = ~drop_actions(valid, ActionDropoutConfig(both=0.2, channel=0.1))
    assert (hidden[:, 1:].int() - hidden[:, :-1].int() >= 0).all()  # a hidden channel stays hidden
    both, any_channel = hidden[:, -1].all(1), hidden[:, -1].any(1)
    assert both.float().mean().item() == pytest.approx(0.2 + 0.8 * 0.01, abs=0.02)
    assert (any_channel & ~both).float().mean().item() == pytest.approx(0.8 * 0.18, abs=0.02)
    all_frames = hidden[any_channel].any(2).all(1).float().mean().item()
    assert all_frames == pytest.approx(0.5 + 0.5 / 6, abs=0.05)
    assert torch.equal(drop_actions(valid, ActionDropoutConfig(both=0.0, channel=0.0)), valid)


def test_dropout_never_makes_an_invalid_action_valid() -> None:
    valid = torch.rand(50, 6, 2) < 0.5
    dropped = drop_actions(valid, ActionDropoutConfig(both=0.3, channel=0.3))
    assert not (dropped & ~valid).any()
    assert (valid & ~dropped).any()


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"both: must be less than or equal to 1, found 1.5"):
        ActionDropoutConfig(both=1.5)
    with pytest.raises(ValueError, match=r"octaves: must .*, found 0"):
        ActionEmbeddingConfig(octaves=0)
    with pytest.raises(ValueError, match=r"std\[1\]: must .*, found -0.1"):
        ActionStatistics(std=(1.0, -0.1))


def test_the_limits_of_the_speed_are_those_of_the_training_data() -> None:
    recorded = ActionStatistics(lowest=(-1.0, -0.2), highest=(12.0, 0.2))
    assert recorded.speed_limits == (0, 12)
    assert STATISTICS.speed_limits == (0, 22)  # older models: 3 deviations from the mean
