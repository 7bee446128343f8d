import math
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.action_file import is_action_file, read_action_file, write_action_file
from driving_sim.data.actions.action_log import STEERING, SteeringKind
from driving_sim.data.actions.alignment import align
from driving_sim.data.reading import Reading
from driving_sim.engine.errors import DriveSimError


def write(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def csv_path(tmp_path: Path) -> Path:
    return tmp_path / "drive.csv"


@pytest.mark.parametrize("kind", ["steering_wheel", "road_wheel", "curvature", "normalised"])
def test_what_is_written_is_read_back(csv_path: Path, kind: SteeringKind) -> None:
    random = np.random.default_rng(0)
    times = np.cumsum(random.integers(10_000, 200_000, 50)) / 1e6
    actions = random.uniform(-0.5, 0.5, (50, 2)).astype(np.float32)
    write_action_file(csv_path, times, actions, kind)
    log = read_action_file(csv_path)
    for channel, column in zip(log.channels, actions.T, strict=True):
        assert channel is not None
        np.testing.assert_array_equal(channel.times, times)
        np.testing.assert_array_equal(channel.values.astype(np.float32), column)
    assert log.steering_kind == kind
    assert log.has.all()
    assert log.notices == ()


def test_held_actions_come_back_as_the_mean_of_their_interval(csv_path: Path) -> None:
    random = np.random.default_rng(0)
    times = np.arange(20) / 10
    actions = random.uniform(-0.5, 0.5, (20, 2)).astype(np.float32)
    write_action_file(csv_path, times, actions, "road_wheel", hold_until=2.0)
    np.testing.assert_allclose(align(read_action_file(csv_path), times)[0], actions, atol=1e-4)


@pytest.mark.parametrize("known", [(True, False), (False, True)])
def test_a_channel_that_is_nan_throughout_is_left_out(
    csv_path: Path, known: tuple[bool, bool]
) -> None:
    actions = np.where(known, np.arange(10, dtype=np.float32).reshape(5, 2) / 50, np.nan)
    write_action_file(csv_path, np.arange(5) / 4, actions, "road_wheel" if known[1] else None)
    log = read_action_file(csv_path, Reading())
    assert log.has.tolist() == list(known)
    for channel, column in zip(log.channels, actions.T, strict=True):
        assert channel is None or np.allclose(channel.values, column, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "row", "seconds", "speed", "steering", "kind"),
    [
        (
            "timestamp_ms,speed_kmh,steering_deg",
            "500,36,90",
            0.5,
            10,
            math.pi / 2,
            "steering_wheel",
        ),
        ("time,speed_mph,road_wheel_deg", "0.5,10,-18", 0.5, 4.4704, -math.pi / 10, "road_wheel"),
        ("t,speed_mps,curvature", "0.5,10,0.02", 0.5, 10, 0.02, "curvature"),
        ("timestamp_us, Speed ,steering_norm", "5e5,10,-1", 0.5, 10, -1, "normalised"),
        ("gear,timestamp_ns,speed_mps,steering_rad", "3,5e8,10,1", 0.5, 10, 1, "steering_wheel"),
    ],
)
def test_units_become_si(
    csv_path: Path,
    header: str,
    row: str,
    seconds: float,
    speed: float,
    steering: float,
    kind: SteeringKind,
) -> None:
    zero = ",".join("0" for _ in header.split(","))
    log = read_action_file(write(csv_path, header, zero, row), Reading(time_offset=2.0))
    assert log.speed is not None
    assert log.steering is not None
    assert log.speed.times[1] == pytest.approx(2.0 + seconds)
    assert log.speed.values[1] == pytest.approx(speed, rel=1e-6)
    assert log.steering.values[1] == pytest.approx(steering, rel=1e-6)
    assert log.steering_kind == kind


def test_bare_names_are_reported_and_a_bare_steering_needs_its_kind(csv_path: Path) -> None:
    write(csv_path, "timestamp,speed,steering", "0,1,0.1", "1,2,0.2")
    with pytest.raises(DriveSimError, match="`steering_kind`"):
        read_action_file(csv_path)
    log = read_action_file(csv_path, Reading(steering_kind="road_wheel"))
    assert log.steering_kind == "road_wheel"
    assert len(log.notices) == 2


def test_a_kind_that_contradicts_the_column_is_an_error(csv_path: Path) -> None:
    write(csv_path, "t,steering_deg", "0,1", "1,2")
    with pytest.raises(DriveSimError, match=r"steering_wheel.*`steering_kind` is road_wheel"):
        read_action_file(csv_path, Reading(steering_kind="road_wheel"))


