"""`python -m benchmarks.play`: how fast and how evenly `drivesim play` serves the packaged model.

Starts the server as a user does. `browser` drives for ten minutes in a headless Chromium on the
same machine, and needs one; the others drive by the server's protocol, without a browser. With
`--toy`, only a few seconds long. Each drive has a server of its own. A frame counts as late if it
comes more than 20 ms later after its predecessor than the model's frame time.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks import ROOT
from benchmarks.measuring.browser import opened
from benchmarks.measuring.page import Page
from benchmarks.measuring.paired import Benchmark, Claim, Figure, Settings, run_command

_LATE_S = 0.020
_STEER_S = 0.5
_FIRST_S, _COMPILING_S = 5.0, 15.0
_HISTORY_S = 30.0
_WATCH = """() => {
  window.shown_ms = [];
  const time = document.getElementById("time");
  const watch = new MutationObserver(() => window.shown_ms.push(performance.now()));
  watch.observe(time, { childList: true, characterData: true, subtree: true });
}"""
"""Notes when the page shows another time, which it does with every frame."""


@contextmanager
def serving(*options: str, cache: Path | None = None) -> Iterator[tuple[int, psutil.Process]]:
    """Start `drivesim play`; yield its port and its process once it says its address."""
    environment = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    command = [sys.executable, "-m", "driving_sim.cli", "play", "synthetic", "--no-browser"]
    with subprocess.Popen(
        [*command, "--port", "18000", *options],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("drive at "):
                    yield int(line.split(":")[2].split("/")[0]), psutil.Process(process.pid)
                    break
            else:
                raise SystemExit("drivesim play has ended")
        finally:
            process.terminate()


@dataclass
class _Drive:
    """What a driver saw: arrival of each frame, and the time from a control to its frame."""

    arrivals: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    period_s: float = 0.1

    @property
    def gaps_s(self) -> np.ndarray:
        return np.diff(self.arrivals)

    @property
    def late(self) -> float:
        """Share of the frames that came late."""
        return float((self.gaps_s > self.period_s + _LATE_S).mean())

    @property
    def rate(self) -> float:
        """Frames per second."""
        return 1 / float(self.gaps_s.mean())


def _drive(port: int, seconds: float) -> _Drive:
    """Steer to the left and to the right for some seconds."""
    seen = _Drive()
    with Page(port) as page:
        seen.period_s = 1 / page.wait("welcome")["model"]["fps"]
        page.wait("frame", frame=1)
        began = steered = time.monotonic()
        side, stamp = 1.0, None
        while time.monotonic() < began + seconds:
            frame = page.wait("frame")
            now = time.monotonic()
            seen.arrivals.append(now)
            seen.compute_s.append(frame["compute_ms"] / 1000)
            if frame["stamp"] != stamp:
                stamp = frame["stamp"]
                seen.latencies.append(now - stamp / 1000)
            if now > steered + _STEER_S + seen.period_s * np.random.default_rng().random():
                side, steered = -side, time.monotonic()
                page.steer(side, throttle=0.3, stamp=1000 * steered)
    return seen


def _first_frame_s(cache: Path | None = None) -> float:
    """Return the time from the command to the first frame of a drive."""
    began = time.monotonic()
    with serving(cache=cache) as (port, _), Page(port) as page:
        page.wait("frame", frame=1)
        return time.monotonic() - began


def start(settings: Settings) -> list[Claim]:
    """Return the time to the first frame: usually, and when the kernels are compiled first."""
    with tempfile.TemporaryDirectory() as empty:
        compiling = _first_frame_s(Path(empty))
    usual = [_first_frame_s() for _ in range(1 if settings.toy else settings.rounds)]
    return [
        Claim(
            what="`drivesim play`, from the command to the first frame",
            figure=Figure.of(usual),
            unit="s",
            bar=_FIRST_S,
            at_most=True,
        ),
        Claim(
            what="`drivesim play`, the same with empty caches",
            figure=Figure.of([compiling]),
            unit="s",
            bar=_COMPILING_S,
            at_most=True,
        ),
    ]


def alone(settings: Settings) -> list[Claim]:
    """Return how evenly frames come for ten minutes, the latency, the memory, and resets."""
    seconds = 4.0 if settings.toy else 600.0
    resets: list[float] = []
    with serving() as (port, process):
        memory: list[int] = []
        full = threading.Timer(
            min(2 * _HISTORY_S, seconds / 2), lambda: memory.append(process.memory_info().rss)
        )
        full.start()
        seen = _drive(port, seconds)
        full.join()
        memory.append(process.memory_info().rss)
        with Page(port) as page:
            page.wait("frame", frame=2)
            for _ in range(settings.rounds):
                page.send("pause", paused=True)
                page.wait("state", paused=True)
                began = time.monotonic()
                page.send("reset")
                page.wait("frame", frame=0)
                resets.append(time.monotonic() - began)
    period, compute = seen.period_s, float(np.median(seen.compute_s))
    return [
        Claim(
            what=f"frames more than 20 ms late, {seconds:g} s at {1 / period:g} frames/s",
            figure=Figure.of([seen.late]),
            unit="%",
            bar=0.01,
            at_most=True,
            details=(f"{seen.rate:.2f} frames/s, {len(seen.arrivals)} frames",),
        ),
        Claim(
            what="from a control to its frame, 95th percentile",
            figure=Figure.of([1000 * float(np.quantile(seen.latencies, 0.95))]),
            unit="ms",
            bar=round(1000 * (period + compute) + 40),
            at_most=True,
            details=(
                f"median {1000 * float(np.median(seen.latencies)):.0f} ms; the bar is a frame's "
                f"time, {1000 * compute:.0f} ms of computing, and 40 ms",
            ),
        ),
        Claim(
            what="memory at the end over memory with a full history",
            figure=Figure.of([memory[-1] / memory[0]]),
            bar=1.05,
            at_most=True,
            details=(f"{memory[-1] / 1e6:.0f} MB",),
        ),
        Claim(what="reset", figure=Figure.of(resets), unit="s", bar=0.3, at_most=True),
    ]


def browser(settings: Settings) -> list[Claim]:
    """Return how evenly frames are shown in Chromium for ten minutes, and the latency there."""
    seconds, side = 8.0 if settings.toy else 600.0, "Left"
    with serving() as (port, _), opened(port) as page:
        page.evaluate(_WATCH)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            side = "Right" if side == "Left" else "Left"
            page.keyboard.press(f"Arrow{side}", delay=300)
            page.wait_for_timeout(500 * np.random.default_rng().random())
        shown_s = np.array(page.evaluate("window.shown_ms")) / 1000
        latency_ms = float(page.inner_text("#latency-95").split()[-2])
        median_ms = float(page.inner_text("#latency-median").split()[0])
        period = 1 / float(page.inner_text("#fps").split()[-1])
    gaps = np.diff(shown_s)
    return [
        Claim(
            what=f"in Chromium, frames more than 20 ms late, {seconds:g} s",
            figure=Figure.of([float((gaps > period + _LATE_S).mean())]),
            unit="%",
            bar=0.01,
            at_most=True,
            details=(f"{1 / gaps.mean():.2f} frames/s, {len(shown_s)} frames",),
        ),
        Claim(
            what="in Chromium, from a control to the shown frame, 95th percentile",
            figure=Figure.of([latency_ms]),
            unit="ms",
            bar=round(1000 * period + 80),
            at_most=True,
            details=(
                f"median {median_ms:.0f} ms, by the page's own gauges; the bar is a frame's time, "
                "40 ms of computing, and 40 ms",
            ),
        ),
    ]


def busy(settings: Settings) -> list[Claim]:
    """Return the rate beside one busy loop."""
    with ExitStack() as stack:
        port, _ = stack.enter_context(serving())
        loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        stack.callback(loop.wait)
        stack.callback(loop.kill)
        seen = _drive(port, 4.0 if settings.toy else 60.0)
    return [
        Claim(
            what="driving beside one busy loop",
            figure=Figure.of([seen.rate]),
            unit="frames/s",
            bar=9.0,
        )
    ]


def two(settings: Settings) -> list[Claim]:
    """Return the rate of the slower one of two drivers."""
    drives: list[_Drive] = []
    seconds = 4.0 if settings.toy else 60.0
    with serving() as (port, _):
        threads = [
            threading.Thread(target=lambda: drives.append(_drive(port, seconds))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rates = [drive.rate for drive in drives]
    if len(rates) < len(threads):
        raise SystemExit("a driver was thrown out")
    return [
        Claim(
            what="two drivers at once, the slower one",
            figure=Figure.of([min(rates)]),
            details=(f"the faster one {max(rates):.1f} frames/s",),
            unit="frames/s",
            bar=8.0,
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {
    "start": start,
    "alone": alone,
    "browser": browser,
    "busy": busy,
    "two": two,
}


if __name__ == "__main__":
    run_command(__doc__, "play", BENCHMARKS, sys.argv[1:])
