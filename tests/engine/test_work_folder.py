from pathlib import Path

import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.work_folder import claim_folder


def test_a_new_folder_is_claimed_and_its_plan_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "new"
    for _ in range(2):
        claim_folder(out, "plan.json", {"seed": 1}, "drives")
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    with pytest.raises(DriveSimError, match=r"drives of another plan \(see plan\.json\)"):
        claim_folder(out, "plan.json", {"seed": 2}, "drives")


def test_leavings_of_a_killed_run_do_not_matter_but_other_files_do(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.tmp").touch()
    claim_folder(tmp_path, "plan.json", {}, "drives")
    other = tmp_path / "other"
    other.mkdir()
    (other / "holiday.mp4").touch()
    with pytest.raises(DriveSimError, match="holds other files; choose a new folder for drives"):
        claim_folder(other, "plan.json", {}, "drives")
    assert [path.name for path in other.iterdir()] == ["holiday.mp4"]
