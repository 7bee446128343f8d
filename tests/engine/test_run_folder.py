from pathlib import Path
from typing import Any

import pytest

from driving_sim.engine import run_folder
from driving_sim.engine.config import load_yaml, save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.run_folder import (
    check_complete,
    check_replaceable,
    check_run,
    claim_folder,
    find_run,
    packaged_models,
    prepare_run,
)

CONFIG: dict[str, dict[str, Any]] = {
    "model": {"levels": (8, 5), "rate": 1e-5},
    "training": {"steps": 10, "seed": 0},
}


def changed(**training: int) -> dict[str, Any]:
    return {**CONFIG, "training": {**CONFIG["training"], **training}}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands in for the packaged models, and holds two of them."""
    folder = tmp_path / "models"
    for name in ("city", "synthetic"):
        save_json(folder / name / "config.json", {})
    (folder / "__pycache__").mkdir()
    monkeypatch.setattr(run_folder, "MODELS", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_run_is_found_by_its_path_or_by_the_name_of_a_packaged_model(models: Path) -> None:
    assert packaged_models() == ["city", "synthetic"]
    assert find_run("city") == find_run(Path("city")) == models / "city"
    assert find_run("city", part="tokenizer") == models / "city" / "tokenizer"
    for other in ("runs/city", "../city", "", ".", "citi", "__pycache__"):
        assert find_run(other, part="tokenizer") == Path(other)


def test_a_folder_wins_over_a_packaged_model_of_the_same_name(models: Path) -> None:
    Path("city").touch()
    assert find_run("city") == models / "city"
    Path("city").unlink()
    Path("city").mkdir()
    assert find_run("city", part="tokenizer") == Path("city")


def test_a_run_that_is_missing_names_the_packaged_models(models: Path) -> None:
    check_complete(models / "city", ["config.json"], "tokenizer")
    with pytest.raises(DriveSimError) as caught:
        check_complete(Path("sinthetic"), ["config.json"], "world model")
    assert str(caught.value) == (
        "sinthetic holds no world model (there is no such folder); did you mean synthetic? "
        "Otherwise train one with `drivesim train-world-model`, or choose another folder, "
        "or name a packaged model (city, synthetic)"
    )
    with pytest.raises(DriveSimError, match=r"city holds no tokenizer \(x is missing\); train one"):
        check_complete(models / "city", ["config.json", "x"], "tokenizer")


def test_without_packaged_models_none_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MODELS", tmp_path / "none")
    assert packaged_models() == []
    with pytest.raises(DriveSimError, match=r"or choose another folder$"):
        check_complete(tmp_path / "run", ["config.json"], "tokenizer")


def test_new_run_keeps_its_config(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tokenizer"
    check_run(run, CONFIG, resume=False)
    assert not run.exists()
    prepare_run(run, CONFIG, resume=False)
    assert load_yaml(run / "config.yaml")["model"] == {"levels": [8, 5], "rate": 1e-5}


def test_leftovers_of_a_killed_writer_do_not_count_as_content(tmp_path: Path) -> None:
    (tmp_path / ".config.7.partial.yaml").touch()
    prepare_run(tmp_path, CONFIG, resume=False)


def test_existing_run_needs_resume(tmp_path: Path) -> None:
    prepare_run(tmp_path, CONFIG, resume=False)
    with pytest.raises(DriveSimError, match=r"already holds a run.*`resume`"):
        check_run(tmp_path, CONFIG, resume=False)
    check_run(tmp_path, CONFIG, resume=True)


def test_resumed_run_may_last_longer_but_not_differ(tmp_path: Path) -> None:
    prepare_run(tmp_path, CONFIG, resume=False)
    prepare_run(tmp_path, changed(steps=20), resume=True)
    assert load_yaml(tmp_path / "config.yaml")["training"]["steps"] == 20
    with pytest.raises(DriveSimError, match=r"training\.seed=0, now it is 1"):
        check_run(tmp_path, changed(seed=1), resume=True)


def test_resumed_run_has_neither_more_nor_fewer_options(tmp_path: Path) -> None:
    prepare_run(tmp_path, CONFIG, resume=False)
    with pytest.raises(DriveSimError, match=r"skip_bad=None, now it is True"):
        check_run(tmp_path, CONFIG | {"skip_bad": True}, resume=True)
    with pytest.raises(DriveSimError, match=r"model\.rate=1e-05, now it is None"):
        check_run(tmp_path, CONFIG | {"model": {"levels": (8, 5)}}, resume=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="nothing to resume"):
        check_run(tmp_path / "run", CONFIG, resume=True)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").touch()
    for path in (tmp_path, tmp_path / "holiday.mp4"):
        with pytest.raises(DriveSimError, match="choose another `run`"):
            check_run(path, CONFIG, resume=False)


def test_a_new_folder_can_be_claimed_again_with_the_same_plan_only(tmp_path: Path) -> None:
    out = tmp_path / "new"
    for _ in range(2):
        claim_folder(out, "plan.json", {"seed": 1}, "drives")
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    with pytest.raises(DriveSimError, match=r"drives made with other settings \(see plan\.json\)"):
        claim_folder(out, "plan.json", {"seed": 2}, "drives")


def test_leftovers_of_a_killed_run_do_not_matter_but_other_files_do(tmp_path: Path) -> None:
    (tmp_path / ".plan.json.tmp").touch()
    claim_folder(tmp_path, "plan.json", {}, "drives")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "holiday.mp4").touch()
    with pytest.raises(DriveSimError, match="other files; choose a new folder"):
        claim_folder(folder, "plan.json", {}, "drives")
    assert [path.name for path in folder.iterdir()] == ["holiday.mp4"]


def test_an_earlier_result_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def check() -> None:
        check_replaceable(out, "report.json", "a report", lambda report: report["files"])

    check()
    save_json(out / "report.json", {"files": ["report.json", "a/plot.png"]})
    (out / "a").mkdir()
    (out / "a" / "plot.png").touch()
    check()


@pytest.mark.parametrize("kind", ["file", "link", "another program's", "no folder"])
def test_files_of_other_programs_are_not_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "no folder":
        out.touch()
    else:
        files = {"name": 1} if kind == "another program's" else {"files": ["report.json"]}
        save_json(out / "report.json", files)
    if kind == "file":
        (out / "thesis.tex").touch()
    if kind == "link":
        (out / "videos").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(
        DriveSimError,
        match=r"out contains files that do not belong to a report: choose another `out`",
    ):
        check_replaceable(out, "report.json", "a report", lambda report: report["files"])
