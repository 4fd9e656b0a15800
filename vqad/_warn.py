"""Warnings that point at the caller's line, not at one of ours."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

_HELD = threading.local()
_PACKAGE_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn`, attributed to the first frame outside this package."""
    held = getattr(_HELD, "warnings", None)
    if held is not None:
        held.append((message, category))
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_PACKAGE_DIR):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def holding_warnings(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work`` for a thread, whose own frames lead to no caller: it gives its result and what `warn` is to say of it.

    Pairs go to `release_warnings`, in the thread that waits.
    """

    def held(*args: Any) -> tuple[Any, list[tuple[str, type[Warning]]]]:
        before = getattr(_HELD, "warnings", None)
        mine: list[tuple[str, type[Warning]]] = []
        _HELD.warnings = mine
        try:
            return work(*args), mine
        finally:
            _HELD.warnings = before

    return held


def release_warnings(result: tuple[Any, list[tuple[str, type[Warning]]]]) -> Any:
    """Say what was held, and give the result."""
    for message, category in result[1]:
        warn(message, category)
    return result[0]
