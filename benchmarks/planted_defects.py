"""Which terms of the anomaly map find defects that were planted into held-out normal images.

Defaults are chosen here, never on test images: scratches, stains, pasted, warped, blurred, roughened and missing spots,
with radii of 2 to 20 percent of the image side, are planted into those training images that a fitted detector held out
for calibration. For every term and mixture of terms the script prints the image AUROC of planted against untouched
images, for HVQTransDetector with every transport asked for.

    python benchmarks/evaluate_mvtec.py ROOT --save model.safetensors
    python benchmarks/planted_defects.py ROOT model.safetensors
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import ndimage

import vqad
from vqad import VQFlowDetector
from vqad._checks import split_rows
from vqad.calibration import MapCalibration, pool_map
from vqad.datasets import load_mvtec
from vqad.device import pick_device
from vqad.images import check_images
from vqad.metrics import image_auroc
from vqad.store import describe
from vqad.vq_flow import resize

FRACTIONS = (0.003, 0.005, 0.01, 0.03)


def plant(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One defect at a place that is busier than others; (H, W, 3) float to the same."""
    while True:
        kind = rng.choice(["paste", "scratch", "stain", "warp", "blur", "texture", "missing"])
        size = np.exp(rng.uniform(np.log(0.02), np.log(0.2)))
        place, radius = _busy_place(image, rng), min(image.shape[:2]) * size
        out = np.clip(
            _scratch(image, place, rng) if kind == "scratch" else _spot(image, place, radius, kind, rng), 0, 1
        )
        if (np.abs(out - image).max(2) > 0.02).sum() >= 12:
            return out


