from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.rotary import AxialRotary, rotate
from driving_sim.world_model.transformer import (
    CodeEmbedding,
    Transformer,
    TransformerConfig,
    code_digits,
)
from tests.fixtures.world_models import CONFIG, GRID, random_inputs, random_model


def in_order(model: Transformer, logits: Tensor) -> Tensor:
    """Return the first sequence's logits [T, P, K], tokens in the order of their slots."""
    by_slot = model.slot_of_token.argsort()
    return logits[0].flatten(1, 2)[:, by_slot]


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("frames", [2, 5])
def test_no_slot_sees_what_comes_later(lag: int, frames: int) -> None:
    model = random_model(replace(CONFIG, lag=lag))
    inputs = random_inputs(frames, batch=1)
    with torch.no_grad():
        before = in_order(model, model(**inputs))
    predicts = model.target < GRID.rows * GRID.cols
    targets, waves = model.target[predicts].tolist(), model.order.wave[predicts].tolist()
    for frame in range(frames):
        for place, token in enumerate(targets):
            changed = {**inputs, "tokens": inputs["tokens"].clone()}
            flat = changed["tokens"].view(1, frames, -1)
            flat[0, frame, token] = (flat[0, frame, token] + 1) % GRID.codebook_size
            with torch.no_grad():
                after = in_order(model, model(**changed))
            assert torch.equal(after[:frame], before[:frame])
            # The logits of the token and of earlier ones stay the same. Those of the last token
            # change, unless it is in the same wave.
            assert torch.equal(after[frame, : place + 1], before[frame, : place + 1])
            if place + 1 < len(targets):
                moved = not torch.equal(after[frame, -1], before[frame, -1])
                assert moved == (waves[place] < waves[-1])
            elif frame + 1 < frames:
                assert not torch.equal(after[frame + 1], before[frame + 1])


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_a_token_sees_its_action_and_its_earlier_neighbours(lag: int) -> None:
    model = random_model(replace(CONFIG, lag=lag))
    inputs = random_inputs(2, batch=1)
    with torch.no_grad():
        before = model(**inputs)
        for t, r, c in [(0, 2, 3), (1, 0, 0), (1, 2, 0), (1, 1, 2)]:
            actions = inputs["actions"].clone()
            actions[0, t, 1] += 0.1
            assert (model(**{**inputs, "actions": actions}) - before)[0, t, r, c].abs().max() > 1e-5
            for row, col in [(r, c - 1), (r - 1, c), (r - 1, c + 1)]:
                inside = row >= 0 and 0 <= col < GRID.cols
                if not inside or col + lag * row >= c + lag * r:
                    continue
                tokens = inputs["tokens"].clone()
                tokens[0, t, row, col] = (tokens[0, t, row, col] + 1) % GRID.codebook_size
                after = model(**{**inputs, "tokens": tokens})
                assert (after - before)[0, t, r, c].abs().max() > 1e-5


def test_lag_of_cols_plus_one_equals_a_raster_order_transformer() -> None:
    """With a larger lag the sequence is the same, and so are the logits, to the last bit."""
    raster = random_model(replace(CONFIG, lag=GRID.cols + 1))
    assert torch.equal(raster.target[raster.slot_of_token], torch.arange(GRID.rows * GRID.cols))
    assert (raster.slot_of_token.diff() > 0).all()
    slower = random_model(replace(CONFIG, lag=GRID.cols + 4))
    inputs = random_inputs(3)
    with torch.no_grad():
        assert torch.equal(raster(**inputs), slower(**inputs))


def test_the_window_slides_over_a_longer_sequence() -> None:
    """With one layer, frame t of a sequence equals the last frame of the window that ends there."""
    model = random_model(replace(CONFIG, layers=1))
    inputs = random_inputs(7)
    with torch.no_grad():
        sequence = model(**inputs)
        for t in range(CONFIG.context_frames - 1, 7):
            first = t - CONFIG.context_frames + 1
            span = slice(first, t + 1)
            window = {name: inputs[name][:, span] for name in ("tokens", "actions", "action_valid")}
            if first:
                window["previous"] = inputs["tokens"][:, first - 1]
            last = model(**{**inputs, **window})[:, -1]
            torch.testing.assert_close(sequence[:, t], last, atol=1e-5, rtol=1e-4)


def test_training_runs_the_flash_kernel() -> None:
    model = random_model()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other kernel is an error
        model(**random_inputs(3)).sum().backward()


def test_a_first_frame_ignores_the_previous_tokens() -> None:
    model = random_model()
    inputs = random_inputs(2)
    inputs["has_previous"][:] = False
    altered = {**inputs, "previous": (inputs["previous"] + 1) % GRID.codebook_size}
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**altered))
        inputs["has_previous"][:] = True
        assert not torch.equal(
            model(**inputs), model(**{**inputs, "previous": altered["previous"]})
        )


def test_an_untrained_model_is_uniform() -> None:
    model = Transformer(CONFIG, GRID, ActionStatistics())
    logits = model(**random_inputs(2))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_rotary_scores_depend_on_differences_only() -> None:
    row, col = torch.tensor([0, 1, 2, 5]), torch.tensor([3, 0, 1, 2])
    q, k = torch.randn(4, 24), torch.randn(4, 24)

    def scores(frame: int, down: int, right: int) -> Tensor:
        turn = AxialRotary(row + down, col + right, 24)(torch.tensor([frame]))
        return rotate(q, *turn) @ rotate(k, *turn).T

    torch.testing.assert_close(scores(0, 0, 0), scores(40, 3, 7), atol=1e-4, rtol=1e-4)
    moved = rotate(k, *AxialRotary(row, col, 24)(torch.tensor([1])))
    still = rotate(k, *AxialRotary(row, col, 24)(torch.tensor([0])))
    assert (moved - still).abs().max() > 0.1


def test_digits_alone_distinguish_all_codes() -> None:
    levels = (3, 2, 4)
    assert len({tuple(digits) for digits in code_digits(levels).tolist()}) == 24
    assert (code_digits(levels) @ torch.tensor([1, 3, 6]) == torch.arange(24)).all()
    embedding = CodeEmbedding(levels, 8)
    embedding.codes.data.zero_()
    table = embedding.table()
    torch.testing.assert_close(table[0] + table[4], table[1] + table[3])  # 00 + 11 and 10 + 01
    assert len({tuple(row) for row in table.tolist()}) == 24


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 30),
        ("kv_heads", 3),
        ("context_frames", 1),
        ("dropout", 1.0),
        ("lag", -1),
        ("layers", 10**9),
    ],
)
def test_impossible_shapes_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(TransformerConfig(width=32, heads=4, kv_heads=2), **{field: value})  # type: ignore[arg-type]
