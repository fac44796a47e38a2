"""SIGTERM and SIGINT as a wish to stop, granted at the end of a training step."""

import signal
import threading
import types
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While entered, the first SIGTERM or SIGINT is noted instead of ending the process.

    A second one acts as it would have before entering, so that an impatient Ctrl-C still works. Off
    the main thread, where Python allows no handlers, entering changes nothing.

    Example:
      with Interruption() as interruption:
        while not interruption.signal:
          work()

    Attributes:
      signal: the signal that asked to stop, None until one comes.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python; Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
