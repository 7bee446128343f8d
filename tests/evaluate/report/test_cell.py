import math
from typing import Any

import pytest

from driving_sim.evaluate.report.cell import cell_texts
from tests.fixtures.report_sections import ESTIMATE


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        ([22.0612, 9.81234, None, 3], ["22.06", "9.81", "–", "3"]),
        ([0.5, 0.25], ["0.50", "0.25"]),
        ([1234567.8, 0.012345, math.nan], ["1,234,568", "0.01235", "–"]),
        ([999.96], ["1,000"]),
        ([0.0000012, 0.0000034], ["1.2e-06", "3.4e-06"]),
        ([0.0, -1.5, math.inf], ["0.0", "-1.5", "–"]),
        ([True, False, "text", 12345], ["yes", "no", "text", "12,345"]),
        ([ESTIMATE], ["3.21 [3.10, 3.33]"]),
        ([{"mean": 1234.5, "low": 1111.1, "high": 1333.3}], ["1,234 [1,111, 1,333]"]),
        ([{"mean": 2.0, "low": 2.0, "high": 2.0}], ["2 [2, 2]"]),
        ([{"mean": 2.0, "low": None, "high": None}], ["2"]),
        ([{"mean": None, "low": None, "high": None}], ["–"]),
    ],
)
def test_numbers_have_sensible_digits(cells: list[Any], texts: list[str]) -> None:
    assert cell_texts(cells) == texts
