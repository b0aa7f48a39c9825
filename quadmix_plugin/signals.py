"""Signals as exceptions that arrive, whatever Python is doing when they come."""

import logging
import signal
import sys
from typing import NoReturn

logger = logging.getLogger(__name__)

_SECONDS = 0.01


def raise_surely(stop: BaseException) -> NoReturn:
    """Raises ``stop`` out of a signal handler; once more where Python drops it.

    It does so with what is raised in a callback of its garbage collector or in a finaliser. A callback that was
    broken off complains from then on, which is of no use to anyone while the process ends.
    """

    def raise_again(swallowed: "sys.UnraisableHookArgs") -> None:
        if swallowed.exc_value is not stop:
            logger.debug("ignored while stopping: %r", swallowed.exc_value)
            return
        signal.signal(signal.SIGALRM, stop_now)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)

    def stop_now(number: int, frame: object) -> None:
        raise stop

    sys.unraisablehook = raise_again
    raise stop
