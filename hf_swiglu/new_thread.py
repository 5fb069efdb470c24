"""Running a function in a new thread, which has none of the caller's modes, transforms, hooks or autocast."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_new_thread(function: Callable[[], Result]) -> Result:
    """Call function in a new thread; returns what it returns, raises what it raises.

    The caller waits for the thread in C. `threading.Thread` waits in Python code, in which an interrupt (Ctrl-C) can
    surface as "RuntimeError: release unlocked lock" instead of KeyboardInterrupt.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Lock()
    ended.acquire()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.release()

    _thread.start_new_thread(run, ())
    ended.acquire()
    if errors:
        raise errors[0]
    return results[0]
