"""Files that the command reads and writes: images of folders, and outputs that take no input's place."""

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
    """Lift Pillow's limit of pixels, which is one for the whole process."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def training_images(folder: str) -> ImageDataset:
    loader = loader_of(Path(folder))
    return load_folder(folder) if loader is None else loader(folder, split="train")


def groups_of(paths: list[str], folder: str, pattern: re.Pattern[str]) -> list[str]:
    """What a pattern finds in the path of each image, from its folder on."""
    groups = []
    for path in paths:
        found = pattern.search(os.path.relpath(path, folder))
        parts = [] if found is None else [part or "" for part in found.groups() or (found[0],)]
        if not any(parts):
            raise ValueError(f"--groups {pattern.pattern!r} finds nothing in {path!r}: each image needs a group.")
        groups.append("\0".join(parts))
    return groups


def ignored(given: str | None, paths: Sequence[str]) -> Any:
    """What `--ignore` gives for images: one mask for all, a file; or one each, of which the folder may lack some."""
    if given is None or not os.path.isdir(given):
        return given
    masks = image_files(existing_folder(given), recursive=True)
    found = masks_of([Path(path) for path in paths], masks, [])
    if several := [path for path, mask in zip(paths, found) if isinstance(mask, tuple)]:
        raise ValueError(f"--ignore {given!r} has several masks of {several[0]!r}: one is expected.")
    if not any(found):
        raise ValueError(f"--ignore {given!r} has no mask of any of the images: masks have the names of their images.")
    return found


def masks_in(given: Any) -> list[Any]:
    """Files of what `ignored` gives."""
    return [] if given is None else [given] if isinstance(given, str) else [path for path in given if path is not None]


def known_images(folder: str) -> tuple[ImageDataset, bool]:
    """Images of a folder, and whether it says what they are: then they are its test images."""
    loader = loader_of(Path(folder))
    return (load_folder(folder), False) if loader is None else (loader(folder, split="test"), True)


def files(images: ImageDataset | None) -> list[str]:
    """What is read of a collection: images and masks."""
    if images is None:
        return []
    masks = [(path,) if isinstance(path, str) else path for path in images.mask_paths if path is not None]
    return [*images.paths, *(path for paths in masks for path in paths)]


def images_to_score(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Paths of all images in files and folders, and where under a folder of maps each one's map belongs."""
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
    """A name of its own for the map of an image: a.jpg and a.png in one folder are two images."""
    output, k = path.with_name(f"{path.stem}_map.png"), 2
    while output in taken:
        output, k = path.with_name(f"{path.stem}_map-{k}.png"), k + 1
    return output


def write_image(path: Path, pixels: Any) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


class Listed:
    """Images that a file names, one path a line, of any number: they are read anew whenever they are gone through.

    Parameters
    ----------
    name : str
        A file, or ``-`` for standard input, which is first copied.
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
                f"--list {name!r} is no file: give one with a path a line, or - for standard input."
            )

    def paths(self) -> Iterator[str]:
        with open(self._path, encoding="utf-8", errors="surrogateescape") as file:
            yield from (path for line in file if (path := line.rstrip("\n")))

    def with_outputs(self, wanted: bool) -> Iterator[tuple[str, Path | None, None]]:
        """Each path, where under a folder of maps its map belongs if maps are wanted, and no mask."""
        taken: set[Path] = set()
        for path in self.paths():
            output = _free(Path(os.path.basename(path)), taken) if wanted else None
            if output is not None:
                taken.add(output)
            yield path, output, None


CSV_COLUMNS = ["path", "category", "anomaly_score", "threshold", "p_value", "label"]


class RowsBefore:
    """The whole rows of a table that a kill may have cut short; when they are gone through, ``end`` is where they end.

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
                    raise ValueError(f"{str(self._path)!r} is no table that vqad score --csv wrote: give another name.")
                if self.end:
                    yield dict(zip(CSV_COLUMNS, row))
                self.end = read


@contextmanager
def csv_rows(path: str | None, resume: bool = False) -> Iterator[tuple[RowsBefore, Callable[[list[list[Any]]], None]]]:
    """Rows that a table has, and a function that writes some more, all at once; into nothing if there is no path.

    The rows must be gone through before the first are written.
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
                file.flush()  # a kill then loses nothing of it

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
    """Raise where there is a file, or where the heatmaps would be among the images of the next call."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--maps {str(folder)!r} is a file; give the name of a folder.")
    for root in map(Path, arguments):
        if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"--maps {str(folder)!r} is in {str(root)!r}, where a second call would take the heatmaps for images; "
                "give a folder outside it."
            )


def writable(path: str | os.PathLike[str]) -> Path:
    """Make the folder of an output file: before the work, which must not be lost at its end."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the output {str(path)!r} is a folder; give the name of a file.")
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout
        return path
    parent = Path(os.path.realpath(path)).parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"nothing may be written to the folder {str(parent)!r}.")
    return path


def spare(inputs: Iterable[Any], outputs: list[Any]) -> None:
    """Raise where an output would be written over what is read."""
    written = {os.path.realpath(path): path for path in outputs if path is not None}
    for path in inputs if written else ():
        if (path := written.get(os.path.realpath(path))) is not None:
            raise ValueError(f"the output {str(path)!r} is the model or one of the images or masks; give another name.")
