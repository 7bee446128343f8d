"""A session of one driver: generates frames at the model's rate, and obeys the page's messages."""

import asyncio
import contextlib
import secrets
import time
import traceback
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from driving_sim.engine.errors import DriveSimError, is_out_of_memory
from driving_sim.engine.progress import say
from driving_sim.play.car import Held
from driving_sim.play.drive import Drive, Sight
from driving_sim.play.recorder import Recorder
from driving_sim.play.serving import protocol
from driving_sim.play.serving.outbox import Outbox
from driving_sim.play.serving.packing import packed_possibility, packed_sight
from driving_sim.play.serving.workers import Workers
from driving_sim.world_model.session import HISTORY_S

IDLE_S = 300.0
"""A session ends if its driver does nothing for so long."""
WARNING_S = 60.0
"""The driver is warned so long before."""
LOST_S = 30.0
"""A lost connection can be taken up again within this time."""
SILENT_S = 7.0
"""Without any message for so long, the world stands: the connection may be lost."""
GONE_S = 120.0
"""Without any message for so long, the session ends. (Browsers let hidden pages run rarely.)"""
_MOST_COMMANDS = 32
_MEASURED = 20  # number of frames over which the rate is measured
_CHECK_S = 0.5  # time between two looks at the clock while the world stands


