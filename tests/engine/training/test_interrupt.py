import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from driving_sim.engine.training.interrupt import StopNow, StopRequest, stop_on_signals


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt. Processes in the background of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_first_signal_is_a_request_and_the_second_acts_as_usual() -> None:
    with stop_on_signals() as request:
        assert request.signal == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    with stop_on_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_only_interruptible_work_is_interrupted() -> None:
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the signal does not raise here
        with pytest.raises(StopNow), request.interruptible():
            raise AssertionError("the earlier signal did not interrupt the work")
    with stop_on_signals() as request, pytest.raises(StopNow), request.interruptible():
        wait_after_sigterm()


def test_cleanup_is_not_interrupted() -> None:
    cleaned = []

    def work(request: StopRequest) -> None:
        try:
            wait_after_sigterm()
        finally:
            request.receive(signal.SIGTERM)
            cleaned.append(True)

    with stop_on_signals() as request, pytest.raises(StopNow), request.interruptible():
        work(request)
    assert cleaned


def wait_after_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    raise AssertionError("the work was not interrupted")


def test_workers_survive_a_signal_only_inside_the_context() -> None:
    def work(request: StopRequest, ready: Connection) -> None:
        request.shield()
        while True:
            ready.send("alive")
            time.sleep(0.01)

    receiver, sender = multiprocessing.Pipe(duplex=False)
    with stop_on_signals() as request:
        worker = multiprocessing.get_context("fork").Process(target=work, args=(request, sender))
        worker.start()
        receiver.recv()
        worker.terminate()
        for _ in range(20):
            assert receiver.recv() == "alive"
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_other_threads_install_no_handlers() -> None:
    signals = []

    def work() -> None:
        with stop_on_signals() as request:
            signals.append(request.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signals == [0]
