import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.actions.action_file import is_action_file, read_action_file, write_action_file
from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.actions.alignment import align
from driving_sim.data.actions.reading import Reading, parse_wheelbases
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
    write(csv_path, "timestamp,speed,steering", "0,1,0.1", "0.1,2,0.2")
    with pytest.raises(DriveSimError, match="`steering_kind`"):
        read_action_file(csv_path)
    log = read_action_file(csv_path, Reading(steering_kind="road_wheel"))
    assert log.steering_kind == "road_wheel"
    assert len(log.notices) == 2


def test_a_kind_that_contradicts_the_column_is_an_error(csv_path: Path) -> None:
    write(csv_path, "t,steering_deg", "0,1", "1,2")
    with pytest.raises(DriveSimError, match="steering_wheel, but road_wheel is needed"):
        read_action_file(csv_path, Reading(steering_kind="road_wheel"))


def test_the_kind_chooses_between_two_steering_columns(csv_path: Path) -> None:
    write(csv_path, "t,steering_rad,road_wheel_rad", "0,1.5,0.1", "1,3,0.2")
    log = read_action_file(csv_path, Reading(steering_kind="road_wheel"))
    assert log.steering is not None
    assert log.steering.values[1] == 0.2
    with pytest.raises(DriveSimError, match="keep one"):
        read_action_file(csv_path)


def test_a_missing_channel_is_not_made_up(csv_path: Path) -> None:
    log = read_action_file(write(csv_path, "t,speed_mps", "0,1", "1,2"))
    assert log.has.tolist() == [True, False]
    assert log.steering_kind is None


def test_frames_are_looked_up_in_the_video(csv_path: Path) -> None:
    write(csv_path, "frame,speed_mps", "0,1", "3,2")
    frame_times = np.array([0, 0.1, 0.25, 0.3])
    assert read_action_file(csv_path, frame_times=frame_times).span == (0, 0.3)
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
        ("t,speed_mps\n0,1\n,2\n", "line 3: t is ''"),
        ("t,speed_mps\n0,1\n1,\n", "neither speed nor steering.*column speed_mps has 1 values"),
        ("t,speed_mps\n0,1\n\nx,2\n", "line 4: t is 'x'"),
        ("t,speed_mps\n0,1\n0,2\n", "line 3: t 0 is the same as"),
        ("t,speed_mps\n0,1\n1,1\n0.5,2\n", "line 4: t 0.5 is before"),
        ("t,speed_mps\n0,1\n1,130\n", "line 3: speed_mps 130 is out of range.*speed_kmh"),
        ("t,road_wheel_rad\n0,0\n1,12\n", "line 3: road_wheel_rad 12 is out of range"),
        ("t,speed_knots\n0,1\n1,2\n", "neither.*column speed_knots is not known.*`speed_unit`"),
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


@pytest.mark.parametrize(
    "name", ["angle", "steer", "SteeringWheelAngle", "EPAS_steer", "yaw_rate", "kappa_curvature"]
)
def test_a_column_that_looks_like_the_missing_steering_is_named(csv_path: Path, name: str) -> None:
    log = read_action_file(write(csv_path, f"t,speed_mps,{name}", "0,1,0.1", "0.1,2,0.2"))
    assert log.has.tolist() == [True, False]
    (line,) = log.notices
    assert f"no steering was found: the column {name.lower()} is not known" in line
    assert "`steering_kind`" in line


@pytest.mark.parametrize(
    "name", ["Speed (km/h)", "vEgo", "velocity", "speed_knots", "KM/H", "v_ego"]
)
def test_a_column_that_looks_like_the_missing_speed_is_named(csv_path: Path, name: str) -> None:
    log = read_action_file(write(csv_path, f"t,{name},curvature", "0,1,0.1", "0.1,2,0.2"))
    assert log.has.tolist() == [False, True]
    (line,) = log.notices
    assert f"no speed was found: the column {name.lower()} is not known" in line


def test_other_columns_are_neither_refused_nor_named(csv_path: Path) -> None:
    write(csv_path, "t,speed_mps,speed_limit,steering_torque", "0,1,50,3", "0.1,2,50,3")
    assert read_action_file(csv_path).notices == ()


