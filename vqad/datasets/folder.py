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
    """List the images of a folder; its subfolders are categories.

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
        What the images are: 1 normal, -1 anomalies. ``load_folder("good") + load_folder("bad", target=-1)``.

    Returns
    -------
    ImageDataset
        No image is opened.

    Raises
    ------
    ValueError
        If there are no images; if the folder or one in it has a layout that another loader reads; or if names tell that
        not all images are of one kind: folders, at any depth, called OK and NG, good and bad, train and test, masks and
        the like, or files called ``012_mask`` beside ``012``, or good and bad. `load_labelled` is for those.
    FileNotFoundError, NotADirectoryError
        If `root` is no folder.

    Warns
    -----
    UserWarning
        Of subfolders without an image; of files left out that are no images by their names; of names that may say that
        images are not normal, or may be those of products.
    """
    folder = existing_folder(root)
    for inside in [folder, *subfolders(folder)] if recursive else []:
        if loader := loader_of_layout(inside):
            raise ValueError(
                f"root {str(inside)!r} has a layout that vqad.datasets.{loader.__name__} reads: load it with that, "
                "which tells defects and masks from normal images."
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
    said = [f"subfolders without an image, which are no categories: {', '.join(empty)}"] if empty else []
    said += [left_out(others, folder)] if others else []
    if said:
        warn(f"root {str(root)!r} has {'; and '.join(said)}.")
    check_names(folder, paths, target)
    return ImageDataset(paths, target=[target] * len(paths), category=category or categories)
