"""Synthetic parts with natural variation, planted defects and exact masks, for tests and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import fft, ndimage
from sklearn.utils import Bunch, check_random_state

DEFECTS = ("scratch", "hole", "stain", "missing")
_LARGEST_SEED = np.iinfo(np.int32).max


def make_textured_parts(
    n_normal: int = 60,
    n_anomalous: int = 20,
    *,
    categories: Sequence[str] = ("disc", "weave", "tile", "pill"),
    image_size: int = 128,
    random_state: Any = None,
) -> Bunch:
    """Draw textured parts of several kinds, some of them with a planted defect.

    Each part has its own rotation, position, brightness and texture. A defect is a scratch, a hole, a stain or a
    missing piece, and changes no pixel outside its mask.

    Parameters
    ----------
    n_normal, n_anomalous : int, default=60, 20
        Number of images without and with a defect; categories (and kinds of defect) take turns.
    categories : sequence of {"disc", "weave", "tile", "pill"}, default=all
        A turned metal disc with bores, a woven fabric, a speckled ceramic tile, a two-coloured capsule.
    image_size : int, default=128
        Height and width in pixels, at least 16.
    random_state : int, RandomState instance or None, default=None
        An int gives the same images in every call; a larger `n_normal` or `n_anomalous` only adds to them.

    Returns
    -------
    Bunch
        Normal images first.

        images : ndarray of shape (n, image_size, image_size, 3), uint8
        target : ndarray of shape (n,), int: +1 normal, -1 anomaly
        category : ndarray of shape (n,), str
        defect : ndarray of shape (n,), str: kind of defect, "good" for normal images
        masks : ndarray of shape (n, image_size, image_size), bool
    """
    categories = tuple(categories)
    unknown = [name for name in categories if name not in _PARTS]
    if unknown or not categories or isinstance(categories, str):
        raise ValueError(f"categories must be some of {tuple(_PARTS)}; got {categories}.")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16; got {image_size}.")
    if n_normal < 0 or n_anomalous < 0:
        raise ValueError(f"n_normal and n_anomalous must not be negative; got {n_normal} and {n_anomalous}.")
    seed = int(check_random_state(random_state).randint(_LARGEST_SEED))
    n = n_normal + n_anomalous
    images = np.empty((n, image_size, image_size, 3), dtype=np.uint8)
    masks = np.zeros((n, image_size, image_size), dtype=bool)
    category, defect = [], []
    for i in range(n):
        is_normal = i < n_normal
        turn = i if is_normal else i - n_normal
        # One step further with every round, so that each category meets each defect.
        kind = "good" if is_normal else DEFECTS[(turn + turn // len(categories)) % len(DEFECTS)]
        category.append(categories[turn % len(categories)])
        defect.append(kind)
        images[i], masks[i] = _draw(category[-1], kind, image_size, (seed, int(is_normal), turn))
    return Bunch(
        images=images,
        target=np.where(np.arange(n) < n_normal, 1, -1),
        category=np.array(category, dtype=str),
        defect=np.array(defect, dtype=str),
        masks=masks,
    )


def _draw(category: str, kind: str, n: int, seed: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image, uint8 (n, n, 3), and its mask; the part is the same whatever the `kind` of defect."""
    # The defect has a generator of its own, so that it takes no random numbers from the part.
    rng, defect_rng = np.random.default_rng((*seed, 0)), np.random.default_rng((*seed, 1))
    colours, part, background = _PARTS[category](n, rng)
    mask = np.zeros((n, n), dtype=bool)
    if kind != "good":
        mask = _REGIONS[kind](part, defect_rng)
        colours = np.where(mask[..., None], _damaged(colours, background, kind, mask, defect_rng), colours)
    colours = colours * rng.uniform(0.85, 1.1) + rng.normal(0, 0.012, (n, n, 1))
    return np.rint(colours.clip(0, 1) * 255).astype(np.uint8), mask


