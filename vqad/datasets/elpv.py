"""Electroluminescence images of solar cells, from the package `elpv-dataset`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqad.datasets._collection import ImageDataset


class ElpvDataset(ImageDataset):
    """An `ImageDataset` of solar cells with the experts' probability of a defect.

    Attributes
    ----------
    probability : ndarray of shape (n,), float
        Probability that the cell is defective, 0, 1/3, 2/3 or 1. It is indexed along with the images.
    """

    _columns: ClassVar[tuple[str, ...]] = (*ImageDataset._columns, "probability")

    def __init__(self, paths: Any, *, probability: Any, **columns: Any) -> None:
        super().__init__(paths, **columns)
        self.probability = np.asarray(probability, dtype=float)
        if self.probability.shape != self.shape:
            raise ValueError(f"probability has shape {self.probability.shape} for {len(self)} paths.")


def load_elpv(*, category: str | None = None) -> ElpvDataset:
    """List the 2,624 solar cells of the ELPV data set: 8-bit grey images of 300 x 300 pixels.

    The images come with the package `elpv-dataset` (``pip install vqad[demo]``), licence CC BY-NC-SA 4.0;
    nothing is downloaded.

    Parameters
    ----------
    category : {"mono", "poly"}, default=None
        Monocrystalline or polycrystalline cells only; None: both.

    Returns
    -------
    ElpvDataset
        ``category`` is "mono" or "poly"; ``probability`` is the experts' probability of a defect, 0, 1/3, 2/3
        or 1; ``target`` is +1 where it is 0 and -1 elsewhere. There are no masks.

    Raises
    ------
    ImportError
        If `elpv-dataset` is not installed.

    References
    ----------
    Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
    Electroluminescence Imagery", EU PVSEC 2018.
    """
    if category not in (None, "mono", "poly"):
        raise ValueError(f"category must be 'mono', 'poly' or None; got {category!r}.")
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ImportError(
            "load_elpv needs the package elpv-dataset: pip install vqad[demo], or pip install elpv-dataset."
        )
    # The package's own loader reads every image; the table is enough here.
    folder = Path(spec.origin).parent / "data"
    with open(folder / "labels.csv", encoding="ascii") as file:
        names, probability, kinds = zip(*(line.split()[:3] for line in file))  # one release has a fourth column
    # Thirds are written with four digits or sixteen, depending on the release.
    thirds = np.rint(np.array(probability, dtype=float) * 3)
    cells = ElpvDataset(
        [folder / name for name in names],
        probability=thirds / 3,
        target=np.where(thirds == 0, 1, -1),
        category=kinds,
    )
    return cells if category is None else cells[cells.category == category]