def test_the_options_say_what_a_column_means(csv_path: Path) -> None:
    write(csv_path, "t,Speed (km/h),Angle", "0,36,90", "0.1,72,-90")
    reading = Reading(
        speed="speed (KM/h)",
        speed_unit="kmh",
        steering="Angle",
        steering_unit="deg",
        steering_kind="steering_wheel",
    )
    log = read_action_file(csv_path, reading)
    assert log.speed is not None
    assert log.steering is not None
    np.testing.assert_allclose(log.speed.values, [10, 20])
    np.testing.assert_allclose(log.steering.values, [math.pi / 2, -math.pi / 2])
    assert log.steering_kind == "steering_wheel"
    assert [line.split(" is taken to be ")[1] for line in log.notices] == [
        "the speed in kmh",
        "steering_wheel steering (deg), left positive",
    ]


def test_a_file_without_the_named_column_is_read_by_its_own_names(csv_path: Path) -> None:
    log = read_action_file(write(csv_path, "t,speed_mps", "0,1", "0.1,2"), Reading(speed="v"))
    assert log.has.tolist() == [True, False]
    assert log.notices == ("there is no column v, so the known names are searched",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_unit": "kmh"}, "`speed_unit` needs"),
        ({"speed": "v", "speed_unit": "knots"}, "`speed_unit` knots: unknown; choose mps, kmh"),
        ({"video_fps": 0.0}, "`video_fps` 0"),
        ({"wheelbase": math.inf}, "`wheelbase` inf"),
        ({"wheelbase": {"a": 2.7, "b": 0.0}}, "`wheelbase` 0"),
        ({"time_offset": math.nan}, "`time_offset`"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DriveSimError, match=message):
        Reading(**settings)


def test_each_folder_may_have_a_wheelbase(tmp_path: Path) -> None:
    cars, models = tmp_path / "cars", tmp_path / "cars" / "models"
    models.mkdir(parents=True)
    reading = Reading(wheelbase=parse_wheelbases([f"{cars}=2.9", f"{models}/=.26", "2.5"]))
    assert reading.wheelbase_of(cars / "a.mp4") == 2.9
    assert reading.wheelbase_of(models / "a.mp4") == 0.26
    assert reading.wheelbase_of(tmp_path / "a.mp4") == 2.5
    assert Reading(wheelbase={str(cars): 2.9}).wheelbase_of(tmp_path / "a.mp4") is None
    assert Reading(wheelbase=3.0).wheelbase_of(tmp_path) == 3.0


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lake"], "`wheelbase` lake: write metres, or a folder and metres"),
        (["lake="], "`wheelbase` lake=: write metres"),
        (["=2.7"], "`wheelbase` =2.7: write metres"),
        (["2.7", "2.8"], "`wheelbase` 2.8: there is another one for all drives"),
        (["a=2", "a/=3"], "`wheelbase` a/=3: there is another one for a"),
    ],
)
def test_a_wheelbase_that_makes_no_sense_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(DriveSimError, match=message):
        parse_wheelbases(texts)


@pytest.mark.parametrize(
    ("text", "noticed"),
    [
        ("t;speed_mps;road_wheel_rad\n0;1.5;0.1\n0.1;2.5;-0.2\n", False),
        ("t;speed_mps;road_wheel_rad\n0;1,5;0,1\n0,1;2,5;-,2\n", True),
        ("t\tspeed_mps\troad_wheel_rad\n0\t1.5\t0.1\n0.1\t2.5\t-0.2\n", False),
        ("sep=;\nt;speed_mps;road_wheel_rad\n0;1,5;0,1\n0,1;2,5;-0,2\n", True),
        ("sep=|\nt|speed_mps|road_wheel_rad\r\n0|1.5|0.1\r\n0.1|2.5|-0.2\r\n", False),
    ],
)
def test_spreadsheets_of_all_countries_are_read(csv_path: Path, text: str, noticed: bool) -> None:
    csv_path.write_text(text, newline="")
    assert is_action_file(csv_path)
    log = read_action_file(csv_path)
    assert log.span == (0, 0.1)
    assert log.speed is not None
    assert log.steering is not None
    np.testing.assert_allclose(log.speed.values, [1.5, 2.5])
    np.testing.assert_allclose(log.steering.values, [0.1, -0.2])
    assert [("decimal commas" in line) for line in log.notices] == [True] * noticed


