import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from benchmarks.measuring.page import Page
from driving_sim.engine.errors import DriveSimError
from driving_sim.play.drive import Drive, Possibility
from driving_sim.play.replay import Replay
from driving_sim.play.serving import protocol, seat
from driving_sim.play.serving import server as server_module
from driving_sim.play.serving.server import Server, listen
from driving_sim.play.starts import Start
from driving_sim.world_model import WorldModel
from driving_sim.world_model.sampling.sampling import Sampling
from tests.fixtures.token_drives import COLS, FPS, ROWS
from tests.play.serving.served import serving


def new_server(
    world: WorldModel, starts: dict[str, Start], sessions: int = 2, recordings: Path | None = None
) -> Server:
    return Server(world, "town", starts, sessions=sessions, recordings=recordings)


@pytest.fixture
def server(world: WorldModel, starts: dict[str, Start], tmp_path: Path) -> Server:
    return new_server(world, starts, recordings=tmp_path / "recordings")


@pytest.fixture
def port(server: Server) -> Iterator[int]:
    with serving(server) as port:
        yield port


@pytest.mark.parametrize(("frame_s", "spared"), [(0.9, [1]), (1.1, [1, 0])])
def test_a_core_is_left_to_the_browser_if_all_drivers_get_their_frames(
    world: WorldModel,
    starts: dict[str, Start],
    monkeypatch: pytest.MonkeyPatch,
    frame_s: float,
    spared: list[int],
) -> None:
    longest = 0.8 / FPS / 2  # for two drivers
    threads: list[tuple[int, str]] = []

    def spare(count: int) -> None:
        threads.append((count, threading.current_thread().name))

    monkeypatch.setattr(server_module, "spare_cores", spare)
    monkeypatch.setattr(
        server_module, "median", lambda seconds: len([*seconds]) and frame_s * longest
    )
    new_server(world, starts).warm_up()
    assert threads == [(count, "model_0") for count in spared]


def picture(message: dict[str, list[bytes]]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(message["parts"][-1])))


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds, at most 20 s."""
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen")


def slow_possibilities(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every step of "what if" take a fifth of a second; return the list of steps so far."""
    computed: list[int] = []
    possibilities = Drive.possibilities

    def slowly(drive: Drive) -> Iterator[Possibility]:
        for possibility in possibilities(drive):
            time.sleep(0.2)
            computed.append(possibility.step)
            yield possibility

    monkeypatch.setattr(Drive, "possibilities", slowly)
    return computed


