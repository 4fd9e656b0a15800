"""The `vqad` command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from vqad.cli._arguments import parser
from vqad.cli._messages import BROKEN_PIPE, INTERRUPTED, NO_ROOM, USER_ERROR, complain, one_line, one_line_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, default=None
        Arguments after the command's name; None: those of the process.

    Returns
    -------
    int
        Exit code: 0 success, 2 an error that the user can fix (one line on stderr says what), 130 after Ctrl-C,
        141 when the reader of the output went away.

    Raises
    ------
    SystemExit
        By argparse: code 0 after --help and --version, 2 for wrong arguments.
    """
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may have characters that it cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        with one_line_warnings(), ExitStack() as stack:
            from vqad.cli import _commands  # brings torch, which takes seconds
            from vqad.cli._files import of_any_size

            if getattr(arguments, "any_size", False):
                stack.enter_context(of_any_size())
            code: int = getattr(_commands, arguments.command)(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (vqad score ... | head).
        _forget_output()
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        complain(f"error: {one_line(error)}")
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.strerror:
            _forget_output()  # flushing it again would fail again
        return USER_ERROR


def _forget_output() -> None:
    """Redirect stdout to nowhere, so that nothing is flushed to it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