def plant_large(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same with one large defect: a radius of 12 to 30 percent of the image side."""
    while True:
        kind = rng.choice(["missing", "paste", "warp", "stain"])
        size = rng.uniform(0.12, 0.3)
        place, radius = _busy_place(image, rng), min(image.shape[:2]) * size
        out = np.clip(_spot(image, place, radius, kind, rng), 0, 1)
        if (np.abs(out - image).max(2) > 0.05).mean() > 0.005:
            return out


def _busy_place(image, rng):
    grey = image.mean(2)
    edges = ndimage.gaussian_filter(ndimage.gaussian_gradient_magnitude(grey, 2), 6)
    contrast = np.abs(image - _background(image)).mean(2)
    weight = (edges + 0.5 * contrast * edges.max() / max(contrast.max(), 1e-6)) ** 2
    margin = int(0.06 * min(grey.shape))
    inside = np.zeros_like(weight)
    inside[margin:-margin, margin:-margin] = weight[margin:-margin, margin:-margin]
    return divmod(rng.choice(inside.size, p=(inside / inside.sum()).ravel()), grey.shape[1])


def _background(image):
    """Colour of the upper and lower edge."""
    return np.median(np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3)]), 0)


def _scratch(image, place, rng):
    h, w = image.shape[:2]
    side, t = min(h, w), np.linspace(-0.5, 0.5, 240)
    angle = rng.uniform(0, 2 * np.pi) + rng.uniform(-2, 2) * t
    length = side * rng.uniform(0.08, 0.6) / len(t)
    y, x = place[0] + np.cumsum(np.sin(angle)) * length, place[1] + np.cumsum(np.cos(angle)) * length
    seen = (y >= 0) & (y < h - 1) & (x >= 0) & (x < w - 1)
    line = np.zeros((h, w))
    line[y[seen].astype(int), x[seen].astype(int)] = 1
    line = ndimage.gaussian_filter(line, side * rng.uniform(0.002, 0.006))
    line = np.clip(1.5 * line / (line.max() + 1e-9), 0, 1)
    return image + line[..., None] * rng.choice([-1, 1]) * rng.uniform(0.12, 0.4)


def _spot(image, place, radius, kind, rng):
    h, w = image.shape[:2]
    mask = _blob(h, w, place, radius, rng)[..., None]
    if kind == "stain":
        return image + mask * rng.choice([-1, 1]) * rng.uniform(0.08, 0.3)
    if kind == "texture":
        return image + mask * _noise(h, w, rng.uniform(0.6, 3), rng)[..., None] * rng.uniform(0.05, 0.15)
    if kind == "paste":
        shift = rng.integers(-h // 3, h // 3), rng.integers(-w // 3, w // 3)
        new = np.roll(image[::-1] if rng.random() < 0.5 else image[:, ::-1], shift, (0, 1))
    elif kind == "missing":
        new = np.broadcast_to(_background(image), image.shape)
    elif kind == "blur":
        new = ndimage.gaussian_filter(image, (1.2 * radius, 1.2 * radius, 0))
    else:
        bend = [ndimage.gaussian_filter(rng.standard_normal((h, w)), 0.6 * radius) for _ in range(2)]
        reach = 2 * min(h, w) * rng.uniform(0.02, 0.05)
        at = [g + b / np.abs(b).max() * reach for g, b in zip(np.mgrid[:h, :w].astype(float), bend)]
        new = np.stack([ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)], -1)
    return image * (1 - mask) + new * mask


def _noise(h, w, sigma, rng):
    noise = ndimage.gaussian_filter(rng.standard_normal((h, w)), sigma)
    return (noise - noise.mean()) / noise.std()


def _blob(h, w, place, radius, rng):
    dy, dx = np.mgrid[:h, :w] - np.array(place)[:, None, None]
    stretch, turn = rng.uniform(0.5, 1.6), rng.uniform(0, np.pi)
    u, v = dy * np.cos(turn) + dx * np.sin(turn), dx * np.cos(turn) - dy * np.sin(turn)
    distance = np.hypot(u * stretch, v / stretch) / radius + 0.25 * _noise(h, w, max(2, radius / 2), rng)
    return np.clip((1.1 - distance) / 0.2, 0, 1)


def raw_terms(detector, data, map_terms):
    """Terms of the map and the category of every image; ``map_terms(model, features, category)`` says which terms."""
    detector._map_terms = map_terms
    parts, categories, device = [], [], pick_device(detector.device)
    try:
        for _, maps in detector._iter_features(data, device):
            category, _ = detector._route(describe(maps))
            parts.append(detector._model_terms(detector.model_, maps, category, device))
            categories.append(category)
    finally:
        del detector._map_terms
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, np.concatenate(categories)


def hvq_trans_terms(detector, transport):
    """The detector's own terms, and the error as published; what to compare."""

    def terms(model, features, category):
        model.transport = transport
        own = type(detector)._map_terms(detector, model, features, category)
        own["single_cells"] = model.anomaly_map(features, category, levels=[])["reconstruction"].square()
        return own

    costs = [f"transport_{level}" for level in range(detector.n_layers + 1)]
    choices = {name: {name: 1.0} for name in ("single_cells", "averaged_reconstruction", *costs)}
    for share in (0.25, 0.5, 0.75):
        mixture = {"averaged_reconstruction": 1 - share, **{k: share / len(costs) for k in costs}}
        choices[f"{share:g} transport"] = mixture
    both = {"averaged_reconstruction": 0.25, "single_cells": 0.25, **{k: 0.5 / len(costs) for k in costs}}
    choices["0.5 transport, both errors"] = both
    return terms, choices


def vq_flow_terms(detector):
    """Of every stage the energy of the latent, as published and as measured by normal images; what to compare.

    Each alone, and with the change of volume, which makes it a density.
    """

    def terms(model, features, category):
        raw = model.anomaly_map(features, category)
        grid = raw["log_likelihood_1"].shape[1:]
        found = {}
        for k in (1, 2, 3):
            volume = resize(raw[f"volume_{k}"].float(), grid)
            for energy, name in (("published energy", "log_likelihood"), ("energy", "mahalanobis")):
                found[f"{energy} {k}"] = resize(raw[f"{name}_{k}"].float(), grid)
                found[f"density by {energy} {k}"] = found[f"{energy} {k}"] + volume
        return found

    kinds = [f"{density}{energy}" for energy in ("published energy", "energy") for density in ("", "density by ")]
    choices = {f"{kind} {k}": {f"{kind} {k}": 1.0} for kind in kinds for k in (1, 2, 3)}
    for kind in kinds:
        choices[f"{kind}, all stages"] = {f"{kind} {k}": 1.0 for k in (1, 2, 3)}
    for energy in ("published energy", "energy"):
        choices[f"{energy} and density, all stages"] = {
            f"{kind}{energy} {k}": 1.0 for kind in ("", "density by ") for k in (1, 2, 3)
        }
    return terms, choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("model", help="a fitted detector, as evaluate_mvtec.py --save writes it")
    parser.add_argument("--transports", nargs="+", default=["nearest", "conditional", "exact", "sinkhorn"])
    args = parser.parse_args()
    detector = vqad.load(args.model)
    train = load_mvtec(args.root)
    # As the detector numbers the categories, which it may have found by itself.
    labels = np.searchsorted(detector.categories_, detector.predict_category(train))
    _, held_out = split_rows(labels, detector.calibration_fraction, detector._split_seed)
    images = check_images(train)
    rng = np.random.default_rng(0)
    reference = np.setdiff1d(np.arange(len(train)), held_out)[::2]
    normal = [images.pixels(i) for i in held_out]
    copies = [16 if (labels[held_out] == labels[i]).sum() < 20 else 4 for i in held_out]
    planted = [plant(p.astype(float), rng).astype(np.float32) for p, n in zip(normal, copies) for _ in range(n)]
    truth = np.repeat([1, -1], [len(normal), len(planted)])
    category = np.concatenate([labels[held_out], np.repeat(labels[held_out], copies)])
    data = check_images(normal + planted)
    if isinstance(detector, VQFlowDetector):
        variants = {"VQ-Flow": vq_flow_terms(detector)}
    else:
        variants = {f"transport={t!r}": hvq_trans_terms(detector, t) for t in args.transports}
    for title, (map_terms, choices) in variants.items():
        terms, routed = raw_terms(detector, data, map_terms)
        known, known_routed = raw_terms(detector, images.subset(reference), map_terms)
        held = {k: v[: len(normal)] for k, v in terms.items()}
        print(f"{title}; image AUROC by category, mean; pooled over the top", *FRACTIONS, flush=True)
        for name, weights in choices.items():
            calibration = MapCalibration(weights).fit(
                {k: np.concatenate([known[k], held[k]]) for k in weights},
                np.concatenate([known_routed, routed[: len(normal)]]),
                held,
                routed[: len(normal)],
                len(detector.categories_),
            )
            maps = calibration.combine(terms, routed)
            for fraction in FRACTIONS:
                score = pool_map(maps, fraction)
                row = [image_auroc(truth[category == c], score[category == c]) for c in np.unique(category)]
                print(f"  {name:32s} {fraction:5.3f} ", *(f"{v:.3f}" for v in row), f" {np.mean(row):.3f}")


if __name__ == "__main__":
    main()
