"""Leaves training in good order when the process is told to end."""

import os
import signal
import threading
from typing import ClassVar


class Stopped(SystemExit):
    """Training ends early because of a signal; to the shell, with status 128 + its number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopSignals:
    """While active, notes SIGTERM and SIGINT instead of dying; a second SIGINT interrupts at once.

    Attributes:
        number: of the first signal, or 0.
        active: those of this process at the moment, if there are any.
    """

    active: ClassVar["StopSignals | None"] = None

    def __init__(self):
        self.number, self._interrupts = 0, 0

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # only the main thread may
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        StopSignals.active = self
        return self

    def __exit__(self, *_) -> None:
        StopSignals.active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.number = self.number or number
        os.write(2, b"Told to stop: training ends after this step, with a checkpoint.\n")