class Seat:
    """One driver's session. It outlives a lost connection."""

    def __init__(self, drive: Drive, workers: Workers, recordings: Path | None) -> None:
        """Begin a session. It may record to the folder `recordings`."""
        self.id = secrets.token_urlsafe(16)
        self.outbox = Outbox()
        self.is_connected = False
        self.ended: str | None = None
        """Why the session has ended, or None while it goes on."""
        self._drive, self._workers, self._recordings = drive, workers, recordings
        self._world = drive.world
        self._control: tuple[Held, float | None] = (Held(), None)
        """How wheel and pedals are held, and the stamp of the message that said so."""
        self._is_paused = False
        self._is_unseen = True
        """Whether the page has not seen the current frame yet."""
        self._commands: asyncio.Queue[protocol.Message] = asyncio.Queue(_MOST_COMMANDS)
        self._wake = asyncio.Event()
        self._recorder: Recorder | None = None
        self._recorded: str | None = None
        self._packing: asyncio.Future[None] | None = None
        self._times: deque[float] = deque(maxlen=_MEASURED)
        self._active_at = self._heard_at = self._lost_at = time.monotonic()
        self._is_warned = False
        self._told = self._state()
        """The state that the page knows."""

    def connect(self, welcome: dict[str, Any]) -> Outbox:
        """Take up the session from a page; return what is to be sent to it."""
        self.outbox.close(protocol.said("end", "this drive was taken up in another window"))
        self.outbox, self.is_connected, self._is_unseen = Outbox(), True, True
        self.outbox.put(protocol.text("welcome", session=self.id, state=self._told, **welcome))
        self._note_activity()
        self._wake.set()
        return self.outbox

    def disconnect(self, outbox: Outbox) -> None:
        """Let the world stand until the page comes back, unless another page already did."""
        outbox.abandon()
        if outbox is self.outbox:
            self.is_connected, self._lost_at = False, time.monotonic()
            self._control = (Held(), None)
            self._wake.set()

    def receive(self, message: protocol.Message) -> None:
        """Take a message of the page. If too many wait to be obeyed, it is dropped, and said so."""
        if isinstance(message, protocol.Ping):
            self._heard_at = time.monotonic()
            self.outbox.put(protocol.text("pong", stamp=message.stamp))
            return
        self._note_activity()
        if isinstance(message, protocol.Control):
            held = Held(message.wheel, message.throttle, message.brake)
            self._control = (held, message.stamp)
            return
        try:
            self._commands.put_nowait(message)
        except asyncio.QueueFull:
            self.outbox.put(protocol.said("notice", "too many commands at once; try again"))
        self._wake.set()

    def end(self, reason: str) -> None:
        """End the session; its task then keeps the recording and frees the memory."""
        self.ended = self.ended or reason
        self._wake.set()

    async def run(self) -> None:
        """Generate frames and obey messages until the session ends."""
        try:
            await self._go_on()
        except DriveSimError as error:
            self.end(str(error))
        except Exception as error:
            if is_out_of_memory(error):
                self.end("there is no memory for the next frame")
            else:
                traceback.print_exception(error)
                self.end("an error in drivesim; the server's terminal shows it")
        finally:
            self.end("the server has stopped")
            try:
                await self._keep_recording()
            except DriveSimError as error:
                say(str(error))
            finally:
                await self._workers.compute(self._drive.close)
                self.outbox.close(protocol.said("end", self.ended or ""))

    async def _go_on(self) -> None:
        period = 1 / self._world.fps
        due = time.monotonic()
        while self.ended is None:
            if not self._commands.empty():
                await self._obey(self._commands.get_nowait())
            elif self._is_unseen and self.is_connected:
                await self._show_now()
            elif self._is_paused or not self._is_watched:
                await self._sleep(_CHECK_S)
                due = time.monotonic()
                self._times.clear()
            elif (wait := due - time.monotonic()) > 0:
                await self._sleep(wait)
            else:
                await self._next_frame()
                # After a late frame, keep the pace; do not hurry to catch up.
                due = max(due + period, time.monotonic())
            self._check_clock()

    @property
    def _is_watched(self) -> bool:
        return self.is_connected and time.monotonic() < self._heard_at + SILENT_S

    async def _sleep(self, seconds: float) -> None:
        """Sleep until the time is over, or until a command arrives."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    def _note_activity(self) -> None:
        """Remember that the driver did something."""
        self._active_at = self._heard_at = time.monotonic()
        self._is_warned = False

    def _check_clock(self) -> None:
        """End the session if the driver is idle or gone, and warn before."""
        now = time.monotonic()
        left = self._active_at + IDLE_S - now
        if not self.is_connected and now > self._lost_at + LOST_S:
            self.end("the connection was lost")
        elif now > self._heard_at + GONE_S:
            self.end("the page fell silent")
        elif left <= 0:
            self.end(f"nobody drove for {IDLE_S / 60:g} minutes")
        elif left <= WARNING_S and not self._is_warned:
            self._is_warned = True
            self.outbox.put(protocol.text("idle", seconds=round(left)))

    async def _next_frame(self) -> None:
        """Drive one frame further, as the newest control says, and show it."""
        drive = self._drive
        if drive.plan and not self._control[0].is_neutral:
            drive.hand_over(None)
            self._tell_state()
        plan, began = drive.plan, time.monotonic()

        def step() -> tuple[Sight, float | None]:
            held, stamp = self._control  # read now, because the thread may have been busy
            return drive.step(held), stamp

        try:
            sight, stamp = await self._workers.compute(step)
        except DriveSimError as error:
            if drive.has_ended:
                raise
            self._is_paused = True
            self.outbox.put(protocol.said("notice", str(error)))
            self._tell_state()
            return
        self._times.append(time.monotonic())
        compute_ms = round(1000 * (self._times[-1] - began), 1)
        await self._pack(sight, stamp=stamp, rate=self._rate(), compute_ms=compute_ms)
        if plan and not drive.plan:
            self.outbox.put(protocol.said("notice", f"{plan} has ended; the wheel is yours"))
            self._tell_state()

    def _rate(self) -> float | None:
        """Return the frames per second lately, or None just after the world stood."""
        if len(self._times) < 2:
            return None
        return round((len(self._times) - 1) / (self._times[-1] - self._times[0]), 2)

    async def _pack(self, sight: Sight, **measured: Any) -> None:
        """Let a frame be packed and shown, and recorded, while the world goes on."""
        await self._packed()
        outbox, recorder, header = self.outbox, self._recorder, self._header(**measured)
        loop = asyncio.get_running_loop()

        def work() -> None:
            packed = packed_sight(self._world, sight, header)
            loop.call_soon_threadsafe(outbox.show, packed)
            if recorder is not None:
                recorder.add(sight)

        self._packing = self._workers.pack(work)

    async def _packed(self) -> None:
        """Wait until the last frame is packed. If it could not be recorded, drive on without."""
        packing, self._packing = self._packing, None
        try:
            if packing is not None:
                await packing
        except DriveSimError as error:
            recorder, self._recorder = self._recorder, None
            if recorder is not None:
                await self._workers.pack(recorder.discard)
            self.outbox.put(protocol.said("notice", f"the recording is lost: {error}"))
            self._tell_state()

    async def _show_now(self) -> Sight:
        """Show the current frame, to which no control led, and return it."""
        self._is_unseen = False
        await self._packed()
        sight = await self._workers.compute(self._drive.now)
        header = self._header(stamp=None, rate=None, compute_ms=None)
        self.outbox.show(
            await self._workers.pack(partial(packed_sight, self._world, sight, header))
        )
        return sight

    def _header(self, **measured: Any) -> dict[str, Any]:
        drive = self._drive
        return {"start": drive.start.name, "rewindable_s": drive.rewindable_s, **measured}

    def _state(self) -> dict[str, Any]:
        settings = asdict(self._drive.sampling)
        return {
            "start": self._drive.start.name,
            "paused": self._is_paused,
            "hand_over": self._drive.plan,
            "recording": self._recorder is not None,
            "recorded": self._recorded,
            "settings": {name: settings[name] for name in ("temperature", "guidance", "seed")},
        }

    def _tell_state(self) -> None:
        self._told = self._state()
        self.outbox.put(protocol.text("state", **self._told))

    async def _obey(self, message: protocol.Message) -> None:
        """Do what a command says. A mistake in it is told to the driver."""
        drive, compute = self._drive, self._workers.compute
        try:
            match message:
                case protocol.Pause(paused=paused):
                    self._is_paused = paused
                case protocol.Step():
                    self._is_paused = True
                    await self._next_frame()
                case protocol.Reset(start=name):
                    start = drive.find(name or drive.start.name)
                    await self._keep_recording()
                    await compute(partial(drive.begin, start))
                    await self._show_now()
                case protocol.Rewind(seconds=seconds):
                    self._is_paused = True
                    self._tell_state()
                    await compute(partial(drive.rewind, seconds))
                    sight = await self._show_now()
                    if self._recorder is not None:
                        await self._workers.pack(partial(self._recorder.go_back, sight))
                case protocol.Settings():
                    chosen = message.model_dump(exclude={"type"})
                    drive.sampling = replace(drive.sampling, **chosen)
                case protocol.HandOver(plan=plan):
                    await compute(partial(drive.hand_over, plan))
                case protocol.WhatIf():
                    self._is_paused = True
                    self._tell_state()
                    await self._what_if()
                case protocol.Record(on=True):
                    await self._start_recording()
                case protocol.Record(on=False):
                    await self._keep_recording()
        except DriveSimError as error:
            self.outbox.put(protocol.said("notice", str(error)))
        self._tell_state()

    async def _what_if(self) -> None:
        """Show what could follow, until the driver does something else."""
        possibilities = self._drive.possibilities()
        outbox, pack = self.outbox, self._workers.pack
        try:
            while self._commands.empty() and self.ended is None:
                if not self._is_watched or outbox is not self.outbox:
                    return
                shown = await self._workers.compute(partial(next, possibilities, None))
                if shown is None:
                    return
                message = await pack(partial(packed_possibility, self._world, shown))
                async with asyncio.timeout(SILENT_S):
                    await outbox.put_slowly(message)
        except TimeoutError:
            outbox.abandon()  # nobody reads it
        finally:
            await self._workers.compute(possibilities.close)

    async def _start_recording(self) -> None:
        if self._recordings is None:
            raise DriveSimError("start the server with `record` and a folder for recordings")
        if self._recorder is None:
            await self._packed()
            sight = await self._workers.compute(self._drive.now)
            fps, folder = self._world.fps, self._recordings
            # A session remembers up to a window more than its history.
            held_back = round(HISTORY_S * fps) + self._world.context_frames
            begin = partial(Recorder, folder, sight, fps=fps, held_back=held_back)
            self._recorder = await self._workers.pack(begin)

    async def _keep_recording(self) -> None:
        """End the recording, if there is one, and keep it."""
        await self._packed()
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        drive, kind = self._drive, self._world.steering_kind

        def finish() -> Path | None:
            return recorder.finish(drive.as_replay(recorder.first_frame), drive.actions, kind)

        # Not in the pictures' thread: the other drivers need it.
        path = await asyncio.to_thread(finish)
        self._recorded = str(path) if path else None
        text = f"recorded: {path}" if path else "nothing was driven, so no recording was kept"
        self.outbox.put(protocol.said("notice", text))
