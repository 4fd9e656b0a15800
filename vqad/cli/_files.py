"""Files that the command reads and writes: images in folders, and outputs that must not overwrite an input."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vqad._writing import writing
from vqad.datasets import ImageDataset, load_folder
from vqad.datasets._files import existing_folder, image_files
from vqad.datasets._layouts import images_but_masks, loader_of
from vqad.datasets.labelled import masks_of


@contextmanager
def of_any_size() -> Iterator[None]:
    """Lift Pillow's limit on pixels, which holds for the whole process."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def training_images(folder: str) -> ImageDataset:
    loader = loader_of(Path(folder))
    return load_folder(folder) if loader is None else loader(folder, split="train")


def groups_of(paths: list[str], folder: str, pattern: re.Pattern[str]) -> list[str]:
    """The text that a pattern matches in each image's path relative to the folder."""
    groups = []
    for path in paths:
        found = pattern.search(os.path.relpath(path, folder))
        parts = [] if found is None else [part or "" for part in found.groups() or (found[0],)]
        if not any(parts):
            raise ValueError(f"--groups {pattern.pattern!r} does not match {path!r}: each image needs a group.")
        groups.append("\0".join(parts))
    return groups


def ignored(given: str | None, paths: Sequence[str]) -> Any:
    """The masks of `--ignore`: a file for all images, or a list with a mask or None for each."""
    if given is None or not os.path.isdir(given):
        return given
    masks = image_files(existing_folder(given), recursive=True)
    found = masks_of([Path(path) for path in paths], masks, [])
    if several := [path for path, mask in zip(paths, found) if isinstance(mask, tuple)]:
        raise ValueError(f"--ignore {given!r} has several masks for {several[0]!r}: give one per image.")
    if not any(found):
        raise ValueError(f"--ignore {given!r} has no mask for any of the images: name masks after their images.")
    return found


def masks_in(given: Any) -> list[Any]:
    """The files that `ignored` returned."""
    return [] if given is None else [given] if isinstance(given, str) else [path for path in given if path is not None]


def known_images(folder: str) -> tuple[ImageDataset, bool]:
    """Images of a folder, and whether its layout labels them; if so, only the test images."""
    loader = loader_of(Path(folder))
    return (load_folder(folder), False) if loader is None else (loader(folder, split="test"), True)


def files(images: ImageDataset | None) -> list[str]:
    """All files of a collection: images and masks."""
    if images is None:
        return []
    masks = [(path,) if isinstance(path, str) else path for path in images.mask_paths if path is not None]
    return [*images.paths, *(path for paths in masks for path in paths)]


