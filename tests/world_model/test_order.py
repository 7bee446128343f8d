import pytest
import torch

from driving_sim.world_model.order import SlotOrder

GRIDS = [(1, 1), (1, 5), (3, 1), (2, 3), (8, 16), (5, 4)]


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 9])
def test_every_input_is_known_one_wave_before_its_slot(rows: int, cols: int, lag: int) -> None:
    order = SlotOrder(rows=rows, cols=cols, lag=lag)
    for slot in range(order.slots):
        if order.source[slot] == order.tokens:
            assert order.col[slot] == 0
            continue
        predictor = order.slot_of_token[order.source[slot]]
        assert order.wave[predictor] == order.wave[slot] - 1


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 9])
def test_waves_cover_the_slots_in_order_and_predict_each_token_once(
    rows: int, cols: int, lag: int
) -> None:
    order = SlotOrder(rows=rows, cols=cols, lag=lag)
    predicted = []
    position = 0
    for wave in order.waves:
        assert wave.start == position
        position = wave.stop
        assert len(set(order.wave[wave.start : wave.stop].tolist())) == 1
        assert (order.row[wave.start : wave.stop].diff() > 0).all()
        assert (order.target[wave.start : wave.first] == order.tokens).all()
        predicted += order.target[wave.first : wave.stop].tolist()
    assert position == order.slots
    assert sorted(predicted) == list(range(order.tokens))
    assert (order.wave.diff() >= 0).all()


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_lag_of_cols_plus_one_is_raster_order(rows: int, cols: int) -> None:
    order = SlotOrder(rows=rows, cols=cols, lag=cols + 1)
    slots = [(r, c) for r in range(rows) for c in range(cols + 1)]
    assert list(zip(order.row.tolist(), order.col.tolist(), strict=True)) == slots
    assert len(order.waves) == order.slots


@pytest.mark.parametrize(("rows", "cols", "passes"), [(8, 16, 31), (16, 32, 63)])
def test_lag_two_needs_few_passes(rows: int, cols: int, passes: int) -> None:
    assert len(SlotOrder(rows=rows, cols=cols).waves) == passes


def test_lag_two_sees_the_four_neighbours_before_a_token() -> None:
    order = SlotOrder(rows=4, cols=6)
    tokens = torch.arange(24).view(4, 6)
    slot = order.slot_of_token[tokens[2, 3]]
    seen = set(order.source[: slot + 1].tolist())
    assert {int(tokens[r, c]) for r, c in [(2, 2), (1, 2), (1, 3), (1, 4)]} <= seen


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
@pytest.mark.parametrize("reach", [0, 1, 2])
def test_neighbours_outside_the_frame_are_missing(rows: int, cols: int, reach: int) -> None:
    """The last token of a row has no right neighbour; it is not the first token of the next row."""
    order = SlotOrder(rows=rows, cols=cols)
    tokens = torch.arange(rows * cols).view(rows, cols)
    # Slots that predict nothing are one column beyond the last.
    margin = (reach, reach + 1, reach, reach)
    padded = torch.nn.functional.pad(tokens, margin, value=order.tokens)
    neighbours = order.neighbours(reach)
    for slot in range(order.slots):
        row, col = int(order.row[slot]), int(order.col[slot])
        around = padded[row : row + 2 * reach + 1, col : col + 2 * reach + 1]
        assert torch.equal(neighbours[slot], around.flatten())
