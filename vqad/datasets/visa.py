"""The layout in which VisA is distributed: one table labels all images."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vqad._warn import warn
from vqad.datasets._categories import SPLITS
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import describe, existing_folder, image_files, left_out, natural_key, some_of

TABLE = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")
TARGETS = {"normal": 1, "anomaly": -1}


def load_visa(
    root: str | os.PathLike[str], *, categories: str | Sequence[str] | None = None, split: str = "train"
) -> ImageDataset:
    """List the images of VisA as it is distributed.

    The images are listed in ``split_csv/1cls.csv``, the data set's split for learning from normal images: one line per
    image, with the columns ``object,split,label,image,mask`` and paths relative to `root`. (If a tool converted VisA to
    the layout of MVTec AD, use `load_mvtec`.)

    Parameters
    ----------
    root : path-like
        The folder that contains ``split_csv``, or the folder of one object in it.
    categories : str or sequence of str, default=None
        Objects to list, in this order; None: all, sorted.
    split : {"train", "test", "all"}, default="train"
        "train": the normal training images; "test": normal and defective test images; "all": both.

    Returns
    -------
    ImageDataset
        Category by category, training images first, in natural order of the names. No image is opened.

    Raises
    ------
    ValueError
        If there is no such table, it lacks a column or has other labels, training images that are anomalies or paths
        outside `root`; if a requested category is missing; or if the split has no images.
    FileNotFoundError, NotADirectoryError
        If `root` is not a folder.

    Warns
    -----
    UserWarning
        When the folders of the objects have images that are not in the table.

    References
    ----------
    Zou, Jeong, Pemula, Zhang & Dabeer, "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
    Segmentation", ECCV 2022. arXiv:2207.14315.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}.")
    folder = existing_folder(root)
    if not _has_table(folder) and _is_category(folder) and _has_table(folder.resolve().parent):
        folder = folder.resolve()
        folder, categories = folder.parent, folder.name if categories is None else categories
    if not _has_table(folder):
        raise ValueError(
            f"root {str(root)!r} does not have the layout of VisA: there is no {TABLE.as_posix()!r}, which labels the "
            f"images; it contains {describe(folder)}. For the layout of MVTec AD use vqad.datasets.load_mvtec."
        )
    rows = _read_table(folder / TABLE)
    found = sorted({row["object"] for row in rows})
    names = found if categories is None else [categories] if isinstance(categories, str) else list(categories)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"root {str(root)!r} has no category {unknown}; it has {found}.")
    _warn_of_left_out(folder, names, {row["image"] for row in rows})
    wanted = [row for row in rows if row["object"] in names and split in (row["split"], "all")]
    if not wanted:
        raise ValueError(f"root {str(root)!r} has no images for split={split!r} in the categories {names}.")
    wanted.sort(key=lambda row: (names.index(row["object"]), row["split"] != "train", natural_key(Path(row["image"]))))
    return ImageDataset(
        [folder / row["image"] for row in wanted],
        target=[TARGETS[row["label"]] for row in wanted],
        category=[row["object"] for row in wanted],
        mask_paths=[folder / row["mask"] if row["mask"] else None for row in wanted],
    )


def _warn_of_left_out(folder: Path, names: Sequence[str], listed: set[str]) -> None:
    others: list[Path] = []
    unlisted = [
        path
        for name in names
        for kind in (folder / name / "Data" / "Images" / kind for kind in ("Normal", "Anomaly"))
        if kind.is_dir()
        for path in image_files(kind, others=others)
        if path.relative_to(folder).as_posix() not in listed
    ]
    said = []
    if unlisted:
        said.append(
            f"{len(unlisted)} images that are not in {TABLE.as_posix()}, left out here: {some_of(unlisted, folder)}"
        )
    if others:
        said.append(left_out(others, folder))
    if said:
        warn(f"root {str(folder)!r} has {'; and '.join(said)}.")


def is_visa(folder: Path) -> bool:
    """Whether a folder has VisA's layout, or is the folder of one object, with or without the table."""
    return _has_table(folder) or _is_category(folder)


def is_masks(folder: Path) -> bool:
    """Whether a folder holds the masks of an object."""
    return folder.name == "Masks" and _is_category(folder.parent.parent)


def _has_table(folder: Path) -> bool:
    return (folder / TABLE).is_file()


def _is_category(folder: Path) -> bool:
    return (folder / "Data" / "Images" / "Normal").is_dir()


def _read_table(path: Path) -> list[dict[str, str]]:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            lacking = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
            if lacking:
                raise ValueError(f"it lacks the columns {', '.join(lacking)}")
            for line in lines:
                row = {name: line[name] or "" for name in COLUMNS}
                if wrong := _what_is_wrong(row):
                    raise ValueError(f"line {lines.line_num} {wrong}: {row}")
                rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is not a table of VisA: {error}.") from error
    return rows


def _what_is_wrong(row: dict[str, str]) -> str | None:
    if row["label"] not in TARGETS or row["split"] not in ("train", "test") or not row["image"]:
        return "must name an image, with the split train or test and the label normal or anomaly"
    if row["split"] == "train" and row["label"] == "anomaly":
        return "has an anomaly in the training split, which must hold only normal images"
    paths = [PurePosixPath(row[name]) for name in ("image", "mask")]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        return "has a path outside the data set"
    return None
