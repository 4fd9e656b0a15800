"""A training on disk: what a later process needs to go on with it as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vqad._warn import warn

# It is written unless that was done less than so many times ago as the writing took.
WRITING_TIMES = 20.0
# And within a pass no more often than this; so much time a kill can cost, where writing does not take long.
SECONDS_BETWEEN = 30.0
# An unfinished file that was last written to so long ago is no longer being written.
STALE_SECONDS = 3600.0
_MAGIC = b"vqad checkpoint 1\n"  # another number whenever an older state would not be understood


def fingerprint(*parts: object) -> str:
    """Hexadecimal SHA-256 of some values, by their bytes or ``repr``."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, (bytes, memoryview)) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


class Checkpoint:
    """The file of one training in a folder that many trainings may share.

    The file is named after the training, so that none is ever continued by another; it is replaced in one piece, so
    that a kill leaves the former or the new one; and it carries its digest, so that a damaged one is known. Reading it
    runs no code.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    name : str
        Fingerprint of all that the training depends on.
    seed : int
        Of the training, if no state is found.

    Attributes
    ----------
    state : dict or None
        Where the training was when the file was written.
    seed : int
        Of the training that was found, or as given.

    Raises
    ------
    ValueError
        When ``folder`` cannot be a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, seed: int) -> None:
        self.path = Path(folder) / f"training-{name[:24]}.vqad"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"checkpoint_dir={str(folder)!r} is no folder and cannot be made one.") from error
        self._sweep()
        self.state: dict[str, Any] | None = self._read()
        self.seed = seed if self.state is None else int(self.state["seed"])
        self._written_at, self._writing_took = time.monotonic(), 0.0

    @property
    def finished(self) -> bool:
        """Whether the training that was found had come to its end."""
        return self.state is not None and bool(self.state["finished"])

    def remove(self) -> None:
        """Delete the file, which no training will go on from."""
        self.path.unlink(missing_ok=True)

    def due(self, *, after_pass: bool) -> bool:
        """Whether it is time to write."""
        waited = time.monotonic() - self._written_at
        return waited >= max(WRITING_TIMES * self._writing_took, 0.0 if after_pass else SECONDS_BETWEEN)

    def write(self, state: Mapping[str, Any], *, finished: bool = False) -> None:
        """Replace the file; it is on the disk when this returns, or a warning says why not."""
        started = time.monotonic()
        try:
            self._replace(state, finished)
        except OSError as error:  # the training is worth more
            warn(f"No checkpoint could be written in checkpoint_dir={str(self.path.parent)!r}: {error}")
        self._written_at = time.monotonic()
        self._writing_took = self._written_at - started

    def _replace(self, state: Mapping[str, Any], finished: bool) -> None:
        buffer = io.BytesIO()
        torch.save({**state, "seed": self.seed, "finished": finished}, buffer)
        content = buffer.getbuffer()
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.stem}-", suffix=".part")
        try:
            with open(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _sweep(self) -> None:
        """Remove what killed writes of this training left; not what another process may be writing now."""
        for left in self.path.parent.glob(f"{self.path.stem}-*.part"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        start = len(_MAGIC) + hashlib.sha256().digest_size
        body = memoryview(content)[start:]
        if content[:start] == _MAGIC + hashlib.sha256(body).digest():
            # Whoever can write the file can make its digest too: torch then fails in many ways.
            with suppress(Exception):
                state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
                int(state["seed"])
                return state
        warn(f"The checkpoint {str(self.path)!r} is damaged or of another version: the training starts anew.")
        return None