# ---- parts: colours (n, n, 3) in 0..1, where the part is (n, n), background (n, n, 3) ------------

Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def _disc(n: int, rng: np.random.Generator) -> Part:
    """Turned metal: concentric grooves, the cross-shaped gleam of turned faces, a bore and four holes."""
    x, y, angle = _grid(n, rng, turn=np.pi, shift=0.06)
    radius, theta = np.hypot(x, y), np.arctan2(y, x)
    outer = rng.uniform(0.78, 0.84)
    part = (radius < outer) & (radius > 0.17)
    for k in range(4):
        part &= np.hypot(x - 0.52 * np.cos(k * np.pi / 2), y - 0.52 * np.sin(k * np.pi / 2)) > 0.09
    grooves = 0.06 * np.sin(2 * np.pi * 11 * radius + rng.uniform(0, 2 * np.pi))
    # The light stays where it is when the part turns.
    gleam = 0.13 * np.cos(2 * (theta + angle) + rng.uniform(-0.3, 0.3))
    shade = 0.55 + grooves + gleam - 0.25 * (radius > outer - 0.05) + 0.02 * _noise(n, rng, 0.01)
    background = (0.13 + 0.02 * _noise(n, rng, 0.05))[..., None] * np.ones(3)
    return _on(background, shade[..., None] * [0.97, 1.0, 1.04], part)


def _weave(n: int, rng: np.random.Generator) -> Part:
    """Plain weave that fills the picture: threads of two colours, over and under in turn."""
    x, y, _ = _grid(n, rng, turn=0.12, shift=0.5)
    threads = 11.0
    x = x + 0.012 * _noise(n, rng, 0.08)
    y = y + 0.012 * _noise(n, rng, 0.08)
    warp, weft = np.abs(np.sin(np.pi * threads * x / 2)), np.abs(np.sin(np.pi * threads * y / 2))
    is_warp_over = (np.floor(threads * x / 2) + np.floor(threads * y / 2)) % 2 == 0
    height = np.where(is_warp_over, warp, weft)[..., None] ** 0.6
    fibre = 1 + 0.07 * _noise(n, rng, 0.008)[..., None]
    colour = np.where(is_warp_over[..., None], [0.78, 0.70, 0.55], [0.42, 0.50, 0.62])
    background = np.full((n, n, 3), 0.16) + 0.02 * _noise(n, rng, 0.03)[..., None]
    part = np.ones((n, n), dtype=bool)
    return _on(background, colour * (0.35 + 0.65 * height) * fibre, part)


def _tile(n: int, rng: np.random.Generator) -> Part:
    """Glazed tile: rounded square with fine and coarse speckles on a slowly changing ground."""
    x, y, _ = _grid(n, rng, turn=0.1, shift=0.04)
    corner = 0.12
    side = rng.uniform(0.80, 0.84)
    beyond = np.hypot(np.maximum(np.abs(x) - side + corner, 0), np.maximum(np.abs(y) - side + corner, 0))
    part = beyond < corner
    ground = np.array([0.72, 0.47, 0.36]) + rng.normal(0, 0.015, 3)
    shade = 1 + 0.06 * _noise(n, rng, 0.15) + 0.1 * (x * np.cos(1.0) + y * np.sin(1.0))
    colours = ground * shade[..., None]
    colours = np.where((_noise(n, rng, 0.012) > 1.3)[..., None], colours * 0.62, colours)
    colours = np.where((_noise(n, rng, 0.007) > 1.7)[..., None], colours * 0.5 + 0.45, colours)
    bevel = np.clip((corner - beyond) / 0.05, 0.6, 1)[..., None]
    background = (0.86 + 0.015 * _noise(n, rng, 0.02))[..., None] * [0.96, 1.0, 0.97]
    return _on(background, colours * bevel, part)


def _pill(n: int, rng: np.random.Generator) -> Part:
    """Two-coloured capsule at any angle on a blue tray, rounded by its shading."""
    x, y, _ = _grid(n, rng, turn=np.pi, shift=0.08)
    half_length, half_width = rng.uniform(0.42, 0.47), rng.uniform(0.33, 0.36)
    across = np.hypot(np.maximum(np.abs(x) - half_length, 0), y)
    part = across < half_width
    roundness = np.sqrt(np.clip(1 - (across / half_width) ** 2, 0, 1))
    two_colours = np.where((x < 0.02)[..., None], [0.83, 0.22, 0.20], [0.93, 0.88, 0.74])
    shade = 0.5 + 0.5 * roundness - 0.2 * (np.abs(x - 0.02) < 0.025) + 0.015 * _noise(n, rng, 0.006)
    background = (0.42 + 0.02 * _noise(n, rng, 0.03))[..., None] * [0.75, 1.0, 1.35]
    return _on(background, two_colours * shade[..., None], part)


