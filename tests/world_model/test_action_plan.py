import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.action_file import write_action_file
from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model.action_plan import (
    ActionPlan,
    Situation,
    make_plan_without_files,
    make_plans,
)

SITUATION = Situation(
    fps=4.0,
    steering_kind="road_wheel",
    steering_limit=0.2,
    known_channels=(True, True),
    last_action=np.array([6.0, 0.05], np.float32),
    last_valid=np.array([True, True]),
    recorded=None,
)


def plan(spec: str, situation: Situation = SITUATION, seconds: float | None = None) -> ActionPlan:
    return make_plans([spec], situation, seconds=seconds)[0]


def test_script_parts_last_their_time_and_channels_that_they_do_not_set_hold() -> None:
    actions = plan("steer=0.1 for 1s; speed=8 steer=-0.1 for 0.5s").actions
    np.testing.assert_allclose(actions[:, 0], [6, 6, 6, 6, 8, 8])
    np.testing.assert_allclose(actions[:, 1], [0.1] * 4 + [-0.1] * 2)


def test_a_change_within_a_frame_is_averaged() -> None:
    actions = plan("steer=0 for 0.125s; steer=0.1 for 0.375s").actions
    np.testing.assert_allclose(actions[:, 1], [0.05, 0.1], atol=1e-6)


def test_brake_slows_down_by_4_mps2_until_the_car_stands() -> None:
    speed = plan("brake", seconds=2.0).actions[:, 0]
    middles = (np.arange(8) + 0.5) / 4
    np.testing.assert_allclose(speed[:5], 6 - 4 * middles[:5], atol=1e-5)
    assert speed[-1] == 0.0
    np.testing.assert_allclose(plan("brake", seconds=2.0).actions[:, 1], 0.05)


def test_a_last_part_accelerates_for_its_own_time_and_then_holds() -> None:
    speed = plan("accel=2 for 1s", seconds=2.0).actions[:, 0]
    np.testing.assert_allclose(speed, [6.25, 6.75, 7.25, 7.75, 8, 8, 8, 8], atol=1e-5)


def test_a_car_that_braked_for_longer_than_needed_speeds_up_from_zero() -> None:
    """From 6 m/s, the car stands after 1.5 s."""
    speed = plan("accel=-4 for 3s; accel=2 for 1s").actions[:, 0]
    assert (speed[6:12] == 0).all()
    np.testing.assert_allclose(speed[12:], 2 * (np.arange(4) + 0.5) / 4, atol=1e-5)


def test_left_and_right_are_plus_and_minus_the_training_limit() -> None:
    left, right = make_plans(["left", "right"], SITUATION)
    np.testing.assert_allclose(left.actions[:, 1], 0.2)
    np.testing.assert_allclose(right.actions[:, 1], -0.2)
    assert len(left.actions) == 16


def test_channels_that_the_model_was_not_trained_with_are_refused(tmp_path: Path) -> None:
    blind = replace(SITUATION, known_channels=(False, False), last_valid=np.zeros(2, np.bool_))
    for spec, channel in (("left", "steering"), ("steer=0.1", "steering"), ("speed=5", "speed")):
        with pytest.raises(DriveSimError, match=f"trained without {channel}"):
            plan(spec, blind)
    assert not plan("straight", blind).valid.any()
    path = tmp_path / "steering.csv"
    path.write_text("timestamp_s,road_wheel_rad\n0,0.1\n1,0.1\n")
    with pytest.raises(DriveSimError, match="without the actions in this file"):
        plan(str(path), replace(SITUATION, known_channels=(True, False)))
    with pytest.raises(DriveSimError, match="too little steering to tell"):
        plan("left", replace(SITUATION, steering_limit=0.0))


def test_a_channel_is_unknown_until_the_script_sets_it() -> None:
    unknown = replace(SITUATION, last_valid=np.array([False, True]))
    planned = plan("steer=0.1 for 0.5s; speed=5 for 0.5s", unknown)
    assert planned.valid.tolist() == [[False, True]] * 2 + [[True, True]] * 2
    np.testing.assert_allclose(planned.actions[:, 0], [0, 0, 5, 5])


