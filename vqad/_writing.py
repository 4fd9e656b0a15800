"""Errors that name the file that could not be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors

# Errors of a full disk, an exhausted quota and a file over the size limit.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_CODE = re.compile(r"(?:code:|os error) (\d+)")  # in the messages of different versions of safetensors


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to any OSError raised inside, where nothing but writing the file may be done.

    Raises
    ------
    OSError
        With the type and ``errno`` of the original error.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe went away, which is no error
        raise
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def room_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to errors of a full disk; other errors pass unchanged."""
    try:
        yield
    except safetensors.SafetensorError as error:
        code = _CODE.search(str(error))
        number = int(code[1]) if code else 0
        raise not_written(path, OSError(number, os.strerror(number)) if code else OSError(str(error))) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise not_written(path, error) from error


def not_written(path: str | os.PathLike[str], error: OSError) -> OSError:
    """The error for a file that the system did not write."""
    advice = " Free some space there, or choose another place." if error.errno in FULL else ""
    named = type(error)(f"{os.fspath(path)!r} could not be written: {error.strerror or error}.{advice}")
    named.errno = error.errno
    return named
