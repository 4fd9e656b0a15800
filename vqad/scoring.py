"""Scorer: from the maps of a backbone to category, terms, map and score. All scoring goes through it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from vqad.engine import Engine, chunk_size, in_chunks, pad_chunk, side_by_side
from vqad.nn.fields import feature_fields
from vqad.nn.model import AnomalyModel, Configured, Term
from vqad.nn.terms import SEEN, Judged, TermScorer
from vqad.routing import CategoryRouter, describe
from vqad.source import MapSource
from vqad.store import FeatureStore
from vqad.tiling import Box, Stitched, Tiling

# Increase of the score per unit of excess over the distance limit of the category.
FAR_WEIGHT = 10.0
# Features are clipped to this size before a model or a Gaussian sees them.
LARGEST = 1e12
# Terms of the features; those without a field are left out.
FEATURE_TERMS = (
    Term("features", 1.0, (0.0,)),
    Term("fine", 1.0, (0.0,)),
    Term("middle", 1.0, (0.0,)),
    Term("deep", 0.0, (0.0, 0.3)),
    Term("whole", 0.0, (0.0,)),
)
# Numbers in the maps of chunks that are joined (64 MiB).
_JOINED_NUMBERS = 2**24
_HALF = (torch.float16, torch.bfloat16)

Found = dict[str, np.ndarray]
Compute = Callable[["Scorer", list[Tensor], Tensor], dict[str, Tensor]]
"""Computes quantities of each image from a scorer, maps of images of one category, and the category's number (N,)."""


class Verdict(NamedTuple):
    """Output of `Scorer` for images of one category.

    Attributes
    ----------
    category : Tensor of shape (N,), int64
    excess : Tensor of shape (N,), float64
        Distance beyond the limit of the category, in units of the limit.
    score : Tensor of shape (N,), float64
        Higher is more anomalous.
    map : Tensor of shape (N, h, w)
    """

    category: Tensor
    excess: Tensor
    score: Tensor
    map: Tensor


