"""Files that cannot be written: errors that name them."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import safetensors

# Of a disk that is full, of one's share of it, and of files that are longer than they may be.
FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_CODE = re.compile(r"(?:code:|os error) (\d+)")  # as its versions put it


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in whatever the system says against writing it; nothing else may be done inside.

    Raises
    ------
    OSError
        Of the same type, with the same ``errno``.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe went away: no fault
        raise
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def room_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file where there is no room for it; other errors pass as they are."""
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
    """The error of a file that the system did not let be written."""
    mend = " Make room there, or give another place." if error.errno in FULL else ""
    told = type(error)(f"{os.fspath(path)!r} could not be written: {error.strerror or error}.{mend}")
    told.errno = error.errno
    return told