def test_shorter_plans_hold_their_last_action_to_the_length_of_the_longest() -> None:
    short, long = make_plans(["steer=0.1 for 0.5s", "steer=0 for 1s"], SITUATION)
    assert len(short.actions) == len(long.actions) == 4
    np.testing.assert_allclose(short.actions[:, 1], 0.1)


def test_an_unknown_channel_that_is_held_is_invalid_and_one_that_is_set_is_valid() -> None:
    unknown = replace(SITUATION, last_valid=np.array([False, False]))
    assert plan("steer=0.1 for 1s", unknown).valid.tolist() == [[False, True]] * 4


def test_recorded_follows_the_context() -> None:
    actions = np.arange(6, dtype=np.float32).reshape(3, 2)
    situation = replace(SITUATION, recorded=(actions, np.ones((3, 2), np.bool_)))
    np.testing.assert_allclose(plan("recorded", situation).actions, actions)
    with pytest.raises(DriveSimError, match="no recorded actions"):
        plan("recorded")


def test_csv_is_averaged_over_each_frame_from_time_zero(tmp_path: Path) -> None:
    path = tmp_path / "swerve.csv"
    rows = "\n".join(f"{t / 8},{t},{0.1}" for t in range(9))
    path.write_text("timestamp_s,speed_mps,road_wheel_rad\n" + rows + "\n")
    actions = plan(str(path)).actions
    np.testing.assert_allclose(actions[:, 0], [1, 3, 5, 7], atol=1e-5)


def test_a_csv_that_drivesim_wrote_gives_all_its_actions(tmp_path: Path) -> None:
    """`write_action_file` ends each action one microsecond early."""
    for count in (1, 20):
        times, actions = np.arange(count) / 4, np.arange(2 * count, dtype=np.float32).reshape(-1, 2)
        actions[:, 1] /= 100
        path = tmp_path / f"{count}.csv"
        write_action_file(path, times, actions, "road_wheel", hold_until=count / 4)
        np.testing.assert_allclose(plan(str(path)).actions, actions, atol=1e-3)


def write_csv(path: Path, times: list[float], columns: str = "speed_mps,road_wheel_rad") -> str:
    value = ",".join(["0.5"] * len(columns.split(",")))
    path.write_text(f"timestamp_s,{columns}\n" + "\n".join(f"{t},{value}" for t in times) + "\n")
    return str(path)


def test_csv_holds_its_last_complete_frame_and_the_channels_it_lacks(tmp_path: Path) -> None:
    times = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.1]
    held = plan(write_csv(tmp_path / "speed.csv", times, "speed_mps"), seconds=3.0)
    assert held.valid.all()
    np.testing.assert_allclose(held.actions, [[0.5, 0.05]] * 12)


def test_a_file_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeps name folders like scripts, such as `lr=3`; such a folder does not count as a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    write_csv(tmp_path / "lr=3" / "a.csv", [0.0, 0.2, 0.4, 0.6])
    shutil.copy(tmp_path / "lr=3" / "a.csv", tmp_path / "steer=left")
    for name in ("lr=3/a.csv", "steer=left"):
        np.testing.assert_allclose(plan(name).actions, 0.5)
    with pytest.raises(DriveSimError, match=r"lr=4.*no such file"):
        plan("lr=4/a.csv")
    (tmp_path / "steer=0.1").mkdir()
    np.testing.assert_allclose(plan("steer=0.1").actions[:, 1], 0.1, rtol=1e-6)


@pytest.mark.parametrize("times", [[0.0, 2.0, 4.0], [5.0, 5.2, 5.4], [0.0, 0.1, 0.2]])
def test_csv_that_cannot_be_followed_is_refused(tmp_path: Path, times: list[float]) -> None:
    with pytest.raises(DriveSimError, match=r"gap|begin at 0"):
        plan(write_csv(tmp_path / "plan.csv", times))


