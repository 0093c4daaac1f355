"""Ctrl-C and SIGTERM: finish the step, keep the checkpoint, say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pathtune.errors import PathtuneError


class Interrupted(PathtuneError):
    """The run was asked to stop and has a checkpoint; exit code 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers, where Python allows it (the main thread)."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        """Put the previous handlers back."""
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
