"""The pictures of the report: selecting images, and drawing each with its heatmap as a separate layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqad.images import ImageSequence
from vqad.report._overlay import heat_layer
from vqad.verdicts import Verdicts

# Longest side of a picture in pixels, by the number of images on the page, which must open on a laptop.
PICTURE_SIDES = ((100, 800), (1000, 320))
SMALLEST_SIDE = 192
# A map has a few dozen cells a side, so half the pixels of a large picture show it as well as all of them.
HEAT_SHARE, SMALLEST_HEAT = 0.5, 160
JPEG_QUALITY = 80
# Shares of the most anomalous images, of those nearest to the threshold, and of the least anomalous ones among the
# images shown; the rest is drawn at random from the normal ones.
SHARES = (0.4, 0.2, 0.15)


@dataclass(frozen=True)
class Card:
    """One image of the page; `picture` and `heat` are data URIs."""

    row: int
    name: str
    path: str
    score: float
    p_value: float
    category: str
    is_anomaly: bool
    truth: str
    is_wrong: bool
    width: int
    height: int
    picture: str
    heat: str


def rows_to_show(verdicts: Verdicts, y: NDArray[Any] | None, n_images: int, random_state: int) -> list[int]:
    """Rows of the images to show, most anomalous first.

    If there are more than `n_images`, they are the most and the least anomalous ones, those nearest to the threshold,
    and a random sample of the normal ones.
    """
    order = np.argsort(-verdicts.score, kind="stable")
    if len(order) <= n_images:
        return [int(i) for i in order]
    counts = [max(1, round(share * n_images)) for share in SHARES]
    nearness = np.argsort(np.abs(verdicts.score - verdicts.threshold), kind="stable")
    normal = np.flatnonzero((verdicts.label if y is None else y) == 1)
    drawn = np.random.RandomState(random_state).permutation(normal)
    shown: set[int] = set()
    # The order comes again last, to fill up if there are few normal images.
    for candidates, count in zip((order, nearness, order[::-1], drawn, order), (*counts, n_images, n_images)):
        room = min(count, n_images - len(shown))
        shown.update([int(i) for i in candidates if int(i) not in shown][:room])
    return [int(i) for i in order if int(i) in shown]


def picture_side(n_shown: int) -> int:
    """Longest side of a picture in pixels, on a page with `n_shown` images."""
    return next((side for most, side in PICTURE_SIDES if n_shown <= most), SMALLEST_SIDE)


def make_cards(
    data: ImageSequence,
    verdicts: Verdicts,
    y: NDArray[Any] | None,
    rows: list[int],
    map_threshold: float,
    side: int,
) -> Iterator[Card]:
    """Make the card of each row, one at a time, because all images may not fit into memory."""
    for i in rows:
        pixels = _shrunk(data.pixels(i), side)
        height, width = pixels.shape[:2]
        share = min(1.0, max(HEAT_SHARE, SMALLEST_HEAT / max(height, width)))
        size = max(1, round(share * height)), max(1, round(share * width))
        path = data.path(i) or ""
        is_anomaly = bool(verdicts.label[i] == -1)
        truth = "" if y is None else "normal" if y[i] == 1 else "anomalous"
        yield Card(
            row=i,
            name="/".join(Path(path).parts[-2:]) if path else f"image {i}",
            path=path,
            score=float(verdicts.score[i]),
            p_value=float(verdicts.p_value[i]),
            category=str(verdicts.category[i]),
            is_anomaly=is_anomaly,
            truth=truth,
            is_wrong=bool(truth) and is_anomaly != (truth == "anomalous"),
            width=width,
            height=height,
            picture=uri(_jpeg(pixels), "jpeg"),
            heat=uri(heat_layer(verdicts.anomaly_map(i, size), map_threshold), "png"),
        )


def _shrunk(pixels: NDArray[Any], side: int) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) in 0..1 as uint8, with the longer side at most `side`."""
    image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    image.thumbnail((side, side))
    return np.asarray(image)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return out.getvalue()


def uri(content: bytes, kind: str) -> str:
    """Content of an image file as a data URI; `kind` is the MIME subtype."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