def images_to_score(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Paths of all images in files and folders, and each one's heatmap relative to the folder of maps."""
    paths: list[str] = []
    outputs: list[Path] = []
    taken: set[Path] = set()
    for argument in arguments:
        root = Path(argument)
        if root.is_dir():
            found = [str(path) for path in images_but_masks(root)]
        else:
            found, root = [argument], root.parent
        for path in found:
            output = _free(Path(os.path.relpath(path, root)), taken)
            taken.add(output)
            paths.append(path)
            outputs.append(output)
    return paths, outputs


def _free(path: Path, taken: set[Path]) -> Path:
    """A heatmap's name that is not taken yet: a.jpg and a.png in one folder are two images."""
    output, k = path.with_name(f"{path.stem}_map.png"), 2
    while output in taken:
        output, k = path.with_name(f"{path.stem}_map-{k}.png"), k + 1
    return output


def write_image(path: Path, pixels: Any) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


class Listed:
    """Paths listed in a file, one per line. The file is read anew on every pass, so it may have any length.

    Parameters
    ----------
    name : str
        A file, or ``-`` for standard input, which is copied first.
    """

    def __init__(self, name: str) -> None:
        self._copy = None
        if name == "-":
            self._copy = tempfile.NamedTemporaryFile(prefix="vqad-list-")  # noqa: SIM115 - it goes with this
            shutil.copyfileobj(sys.stdin.buffer, self._copy)
            self._copy.flush()
        self._path = name if self._copy is None else self._copy.name
        if not os.path.isfile(self._path):
            raise FileNotFoundError(
                f"--list {name!r} is not a file: give one with a path per line, or - for standard input."
            )

    def paths(self) -> Iterator[str]:
        with open(self._path, encoding="utf-8", errors="surrogateescape") as file:
            yield from (path for line in file if (path := line.rstrip("\n")))

    def with_outputs(self, wanted: bool) -> Iterator[tuple[str, Path | None, None]]:
        """Each path, its heatmap relative to the folder of maps if heatmaps are wanted, and no mask."""
        taken: set[Path] = set()
        for path in self.paths():
            output = _free(Path(os.path.basename(path)), taken) if wanted else None
            if output is not None:
                taken.add(output)
            yield path, output, None


CSV_COLUMNS = ["path", "category", "anomaly_score", "threshold", "p_value", "label"]


class RowsBefore:
    """The complete rows of a table whose writer may have been killed; after iteration, ``end`` is their end in bytes.

    Parameters
    ----------
    path : Path or None
        None has no rows.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self.end = path, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        if self._path is None:
            return
        with open(self._path, "rb") as file:
            read, is_whole = 0, False

            def lines() -> Iterator[str]:
                nonlocal read, is_whole
                for line in file:
                    read, is_whole = read + len(line), line.endswith(b"\n")
                    yield line.decode("utf-8", "surrogateescape")

            for row in csv.reader(lines()):
                if not is_whole or (self.end and len(row) != len(CSV_COLUMNS)):
                    return
                if not self.end and row != CSV_COLUMNS:
                    raise ValueError(f"{str(self._path)!r} was not written by vqad score --csv: give another name.")
                if self.end:
                    yield dict(zip(CSV_COLUMNS, row))
                self.end = read


@contextmanager
def csv_rows(path: str | None, resume: bool = False) -> Iterator[tuple[RowsBefore, Callable[[list[list[Any]]], None]]]:
    """The rows that a table already has, and a function that appends rows. Without a path, nothing is written.

    Iterate over the existing rows before writing new ones.
    """
    if path is None:
        yield RowsBefore(None), lambda rows: None
        return
    target = writable(path)
    before = RowsBefore(target if resume and target.is_file() else None)
    is_kept = before._path is not None
    mode = "r+" if is_kept else "w"
    file = open(target, mode, newline="", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    try:

        def write(rows: list[list[Any]]) -> None:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            with writing(path):
                file.write(text.getvalue())
                file.flush()  # so that a kill loses nothing

        def begin(rows: list[list[Any]]) -> None:
            nonlocal ready
            if not ready:
                if is_kept:
                    file.seek(before.end)
                    file.truncate()
                if not before.end:
                    write([CSV_COLUMNS])
                ready = True
            write(rows)

        ready = False
        if not is_kept:
            begin([])
        yield before, begin
    finally:
        with writing(path):
            file.close()


def check_folder_of_maps(folder: Path, arguments: list[str]) -> None:
    """Raise if the folder is a file, or if the next call would take the heatmaps for images."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--maps {str(folder)!r} is a file; name a folder.")
    for root in map(Path, arguments):
        if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"--maps {str(folder)!r} is inside {str(root)!r}: the next call would take the heatmaps for images. "
                "Name a folder outside it."
            )


def writable(path: str | os.PathLike[str]) -> Path:
    """Create the folder of an output file before the work, so that no result is lost at the end."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the output {str(path)!r} is a folder; name a file.")
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout
        return path
    parent = Path(os.path.realpath(path)).parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"the folder {str(parent)!r} is not writable.")
    return path


def spare(inputs: Iterable[Any], outputs: list[Any]) -> None:
    """Raise if an output would overwrite an input."""
    written = {os.path.realpath(path): path for path in outputs if path is not None}
    for path in inputs if written else ():
        if (path := written.get(os.path.realpath(path))) is not None:
            raise ValueError(f"the output {str(path)!r} would overwrite an input; give another name.")