_PARTS: dict[str, Callable[[int, np.random.Generator], Part]] = {
    "disc": _disc,
    "weave": _weave,
    "tile": _tile,
    "pill": _pill,
}


def _grid(n: int, rng: np.random.Generator, *, turn: float, shift: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Coordinates (-1..1) of a part, turned by up to `turn` radians, shifted by up to `shift`; its angle."""
    centres = (np.arange(n) + 0.5) / n * 2 - 1
    y, x = np.meshgrid(centres, centres, indexing="ij")
    angle = rng.uniform(-turn, turn)
    x, y = x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle), angle


def _noise(n: int, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1; `scale` is its grain as a share of the side."""
    white = rng.standard_normal((n, n // 2 + 1, 2), dtype=np.float32).view(np.complex64)[..., 0]
    noise = fft.irfft2(white * _blur(n, scale), s=(n, n))
    return (noise - noise.mean()) / noise.std()


@lru_cache(maxsize=64)
def _blur(n: int, scale: float) -> np.ndarray:
    """Fourier transform of a Gaussian filter: its cost does not grow with its width."""
    frequency = fft.fftfreq(n)[:, None] ** 2 + fft.rfftfreq(n)[None, :] ** 2
    return np.exp(-2 * (np.pi * scale * n) ** 2 * frequency).astype(np.float32)


def _on(background: np.ndarray, colours: np.ndarray, part: np.ndarray) -> Part:
    return np.where(part[..., None], colours, background), part, background


# ---- defects: where they are, and what is seen there ---------------------------------------------


def _scratch(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A thin, slightly bent line through a point of the part."""
    along, across = _local(part, rng)
    length, width = rng.uniform(0.25, 0.45), max(rng.uniform(0.018, 0.03), 1.5 / len(part))
    line = across - rng.uniform(-0.6, 0.6) * along**2
    return part & (np.abs(line) <= width * (1 - 0.5 * np.abs(along) / length)) & (np.abs(along) <= length)


def _hole(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An elliptic pit."""
    along, across = _local(part, rng)
    radius = rng.uniform(0.07, 0.12)
    return part & (np.hypot(along, across * rng.uniform(1.0, 1.5)) <= max(radius, 1.5 / len(part)))


def _stain(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blot with a wavy rim."""
    along, across = _local(part, rng)
    wavy = 1 + 0.25 * _noise(len(part), rng, 0.05)
    return part & (np.hypot(along, across * rng.uniform(1.0, 1.4)) <= rng.uniform(0.15, 0.26) * wavy.clip(0.5))


def _missing(part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A piece of 4 to 10 % of the part, broken off along a rough edge."""
    n = len(part)
    y, x = np.mgrid[:n, :n] * (2 / n)
    angle = rng.uniform(0, 2 * np.pi)
    distance = x * np.cos(angle) + y * np.sin(angle) + 0.03 * _noise(n, rng, 0.03)
    return part & (distance > np.quantile(distance[part], rng.uniform(0.90, 0.96)))


_REGIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "scratch": _scratch,
    "hole": _hole,
    "stain": _stain,
    "missing": _missing,
}


def _local(part: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates around a random point well inside the part, in random directions; the image's side is 2."""
    depth = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
    inside = np.argwhere(depth >= 0.4 * depth.max())
    row, column = inside[rng.integers(len(inside))]
    n = len(part)
    y, x = (np.arange(n)[:, None] - row) * (2 / n), (np.arange(n)[None, :] - column) * (2 / n)
    angle = rng.uniform(0, 2 * np.pi)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _damaged(
    colours: np.ndarray, background: np.ndarray, kind: str, mask: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Colours that the damaged surface has; they are used inside the mask only."""
    if kind == "missing":
        return background
    if kind == "stain":
        tint = np.array([(0.55, 0.42, 0.25), (0.30, 0.42, 0.35), (0.35, 0.30, 0.45)])[rng.integers(3)]
        return colours * 0.35 + 0.65 * tint * (0.8 + 0.4 * colours.mean(axis=2, keepdims=True))
    depth = np.minimum(ndimage.distance_transform_edt(mask) * (2 / len(mask)) / 0.05, 1)[..., None]
    if kind == "hole":
        return colours * 0.5 * (1 - depth) + 0.05 * depth
    # A scratch is seen against its surroundings: bright on dark, dark on bright.
    return np.full_like(colours, 0.95 if colours[mask].mean() < 0.55 else 0.12)