class Scaling(Configured):
    """Standardises each channel of each map to mean 0 and deviation 1 over the training images, or leaves it unchanged.

    Parameters
    ----------
    channels : sequence of int
        Channels of each map; 1 for a map whose channels share one scale.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = [int(c) for c in channels]
        for k, c in enumerate(self.channels):
            self.register_buffer(f"mean_{k}", torch.zeros(c))
            self.register_buffer(f"scale_{k}", torch.ones(c))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Standardise and clip maps (N, C_k, h_k, w_k), float32."""
        return [self._scaled(m, getattr(self, f"mean_{k}"), getattr(self, f"scale_{k}")) for k, m in enumerate(maps)]

    def _scaled(self, m: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return ((m - mean[:, None, None]) / scale[:, None, None]).clamp(-LARGEST, LARGEST)


class Scorer(nn.Module):
    """Judges images by their maps: assigns a category, scales the maps, runs the model, and combines terms.

    It computes all scores: those of `score_samples`, calibration, `explain` and reports, and the ONNX graph, which is
    traced from it.

    Parameters
    ----------
    router : CategoryRouter
    scaling : Scaling
    model : AnomalyModel
    terms : TermScorer or None
        None until terms have been learned.
    gaussian : bool
        Whether terms of the features themselves are included.
    strides : sequence of int or None
        Pixels per cell of each map; None for a single map.
    own_units : bool
        Whether the features may have any units, and so are scaled before they are measured.
    """

    def __init__(
        self,
        router: CategoryRouter,
        scaling: Scaling,
        model: AnomalyModel,
        terms: TermScorer | None = None,
        *,
        gaussian: bool = True,
        strides: Sequence[int] | None = None,
        own_units: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.scaling, self.model, self.terms = router, scaling, model, terms
        self.gaussian, self.own_units = gaussian, own_units
        self.strides = None if strides is None else tuple(strides)

    def forward(self, maps: Sequence[Tensor]) -> Verdict:
        """Judge one image, or several images of the same category, from maps (N, C_k, h_k, w_k).

        Here and below, an extra first map gives the share of each cell that is not ignored, (N, 1, h, w).
        """
        category, excess = self.route(maps)
        judged = self.judge(maps, category)
        return Verdict(category, excess, judged.score + FAR_WEIGHT * excess, judged.map)

    def route(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Category of each image, and its excess over the distance limit."""
        category, distance = self.router(describe(self._parts(maps)[1]))
        return category, self.router.excess(category, distance)

    def judge(self, maps: Sequence[Tensor], category: Tensor) -> Judged:
        """Terms, map and score of images of one category, (N,) with equal numbers, without the excess."""
        judged: Judged = cast(TermScorer, self.terms)(self.fields(maps, category), category[0])
        return judged

    def fields(self, maps: Sequence[Tensor], category: Tensor) -> dict[str, Tensor]:
        """Fields of all terms: those of the model and, with ``gaussian``, those of the features themselves."""
        seen, maps = self._parts(maps)
        maps = [m.float().clamp(-LARGEST, LARGEST) for m in maps]
        scaled = self.scaling(maps)
        fields = self.model.fields(self.model.arrange(scaled), category, self.gaussian)
        if self.gaussian:
            fields = {**feature_fields(scaled if self.own_units else maps, self.strides), **fields}
        return fields if seen is None else {**fields, SEEN: seen[:, 0]}

    def model_input(self, maps: Sequence[Tensor]) -> Any:
        """The input of the model."""
        _, maps = self._parts(maps)
        return self.model.arrange(self.scaling([m.float().clamp(-LARGEST, LARGEST) for m in maps]))

    def _parts(self, maps: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Split off the share of each cell that is not ignored, if present, from the maps of the backbone."""
        n = len(self.scaling.channels)
        return (maps[0] if len(maps) > n else None), maps[len(maps) - n :]

    def new_terms(self, shapes: dict[str, tuple[int, int, int]], n_categories: int) -> TermScorer:
        """A new `TermScorer` for fields of these shapes: length of vectors (0 for numbers), rows and columns."""
        terms, map_peak = self.model.terms(self.gaussian)
        shapes = {name: shape for name, shape in shapes.items() if name != SEEN}
        own = FEATURE_TERMS if self.gaussian else ()
        return TermScorer([*own, *terms], shapes, n_categories, map_peak)

    def config(self) -> dict[str, Any]:
        """Plain values from which `make` creates a scorer with the same parts and shapes."""
        parts = {name: part.config() for name, part in self.named_children() if isinstance(part, Configured)}
        return {**parts, "gaussian": self.gaussian, "strides": self.strides, "own_units": self.own_units}

    @classmethod
    def make(cls, model_class: type[AnomalyModel], config: dict[str, Any]) -> Scorer:
        """Create a scorer without learned values."""
        kinds = {"router": CategoryRouter, "scaling": Scaling, "model": model_class, "terms": TermScorer}
        return cls(**{**config, **{name: kind(**config[name]) for name, kind in kinds.items()}})

    def with_terms(self, terms: TermScorer | None) -> Scorer:
        """The same scorer with other terms."""
        return Scorer(
            self.router, self.scaling, self.model, terms,
            gaussian=self.gaussian, strides=self.strides, own_units=self.own_units,
        )  # fmt: skip

    def ready(self) -> Scorer:
        """The same scorer with the faster equivalent of the model."""
        view = copy.copy(self)
        view._modules = {**self._modules, "model": self.model.ready()}
        return view


# ---- quantities to compute -------------------------------------------------------------------------


def fields(scorer: Scorer, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
    """Fields of each image."""
    return scorer.fields(maps, category)


def score_and_map(scorer: Scorer, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
    """Score and map of each image."""
    judged = scorer.judge(maps, category)
    return {"score": judged.score, "map": judged.map}


def codes(scorer: Scorer, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
    """Codes and distances of all codebooks."""
    found = scorer.model.codes(scorer.model_input(maps), category)
    return {f"{kind} {name}": grid for name, pair in found.items() for kind, grid in zip(("code", "distance"), pair)}


def everything(scorer: Scorer, maps: list[Tensor], category: Tensor) -> dict[str, Tensor]:
    """Codes, terms, contributions, map and score."""
    judged = scorer.judge(maps, category)
    named = {"term": judged.terms, "standard": judged.standard, "contribution": judged.contributions}
    flat = {f"{kind} {name}": value for kind, values in named.items() for name, value in values.items()}
    return {**codes(scorer, maps, category), **flat, "map": judged.map, "score": judged.score}


# ---- many images -----------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """Result of one pass over some images.

    Attributes
    ----------
    score : ndarray of shape (n,)
        Higher is more anomalous; standardised per category.
    category : ndarray of shape (n,), int64
    maps : ndarray of shape (n, h, w), float32, or list of ndarray of shape (h, w)
        Standardised, on the grid of the features; a list if maps of images in tiles differ in size.
    """

    score: np.ndarray
    category: np.ndarray
    maps: np.ndarray | list[np.ndarray]


def judge_images(scorer: Scorer, source: MapSource, rows: np.ndarray, keep_maps: bool = True) -> Judgement:
    """Judge the images ``rows`` in one pass, chunk by chunk."""
    if source.tiling is not None:
        return _judge_in_tiles(scorer, source, rows, keep_maps)

    def judge(part: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        judged = judged_chunks(scorer, source, part, score_and_map)
        return [(s, c, found["map"] if keep_maps else found["map"][:0].copy()) for _, c, _, s, found in judged]

    return Judgement(*(np.concatenate(column) for column in zip(*source.side_by_side(judge, rows))))


def _judge_in_tiles(scorer: Scorer, source: MapSource, rows: np.ndarray, keep_maps: bool) -> Judgement:
    ready = cast(Scorer, source.engine.ready(scorer))

    def judge(part: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
        judged = []
        for chunk, category, excess, _ in routed_chunks(scorer, source, part):
            for i, c, far in zip(chunk.tolist(), category.tolist(), excess.tolist()):
                score, heat = scan(ready, source, i, c)
                judged.append((score + FAR_WEIGHT * far, c, heat if keep_maps else heat[:0]))
        return judged

    score, category, maps = zip(*source.side_by_side(judge, rows))
    same = len({m.shape for m in maps}) == 1
    return Judgement(np.array(score), np.array(category), np.stack(maps) if same else list(maps))


def scan(ready: Scorer, source: MapSource, i: int, category: int) -> tuple[float, np.ndarray]:
    """The highest score of the tiles of image ``i``, judged as the given category, and the map of the whole image.

    Tiles are processed chunk by chunk, so that memory does not grow with their number.
    """
    boxes = source.boxes(i)
    score, whole = -math.inf, Stitched(source.data.size(i), boxes, cast(Tiling, source.tiling))
    for part, found in tile_chunks(ready, source, i, boxes, category, score_and_map):
        score = max(score, float(found["score"].max()))
        for tile, heat in zip(part.tolist(), found["map"]):
            whole.add(tile, heat)
    return score, whole.map()


def tile_chunks(
    ready: Scorer, source: MapSource, i: int, boxes: list[Box], category: int, compute: Compute
) -> Iterator[tuple[np.ndarray, Found]]:
    """Yield the numbers of each chunk of tiles of image ``i`` with the output of ``compute``."""
    for part, maps in source.tile_chunks(i, boxes):
        yield part, by_category(ready, maps, np.full(len(part), category), source.engine, compute)


def judged_chunks(
    scorer: Scorer, source: MapSource, rows: np.ndarray, compute: Compute
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Found]]:
    """Yield the rows, categories, excess and scores of each chunk, with the output of ``compute``."""
    ready = cast(Scorer, source.engine.ready(scorer))
    for chunk, category, excess, maps in _joined(routed_chunks(scorer, source, rows)):
        found = by_category(ready, maps, category, source.engine, compute)
        yield chunk, category, excess, found["score"] + FAR_WEIGHT * excess, found


def routed_chunks(
    scorer: Scorer, source: MapSource, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]]:
    """Yield the rows, categories, excess and maps of each chunk."""
    resident = source.engine.resident(scorer)
    for chunk, maps in source.chunks(rows):
        with torch.inference_mode():
            category, excess = (t.cpu().numpy() for t in resident.route(maps))
        yield chunk, category, excess, maps


def stored_images(
    scorer: Scorer, store: FeatureStore, rows: np.ndarray, category: np.ndarray, engine: Engine, compute: Compute
) -> Found:
    """Output of ``compute`` for stored images of the given categories."""
    order = np.argsort(category, kind="stable")  # chunks of one category need less padding
    size = chunk_size(engine.device, math.prod(store.maps[-1].shape[-2:]))
    ready = cast(Scorer, engine.ready(scorer))

    def compute_part(places: np.ndarray) -> list[Found]:
        out = []
        for part in np.split(places, range(size, len(places), size)):
            part = order[part]
            maps = [m.to(engine.device, non_blocking=True) for m in store.batch(rows[part])]
            out.append(by_category(ready, maps, category[part], engine, compute))
        return out

    # Processes that share a store must read the same images in the same order, so threads are not used.
    wanted = not store.is_shared
    parts = list(side_by_side(compute_part, np.arange(len(rows)), engine.device, wanted, chunk=size))
    place = np.argsort(order)
    return {name: np.concatenate([p[name] for p in parts])[place] for name in parts[0]}


def by_category(scorer: Scorer, maps: list[Tensor], category: np.ndarray, engine: Engine, compute: Compute) -> Found:
    """Output of ``compute`` for the images of one chunk.

    Images are processed one category at a time, padded to a fixed number and in one memory layout, because the last
    bits of a matrix product depend on its size and strides.
    """
    size = chunk_size(engine.device, math.prod(maps[-1].shape[-2:]))
    out: Found = {}

    def some(part: Tensor, size: int) -> dict[str, Tensor]:
        rows = part.to(maps[0].device)
        chunk = [pad_chunk(m[rows], size, engine.device).to(engine.device).float() for m in maps]
        chunk = [m.contiguous(memory_format=torch.channels_last) for m in chunk]
        number = torch.full((len(chunk[0]),), int(category[part[0]]))  # on the host, so that reading it is cheap
        with torch.inference_mode(), engine.autocast():
            return compute(scorer, chunk, number)

    for c in np.unique(category):
        for part, found in in_chunks(some, torch.from_numpy(np.flatnonzero(category == c)), size):
            for name, value in found.items():
                values = (value.float() if value.dtype in _HALF else value)[: len(part)].cpu().numpy()
                kept = out.setdefault(name, np.empty((len(category), *values.shape[1:]), values.dtype))
                kept[part.numpy()] = values
    return out


def _joined(
    chunks: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]]:
    """Join chunks of several images into larger ones.

    A model processes one category at a time and pads the last part, so larger chunks need less padding.
    """
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]] = []
    numbers = 0
    for item in chunks:
        held.append(item)
        numbers += sum(m.numel() for m in item[3])
        if len(item[0]) == 1 or numbers >= _JOINED_NUMBERS:
            yield _join(held)
            held, numbers = [], 0
    if held:
        yield _join(held)


def _join(
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Tensor]]:
    if len(held) == 1:
        return held[0]
    rows, category, excess, maps = zip(*held)
    stages = [torch.cat(stage) for stage in zip(*maps)]
    return np.concatenate(rows), np.concatenate(category), np.concatenate(excess), stages
