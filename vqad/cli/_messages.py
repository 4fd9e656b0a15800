"""Messages of the command on stderr, one line each, and its exit codes."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Errors of a full disk, an exhausted quota and a file over the size limit.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
OK, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show warnings for users on one line each, without the line of code."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            complain(f"warning: {one_line(message)}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def printable(text: str) -> str:
    """Escape what is not printable, so that any file name fits on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(text: str) -> None:
    print(f"vqad: {text}", file=sys.stderr)


def one_line(message: object) -> str:
    if isinstance(message, OSError) and message.strerror:
        if not message.filename and message.errno in NO_ROOM:  # errors of our own files have names: this is stdout
            return f"the output could not be written: {message.strerror}"
        return f"{message.strerror}: {message.filename!r}" if message.filename else message.strerror
    return " ".join(str(message).split()) or type(message).__name__
