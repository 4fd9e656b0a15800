"""Checkpoints: the state from which a later process resumes a training."""

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

# Between two checkpoints there is at least this multiple of the time that writing one takes.
WRITING_TIMES = 20.0
# Within a pass there are also at least so many seconds between two: about the work that a kill can lose.
SECONDS_BETWEEN = 30.0
# An unfinished file that was last written so long ago has been abandoned.
STALE_SECONDS = 3600.0
_MAGIC = b"vqad checkpoint 1\n"  # change the number when older states can no longer be read


def fingerprint(*parts: object) -> str:
    """Hexadecimal SHA-256 of values, from their bytes or ``repr``."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, (bytes, memoryview)) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


class Checkpoint:
    """The file of one training in a folder that many trainings may share.

    The file is named after the training, so that no other training resumes from it. It is replaced atomically, so that
    a kill leaves either the old or the new one, and it carries its digest, so that damage is detected. Reading it runs
    no code.

    Parameters
    ----------
    folder : path
        Created if it does not exist.
    name : str
        Fingerprint of everything that the training depends on.
    seed : int
        Seed of the training if no state is found.

    Attributes
    ----------
    state : dict or None
        State of the training when the file was written.
    seed : int
        Seed of the training that was found, or the given one.

    Raises
    ------
    ValueError
        When ``folder`` is not a folder and cannot be created.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, seed: int) -> None:
        self.path = Path(folder) / f"training-{name[:24]}.vqad"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"checkpoint_dir={str(folder)!r} is not a folder and cannot be created.") from error
        self._sweep()
        self.state: dict[str, Any] | None = self._read()
        self.seed = seed if self.state is None else int(self.state["seed"])
        self._written_at, self._writing_took = time.monotonic(), 0.0

    @property
    def finished(self) -> bool:
        """Whether the training that was found was complete."""
        return self.state is not None and bool(self.state["finished"])

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def due(self, *, after_pass: bool) -> bool:
        """Whether it is time to write."""
        waited = time.monotonic() - self._written_at
        return waited >= max(WRITING_TIMES * self._writing_took, 0.0 if after_pass else SECONDS_BETWEEN)

    def write(self, state: Mapping[str, Any], *, finished: bool = False) -> None:
        """Replace the file. It is on disk when this returns, or a warning says why not."""
        started = time.monotonic()
        try:
            self._replace(state, finished)
        except OSError as error:  # no reason to abort the training
            warn(f"The checkpoint could not be written to checkpoint_dir={str(self.path.parent)!r}: {error}")
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
        """Remove what killed writes of this training left, but nothing that may still be being written."""
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
            # A forged file may have a valid digest, and then torch may raise any exception.
            with suppress(Exception):
                state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
                int(state["seed"])
                return state
        warn(f"The checkpoint {str(self.path)!r} is damaged or of another version: training starts from the beginning.")
        return None
