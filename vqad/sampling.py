"""The sample to learn from: images, or tiles drawn from them; and scores of held-out images in tiles."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from vqad.calibration import HeldOut, Learned
from vqad.nn.terms import TermScorer
from vqad.scoring import Scorer, scan
from vqad.source import MapSource
from vqad.splitting import hold_out
from vqad.store import FeatureStore
from vqad.tiling import Box

# Number of tiles per category to learn from; at least one of each image.
TILES = 1000
# Share of these tiles that the model is not trained on, to calibrate the terms of the trained model.
TILES_HELD = 0.1


class Split(NamedTuple):
    """Rows of images for training, for early stopping (if any), and for thresholds."""

    train: np.ndarray
    validation: np.ndarray | None
    held_out: np.ndarray


class Sample(NamedTuple):
    """Maps from which a model and its terms learn, of images or of tiles.

    Attributes
    ----------
    store : FeatureStore
    index : ndarray of shape (len(store),)
        Category of each map; -1 for those left out.
    split : Split
        Rows of ``store``.
    groups : ndarray of shape (len(store),) or None
        Number of each map's group.
    image : ndarray of shape (len(store),)
        Number of each map's image in the source.
    boxes : list of Box or None
        The tiles; None for whole images.
    """

    store: FeatureStore
    index: np.ndarray
    split: Split
    groups: np.ndarray | None
    image: np.ndarray
    boxes: list[Box] | None = None

    @property
    def used(self) -> np.ndarray:
        """Category of each map in use; -1 for those not in use, such as other images of a held-out group."""
        rows = np.concatenate([each for each in self.split if each is not None])
        return np.where(np.isin(np.arange(len(self.index)), rows), self.index, -1)

    def learned(self, descriptor: np.ndarray) -> Learned:
        """The sample as input of the functions that set scales and thresholds."""
        return Learned(self.store, descriptor, self.used, self.split.train, self.split.held_out, self.groups)


def draw_tiles(
    source: MapSource, rows: np.ndarray, index: np.ndarray, split: Split, groups: np.ndarray | None, seed: int,
    verbose: int = 0,
) -> Sample:  # fmt: skip
    """Sample tiles of the images for training and early stopping; held-out images are judged as a whole later.

    Parameters
    ----------
    rows : ndarray of int
        Images of the source, to which ``index``, ``split`` and ``groups`` refer.
    """
    rng = np.random.RandomState(seed % 2**32)
    watched = np.empty(0, int) if split.validation is None else split.validation
    learned = np.sort(np.concatenate([split.train, watched]))
    quota = {c: max(1, TILES // n) for c, n in zip(*np.unique(index[learned], return_counts=True))}
    boxes: list[list[Box]] = []
    for k in learned.tolist():
        every = source.boxes(int(rows[k]))
        chosen = np.sort(rng.permutation(len(every))[: quota[index[k]]])
        boxes.append([every[j] for j in chosen])
    of = np.repeat(learned, [len(own) for own in boxes])
    store = _maps_of_tiles(source, rows[learned], boxes, verbose)
    tiles = np.arange(len(of))
    train = tiles[np.isin(of, split.train)]
    keep, held = hold_out(index[of[train]], TILES_HELD, seed)
    held = held if len(held) else keep
    validation = None if split.validation is None else tiles[np.isin(of, watched)]
    return Sample(
        store, index[of], Split(train[keep], validation, train[held]),
        of if groups is None else groups[of], rows[of], [box for own in boxes for box in own],
    )  # fmt: skip


def _maps_of_tiles(source: MapSource, images: np.ndarray, boxes: list[list[Box]], verbose: int) -> FeatureStore:
    first = np.cumsum([0, *map(len, boxes)])
    store = FeatureStore(int(first[-1]))
    bar = tqdm(total=len(images), desc="tiles", unit="image", disable=not verbose)

    def keep(places: np.ndarray) -> list[None]:
        for k in places.tolist():
            for part, maps in source.tile_chunks(int(images[k]), boxes[k]):
                store.write(first[k] + part, maps)
            bar.update()
        return []

    with bar:
        list(source.side_by_side(keep, np.arange(len(images))))
    return store


def hold_scans(scorer: Scorer, source: MapSource, rows: np.ndarray, category: np.ndarray, n_known: int) -> HeldOut:
    """Held-out images in tiles: the score of each image's worst tile, and the peak of its whole map.

    The images ``rows`` were not used before. They set the scales of the scores in ``scorer.terms`` of all categories
    but the first ``n_known``.
    """
    before = scorer.with_terms(scorer.terms)  # a separate object, so that its copy on a device is not reused
    score, peak = judge_scans(before, source, rows, category)
    for c in np.unique(category[category >= n_known]):
        own = category == c
        score[own] = cast(TermScorer, scorer.terms).rescale(int(c), torch.from_numpy(score[own])).numpy()
    return HeldOut(category, score, peak)


def judge_scans(
    scorer: Scorer, source: MapSource, rows: np.ndarray, category: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of images in tiles, judged as the given categories, and the peaks of their maps."""
    known: dict[int, int] = dict(zip(rows.tolist(), category.tolist()))
    ready = cast(Scorer, source.engine.ready(scorer))

    def judge(part: np.ndarray) -> list[tuple[float, float]]:
        judged = (scan(ready, source, i, known[i]) for i in part.tolist())
        return [(score, float(heat.max())) for score, heat in judged]

    score, peak = zip(*source.side_by_side(judge, rows))
    return np.array(score), np.array(peak)
