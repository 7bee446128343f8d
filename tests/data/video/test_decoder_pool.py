"""Decoder processes give the right frames and errors, whatever happens to one of them."""

import gc
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.video import decoder_pool as processes
from driving_sim.data.video import file_facts, reader
from driving_sim.data.video.decoder_pool import LIMIT, read_facts, read_frames, stream_frames
from driving_sim.data.video.decoder_worker import MEMORY_BYTES
from driving_sim.data.video.file import VideoError
from driving_sim.data.video.file_facts import VideoFacts
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import DriveSimError
from tests import ROOT
from tests.fixtures.video_files import (
    claim_frames,
    claim_size,
    cut,
    make_hang,
    read_numbers,
    write_numbered,
)

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
SIZE = FrameSize(height=24, width=64)
LARGE = FrameSize(height=480, width=1280)  # 40 frames of this size exceed a pipe.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_numbered(tmp_path / "x.mp4")


@pytest.fixture
def facts(path: Path) -> VideoFacts:
    return read_facts(path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop hangs soon, but give the other reads enough time on a busy machine."""
    monkeypatch.setenv(LIMIT, "3")


@pytest.fixture
def changed_decoder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Return a function that replaces all decoders by new ones that run some lines first."""
    folder = tmp_path_factory.mktemp("lines")

    def change(lines: str) -> None:
        (folder / "sitecustomize.py").write_text(lines)

    monkeypatch.syspath_prepend(folder)
    processes.end_all()
    yield change
    processes.end_all()


def idle_pid() -> int:
    """Return the id of the process that takes the next request."""
    return processes._idle[-1].process.pid


def busy_pid() -> int:
    """Return the id of the process of the only open stream."""
    (pid,) = (decoder.process.pid for decoder in processes._started if decoder.busy)
    return pid


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def same(expected: VideoFacts, actual: VideoFacts) -> None:
    for name in VideoFacts.__slots__:
        first, second = getattr(expected, name), getattr(actual, name)
        if isinstance(first, np.ndarray):
            np.testing.assert_array_equal(first, second)
            assert first.dtype == second.dtype
        else:
            assert first == second


@pytest.mark.parametrize("codec", ["libx264", "libx265"])  # With and without timestamps.
def test_a_decoder_returns_what_the_functions_return(tmp_path: Path, codec: str) -> None:
    raw = codec == "libx265"
    path = write_numbered(
        tmp_path / ("x.hevc" if raw else "x.mp4"),
        codec=codec,
        container="hevc" if raw else None,
        codec_options={"x265-params": "log-level=none"} if raw else None,
    )
    facts = read_facts(path)
    same(facts, file_facts.read_facts(path))
    for size in (SIZE, None):
        expected = list(reader.stream_frames(facts, size))
        np.testing.assert_array_equal(list(stream_frames(facts, size)), expected)
        chosen = list(reader.stream_frames(facts, size, [3, 4, 30]))
        np.testing.assert_array_equal(list(stream_frames(facts, size, [3, 4, 30])), chosen)
        clip = reader.read_frames(facts, [30, 3, 3], size)
        np.testing.assert_array_equal(read_frames(facts, [30, 3, 3], size), clip)
    assert read_frames(facts, [], SIZE).shape == (0, 24, 64, 3)
    assert list(stream_frames(facts, SIZE, [])) == []


OPENS_VIDEOS = re.compile(
    r"from driving_sim\.data\.video\.(?:reader|file_facts|file) import (?:\([^)]*|.*)"
    r"\b(?:read_facts|read_frames|stream_frames|open_video)\b|\bav\.open\(|\bimport decord\b"
)


def test_nothing_else_opens_videos() -> None:
    package = ROOT / "driving_sim"
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    names = {file.name for file in files if OPENS_VIDEOS.search(file.read_text("utf-8"))}
    assert names == {
        "decoder_worker.py",
        "file.py",
        "file_facts.py",
        "reader.py",
        "timing.py",
        "writer.py",
    }


def test_a_decoder_raises_what_the_functions_raise(tmp_path: Path, facts: VideoFacts) -> None:
    bad = [
        tmp_path / "gone.mp4",
        tmp_path,
        cut(write_numbered(tmp_path / "cut.mp4"), 0.5),
        claim_size(tmp_path / "large.avi", 100_000, 100_000),
        claim_frames(tmp_path / "million.mp4", 1_000_000),
    ]
    for path in bad:
        with pytest.raises(VideoError) as expected:
            file_facts.read_facts(path)
        with pytest.raises(VideoError) as raised:
            read_facts(path)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(IndexError, match="only 40"):
        read_frames(facts, [40])
    with pytest.raises(ValueError, match="increasing"):
        next(stream_frames(facts, SIZE, [4, 3]))
    cut(facts.path, 0.3)
    with pytest.raises(VideoError, match=r"x\.mp4"):
        list(stream_frames(facts))


def test_a_process_is_used_again_after_files_good_and_bad(path: Path, tmp_path: Path) -> None:
    facts = read_facts(path)
    before = idle_pid()
    list(stream_frames(facts, SIZE))
    read_frames(facts, [3], SIZE)
    with pytest.raises(VideoError, match="no such file"):
        read_facts(tmp_path / "gone.mp4")
    assert idle_pid() == before


def test_a_relative_path_is_one_of_the_current_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_facts(path)  # This starts the process in another folder.
    monkeypatch.chdir(path.parent)
    facts = read_facts(Path("x.mp4"))
    assert facts.path == Path("x.mp4")
    assert read_numbers(list(stream_frames(facts, indices=[5]))) == [5]


def test_a_file_that_hangs_its_decoder_costs_the_file_only(
    facts: VideoFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = read_facts(write_numbered(tmp_path / "other.mp4"))
    make_hang(facts.path)
    for read in (lambda: list(stream_frames(facts)), lambda: read_frames(facts, [3, 9])):
        before = idle_pid()
        started = time.monotonic()
        with monkeypatch.context() as impatient:
            impatient.setenv(LIMIT, "0.5")
            with pytest.raises(VideoError, match=r"no sign of life for 0\.5 s .*, twice,") as error:
                read()
        assert 1 < time.monotonic() - started < 20
        assert str(facts.path) in str(error.value)
        assert "\n" not in str(error.value)
        wait_until(lambda pid=before: not is_running(pid))  # type: ignore[misc]
        assert read_numbers(list(stream_frames(other))) == list(range(40))


def test_facts_that_hang_are_ended(
    path: Path, changed_decoder: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_decoder(
        "import time\nfrom driving_sim.data.video import file_facts\n"
        "file_facts.beat = lambda: time.sleep(60)\n"
    )
    monkeypatch.setenv(LIMIT, "0.5")
    with pytest.raises(
        VideoError, match=r"x\.mp4: .*life for 0\.5 s while its facts were read, twice"
    ):
        read_facts(path)


def test_a_hang_midway_says_where(facts: VideoFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = stream_frames(facts, LARGE, [0, 7, 8])
    next(frames)
    make_hang(facts.path)  # Only the next decoder hangs: this one has already opened the file.
    monkeypatch.setenv(LIMIT, "0.5")
    os.kill(busy_pid(), signal.SIGKILL)
    with pytest.raises(VideoError, match=r"at 0\.[34]\d? s of 1\.9\d? s \(frame [78]\), twice"):
        list(frames)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_drive_that_stalled_or_a_full_memory_is_no_fault_of_the_file(
    facts: VideoFacts, number: int
) -> None:
    frames = stream_frames(facts, LARGE)
    first = next(frames)
    os.kill(busy_pid(), number)
    assert read_numbers([first, *frames]) == list(range(40))


@pytest.mark.parametrize("what", ["file_facts.read_facts", "reader.read_frames"])
def test_facts_and_a_clip_are_asked_for_once_more(
    facts: VideoFacts, tmp_path: Path, changed_decoder: Callable[[str], None], what: str
) -> None:
    mark = tmp_path / "killed"
    changed_decoder(
        "import os\nfrom pathlib import Path\n"
        "from driving_sim.data.video import file_facts, reader\n"
        f"mark, work = Path({str(mark)!r}), {what}\n"
        "def kill(*given, **named):\n"
        "    if not mark.exists(): mark.touch(); os.kill(os.getpid(), 9)\n"
        "    return work(*given, **named)\n"
        f"{what} = kill\n"
    )
    same(read_facts(facts.path), facts)
    assert read_numbers(read_frames(facts, [7, 3])) == [7, 3]
    assert mark.exists()


def test_a_stream_may_be_disturbed_at_more_than_one_frame(facts: VideoFacts) -> None:
    frames = stream_frames(facts, LARGE)
    read = [next(frames)]
    for _ in range(3):
        os.kill(busy_pid(), signal.SIGKILL)
        read += [next(frames) for _ in range(9)]  # These are more than a pipe holds.
    assert read_numbers([*read, *frames]) == list(range(40))


def test_a_file_that_has_its_decoder_killed_again_is_at_fault(
    facts: VideoFacts, changed_decoder: Callable[[str], None]
) -> None:
    changed_decoder(
        "import os\nfrom driving_sim.data.video import reader\n"
        "reader.beat = lambda: os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(VideoError, match=r"x\.mp4: its decoder died \(SIGKILL\) at .*, twice:"):
        list(stream_frames(facts))


@pytest.mark.usefixtures("impatient")
def test_slow_is_not_hung(tmp_path: Path, changed_decoder: Callable[[str], None]) -> None:
    path = write_numbered(tmp_path / "x.mp4", keyframe_every=999)
    changed_decoder(
        "import time\n"
        "from driving_sim.data.video import reader\n"
        "def beat(): time.sleep(0.1); slow()\n"
        "slow, reader.beat = reader.beat, beat\n"
    )
    facts = read_facts(path)
    started = time.monotonic()
    assert read_numbers(list(stream_frames(facts, indices=[39]))) == [39]
    assert time.monotonic() - started > 3  # This is longer than a decoder may be silent.


@pytest.mark.usefixtures("facts")
def test_a_pause_of_the_machine_is_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pausing:
        """Waits end at once, like those of a process that was paused."""

        waits = 0

        def register(self, pipe: object) -> None:
            pass

        def poll(self, milliseconds: float) -> list[int]:
            assert milliseconds <= 1000
            self.waits += 1
            return []

    decoder, paused = processes._idle[-1], Pausing()
    decoder._limit_s = 7
    monkeypatch.setattr(select, "poll", lambda: paused)
    with pytest.raises(TimeoutError):
        decoder._wait(decoder._output)
    assert paused.waits == 7


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_the_limit_must_be_a_number_of_seconds(
    path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(DriveSimError, match=f"{LIMIT}={value}: must be"):
        read_facts(path)


def test_a_decoder_that_crashes_costs_the_file_only(facts: VideoFacts) -> None:
    frames = stream_frames(facts, LARGE)
    next(frames)
    pid = busy_pid()
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(VideoError, match=r"died \(SIGSEGV\) at \d\.\d\d? s of"):
        list(frames)
    assert not is_running(pid)
    assert read_numbers(read_frames(facts, [7])) == [7]


def test_an_idle_decoder_that_was_killed_is_replaced(path: Path) -> None:
    read_facts(path)
    decoder = processes._idle[-1]
    os.kill(decoder.process.pid, signal.SIGKILL)
    wait_until(lambda: decoder.process.poll() is not None)
    assert len(read_facts(path).timestamps) == 40


def test_decoders_ignore_ctrl_c_and_sigterm(facts: VideoFacts) -> None:
    pid = idle_pid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    time.sleep(0.1)
    assert read_numbers(read_frames(facts, [7])) == [7]
    assert idle_pid() == pid


def test_several_streams_at_once(facts: VideoFacts) -> None:
    pairs = zip(stream_frames(facts), stream_frames(facts, indices=range(40)), strict=True)
    assert all(one is not None and (one == other).all() for one, other in pairs)
    with ThreadPoolExecutor(4) as pool:
        numbers = pool.map(lambda _: read_numbers(list(stream_frames(facts))), range(8))
    assert list(numbers) == [list(range(40))] * 8


def test_a_stream_that_is_given_up_leaves_no_process(facts: VideoFacts) -> None:
    frames = stream_frames(facts, LARGE)
    next(frames)
    pid = busy_pid()
    frames.close()  # type: ignore[attr-defined]
    assert not is_running(pid)
    assert pid not in [decoder.process.pid for decoder in processes._started]
    assert read_numbers(read_frames(facts, [7])) == [7]


def test_a_stream_whose_last_frame_was_taken_is_over(facts: VideoFacts) -> None:
    pid = idle_pid()
    frames = stream_frames(facts, SIZE, [0, 5])
    next(frames), next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert idle_pid() == pid


def test_a_decoder_does_not_decode_far_ahead(facts: VideoFacts) -> None:
    """The pipe is full after one or two frames of 1.8 MB, and then the decoder waits."""
    frames = stream_frames(facts, LARGE)
    next(frames)
    written = Path(f"/proc/{busy_pid()}/io")
    if not written.exists():
        pytest.skip("no /proc/PID/io here")
    time.sleep(0.3)
    sent = int(written.read_text().split("wchar: ")[1].split()[0])
    assert sent < 6 * LARGE.height * LARGE.width * 3
    frames.close()  # type: ignore[attr-defined]


def report_fork(facts: VideoFacts, pipe: Connection) -> None:
    """In a forked process, return what it reads and the ids of its decoders."""
    numbers = read_numbers(list(stream_frames(facts)))
    pipe.send((numbers, [decoder.process.pid for decoder in processes._started]))


def test_a_forked_process_starts_its_own(facts: VideoFacts) -> None:
    frames = stream_frames(facts)
    first = [next(frames) for _ in range(3)]
    read_frames(facts, [3])  # This leaves a second decoder idle.
    own = {decoder.process.pid for decoder in processes._started}
    receiver, sender = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=report_fork, args=(facts, sender))
    worker.start()
    assert receiver.poll(30)
    numbers, pids = receiver.recv()
    worker.join(timeout=30)
    assert numbers == list(range(40))
    assert len(pids) == 1
    assert not own & set(pids)
    wait_until(lambda: not is_running(pids[0]))  # The decoder ends with the worker.
    assert read_numbers([*first, *frames]) == list(range(40))
    assert own <= {decoder.process.pid for decoder in processes._started}


ORPHAN = """
import sys
from pathlib import Path
from driving_sim.data.video import decoder_pool as processes
from driving_sim.data.video.decoder_pool import read_facts, stream_frames
from tests.fixtures.video_files import make_hang

facts = read_facts(Path(sys.argv[1]))
make_hang(facts.path)
print(processes._idle[-1].process.pid, flush=True)
list(stream_frames(facts))
"""


@needs_proc
def test_no_decoder_outlives_its_parent(path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(path)]
    environment = processes._environment()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)  # Wait until it hangs.
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


@needs_proc
def test_memory_has_a_limit(facts: VideoFacts) -> None:
    limits = Path(f"/proc/{idle_pid()}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3] == str(MEMORY_BYTES)


ARENAS = """
import threading
threading.stack_size(256 << 10)
barrier = threading.Barrier(41)
def work():
    kept = bytearray(100_000)
    barrier.wait()
    barrier.wait()
for _ in range(40):
    threading.Thread(target=work, daemon=True).start()
barrier.wait()
print(int(open("/proc/self/status").read().split("VmPeak:")[1].split()[0]) >> 10)
"""


@needs_proc
def test_threads_of_a_decoder_take_little_address_space() -> None:
    environment = processes._environment()
    mebibytes = subprocess.check_output([sys.executable, "-c", ARENAS], env=environment)
    assert int(mebibytes) < 400


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the size of a pipe")
def test_a_hundred_decoders_do_not_use_up_a_users_pipes(path: Path) -> None:
    import fcntl

    read_facts(path)
    size = fcntl.fcntl(processes._idle[-1]._output.fileno(), fcntl.F_GETPIPE_SZ)
    assert 100 * size <= 64 << 20  # Default of pipe-user-pages-soft in Linux.


def test_a_clip_that_no_decoder_has_memory_for_is_not_the_files_fault(facts: VideoFacts) -> None:
    pid = idle_pid()
    with pytest.raises(DriveSimError, match=r"x\.mp4: a clip of 20 frames of 8,000×8,000 .* 2 GiB"):
        read_frames(facts, range(20), FrameSize(height=8000, width=8000))
    assert idle_pid() == pid
    assert read_numbers(read_frames(facts, [5, 5, 3])) == [5, 5, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot limit another process")
def test_a_decoder_out_of_memory_costs_the_file_only(facts: VideoFacts) -> None:
    import resource

    pid = idle_pid()
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.split("VmSize:")[1].split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, ((kilobytes + 50_000) << 10,) * 2)
    with pytest.raises(VideoError, match=r"x\.mp4: decoding takes more than 4 GiB of memory"):
        read_frames(facts, range(40), LARGE)
    assert not is_running(pid)
    assert read_frames(facts, range(40), LARGE).shape == (40, 480, 1280, 3)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            "reader.stream_frames = lambda facts, *_: iter([np.zeros((2, 2, 3), np.uint8)])",
            "sent an invalid answer",
        ),
        ("reader.stream_frames = lambda *_: 1 / 0", r"cannot be decoded \(ZeroDivisionError"),
        ("reader.stream_frames = lambda *_: os._exit(3)", r"died \(exit code 3\)"),
    ],
)
def test_any_fault_of_a_decoder_gives_a_one_line_error(
    path: Path, changed_decoder: Callable[[str], None], lines: str, says: str
) -> None:
    changed_decoder(
        f"import os\nimport numpy as np\nfrom driving_sim.data.video import reader\n{lines}\n"
    )
    facts = read_facts(path)
    with pytest.raises(VideoError, match=rf"x\.mp4: .*{says}"):
        list(stream_frames(facts))


def test_output_of_a_library_is_not_taken_for_an_answer(
    path: Path, changed_decoder: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    changed_decoder(
        "from driving_sim.data.video import file_facts\n"
        "file_facts.beat = lambda: print('chatter', flush=True)\n"
    )
    assert len(read_facts(path).timestamps) == 40
    out, err = capfd.readouterr()
    assert "chatter" in err
    assert out == ""


def test_a_process_that_does_not_start_is_no_fault_of_a_video(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.end_all()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="does not start") as error:
        read_facts(path)
    assert error.value.filename == "/bin/false"


@pytest.mark.parametrize("line", ["", "hello", "a greeting longer than any prefix of a message"])
def test_what_is_printed_before_a_decoder_starts_is_no_fault_of_a_video(
    path: Path, changed_decoder: Callable[[str], None], line: str
) -> None:
    changed_decoder(f"print({line!r}, flush=True)\n")
    with pytest.raises(OSError, match="does not start: something prints"):
        read_facts(path)
    assert not processes._started


def test_ctrl_c_while_a_decoder_starts_leaves_no_process(
    path: Path, changed_decoder: Callable[[str], None]
) -> None:
    changed_decoder("import time\ntime.sleep(60)\n")
    main = threading.get_ident()
    seen: list[int] = []

    def interrupt() -> None:
        wait_until(lambda: bool(processes._started))
        seen.extend(decoder.process.pid for decoder in processes._started)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # A job that a shell starts with `&` ignores it.
    thread = threading.Thread(target=interrupt)
    thread.start()
    gc.collect()
    gc.disable()  # In a finaliser the interrupt would be lost.
    try:
        with pytest.raises(KeyboardInterrupt):
            read_facts(path)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert not processes._started
    assert not is_running(seen[0])
