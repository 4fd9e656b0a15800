"""Plain folders of images."""

from __future__ import annotations

import os
from pathlib import Path

from vqad._warn import warn
from vqad.datasets._collection import ImageDataset
from vqad.datasets._files import existing_folder, image_files, left_out, no_images, product_of, subfolders
from vqad.datasets._layouts import check_names, loader_of_layout


def load_folder(
    root: str | os.PathLike[str], *, recursive: bool = True, category: str | None = None, target: int = 1
) -> ImageDataset:
    """List the images of a folder, whose subfolders are categories.

    Images directly in `root` get its name as their category; images in a subfolder, at any depth, get the subfolder's
    name. A folder named good, bad, train or the like is no kind of object: the nearest folder above it with another
    name counts instead, so that ``bottle/train/good`` is of the category "bottle". Files are in natural order
    (``part-2`` before ``part-10``); hidden files are skipped.

    Parameters
    ----------
    root : path-like
        Folder of images, or of one subfolder per category.
    recursive : bool, default=True
        Whether to look into subfolders.
    category : str, default=None
        One category for all images, instead of the folders' names.
    target : {1, -1}, default=1
        Label of all images: 1 normal, -1 anomaly. Collections can be added:
        ``load_folder("good") + load_folder("bad", target=-1)``.

    Returns
    -------
    ImageDataset
        No image is opened.

    Raises
    ------
    ValueError
        If there are no images; if the folder or a subfolder has a layout that another loader reads; or if names say
        that the images have different labels: folders, at any depth, named OK and NG, good and bad, train and test,
        masks or the like, or files named good and bad, or ``012_mask`` beside ``012``. Use `load_labelled` for those.
    FileNotFoundError, NotADirectoryError
        If `root` is not a folder.

    Warns
    -----
    UserWarning
        When subfolders have no image, when files are left out because their names are not those of images, and when
        names may be those of anomalies, masks or test images.
    """
    folder = existing_folder(root)
    for inside in [folder, *subfolders(folder)] if recursive else []:
        if loader := loader_of_layout(inside):
            raise ValueError(
                f"root {str(inside)!r} has a layout that vqad.datasets.{loader.__name__} reads: use that loader, which "
                "tells defects and masks from normal images."
            )
    others: list[Path] = []
    paths = image_files(folder, others=others)
    categories = [product_of(folder.resolve())] * len(paths)
    empty = []
    for subfolder in subfolders(folder) if recursive else []:
        inside = image_files(subfolder, recursive=True, within=folder, others=others)
        paths += inside
        categories += [product_of(subfolder)] * len(inside)
        empty += [] if inside else [subfolder.name]
    if not paths:
        raise no_images(root)
    said = [f"subfolders without an image, which are not categories: {', '.join(empty)}"] if empty else []
    said += [left_out(others, folder)] if others else []
    if said:
        warn(f"root {str(root)!r} has {'; and '.join(said)}.")
    check_names(folder, paths, target)
    return ImageDataset(paths, target=[target] * len(paths), category=category or categories)
