"""export_onnx: a fitted detector as one ONNX graph, from pixels to score, label and map."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

import vqad
from vqad._ignore import GREY, share_seen
from vqad.backbones import two_views
from vqad.base import BaseImageDetector
from vqad.engine import undisturbed
from vqad.features import BackboneFeatures
from vqad.fitted import Fitted
from vqad.images import ImageSequence, check_images
from vqad.nn.fields import merge_maps
from vqad.persistence import replacing
from vqad.verdicts import sequence_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("score", "label", "map", "category")
OPSET = 20
# Largest accepted differences: rounding differs, and decides which code is nearest if two are about equally near.
SCORE_TOLERANCE = 0.02
MAP_TOLERANCE = 0.02


def export_onnx(detector: BaseImageDetector, path: str | os.PathLike[str], *, X: Any = None) -> None:
    """Write a fitted detector as an ONNX graph, which runs without Python and torch.

    The graph has one input, ``image`` of shape (height, width, 3), float32 in 0..1, RGB, of any size, and these
    outputs:

    - ``score``, float32, as `score_samples`: higher is more normal;
    - ``label``, int64, as `predict`: +1 normal, -1 anomaly;
    - ``map``, float32 (height, width), as `anomaly_map`: higher is more anomalous;
    - ``category``, int64: index of the inferred category in the list ``categories``.

    The graph checks nothing: values outside 0..1 are clipped, and NaN in an image gives a score of NaN and the label
    -1. Its metadata hold, as JSON, ``categories``, ``offset`` (a list with ``threshold="category"``),
    ``map_threshold`` and the versions of the ``packages``.

    Before the file is written, onnxruntime runs the graph, and its outputs are compared with those of the detector in
    float32.

    Parameters
    ----------
    detector : HVQTransDetector or VQFlowDetector
        Fitted, on images.
    path : path-like
        File to write. An existing one is replaced once the new one is complete.
    X : images, default=None
        Images to compare on, in any form that detectors take, preferably yours. None: three synthetic ones of different
        sizes.

    Raises
    ------
    ImportError
        When onnx, onnxruntime or onnxscript is missing: ``pip install "vqad[onnx]"``.
    NotFittedError
        When the detector is not fitted.
    TypeError
        When it is not a detector of vqad.
    ValueError
        When it cannot be exported: with ``backbone=None`` or a transformer as backbone, with ``transport="sinkhorn"``
        or ``"exact"``, with ``tiles``, or a `VQFlowDetector` with categories added by `partial_fit`.
    RuntimeError
        When torch cannot export the backbone, or the outputs of graph and detector differ.

    Notes
    -----
    The graph computes in float32. On hardware with bfloat16 the detector itself scores in bfloat16, unless
    ``precision="float32"``, and differs by rounding; the comparison is with the detector in float32. The threshold is
    that of the detector at the time of export.
    """
    _check(detector)
    onnxruntime = _packages()
    plain = copy.copy(detector).set_params(precision="float32", device="cpu", memory=None)
    images = check_images(_drawn_images(plain.features_.size_)) if X is None else sequence_of(plain, X)
    with replacing(Path(path)) as unfinished, undisturbed():
        written = _to_onnx(_Graph(plain.features_, plain.fitted_).eval(), plain).SerializeToString()
        _compare(onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"]), plain, images)
        unfinished.write_bytes(written)


def _check(detector: Any) -> None:
    if not isinstance(detector, BaseImageDetector):
        raise TypeError(
            f"export_onnx needs a fitted HVQTransDetector or VQFlowDetector; got {type(detector).__name__}."
        )
    check_is_fitted(detector)
    features = getattr(detector, "features_", None)
    if detector.backbone is None or not isinstance(features, BackboneFeatures):
        raise ValueError(
            "export_onnx can only export detectors with a timm model as backbone; this detector has "
            f"backbone={detector.backbone!r}."
        )
    if detector.fitted_.tiles is not None:
        raise ValueError(
            f"export_onnx cannot export a detector with tiles (tiles={detector.fitted_.tiles}): score in Python, or "
            "cut the images yourself and fit without tiles."
        )
    detector.model_.check_export()


def _packages() -> Any:
    """Import the packages that are needed; returns onnxruntime."""
    try:
        return [importlib.import_module(name) for name in PACKAGES][-1]
    except ImportError as error:
        raise ImportError(f'export_onnx needs {", ".join(PACKAGES)}: pip install "vqad[onnx]" ({error}).') from error


# ---- the graph -----------------------------------------------------------------------------------


class _Graph(nn.Module):
    """Everything needed to score one image: resizing, the backbone, the scorer, resizing the map."""

    def __init__(self, features: BackboneFeatures, fitted: Fitted):
        super().__init__()
        self.size, self.has_deep_view = features.size_, features.deep_size_ is not None
        self.sizes = [size for size in dict.fromkeys([features.size_, features.deep_size_]) if size is not None]
        self.grid = features.grid_ if features.merge else None
        self.network = copy.deepcopy(features.network_).float().eval()
        self.scorer = fitted.scorer
        mean, std = features.network_.normalization
        offset = np.broadcast_to(fitted.thresholds.offset, len(fitted.categories)).copy()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1))
        self.register_buffer("offset", torch.from_numpy(offset))
        self.ignores = fitted.ignore is not None
        if fitted.ignore is not None:
            self.register_buffer("ignore", torch.from_numpy(fitted.ignore).double())
            self.register_buffer("seen", share_seen(fitted.ignore, features.shapes_[0])[None])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.ignores:
            hidden = _resampled(self.ignore[None], image[:, :, 0], _nearest)[0] > 0.5
            image = torch.where(hidden[:, :, None], GREY, image)
        image = image.permute(2, 0, 1)
        maps = self._maps(*(self._pixels(image, size) for size in self.sizes))
        verdict = self.scorer([self.seen, *maps] if self.ignores else maps)
        category, normal = verdict.category[0], -verdict.score[0]
        # NaN fails the comparison, so that invalid images are not called normal.
        label = torch.where(normal - self.offset[category] >= 0, 1, -1)
        heat = _resampled(verdict.map, image[0], _between)[0]
        return normal.float(), label, torch.where(hidden, 0.0, heat) if self.ignores else heat, category

    def _pixels(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        pixels = _resampled(image, size, _shrinking).clamp(0.0, 1.0)
        return ((pixels - self.pixel_mean) / self.pixel_std)[None]

    def _maps(self, pixels: Tensor, small: Tensor | None = None) -> list[Tensor]:
        if self.has_deep_view:
            return two_views(self.network, pixels, pixels if small is None else small)
        maps = list(self.network(pixels))
        return maps if self.grid is None else [merge_maps(maps, self.grid)]


def _resampled(maps: Tensor, size: Any, weights: Any) -> Tensor:
    """Resize maps (C, H, W) by a matrix product on each side, which a graph can compute for any size.

    ``size`` is a pair, or a map of that size.
    """
    if isinstance(size, Tensor):
        rows, columns = torch.ones_like(size[:, 0]), torch.ones_like(size[0])
    else:
        rows, columns = maps.new_ones(size[0]), maps.new_ones(size[1])
    vertical = weights(torch.ones_like(maps[0, :, 0]), rows).to(maps.dtype)
    horizontal = weights(torch.ones_like(maps[0, 0]), columns).to(maps.dtype)
    return vertical @ maps @ horizontal.mT


def _places(ones: Tensor) -> tuple[Tensor, Tensor]:
    """0, 1, ..., n - 1, and n, where n is the number of ones when the graph runs."""
    ones = ones.double()
    return ones.cumsum(0) - 1, ones.sum()


def _shrinking(ones: Tensor, wanted: Tensor) -> Tensor:
    """Bilinear weights with antialiasing, for align_corners=False: (wanted, n), rows of sum 1."""
    (source, n), (target, m) = _places(ones), _places(wanted)
    scale = n / m
    distance = (target[:, None] + 0.5) * scale - (source + 0.5)
    weight = (1 - distance.abs() / scale.clamp_min(1.0)).clamp_min(0.0)
    return weight / weight.sum(1, keepdim=True)


def _between(ones: Tensor, wanted: Tensor) -> Tensor:
    """Bilinear weights, for align_corners=True."""
    (source, n), (target, m) = _places(ones), _places(wanted)
    place = target * ((n - 1) / (m - 1).clamp_min(1.0))
    return (1 - (place[:, None] - source).abs()).clamp_min(0.0)


def _nearest(ones: Tensor, wanted: Tensor) -> Tensor:
    """Nearest-neighbour weights, see `vqad._ignore.stretched`."""
    (source, n), (target, m) = _places(ones), _places(wanted)
    return (torch.floor((target[:, None] + 0.5) * n / m) == source).double()


def _to_onnx(graph: _Graph, detector: BaseImageDetector) -> Any:
    height, width = graph.size
    example = torch.full((height + 24, width + 40, 3), 0.5)
    sides = {0: torch.export.Dim("height", min=2), 1: torch.export.Dim("width", min=2)}
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes={"image": sides},
                input_names=["image"],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise RuntimeError(
            f"torch.onnx cannot export a detector with backbone={detector.backbone!r}: {reason}"
        ) from error
    model = program.model_proto
    about = {
        "categories": [c.item() if isinstance(c, np.generic) else c for c in detector.categories_],
        "offset": np.asarray(detector.offset_).tolist(),
        "map_threshold": float(detector.map_threshold_),
        "packages": {"vqad": vqad.__version__, "torch": str(torch.__version__)},
    }
    for name, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of the exporter, which are meant for its developers."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels):
            log.setLevel(level)


# ---- the comparison --------------------------------------------------------------------------------


def _drawn_images(size: tuple[int, int]) -> list[np.ndarray]:
    """Synthetic images of smooth colours and noise: of the backbone's size, larger with another shape, and smaller."""
    rng = np.random.default_rng(0)
    shapes = [size, (size[0] + 60, 2 * size[1]), (max(2, size[0] // 3), max(2, size[1] // 2))]
    images = []
    for h, w in shapes:
        y, x = np.mgrid[:h, :w] / max(h, w)
        waves = [0.5 + 0.4 * np.sin(f * x + g * y) for f, g in rng.uniform(2, 20, (3, 2))]
        images.append(np.clip(np.stack(waves, -1) + 0.05 * rng.standard_normal((h, w, 3)), 0, 1).astype(np.float32))
    return images


def _compare(session: Any, detector: BaseImageDetector, images: ImageSequence) -> None:
    """Raise if the outputs of graph and detector differ."""
    for i in range(len(images)):
        pixels = np.ascontiguousarray(images.pixels(i), dtype=np.float32)
        score, label, heat, category = session.run(list(OUTPUTS), {"image": pixels})
        judged = detector.judge(images, rows=[i])
        expected, expected_map = -judged.score[0], judged.anomaly_map(0, images.size(i))
        decision = judged.threshold[0] - judged.score[0]
        limit = SCORE_TOLERANCE * max(1.0, abs(expected))
        map_limit = MAP_TOLERANCE * max(1.0, float(np.abs(expected_map).max()))
        differs = {
            "category": detector.categories_[category] != judged.category[0],
            "score": not abs(score - expected) <= limit,
            "label": abs(decision) > limit and label != (-1 if decision < 0 else 1),
            "map": heat.shape != expected_map.shape or not np.abs(heat - expected_map).mean() <= map_limit,
        }
        if any(differs.values()):
            raise RuntimeError(
                f"The graph and the detector disagree for {images.name(i)}: "
                f"{', '.join(name for name in differs if differs[name])} (score {score:.4f}, the detector's "
                f"{expected:.4f}). Nothing was written. Please report this, with the versions of torch, onnx and "
                "onnxruntime."
            )