def test_lines_are_counted_from_the_top_of_the_file(csv_path: Path) -> None:
    csv_path.write_text("sep=;\nt;speed_mps\n0;1\n0,1;x\n")
    with pytest.raises(DriveSimError, match="line 4: speed_mps is 'x'"):
        read_action_file(csv_path)


def test_channels_of_two_rates_in_one_table_are_read_apart(csv_path: Path) -> None:
    """Steering every 0.1 s and speed once a second, joined into rows with blank cells."""
    rows = [f"{n / 10:.1f},{n / 10 if n % 10 == 0 else ''},{n / 100}" for n in range(51)]
    log = read_action_file(write(csv_path, "t,speed_mps,road_wheel_rad", *rows))
    assert log.speed is not None
    assert log.speed.times.tolist() == [0, 1, 2, 3, 4, 5]
    (line,) = log.notices
    assert "speed_mps has values in 6 of 51 rows; it is interpolated between values" in line
    actions, valid = align(log, np.arange(0, 4.9, 0.1))
    assert valid.all()
    np.testing.assert_allclose(actions[:, 0], np.arange(0, 4.9, 0.1) + 0.05, atol=1e-6)


def test_gps_once_a_second_is_read_and_named(csv_path: Path) -> None:
    rows = [f"{n},{n}" for n in range(10)]
    log = read_action_file(write(csv_path, "t,speed_mps", *rows))
    assert log.notices == ("speed_mps has a value every 1 s; it is interpolated between them",)


def test_a_last_line_that_was_cut_off_is_left_out_and_named(csv_path: Path) -> None:
    for cut in ("0.2", "0.2,", "0.2,-", "0.2,1."):
        csv_path.write_text(f"t,speed_mps\n0,1\n0.1,2\n{cut}")
        log = read_action_file(csv_path)
        assert log.span == (0, 0.1)
        assert log.notices == ("the last line of drive.csv was cut off and is left out",)
    csv_path.write_text("t,speed_mps\n0,1\n0.1,2\n0.2,3")
    assert read_action_file(csv_path).span == (0, 0.2)


def test_a_clock_that_counts_from_1970_begins_with_the_video(csv_path: Path) -> None:
    rows = [f"{1_700_000_000_000 + 100 * n},{n}" for n in range(10)]
    write(csv_path, "timestamp_ms,speed_mps", *rows)
    frame_times = np.arange(10) / 10
    log = read_action_file(csv_path, frame_times=frame_times)
    assert log.span == pytest.approx((0, 0.9))
    (line,) = log.notices
    assert "begins at 1700000000.00 s; this moment is taken to be the start" in line
    late = read_action_file(csv_path, Reading(time_offset=0.3), frame_times=frame_times)
    assert late.span == pytest.approx((0.3, 1.2))
    told = read_action_file(csv_path, Reading(time_offset=-1.7e9), frame_times=frame_times)
    assert told.span == pytest.approx((0, 0.9))
    assert told.notices == ()


def test_a_wheel_that_its_logger_wraps_is_unwrapped(csv_path: Path) -> None:
    degrees = np.concatenate([np.arange(0, 400, 20), np.arange(400, -400, -20)])
    wrapped = (degrees + 180) % 360 - 180
    rows = [f"{n / 20},{value}" for n, value in enumerate(wrapped)]
    log = read_action_file(write(csv_path, "t,steering_deg", *rows))
    assert log.steering is not None
    np.testing.assert_allclose(log.steering.values, np.radians(degrees), atol=1e-9)
    (line,) = log.notices[:1]
    assert "steering_deg jumps by a full turn" in line


def test_a_wheel_that_turns_fast_is_left_as_it_is(csv_path: Path) -> None:
    log = read_action_file(write(csv_path, "t,steering_deg", "0,-100", "0.1,100", "0.2,300"))
    assert log.notices == ()