class TestDriving:
    def test_the_page_is_welcomed_and_sees_frames(self, port: int, world: WorldModel) -> None:
        with Page(port) as page:
            welcome = page.next()
            assert welcome["type"] == "welcome"
            assert welcome["model"]["fingerprint"] == world.fingerprint
            assert [start["name"] for start in welcome["starts"]] == ["a", "b"]
            assert welcome["state"]["start"] == "a"
            numbers = [page.wait("frame")["frame"] for _ in range(6)]
            assert numbers == list(range(6))

    def test_a_frame_has_a_picture_and_its_entropy(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame", frame=0)
            frame = page.wait("frame", frame=1)
            entropy, _ = frame["parts"]
            assert len(entropy) == ROWS * COLS
            assert max(entropy) > 0
            assert picture(frame).shape == (16 * ROWS, 16 * COLS, 3)

    def test_the_car_obeys_and_the_frame_carries_the_stamp_back(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame", frame=2)
            page.steer(1.0, stamp=77.0)
            obeying = page.wait("frame", stamp=77.0)
            following = page.wait("frame")
            assert following["stamp"] == 77.0
            assert following["steering"] > obeying["steering"] > 0
            page.steer(-1.0, stamp=78.0)
            turned = page.wait("frame", stamp=78.0)
            assert page.wait("frame")["steering"] < turned["steering"]

    def test_pause_step_and_go_on(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame", frame=3)
            page.send("pause", paused=True)
            page.wait("state", paused=True)
            page.send("step")
            first = page.wait("frame")["frame"]
            page.send("step")
            assert page.wait("frame")["frame"] == first + 1
            page.send("pause", paused=False)
            assert page.wait("frame")["frame"] == first + 2

    def test_rewind_goes_back_and_pauses(self, port: int) -> None:
        with Page(port) as page:
            shown = {}
            while 8 not in shown:
                message = page.wait("frame")
                shown[message["frame"]] = picture(message)
            page.send("rewind", seconds=4 / FPS)
            page.wait("state", paused=True)
            page.send("step")
            frame = page.wait("frame")
            np.testing.assert_array_equal(picture(frame), shown[frame["frame"]])

    def test_reset_to_another_start(self, port: int, starts: dict[str, Start]) -> None:
        with Page(port) as page:
            page.wait("frame", frame=3)
            page.send("reset", start="b")
            page.wait("state", start="b")
            page.send("reset", start="elsewhere")
            assert "choose one of a, b" in page.wait("notice")["text"]

    def test_settings_hold_from_the_next_frame_on(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame", frame=1)
            page.send("settings", temperature=0.0, guidance=2.0, seed=9)
            state = page.wait("state")
            assert state["settings"] == {"temperature": 0.0, "guidance": 2.0, "seed": 9}
            page.send("record", on=True)
            page.wait("frame", frame=page.wait("frame")["frame"] + 4)
            page.send("record", on=False)
            video = Path(page.wait("state", recording=False)["recorded"])
            _, change = Replay.load(video.with_suffix(".json")).changes
            assert (change.sampling.guidance, change.sampling.seed) == (2.0, 9)

    def test_a_script_drives_until_the_driver_takes_the_wheel(self, port: int) -> None:
        with Page(port) as page:
            page.send("hand_over", plan="speed=7 steer=0.05")
            assert page.wait("state")["hand_over"] == "speed=7 steer=0.05"
            page.wait("frame")
            assert page.wait("frame")["speed"] == 7
            page.steer(-1.0)
            assert page.wait("state")["hand_over"] is None

    def test_what_if_shows_futures_and_their_truths(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame", frame=2)
            page.send("what_if")
            shown = [page.wait("what_if") for _ in range(round(2 * FPS))]
            assert [message["step"] for message in shown] == list(range(1, len(shown) + 1))
            assert len(shown[0]["parts"]) == 6
            assert len(shown[0]["psnr_db"]) == 3
            assert page.wait("state")["paused"]

    def test_what_if_ends_when_the_driver_goes_on(
        self, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed = slow_possibilities(monkeypatch)
        with Page(port) as page:
            page.send("what_if")
            page.wait("what_if", step=1)
            page.send("pause", paused=False)
            page.wait("frame")
            assert len(computed) < 6

    def test_what_if_ends_with_the_connection(
        self, server: Server, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(seat, "LOST_S", 0.0)
        computed = slow_possibilities(monkeypatch)
        with Page(port) as page:
            page.send("what_if")
            page.wait("what_if", step=1)
        wait_for(lambda: len(server.seats) == 0)
        assert len(computed) < 6

    def test_what_if_ends_if_the_page_reads_nothing(
        self, server: Server, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(seat, "SILENT_S", 0.3)
        monkeypatch.setattr(seat, "GONE_S", 0.6)
        with Page(port) as page:
            page.send("what_if")
            page.wait("what_if", step=1)
            wait_for(lambda: len(server.seats) == 0)

    def test_a_recording_is_kept(self, port: int, tmp_path: Path) -> None:
        with Page(port) as page:
            page.send("record", on=True)
            page.wait("state", recording=True)
            first = page.wait("frame")["frame"]
            page.wait("frame", frame=first + 3)
            page.send("record", on=False)
            kept = Path(page.wait("state", recording=False)["recorded"])
            assert kept.parent == tmp_path / "recordings"
            assert {path.suffix for path in kept.parent.iterdir()} == {".mp4", ".csv", ".json"}

    def test_without_a_folder_nothing_can_be_recorded(
        self, world: WorldModel, starts: dict[str, Start]
    ) -> None:
        with serving(new_server(world, starts)) as port, Page(port) as page:
            assert page.wait("welcome")["can_record"] is False
            page.send("record", on=True)
            assert "record" in page.wait("notice")["text"]


class TestSessions:
    def test_two_drive_apart_and_a_third_is_told_to_wait(self, port: int) -> None:
        with Page(port) as first, Page(port) as second:
            a, b = first.wait("welcome"), second.wait("welcome")
            assert a["session"] != b["session"]
            first.send("reset", start="b")
            first.wait("state", start="b")
            second.send("pause", paused=True)
            assert second.wait("state")["start"] == "a"
            with Page(port) as third:
                (busy,) = third.rest()
                assert busy["type"] == "busy"
                assert "2 of 2 sessions are in use" in busy["text"]

    def test_a_lost_connection_is_taken_up_where_it_stopped(self, port: int) -> None:
        with Page(port) as page:
            session = page.wait("welcome")["session"]
            page.wait("frame", frame=4)
            page.send("pause", paused=True)
            page.wait("state", paused=True)
            page.send("step")
            last = page.wait("frame")["frame"]
        with Page(port, session=session) as page:
            welcome = page.wait("welcome")
            assert welcome["session"] == session
            assert welcome["state"]["paused"]
            page.send("step")
            assert page.wait("frame", frame=last + 1)

    def test_a_page_that_comes_back_during_a_reset_is_welcomed(
        self, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin = Drive._begin

        def slowly(drive: Drive, start: Start, sampling: Sampling) -> None:
            time.sleep(0.5)
            begin(drive, start, sampling)

        monkeypatch.setattr(Drive, "_begin", slowly)
        with Page(port) as first:
            session = first.wait("welcome")["session"]
            first.send("reset", start="b")
            time.sleep(0.2)
            with Page(port, session=session) as second:
                assert second.wait("welcome")["session"] == session
                second.wait("state", start="b")

    def test_another_window_takes_the_session_over(self, port: int) -> None:
        with Page(port) as first:
            session = first.wait("welcome")["session"]
            with Page(port, session=session) as second:
                second.wait("frame")
                assert first.rest()[-1]["text"] == "this drive was taken up in another window"

    def test_a_lost_session_ends_and_frees_its_place(
        self, server: Server, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(seat, "LOST_S", 0.0)
        for _ in range(4):
            with Page(port) as page:
                page.wait("frame")
            wait_for(lambda: len(server.seats) == 0)

    def test_an_idle_driver_is_warned_and_then_leaves(
        self, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(seat, "IDLE_S", 1.5)
        monkeypatch.setattr(seat, "WARNING_S", 1.0)
        with Page(port) as page:
            assert page.wait("idle")["seconds"] <= 1
            page.steer(1.0)
            page.wait("frame", stamp=1.0)
            page.wait("idle")
            assert "nobody drove" in page.rest()[-1]["text"]

    def test_a_recording_outlives_the_server(
        self, world: WorldModel, starts: dict[str, Start], tmp_path: Path
    ) -> None:
        with ExitStack() as pages, serving(new_server(world, starts, recordings=tmp_path)) as port:
            page = pages.enter_context(Page(port))
            page.send("record", on=True)
            page.wait("state", recording=True)
            first = page.wait("frame")["frame"]
            page.wait("frame", frame=first + 3)
        (video,) = tmp_path.glob("*.mp4")
        assert json.loads(video.with_suffix(".json").read_text("utf-8"))["checksums"]


class TestSafety:
    @pytest.mark.parametrize(
        "message",
        ["{", "[]", '{"type": "control"}', '{"type": "jump"}', "null", '{"type": "hello"}'],
    )
    def test_a_malformed_message_ends_its_session_only(self, port: int, message: str) -> None:
        with Page(port) as good, Page(port) as bad:
            bad.wait("frame")
            bad.socket.send(message)
            assert bad.rest()[-1]["type"] == "end"
            frame = good.wait("frame")["frame"]
            good.wait("frame", frame=frame + 2)

    @pytest.mark.parametrize("message", [b"\x00", "x" * (protocol.MOST_BYTES + 1)])
    def test_a_message_that_is_no_text_or_too_long_ends_it(
        self, server: Server, port: int, message: bytes | str
    ) -> None:
        with Page(port) as page:
            session = page.wait("welcome")["session"]
            page.wait("frame")
            page.socket.send(message)
            page.rest()
        with Page(port, session=session) as page:
            assert page.wait("welcome")["session"] != session

    def test_too_many_messages_end_it(self, port: int) -> None:
        with Page(port) as page:
            page.wait("frame")
            with suppress(ConnectionClosed):
                for _ in range(1500):
                    page.steer(1.0)
            assert "messages a second" in page.rest()[-1]["text"]

    def test_another_version_gets_an_answer(self, port: int) -> None:
        with connect(f"ws://127.0.0.1:{port}/drive") as socket:
            socket.send(json.dumps({"type": "hello", "version": 99}))
            assert "reload the page" in json.loads(socket.recv())["text"]

    def test_the_first_message_is_hello(self, port: int) -> None:
        with connect(f"ws://127.0.0.1:{port}/drive") as socket:
            socket.send(json.dumps({"type": "step"}))
            assert "hello" in json.loads(socket.recv())["text"]

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
    def test_other_pages_are_refused(self, port: int, origin: str) -> None:
        with pytest.raises(InvalidStatus, match="403"), Page(port, origin=origin):
            pass

    def test_other_names_are_refused(self, port: int) -> None:
        # A page whose name was rebound to this address sends its own name as Host.
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(
                b"GET /drive HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            assert b" 403 " in raw.recv(1000).splitlines()[0]

    def test_the_page_comes_with_a_strict_policy(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert b"<canvas" in response.read()
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)

    @pytest.mark.parametrize("path", ["../car.py", "%2e%2e/car.py", "..%2fcar.py", "starts/99.png"])
    def test_no_file_outside_the_page_is_served(self, port: int, path: str) -> None:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")

    def test_with_a_token_nobody_gets_in_without_it(
        self, world: WorldModel, starts: dict[str, Start]
    ) -> None:
        with serving(new_server(world, starts), token="secret") as port:
            at = f"http://127.0.0.1:{port}"
            for path in ("/", "/play.js", "/starts/0.png", "/?token=secre", "/?token="):
                with pytest.raises(urllib.error.HTTPError, match="403"):
                    urllib.request.urlopen(at + path)
            with pytest.raises(InvalidStatus, match="403"), Page(port):
                pass
            with urllib.request.urlopen(f"{at}/?token=secret") as response:
                cookie = response.headers["Set-Cookie"].partition(";")[0]
            request = urllib.request.Request(f"{at}/starts/0.png", headers={"Cookie": cookie})
            with urllib.request.urlopen(request) as response:
                assert response.headers["Content-Type"] == "image/png"
            with Page(port, additional_headers={"Cookie": cookie}) as page:
                page.wait("frame")


def test_a_port_in_use_gives_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with listen("127.0.0.1", port) as other:
            assert other.getsockname()[1] == port + 1
    assert f"port {port} is in use" in capsys.readouterr().err


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(DriveSimError, match=r"203\.0\.113\.1"):
        listen("203.0.113.1", 0)
