"""Real signals, sent to this process."""

import signal
import threading

import pytest

from msa_jax.train.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with Interruption() as interruption:
        assert interruption.signal is None
        signal.raise_signal(number)
        assert interruption.signal == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_handlers_come_back_after_an_exception_that_is_not_hidden():
    def fail():
        with Interruption():
            assert signal.getsignal(signal.SIGTERM) != before
            raise KeyError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError):
        fail()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_acts_as_before():
    # A shell starts what it puts into the background with SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interruption():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_off_the_main_thread_it_changes_nothing():
    seen = []

    def work():
        with Interruption() as interruption:
            seen.append(interruption.signal)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
    assert signal.getsignal(signal.SIGTERM) == before