def test_a_known_name_keeps_its_unit(csv_path: Path) -> None:
    write(csv_path, "t,speed_kmh,speed_mps,steering_deg,curvature", "0,36,1,90,0", "0.1,36,1,90,0")
    with pytest.raises(DriveSimError, match="keep one of them, or name one with `speed`"):
        read_action_file(csv_path)
    log = read_action_file(csv_path, Reading(speed="speed_kmh", steering="steering_deg"))
    assert log.speed is not None
    assert log.steering is not None
    np.testing.assert_allclose(log.speed.values, 10)
    np.testing.assert_allclose(log.steering.values, math.pi / 2)
    assert log.notices == ()
    with pytest.raises(DriveSimError, match="speed_kmh has another unit than mph"):
        read_action_file(csv_path, Reading(speed="speed_kmh", speed_unit="mph"))


def test_degrees_are_refused_for_what_is_no_angle(csv_path: Path) -> None:
    write(csv_path, "t,k", "0,0.1", "0.1,0.1")
    reading = Reading(steering="k", steering_unit="deg", steering_kind="curvature")
    with pytest.raises(DriveSimError, match="is no angle; leave out `steering_unit`"):
        read_action_file(csv_path, reading)


def steering_of(csv_path: Path, rows: Sequence[tuple[float, float]]) -> tuple[list[float], str]:
    """Return the steering in degrees, and the notices, of a table of times and degrees."""
    write(csv_path, "t,steering_deg", *(f"{time},{value}" for time, value in rows))
    log = read_action_file(csv_path)
    assert log.steering is not None
    return np.degrees(log.steering.values).round(3).tolist(), "; ".join(log.notices)


def test_a_wheel_logged_from_0_to_360_turns_about_0(csv_path: Path) -> None:
    rows = [(n / 20, value % 360) for n, value in enumerate(range(-30, 31, 5))]
    angles, notices = steering_of(csv_path, rows)
    assert angles == list(range(-30, 31, 5))
    assert "once" in notices


def test_a_hole_in_the_log_is_no_turn_of_the_wheel(csv_path: Path) -> None:
    rows = [(0, 140), (0.1, 175), (0.2, -175), (60, -150), (60.1, -140)]
    assert steering_of(csv_path, rows)[0] == [140, 175, 185, -150, -140]


def test_jumps_that_no_wheel_makes_are_named_and_left(csv_path: Path) -> None:
    rows = [(n / 10, (170, -170, 60)[n % 3]) for n in range(200)]
    angles, notices = steering_of(csv_path, rows)
    assert angles == [value for _, value in rows]
    assert "not as a steering wheel would" in notices


@pytest.mark.parametrize("note", ["note (a;b;c)", "note (a\tb)"])
def test_a_semicolon_in_a_name_separates_nothing(csv_path: Path, note: str) -> None:
    write(csv_path, f"timestamp_s,speed_mps,{note}", "0,1,x", "0.1,2,y")
    assert read_action_file(csv_path).span == (0, 0.1)


@pytest.mark.parametrize("first", ["sep=", 'sep="', "sep=;;"])
def test_a_separator_that_makes_no_sense_is_one_line(csv_path: Path, first: str) -> None:
    csv_path.write_text(f"{first}\r\nt;speed_mps\r\n0;1\r\n", newline="")
    assert not is_action_file(csv_path)
    with pytest.raises(DriveSimError, match=r"drive\.csv"):
        read_action_file(csv_path)


def test_a_bare_speed_may_be_in_any_unit(csv_path: Path) -> None:
    write(csv_path, "t,speed", "0,36", "0.1,36")
    log = read_action_file(csv_path, Reading(speed="speed", speed_unit="kmh"))
    assert log.speed is not None
    np.testing.assert_allclose(log.speed.values, 10)
    assert log.notices == ("the column speed is taken to be the speed in kmh",)


@pytest.mark.parametrize("rows", [("0,1,", "0.1,1,"), ("0,1,90", "0.1,1,")])
def test_a_blank_steering_is_left_out(csv_path: Path, rows: tuple[str, str]) -> None:
    log = read_action_file(write(csv_path, "t,speed_mps,steering_deg", *rows))
    assert log.steering is None
    assert "the column steering_deg has " in log.notices[0]
