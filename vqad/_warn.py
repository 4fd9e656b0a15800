"""Warnings that point at the caller's line rather than at a line of this package."""

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
    """Wrap ``work`` for another thread, where `warn` cannot find the caller: it returns its result and its warnings.

    The waiting thread passes such a pair to `release_warnings`.
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
    """Issue the warnings that were held, and return the result."""
    for message, category in result[1]:
        warn(message, category)
    return result[0]
