"""New thresholds without training: for another rate, or from new normal images."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from vqad._checks import known_index
from vqad.calibration import HeldOut, Seen, set_thresholds
from vqad.copies import pieces
from vqad.fitted import Fitted
from vqad.fitting import Images
from vqad.nn.terms import TermScorer
from vqad.routing import describe
from vqad.scoring import Scorer, by_category, scan, score_and_map


def at_rate(before: Fitted, contamination: Any, rate: float) -> Fitted:
    """Thresholds for a false-alarm rate, from the held-out images."""
    per_category = before.thresholds.conformal.per_category
    thresholds = set_thresholds(before.held_out, before.seen, before.categories, contamination, rate, per_category)
    return replace(before, thresholds=thresholds)


def on_images(images: Images, before: Fitted, contamination: Any, rate: float) -> Fitted:
    """Scales and thresholds of the categories of these images; other categories keep theirs.

    Raises
    ------
    ValueError
        When a label is unknown, or a category has a single image or group.
    """
    scorer = copy.deepcopy(before.scorer)
    descriptor, index, score, peak = _judged(images, before)
    if images.category is not None:
        index = known_index(images.category, before.categories)
        if (index < 0).any():
            raise ValueError(
                f"category has {images.category[index < 0][0].item()!r}, which was not learned; known are "
                f"{before.categories.tolist()}. Use partial_fit to add categories."
            )
    groups = pieces(images.source.data, images.rows, images.groups, descriptor, index, before.seed)
    rows = _one_of_each_group(groups, len(index), before.seed)
    scorer.router.set_limits(descriptor, index, n_known=len(before.categories))
    terms, held = cast(TermScorer, scorer.terms), before.held_out
    for c in np.unique(index):
        own = rows[index[rows] == c]
        if len(own) < 2:
            unit = "image" if groups is None else "group"
            raise ValueError(
                f"category {before.categories[c].item()!r} has 1 normal {unit} to recalibrate from: at least 2 are "
                "needed, and a few dozen for a low false-alarm rate."
            )
        others = HeldOut(*(each[held.category != c] for each in vars(held).values()))
        standard = terms.rescale(int(c), torch.from_numpy(score[own])).numpy()
        held = others.append(HeldOut(np.full(len(own), c), standard, peak[own]))
    seen = Seen() if contamination == "auto" else Seen(held.category, held.score)
    return at_rate(replace(before, scorer=scorer, held_out=held, seen=seen), contamination, rate)


def _judged(images: Images, before: Fitted) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Descriptor, nearest category, score within that category or the given one, and map peak of each image."""
    source, rows, category, _ = images
    source.watch()
    given = None if category is None else dict(zip(rows.tolist(), known_index(category, before.categories).tolist()))
    ready, resident = cast(Scorer, source.engine.ready(before.scorer)), source.engine.resident(before.scorer)

    def judge(part: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        judged: list[tuple[np.ndarray, ...]] = []
        for chunk, maps in source.chunks(part):
            with torch.inference_mode():
                descriptor = describe(source.of_backbone(maps))
                index = resident.router(descriptor)[0].cpu().numpy()
            if given is not None:
                index = np.maximum([given[i] for i in chunk.tolist()], 0)
            if source.tiling is None:
                found = by_category(ready, maps, index, source.engine, score_and_map)
                score, peak = found["score"].astype(np.float64), found["map"].reshape(len(chunk), -1).max(1)
            else:
                scans = [scan(ready, source, i, c) for i, c in zip(chunk.tolist(), index.tolist())]
                score, peak = (np.array(each) for each in zip(*((score, heat.max()) for score, heat in scans)))
            judged.append((descriptor.cpu().numpy(), index, score, peak.astype(np.float64)))
        return judged

    columns = zip(*source.side_by_side(judge, rows))
    descriptor, index, score, peak = (np.concatenate(column) for column in columns)
    return descriptor, index, score, peak


def _one_of_each_group(groups: np.ndarray | None, n: int, seed: int) -> np.ndarray:
    """One random row of each group."""
    if groups is None:
        return np.arange(n)
    order = np.random.RandomState(seed % 2**32).permutation(n)
    return np.sort(order[np.unique(groups[order], return_index=True)[1]])
