"""What a map is made of: codes and terms of each cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vqad.scoring import FAR_WEIGHT, Scorer, everything, judged_chunks, routed_chunks, tile_chunks
from vqad.source import MapSource
from vqad.tiling import Box

if TYPE_CHECKING:
    from vqad.fitted import Fitted

__all__ = ["Explanation"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Explanation of the judgement of one image.

    Codebooks are named "level_0", "level_1", ... for `HVQTransDetector`, and "pattern_1" to "pattern_4" and "concept"
    for `VQFlowDetector`. Each has its own grid of cells (h_k, w_k); that of "concept" is a single cell. The map has one
    grid (h, w).

    Attributes
    ----------
    category : str or int
        Category that the image was judged as.
    anomaly_score : float
        ``-score_samples`` of the image.
    too_far : float
        How far the image lies beyond the distance limit of its category, in units of that limit; 0 within the limit.
        It adds to the score, but not to the map.
    group : int
        Group of codes, see `Prototypes`, that the codes belong to.
    codes : dict of str to ndarray of shape (h_k, w_k), int64
        For each codebook, the code of each cell.
    distances : dict of str to ndarray of shape (h_k, w_k), float32
        Euclidean distance of each encoded cell to its code, in the units of the codebook.
    terms : dict of str to ndarray of shape (h_k, w_k), float32
        Terms of map and score, each on its own grid: Mahalanobis distances of the features ("fine", "middle", "deep",
        "whole", or "features" for maps given by the caller) and of the model's output ("error" of `HVQTransDetector`,
        "latent" of `VQFlowDetector`), and transport costs ("transport_j" of `HVQTransDetector`). Higher is more
        anomalous. Different terms are not comparable.
    standardized_terms : dict of str to ndarray of shape (h_k, w_k), float32
        The terms in standard deviations of normal images at that location, which are comparable.
    contributions : dict of str to ndarray of shape (h, w), float32
        What each term adds to the map, standardised and weighted: their sum is the map, up to rounding.
    standardized : ndarray of shape (h, w), float32
        The map that ``anomaly_map`` resizes to the image, comparable between cells and images.
    tile : vqad.tiling.Box or None
        For an image in tiles, the position of the worst tile, which all other attributes describe: top, left, height
        and width in pixels.
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
    tile: Box | None = None

    @property
    def worst_cell(self) -> tuple[int, int]:
        """Row and column of the highest value of the map; the first if there are several."""
        row, col = np.unravel_index(int(self.standardized.argmax()), self.standardized.shape)
        return int(row), int(col)

    def cell_of(self, codebook: str, cell: tuple[int, int] | None = None) -> tuple[int, int]:
        """Row and column, on a codebook's grid, of the cell that contains the centre of a cell of the map.

        Parameters
        ----------
        codebook : str
        cell : (int, int), default=None
            Row and column on the map; None: ``worst_cell``.

        Returns
        -------
        row, col : int

        Raises
        ------
        ValueError
            When there is no such codebook, or the cell is outside the map.
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
    """Explain the maps of checked images."""
    if source.tiling is not None:
        return list(_of_worst_tiles(fitted, source))
    found: list[Explanation] = []
    for _, category, excess, score, made in judged_chunks(fitted.scorer, source, np.arange(len(source)), everything):
        for k in range(len(category)):
            own = {name: values[k] for name, values in made.items()}
            found.append(_explanation(fitted, int(category[k]), float(score[k]), float(excess[k]), own))
    return found


def _of_worst_tiles(fitted: Fitted, source: MapSource) -> Iterator[Explanation]:
    ready = cast(Scorer, source.engine.ready(fitted.scorer))
    for chunk, category, excess, _ in routed_chunks(fitted.scorer, source, np.arange(len(source))):
        for i, c, far in zip(chunk.tolist(), category.tolist(), excess.tolist()):
            boxes, worst, own = source.boxes(i), 0, {"score": np.array(-np.inf)}
            for part, made in tile_chunks(ready, source, i, boxes, c, everything):
                k = int(made["score"].argmax())
                if made["score"][k] > own["score"]:
                    worst, own = int(part[k]), {name: values[k].copy() for name, values in made.items()}
            score = float(own["score"]) + FAR_WEIGHT * far
            yield replace(_explanation(fitted, c, score, far, own), tile=boxes[worst])


def _explanation(fitted: Fitted, category: int, score: float, excess: float, made: dict[str, Any]) -> Explanation:
    by_kind: dict[str, dict[str, np.ndarray]] = {}
    for name, value in made.items():
        kind, _, what = name.partition(" ")
        by_kind.setdefault(kind, {})[what] = value
    return Explanation(
        category=fitted.categories[category],
        anomaly_score=score,
        too_far=excess,
        group=int(fitted.scorer.model.group_of(np.array([category]))[0]),
        codes=by_kind["code"],
        distances=by_kind["distance"],
        terms=by_kind["term"],
        standardized_terms=by_kind["standard"],
        contributions=by_kind["contribution"],
        standardized=by_kind["map"][""],
    )