def test_the_kind_chooses_between_two_steering_columns(csv_path: Path) -> None:
    write(csv_path, "t,steering_rad,road_wheel_rad", "0,1.5,0.1", "1,3,0.2")
    log = read_action_file(csv_path, Reading(steering_kind="road_wheel"))
    assert log.values[1, STEERING] == np.float32(0.2)
    with pytest.raises(DriveSimError, match="keep one"):
        read_action_file(csv_path)


def test_a_missing_channel_is_not_made_up(csv_path: Path) -> None:
    log = read_action_file(write(csv_path, "t,speed_mps", "0,1", "1,2"))
    assert log.has.tolist() == [True, False]
    assert log.steering_kind is None


def test_frames_are_looked_up_in_the_video(csv_path: Path) -> None:
    write(csv_path, "frame,speed_mps", "0,1", "3,2")
    frame_times = np.array([0, 0.1, 0.25, 0.3])
    np.testing.assert_array_equal(
        read_action_file(csv_path, frame_times=frame_times).times, [0, 0.3]
    )
    with pytest.raises(DriveSimError, match=r"line 3: frame 3 .* 0 to 2"):
        read_action_file(csv_path, frame_times=frame_times[:3])
    with pytest.raises(DriveSimError, match="timestamp_s"):
        read_action_file(csv_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("t,speed_mps\n", "at least 2"),
        ("t,speed_mps\n0,1\n", "at least 2"),
        ("t,speed_mps\n0,1\n1\n", "line 3: has 1 cells"),
        ("t,speed_mps\n0,1\n1,nan\n", "line 3: speed_mps is 'nan'"),
        ("t,speed_mps\n0,1\n1,inf\n", "line 3: speed_mps is 'inf'"),
        ("t,speed_mps\n0,1\n1,\n", "line 3: speed_mps is ''"),
        ("t,speed_mps\n0,1\n\nx,2\n", "line 4: t is 'x'"),
        ("t,speed_mps\n0,1\n0,2\n", "line 3: t 0 is the same as"),
        ("t,speed_mps\n0,1\n1,1\n0.5,2\n", "line 4: t 0.5 is before"),
        ("t,speed_mps\n0,1\n1,130\n", "line 3: speed_mps 130 is out of range.*speed_kmh"),
        ("t,road_wheel_rad\n0,0\n1,12\n", "line 3: road_wheel_rad 12 is out of range"),
        ("t,speed_knots\n0,1\n1,2\n", "'speed_knots' is not known; use one of speed_mps"),
        ("t,speed_mps,steering_turns\n0,1,0\n1,2,0\n", "'steering_turns' is not known"),
        ("t,speed_mps,speed_kmh\n0,1,0\n1,2,0\n", "keep one"),
        ("speed_mps,steering_rad\n0,1\n1,2\n", "no time column"),
        ("timestamp_minutes,speed_mps\n0,1\n1,2\n", "'timestamp_minutes' is not known"),
        ("t,throttle\n0,1\n1,2\n", "neither speed nor steering"),
    ],
)
def test_errors_name_the_file_and_the_line(csv_path: Path, text: str, message: str) -> None:
    csv_path.write_text(text)
    with pytest.raises(DriveSimError, match=message) as raised:
        read_action_file(csv_path)
    assert str(csv_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_binary_and_missing_files_are_errors(csv_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no such file"):
        read_action_file(csv_path)
    csv_path.write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(DriveSimError, match="UTF-8"):
        read_action_file(csv_path)
    assert not is_action_file(csv_path)


def test_action_files_are_distinguished_from_other_tables(csv_path: Path) -> None:
    assert is_action_file(write(csv_path, "time,steering", "0,1"))
    assert not is_action_file(write(csv_path, "epoch,loss", "0,1"))


def test_a_file_with_one_huge_line_is_not_an_action_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x," * 10**6 + "timestamp_s,speed_mps")
    assert not is_action_file(path)
    with pytest.raises(DriveSimError) as caught:
        read_action_file(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("time", ["1e300", "-1e13"])
def test_absurd_times_are_out_of_range(tmp_path: Path, time: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"timestamp_s,speed_mps\n0,1\n{time},1\n")
    with pytest.raises(DriveSimError, match=r"line 3: timestamp_s .* out of range"):
        read_action_file(path)
