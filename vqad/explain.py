"""What a map is made of: of every cell its codes and terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vqad.scoring import everything, judged_chunks
from vqad.source import MapSource

if TYPE_CHECKING:
    from vqad.fitted import Fitted

__all__ = ["Explanation"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What the judgement of one image is made of.

    Codebooks have names, "level_0", "level_1", ... of `HVQTransDetector`, "pattern_1" to "pattern_4" and "concept" of
    `VQFlowDetector`, and each has its own grid of cells (h_k, w_k); that of "concept" is a single cell. The map and its
    terms have one grid (h, w).

    Attributes
    ----------
    category : str or int
        What the image was judged as.
    anomaly_score : float
        ``-score_samples`` of the image.
    too_far : float
        By how many of its limits the image is too far from its category; 0 for an image that belongs there. It adds to
        the score, and is not on the map.
    group : int
        Which of the groups of codes, see `Prototypes`, the codes are of.
    codes : dict of str to ndarray of shape (h_k, w_k), int64
        Of each codebook the code that each cell was turned into.
    distances : dict of str to ndarray of shape (h_k, w_k), float32
        Euclidean distance of what was encoded of the cell to that code, in the units of the codebook.
    terms : dict of str to ndarray of shape (h_k, w_k), float32
        What map and score are made of, each on its own grid: distances that Gaussians by location measure of the
        features ("fine", "middle", "deep", "whole", or "features" of maps that the caller gave) and of the model
        ("error" and "transport_j" of `HVQTransDetector`, "latent" of `VQFlowDetector`). Higher is more anomalous; they
        do not compare with one another.
    standardized_terms : dict of str to ndarray of shape (h_k, w_k), float32
        The same in standard deviations of normal images at that place, which compare.
    contributions : dict of str to ndarray of shape (h, w), float32
        What each term of the map adds to it, standardised and weighted: their sum is the map, but for rounding.
    standardized : ndarray of shape (h, w), float32
        The map that ``anomaly_map`` brings to the size of the image: in units that compare between cells and images.
    """

    category: Any
    anomaly_score: float
    too_far: float
    group: int
    codes: dict[str, np.ndarray]
    distances: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]
    standardized_terms: dict[str, np.ndarray]
    contributions: dict[str, np.ndarray]
    standardized: np.ndarray

    @property
    def worst_cell(self) -> tuple[int, int]:
        """Row and column of the highest value of the map; the first of several."""
        row, col = np.unravel_index(int(self.standardized.argmax()), self.standardized.shape)
        return int(row), int(col)

    def cell_of(self, codebook: str, cell: tuple[int, int] | None = None) -> tuple[int, int]:
        """Row and column, on a codebook's grid, of the cell in which the middle of a cell of the map lies.

        Parameters
        ----------
        codebook : str
        cell : (int, int), default=None
            Row and column on the map; ``worst_cell`` when left out.

        Returns
        -------
        row, col : int
        """
        cell, (h, w) = self.worst_cell if cell is None else cell, self.standardized.shape
        if not (0 <= cell[0] < h and 0 <= cell[1] < w):
            raise ValueError(f"cell must be a row and a column on the map of {h} x {w} cells; got {cell!r}.")
        rows, cols = known(self.codes, codebook).shape
        return (2 * int(cell[0]) + 1) * rows // (2 * h), (2 * int(cell[1]) + 1) * cols // (2 * w)


def known(of: dict[str, Any], codebook: str) -> Any:
    if codebook not in of:
        raise ValueError(f"codebook must be one of {', '.join(map(repr, of))}; got {codebook!r}.")
    return of[codebook]


# ---- explain -------------------------------------------------------------------------------------


def explain_images(fitted: Fitted, source: MapSource) -> list[Explanation]:
    """What the maps of checked images are made of."""
    found: list[Explanation] = []
    for _, category, excess, score, made in judged_chunks(fitted.scorer, source, np.arange(len(source)), everything):
        by_kind: dict[str, dict[str, np.ndarray]] = {}
        for name, values in made.items():
            kind, _, what = name.partition(" ")
            by_kind.setdefault(kind, {})[what] = values
        group = fitted.scorer.model.group_of(category)
        for k in range(len(category)):
            own = {kind: {name: values[k] for name, values in named.items()} for kind, named in by_kind.items()}
            found.append(
                Explanation(
                    category=fitted.categories[category[k]],
                    anomaly_score=float(score[k]),
                    too_far=float(excess[k]),
                    group=int(group[k]),
                    codes=own["code"],
                    distances=own["distance"],
                    terms=own["term"],
                    standardized_terms=own["standard"],
                    contributions=own["contribution"],
                    standardized=own["map"][""],
                )
            )
    return found