def test_a_last_part_without_a_time_still_gets_frames() -> None:
    actions = plan("steer=0.1 for 6s; steer=0").actions
    assert len(actions) == 28
    assert actions[-1, 1] == 0.0


def test_braking_from_an_unknown_speed_is_refused() -> None:
    unknown = replace(SITUATION, last_valid=np.array([False, True]))
    with pytest.raises(DriveSimError, match="speed is unknown"):
        plan("brake", unknown)
    assert plan("speed=8 for 1s; accel=-4 for 1s", unknown).valid.all()


def test_csv_of_another_steering_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wheel.csv"
    path.write_text("timestamp_s,speed_mps,steering_rad\n0,1,0\n0.1,1,0\n0.2,1,0\n")
    with pytest.raises(DriveSimError, match="but road_wheel is needed"):
        plan(str(path))


@pytest.mark.parametrize("seconds", [float("inf"), float("nan")])
def test_a_future_without_an_end_is_refused(seconds: float) -> None:
    with pytest.raises(DriveSimError, match=f"`seconds` {seconds}"):
        plan("left", seconds=seconds)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lefft", "did you mean 'left'"),
        ("sped=3", "did you mean 'speed'"),
        ("speed=fast", "not a finite number"),
        ("speed=nan", "not a finite number"),
        ("speed=-1", "negative"),
        ("steer=90", "too large"),
        ("speed=1 accel=2", "give only one"),
        ("steer=1 steer=2", "twice"),
        ("steer=0.1; steer=0", "needs a time"),
        ("steer=0.1 for ever", "no time"),
        ("steer=0.1 for 0.01s", "less than one frame"),
        ("=", "unknown"),
        ("missing.csv", "missing.csv"),
    ],
)
def test_mistakes_are_named(spec: str, message: str) -> None:
    with pytest.raises(DriveSimError, match=message) as raised:
        plan(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("steer=0 for 1e5s", "no time in seconds"),
        ("steer=0 for 999999999s", "at most 86400"),
        ("steer=0 for 86400s; steer=0.1 for 86400s", r"at most 86400 s"),
        ("speed=1e308", "at most 1000"),
        ("accel=-1e30", "at most 1000"),
        ("speed=" + "9" * 5000, "not a finite number"),
        ("x" * 5000, "not a file, a script or a name"),
        ("way\0.csv", "not a file, a script or a name"),
    ],
)
def test_errors_about_absurd_scripts_are_one_short_line(script: str, reason: str) -> None:
    with pytest.raises(DriveSimError, match=reason) as caught:
        plan(script)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_long_script_with_many_parts_is_planned_in_seconds() -> None:
    parts = 4000
    script = ";".join(f"steer={0.1 * (n % 2)} for 20s" for n in range(parts))
    actions = plan(script).actions
    assert len(actions) == parts * 20 * 4
    np.testing.assert_allclose(actions[:, 1], np.repeat(np.arange(parts) % 2 * 0.1, 80), atol=1e-6)


@pytest.mark.parametrize("spec", ["left", "speed=8 steer=0.1 for 1s;  steer=0 for 0.5s"])
def test_a_plan_without_files_is_the_same_plan(spec: str) -> None:
    without = make_plan_without_files(spec, SITUATION, 10.0)
    np.testing.assert_array_equal(without.actions, plan(spec).actions)
    np.testing.assert_array_equal(without.valid, plan(spec).valid)


def test_a_plan_without_files_reads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    actions = np.full((8, 2), 3.0, np.float32)
    for name in ("drive.csv", "steer=0.1"):
        write_action_file(Path(name), np.arange(8) / 4, actions, "road_wheel")
    with pytest.raises(DriveSimError, match="unknown word"):
        make_plan_without_files("drive.csv", SITUATION, 10.0)
    assert make_plan_without_files("steer=0.1", SITUATION, 10.0).actions[0, 1] < 1
    with pytest.raises(DriveSimError, match="at most 10 s"):
        make_plan_without_files("speed=3 for 11s", SITUATION, 10.0)
