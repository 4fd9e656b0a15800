"""The lazy collection that every loader returns: paths and labels, not pixels."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from vqad._checks import check_none_missing, is_missing
from vqad._decode import read_mask, turned_by
from vqad.images import ImageSequence


class ImageDataset:
    """Paths of images with labels and masks. Files are opened only when their content is needed.

    It can be passed as ``X`` to every detector. scikit-learn (`train_test_split`, `KFold`, `GridSearchCV`) can index,
    split and shuffle it without reading any image.

    Parameters
    ----------
    paths : sequence of path-like, length n
        Image files.
    target : array-like of int, shape (n,), default=None
        +1 for a normal image, -1 for an anomaly. None: all normal.
    category : str or array-like of str, shape (n,), default="images"
        Kind of object in each image, or in all.
    defect : array-like of str, shape (n,), default=None
        Kind of defect. None: "good" for normal images and "defect" for others.
    mask_paths : sequence, array or Series of (path-like, tuple of path-like or None), length n, default=None
        Mask files, black where there is no defect; an image with several defects may have several. None: unknown.
    ignore_paths : sequence of (path-like or None), length n, default=None
        Mask files of what to ignore, black elsewhere, see `vqad.images.ImageSequence.ignoring`.

    Attributes
    ----------
    paths : ndarray of shape (n,), object
        File paths, as str.
    target : ndarray of shape (n,), int
    category, defect : ndarray of shape (n,), str
    mask_paths : list of (str, tuple of str or None)
    ignore_paths : list of (str or None)
    shape : tuple
        ``(n,)``, so that scikit-learn treats it as an array of n images.
    """

    # Arguments with one entry per image, which indexing and concatenation carry along.
    _columns: ClassVar[tuple[str, ...]] = ("paths", "target", "category", "defect", "mask_paths", "ignore_paths")

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]] | np.ndarray,
        *,
        target: Any = None,
        category: Any = "images",
        defect: Any = None,
        mask_paths: Sequence[Any] | np.ndarray | None = None,
        ignore_paths: Sequence[Any] | np.ndarray | None = None,
    ) -> None:
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"paths must be a sequence of file paths; got the single path {os.fspath(paths)!r}.")
        n = len(paths)
        self.paths = np.empty(n, dtype=object)
        self.paths[:] = [os.fspath(path) for path in paths]
        self.target = np.ones(n, dtype=int) if target is None else np.asarray(target)
        if not np.isin(self.target, (1, -1)).all():
            raise ValueError(f"target must be +1 (normal) or -1 (anomaly); got {np.unique(self.target)}.")
        self.target = self.target.astype(int)
        check_none_missing(category)
        if not isinstance(category, str) and np.ndim(category) != 1:
            raise TypeError(f"category must be a str for all images, or one label for each; got {category!r}.")
        self.category = np.full(n, category) if isinstance(category, str) else np.asarray(category, dtype=str)
        if defect is None:
            defect = np.where(self.target == 1, "good", "defect")
        self.defect = np.asarray(defect, dtype=str)
        masks = [None] * n if mask_paths is None or len(mask_paths) == 0 else mask_paths
        self.mask_paths = [_paths_of_mask(path) for path in masks]
        ignored = [None] * n if ignore_paths is None or len(ignore_paths) == 0 else ignore_paths
        self.ignore_paths = [None if is_missing(path) else os.fspath(path) for path in ignored]
        for column in ImageDataset._columns:
            if len(getattr(self, column)) != n:
                raise ValueError(f"{column} has {len(getattr(self, column))} entries for {n} paths.")
        # Not check_images, which would look up every path on the disk.
        self._images = ImageSequence(self.paths.tolist(), np.arange(n))

    @property
    def shape(self) -> tuple[int]:
        return (len(self.paths),)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the images, reading one at a time."""
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the paths: ``np.asarray(dataset)`` must not read all images."""
        return self.paths.astype(dtype or object, copy=copy is not False)

    def __getitem__(self, key: Any) -> Any:
        """Read image `key`, uint8 (H, W, 3), or select a subset: slice, int array or boolean mask."""
        if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
            key = key[0]  # scikit-learn indexes X[indices, ...]
        if isinstance(key, slice):
            return self._take(np.arange(len(self))[key])
        if np.ndim(key) == 0 and not isinstance(key, (bool, np.bool_)):
            return self._read(operator.index(key))
        key = np.asarray(key)
        if key.ndim != 1 or (key.size and key.dtype.kind not in "biu"):
            raise TypeError(
                "an ImageDataset is indexed by an int, a slice, or a 1-D array of ints or booleans; "
                f"got {key.dtype} of shape {key.shape}."
            )
        return self._take(np.arange(len(self))[key if key.size else key.astype(int)])

    def _read(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} is out of range for a dataset of {len(self)} images.")
        return np.rint(self._images.pixels(i) * 255).astype(np.uint8)

    def _take(self, indices: np.ndarray) -> ImageDataset:
        columns = {name: getattr(self, name) for name in self._columns}
        return type(self)(
            **{
                name: [column[i] for i in indices] if isinstance(column, list) else column[indices]
                for name, column in columns.items()
            }
        )

    def __add__(self, other: Any) -> ImageDataset:
        """Concatenate two collections, the images of `self` first."""
        if not isinstance(other, ImageDataset):
            return NotImplemented
        made = type(self) if type(self) is type(other) else ImageDataset
        return made(**{name: [*getattr(self, name), *getattr(other, name)] for name in made._columns})

    def mask(self, i: int) -> np.ndarray | None:
        """Read the defect mask of image `i`; several files are united.

        Returns
        -------
        ndarray of shape (H, W), bool, or None
            At the image's own size, True where it is defective: nowhere for a normal image. None for an anomaly
            without a mask file.

        Raises
        ------
        ValueError
            If the sizes of mask and image differ, for instance because the mask was drawn on a photograph before its
            EXIF orientation was applied.

        Warns
        -----
        UserWarning
            If the image has an EXIF orientation that keeps its size and the mask has none, because it is then unclear
            whether the mask was drawn before or after applying it.
        """
        i = operator.index(i)
        paths = self.mask_paths[i]
        if paths is None:
            return np.zeros(self._images.size(i), dtype=bool) if self.target[i] == 1 else None
        size = self._images.size(i)
        paths = (paths,) if isinstance(paths, str) else paths
        return np.logical_or.reduce([self._one_mask(i, path, size) for path in paths])

    def _one_mask(self, i: int, path: str, size: tuple[int, int]) -> np.ndarray:
        mask = read_mask(path)
        turn, stored = turned_by(self.paths[i], self._images.name(i))
        if mask.shape != size:
            why = "."
            if turn != 1 and mask.shape == stored:
                why = (
                    f": its EXIF orientation, {turn}, turns it, but the mask was drawn on the pixels as stored, "
                    f"{stored}. Save the image without the tag, or turn the mask as PIL.ImageOps.exif_transpose turns "
                    "the image."
                )
            raise ValueError(f"mask {path!r} has shape {mask.shape}, but {self._images.name(i)}, has {size}{why}")
        if turn != 1 and stored == size and turned_by(path, f"mask {path!r}")[0] == 1:
            self._images.warn_once(
                i,
                f"an EXIF orientation, {turn}, that turns or mirrors it, and its mask has none: the mask is taken as "
                "drawn on the upright image. If it was drawn on the pixels as stored, turn it in the same way.",
            )
        return mask

    def masks(self, indices: Any = None) -> list[np.ndarray | None]:
        """Read the defect masks of some images (int array, boolean mask or slice), or of all; see `mask`.

        All masks are held in memory.
        """
        chosen = np.arange(len(self))
        return [self.mask(int(i)) for i in (chosen if indices is None else chosen[indices])]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {len(self)} images"]
        has_mask = np.array([path is not None for path in self.mask_paths], dtype=bool)
        categories = np.unique(self.category)
        width = max((len(category) for category in categories), default=0)
        for category in categories:
            here = self.category == category
            normal = int((self.target[here] == 1).sum())
            lines.append(
                f"  {category:<{width}}  {normal} normal, {int(here.sum()) - normal} anomalous, "
                f"{int(has_mask[here].sum())} masks"
            )
        return "\n".join(lines)


def _paths_of_mask(given: Any) -> str | tuple[str, ...] | None:
    if isinstance(given, (list, tuple)):
        return tuple(map(os.fspath, given)) or None
    return None if is_missing(given) else os.fspath(given)
