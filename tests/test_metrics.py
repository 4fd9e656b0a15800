"""vqad.metrics against scikit-learn where it has the same, against a sweep over all thresholds where not."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from vqad import metrics
from vqad.metrics import _pixel_counts

PIXEL_METRICS: list[Callable[..., Any]] = [
    metrics.pixel_auroc,
    metrics.pixel_average_precision,
    metrics.pixel_f1_max,
    metrics.aupro,
]
few_examples = settings(max_examples=40, deadline=None)
LIMITS = [0.01, 0.05, 0.3, 0.5, 1.0]


@st.composite
def images_with_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels with both kinds, and scores that are mostly tied (few levels) or hardly (many)."""
    n = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y = rng.choice([1, -1], n)
    y[:2] = [1, -1]
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))
    return y, rng.integers(0, levels, n) / 7 - 1


@st.composite
def masks_with_maps(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images of different sizes with at least one defect pixel and one normal pixel in all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))
    share = draw(st.sampled_from([0.05, 0.3, 0.9]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = rng.integers(1, 9, (draw(st.integers(1, 5)), 2))
    shapes[0] = [2, 3]
    masks = [rng.random(shape) < share for shape in shapes]
    masks[0][0, :2] = [True, False]
    maps = [(rng.integers(0, levels, m.shape) / 3 - 1 + m * rng.integers(0, 2)).astype(dtype) for m in masks]
    return masks, maps


def example(n: int = 6, shape: tuple[int, int] = (24, 30), levels: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """An array of masks with blobs and of maps that partly see them, with ties."""
    rng = np.random.default_rng(5)
    masks = np.zeros((n, *shape), bool)
    for mask in masks[: n - 2]:
        for _ in range(3):
            r, c = rng.integers(0, shape[0] - 6), rng.integers(0, shape[1] - 6)
            mask[r : r + rng.integers(1, 6), c : c + rng.integers(1, 6)] = True
    maps = np.round((rng.random(masks.shape) + 0.5 * masks) * levels).astype(np.float32)
    return masks, maps


def flatten(images: Any) -> np.ndarray:
    return np.concatenate([np.ravel(image) for image in images])


def flood_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected components by flooding, one pixel at a time."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask))))
    regions = []
    while left:
        region, border = [], [left.pop()]
        while border:
            r, c = border.pop()
            region.append((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            border += near
        regions.append(region)
    return regions


def aupro_by_sweep(masks: Any, maps: Any, limit: float) -> float:
    """PRO and FPR at every distinct value of the maps, in fractions; trapezoids up to the limit."""
    regions = [[m[p] for p in region] for mask, m in zip(masks, maps) for region in flood_regions(mask)]
    normal = np.concatenate([m[~mask] for mask, m in zip(masks, maps)])
    points = [(Fraction(0), Fraction(0))]
    for t in np.unique(flatten(maps))[::-1]:
        overlaps = [Fraction(sum(bool(s >= t) for s in region), len(region)) for region in regions]
        points.append((Fraction(int((normal >= t).sum()), normal.size), sum(overlaps) / len(overlaps)))
    stop, area = Fraction(limit), Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 > stop:
            if x0 < stop:
                y1 = y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
                area += (stop - x0) * (y0 + y1) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return float(area / stop)


class Lazy:
    """A collection that knows only its length and its items, and counts how many of them are alive."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.alive = self.most_alive = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        image = np.array(self.images[i])
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(image, self._gone)
        return image

    def _gone(self) -> None:
        self.alive -= 1


# ------------------------------------------------------------------------------------------ image metrics


@few_examples
@given(images_with_scores())
def test_image_auroc_is_the_share_of_pairs_in_the_right_order(data):
    y, score = data
    gap = score[y == -1][:, None] - score[y == 1]
    assert metrics.image_auroc(y, score) == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean(), abs=1e-12)


@few_examples
@given(images_with_scores())
def test_image_average_precision_is_the_mean_precision_at_the_anomalies(data):
    y, score = data
    precisions = [(y[score >= s] == -1).mean() for s in score[y == -1]]
    assert metrics.image_average_precision(y, score) == pytest.approx(np.mean(precisions), abs=1e-12)


@few_examples
@given(images_with_scores())
def test_image_f1_max_is_the_best_f1_at_the_highest_such_threshold(data):
    y, score = data
    hits_at = {t: ((y == -1) & (score >= t)).sum() for t in np.unique(score)}
    f1_at = {t: 2 * hits / ((score >= t).sum() + (y == -1).sum()) for t, hits in hits_at.items()}
    f1, threshold = metrics.image_f1_max(y, score, return_threshold=True)
    assert f1 == metrics.image_f1_max(y, score) == pytest.approx(max(f1_at.values()), abs=1e-12)
    assert f1_at[threshold] == pytest.approx(f1, abs=1e-12)
    assert all(f1_at[t] < f1 - 1e-12 for t in f1_at if t > threshold)


def test_image_metrics_take_lists_and_integer_scores():
    assert metrics.image_auroc([1, 1, -1], [0, 1, 2]) == 1.0
    assert metrics.image_auroc((1.0, -1.0), np.array([3, 1], np.uint8)) == 0.0
    assert metrics.image_auroc(np.array([1, 1, np.int8(-1)], dtype=object), [0, 1, 2]) == 1.0


@pytest.mark.parametrize("metric", [metrics.image_auroc, metrics.image_average_precision, metrics.image_f1_max])
@pytest.mark.parametrize(
    ("y", "score", "message"),
    [
        ([1, 0, -1], [1.0, 2.0, 3.0], r"\+1 \(normal\) and -1 \(anomaly\) only, but also holds 0"),
        ([True, False], [1.0, 2.0], "dtype bool"),
        (["good", "bad"], [1.0, 2.0], "dtype <U4"),
        (np.array([1, -1, None], dtype=object), [1.0, 2.0, 3.0], "dtype object"),
        ([1, 1], [1.0, 2.0], r"no anomaly \(-1\)"),
        ([-1, -1], [1.0, 2.0], r"no normal image \(\+1\)"),
        ([1, -1], [1.0, 2.0, 3.0], "y_true has 2 images but anomaly_score has 3"),
        ([1, -1], [1.0, np.nan], "nan for image 1"),
        ([1, -1], [np.inf, 1.0], "inf for image 0"),
        ([1, -1], [[1.0], [2.0]], r"anomaly_score must have one value per image.*\(2, 1\)"),
        ([1, -1], ["a", "b"], "real numbers"),
        ([], [], "empty"),
    ],
)
def test_image_metrics_say_what_is_wrong(metric, y, score, message):
    with pytest.raises(ValueError, match=message):
        metric(y, score)


# ---------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(0)
    y = np.repeat([1, -1], [50, 400])
    score = rng.normal(size=y.size)

    def mean_of_anomalies(y: np.ndarray, score: np.ndarray) -> float:
        assert (y == -1).sum() == 400  # resampled within each label
        return score[y == -1].mean()

    low, high = metrics.bootstrap_interval(
        mean_of_anomalies, y, score, n_resamples=4000, confidence_level=0.9, random_state=0
    )
    anomalies = score[y == -1]
    error = anomalies.std() / np.sqrt(400)
    assert low == pytest.approx(anomalies.mean() - 1.645 * error, abs=0.15 * error)
    assert high == pytest.approx(anomalies.mean() + 1.645 * error, abs=0.15 * error)


def test_bootstrap_interval_is_reproducible_and_holds_the_estimate():
    rng = np.random.default_rng(1)
    y = rng.choice([1, -1], 80)
    score = rng.normal(size=80) - y
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    low, high = metrics.bootstrap_interval(metrics.image_auroc, y, score, n_resamples=100, random_state=3)
    again = metrics.bootstrap_interval(metrics.image_auroc, y, score, n_resamples=100, random_state=3)
    assert again == (low, high)
    assert low < metrics.image_auroc(y, score) < high
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("wrong", [{"n_resamples": 0}, {"confidence_level": 1.0}, {"confidence_level": 95}])
def test_bootstrap_interval_names_the_wrong_parameter(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        metrics.bootstrap_interval(metrics.image_auroc, [1, -1], [0.0, 1.0], **wrong)


# ------------------------------------------------------------------------------------------ pixel metrics


@few_examples
@given(masks_with_maps())
def test_pixel_auroc_and_average_precision_are_scikit_learns(data):
    masks, maps = data
    truth, score = flatten(masks), flatten(maps)
    assert metrics.pixel_auroc(masks, maps) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    expected = average_precision_score(truth, score)
    assert metrics.pixel_average_precision(masks, maps) == pytest.approx(expected, abs=1e-12)


@few_examples
@given(masks_with_maps())
def test_pixel_f1_max_is_the_best_point_of_scikit_learns_curve(data):
    masks, maps = data
    truth, score = flatten(masks), flatten(maps)
    precision, recall, thresholds = precision_recall_curve(truth, score)
    f1_at = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
    f1, threshold = metrics.pixel_f1_max(masks, maps, return_threshold=True)
    assert f1 == metrics.pixel_f1_max(masks, maps) == pytest.approx(f1_at.max(), abs=1e-12)
    assert f1_score(truth, score >= threshold) == pytest.approx(f1, abs=1e-12)
    assert (f1_at[thresholds > threshold] < f1 - 1e-12).all()


@few_examples
@given(masks_with_maps(), st.sampled_from(LIMITS) | st.floats(0.001, 1))
def test_aupro_is_the_sweep_over_every_threshold(data, limit):
    masks, maps = data
    expected = aupro_by_sweep(masks, maps, limit)
    assert metrics.aupro(masks, maps, fpr_limit=limit) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("limit", LIMITS)
def test_aupro_is_a_roc_curve_in_which_every_region_weighs_the_same(limit):
    masks, maps = example()
    weights = np.ones(masks.shape)
    for mask, weight in zip(masks, weights):
        for region in flood_regions(mask):
            weight[tuple(zip(*region))] = 1 / len(region)
    fpr, pro, _ = roc_curve(masks.ravel(), maps.ravel(), sample_weight=weights.ravel(), drop_intermediate=False)
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    expected = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit
    assert metrics.aupro(masks, maps, fpr_limit=limit) == pytest.approx(expected, abs=1e-12)


@few_examples
@given(masks_with_maps())
def test_aupro_of_one_region_up_to_one_is_pixel_auroc(data):
    _, maps = data
    masks = [np.zeros(m.shape, bool) for m in maps]
    masks[0][:, :2] = True
    expected = metrics.pixel_auroc(masks, maps)
    assert metrics.aupro(masks, maps, fpr_limit=1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_a_map_equal_to_its_mask_is_perfect(metric):
    masks, _ = example()
    assert metric(masks, masks.astype(np.float32)) == 1.0


@pytest.mark.parametrize("limit", LIMITS)
def test_a_constant_map_has_the_diagonal_as_its_curve(limit):
    masks, maps = example()
    constant = np.zeros_like(maps)
    assert metrics.pixel_auroc(masks, constant) == 0.5
    assert metrics.pixel_average_precision(masks, constant) == pytest.approx(masks.mean())
    assert metrics.aupro(masks, constant, fpr_limit=limit) == pytest.approx(limit / 2)


def test_regions_touching_at_a_corner_are_one():
    corner, apart = np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4), bool)
    corner[0, [0, 1, 1], [0, 1, 2]] = True
    apart[0, [0, 2, 2], [0, 2, 3]] = True
    found = np.zeros((1, 4, 4))
    found[0, 0, 0] = 2.0  # the first pixel stands out, and nothing else
    # PRO starts at 1/3 of the one region, or at one region of two, and rises to 1 along a straight line.
    assert metrics.aupro(corner, found, fpr_limit=1) == pytest.approx((1 / 3 + 1) / 2)
    assert metrics.aupro(apart, found, fpr_limit=1) == pytest.approx((1 / 2 + 1) / 2)


# ------------------------------------------------------------------------- what pixel metrics do not see


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@few_examples
@given(masks_with_maps())
def test_strictly_increasing_transforms_change_nothing(metric, data):
    masks, maps = data
    expected = metric(masks, maps)
    ranks = np.unique(flatten(maps))
    assert metric(masks, [np.searchsorted(ranks, m).astype(np.float64) for m in maps]) == expected
    assert metric(masks, [-1 / (np.searchsorted(ranks, m) + 1.0) for m in maps]) == expected


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@few_examples
@given(masks_with_maps(), st.integers(1, 40))
def test_neither_chunks_nor_order_nor_iterators_matter(metric, data, chunk):
    masks, maps = data
    expected = metric(masks, maps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pixel_counts, "CHUNK_PIXELS", chunk)
        assert metric(masks, maps) == pytest.approx(expected, abs=1e-14)
        assert metric(iter(masks), iter(maps)) == pytest.approx(expected, abs=1e-14)
        assert metric(masks[::-1], maps[::-1]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_every_form_of_the_same_pixels_gives_the_same(metric):
    masks, maps = example()
    expected = metric(masks, maps)
    reused = np.empty_like(maps[0])

    def into_one_buffer() -> Any:
        for m in maps:
            reused[:] = m
            yield reused

    for other_masks in (list(masks), masks.astype(np.uint8), masks.astype(np.int64), masks * np.uint8(255)):
        assert metric(other_masks, maps) == expected
    for other_maps in (
        list(maps),
        maps.astype(np.float16),
        maps.astype(np.float64),
        maps.astype(int),
        Lazy(maps),
    ):
        assert metric(masks, other_maps) == expected
    assert metric(masks, into_one_buffer()) == expected
    mixed = [m.astype(np.float64 if i % 2 else np.float32) for i, m in enumerate(maps)]
    assert metric(masks, mixed) == expected
    assert metric(masks, maps.astype(">f4")) == expected
    assert metric(masks.transpose(0, 2, 1), maps.transpose(0, 2, 1)) == expected


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_cutting_images_into_ragged_parts_between_regions_changes_nothing(metric):
    masks, maps = example()
    masks[:, 12] = False
    cut_masks = [part for mask in masks for part in (mask[:12], mask[12:])]
    cut_maps = [part for m in maps for part in (m[:12], m[12:])]
    assert metric(cut_masks, cut_maps) == pytest.approx(metric(masks, maps), abs=1e-14)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_inputs_are_left_as_they_were(metric):
    masks, maps = example()
    masks_before, maps_before = masks.copy(), maps.copy()
    metric(masks, maps)
    np.testing.assert_array_equal(masks, masks_before)
    np.testing.assert_array_equal(maps, maps_before)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_images_with_unknown_pixels_are_left_out(metric):
    masks, maps = example()
    some = [mask if i != 1 else None for i, mask in enumerate(masks)]
    expected = metric(np.delete(masks, 1, axis=0), np.delete(maps, 1, axis=0))
    assert metric(some, maps) == expected
    assert metric(some, [None if mask is None else m for mask, m in zip(some, maps)]) == expected


@pytest.mark.parametrize("metric", PIXEL_METRICS)
def test_lazy_collections_are_read_an_image_at_a_time(metric):
    masks, maps = map(Lazy, example(n=20))
    metric(masks, maps)
    assert max(masks.most_alive, maps.most_alive) <= 3


def test_float64_is_not_rounded_to_float32():
    maps = 1 + np.arange(20).reshape(1, 4, 5) * 1e-12
    masks = maps > maps.flat[14]
    assert metrics.pixel_auroc(masks, maps) == 1.0
    assert metrics.pixel_auroc(masks, maps.astype(np.float32)) == 0.5


def test_negative_zero_is_tied_with_zero():
    assert metrics.pixel_auroc(np.array([[[True, False]]]), np.array([[[0.0, -0.0]]], np.float32)) == 0.5


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf])
def test_maps_must_be_finite(metric, pixel):
    masks, maps = example()
    maps[4, 2, 3] = pixel
    with pytest.raises(ValueError, match="map 4 must be finite, but 1 of its 720 pixels"):
        metric(masks, maps)


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda masks, maps: ([*masks[:3], masks[3][:, 1:]], maps[:4]),
            r"mask 3 has shape \(24, 29\) but map 3 has shape \(24, 30\)",
        ),
        (lambda masks, maps: (masks[:4], maps), "there are 4 masks and more maps"),
        (lambda masks, maps: (masks, maps[:4]), "there are 4 maps and more masks"),
        (lambda masks, maps: (masks[0], maps[0]), r"map 0 must have shape \(H, W\), got \(30,\)"),
        (lambda masks, maps: (masks, maps[..., None]), r"map 0 must have shape \(H, W\), got \(24, 30, 1\)"),
        (lambda masks, maps: (masks * 0.5, maps), "mask 0 must be boolean.*dtype float64.*0.0 to 0.5"),
        (lambda masks, maps: (masks * np.uint8(128), maps), "mask 0 must be boolean.*dtype uint8.*0 to 128"),
        (lambda masks, maps: (masks * -1, maps), "mask 0 must be boolean"),
        (lambda masks, maps: (masks * np.arange(30), maps), "mask 0 must be boolean"),
        (lambda masks, maps: (masks, maps.astype(complex)), "map 0 must hold real numbers.*complex"),
        (lambda masks, maps: (np.zeros_like(masks), maps), "no defect pixel"),
        (lambda masks, maps: (np.ones_like(masks), maps), "at least one normal pixel"),
        (lambda masks, maps: ([], []), "no defect pixel"),
        (lambda masks, maps: ([None] * 6, maps), "no defect pixel"),
    ],
)
def test_pixel_metrics_say_what_is_wrong(metric, change, message):
    with pytest.raises(ValueError, match=message):
        metric(*change(*example()))


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, np.nan])
def test_fpr_limit_lies_in_0_1(limit):
    masks, maps = example()
    with pytest.raises(ValueError, match="fpr_limit must lie in"):
        metrics.aupro(masks, maps, fpr_limit=limit)
    with pytest.raises(ValueError, match="fpr_limit must lie in"):
        metrics.evaluate([1, -1], [0.0, 1.0], fpr_limit=limit)


# ---------------------------------------------------------------------------------------------- evaluate


@pytest.fixture
def benchmark_set() -> dict[str, Any]:
    """Two full categories, one without anomalies and one whose anomalies have no masks, interleaved."""
    rng = np.random.default_rng(2)
    category = np.array(["nut", "bolt", "clean", "unmasked"] * 12)
    y = rng.choice([1, -1], category.size)
    y[:8] = [1] * 4 + [-1] * 4
    y[category == "clean"] = 1
    score = rng.normal(size=y.size) - y + np.where(category == "nut", 5, 0)
    maps, masks = [], []
    for i in range(y.size):
        shape = rng.integers(5, 12, 2)
        mask = (rng.random(shape) < 0.1) & (y[i] == -1)
        maps.append((rng.random(shape) + 0.4 * mask).astype(np.float32))
        masks.append(None if y[i] == 1 or category[i] == "unmasked" else mask)
    return {"y_true": y, "anomaly_score": score, "category": category, "masks": masks, "maps": maps}


def test_evaluate_gives_each_category_what_the_single_metrics_give(benchmark_set):
    evaluation = metrics.evaluate(**benchmark_set, fpr_limit=0.2)
    y, score, category = (benchmark_set[key] for key in ("y_true", "anomaly_score", "category"))
    assert list(evaluation.per_category) == ["bolt", "clean", "nut", "unmasked"]
    for name in ("bolt", "nut"):
        mine = np.flatnonzero(category == name)
        maps = [benchmark_set["maps"][i] for i in mine]
        given_masks = [benchmark_set["masks"][i] for i in mine]
        masks = [np.zeros(m.shape, bool) if mask is None else mask for mask, m in zip(given_masks, maps)]
        assert evaluation.per_category[name] == pytest.approx(
            {
                "n_images": mine.size,
                "n_anomalies": (y[mine] == -1).sum(),
                "image_auroc": roc_auc_score(-y[mine], score[mine]),
                "image_average_precision": average_precision_score(-y[mine], score[mine]),
                "image_f1_max": metrics.image_f1_max(y[mine], score[mine]),
                "pixel_auroc": roc_auc_score(flatten(masks), flatten(maps)),
                "pixel_average_precision": average_precision_score(flatten(masks), flatten(maps)),
                "pixel_f1_max": metrics.pixel_f1_max(masks, maps),
                "aupro": aupro_by_sweep(masks, maps, 0.2),
            }
        )
    assert evaluation.pooled["image_auroc"] == pytest.approx(roc_auc_score(-y, score))
    assert evaluation.fpr_limit == 0.2


def test_evaluate_leaves_what_is_undefined_out_of_the_means(benchmark_set):
    evaluation = metrics.evaluate(**benchmark_set)
    rows = evaluation.per_category
    assert all(np.isnan(rows["clean"][metric]) for metric in evaluation.mean)
    assert np.isnan(rows["unmasked"]["aupro"])
    assert rows["unmasked"]["image_auroc"] > 0
    image = [rows[name]["image_auroc"] for name in ("bolt", "nut", "unmasked")]
    pixel = [rows[name]["aupro"] for name in ("bolt", "nut")]
    assert evaluation.mean["image_auroc"] == pytest.approx(np.mean(image))
    assert evaluation.mean["aupro"] == pytest.approx(np.mean(pixel))


def test_evaluate_takes_iterators_and_any_chunk(benchmark_set, monkeypatch):
    expected = metrics.evaluate(**benchmark_set).to_dict()
    monkeypatch.setattr(_pixel_counts, "CHUNK_PIXELS", 10)
    assert metrics.evaluate(**benchmark_set).to_dict() == expected
    iterators = {key: iter(benchmark_set[key]) for key in ("masks", "maps")}
    assert metrics.evaluate(**benchmark_set | iterators).to_dict() == expected


def test_the_table_has_a_line_for_everything_and_says_what_is_missing(benchmark_set):
    evaluation = metrics.evaluate(**benchmark_set, fpr_limit=0.05)
    lines = str(evaluation).splitlines()
    assert lines[1].split()[0] == "category"
    assert "AUPRO@0.05" in lines[1]
    firsts = [line.split()[0] for line in lines if line and not line.startswith(("-", "nan", " "))]
    assert firsts == ["category", "bolt", "clean", "nut", "unmasked", "mean", "pooled"]
    nut = next(line for line in lines if line.startswith("nut"))
    assert nut.split()[3] == f"{evaluation.per_category['nut']['image_auroc']:.4f}"
    ends = [len(line) for line in lines if line.startswith(("category", "bolt", "clean", "nut", "mean", "---"))]
    assert len(set(ends)) == 1
    assert "no anomalies, so no image metrics: clean; left out of the mean." in lines[-2]
    assert "so no pixel metrics: clean, unmasked; left out of the mean." in lines[-1]


def test_to_dict_is_strict_json_with_the_same_numbers(benchmark_set):
    evaluation = metrics.evaluate(**benchmark_set)
    read = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert read["per_category"]["clean"]["image_auroc"] is None
    assert read["per_category"]["nut"] == evaluation.per_category["nut"]
    assert read["mean"] == evaluation.mean
    assert read["pooled"] == evaluation.pooled


def test_without_category_and_maps_there_is_one_row_of_image_metrics():
    evaluation = metrics.evaluate([1, 1, -1, -1], [0.0, 2.0, 1.0, 3.0])
    assert list(evaluation.per_category) == ["all"]
    assert evaluation.per_category["all"]["image_auroc"] == 0.75
    assert set(evaluation.mean) == {"image_auroc", "image_average_precision", "image_f1_max"}
    assert evaluation.mean == {key: evaluation.pooled[key] for key in evaluation.mean}
    assert str(evaluation).splitlines()[-1].split()[:3] == ["all", "4", "2"]


def test_integer_categories_are_sorted_as_numbers():
    evaluation = metrics.evaluate([1, -1] * 3, np.arange(6.0), [10, 10, 9, 9, -1, -1])
    assert list(evaluation.per_category) == [-1, 9, 10]


def test_a_missing_category_is_told():
    pandas = pytest.importorskip("pandas")
    for missing in (None, np.nan, pandas.NA, pandas.NaT):
        for category in (["a", "a", "b", missing], pandas.Series(["a", "a", "b", missing], dtype=object)):
            with pytest.raises(ValueError, match=r"category is missing \(.*\) for 1 images"):
                metrics.evaluate([1, -1, 1, -1], [0.0, 1.0, 0.0, 1.0], category)
    with pytest.raises(ValueError, match="category is missing \\(nan\\) for 2 images"):
        metrics.evaluate([1, -1, 1, -1], [0.0, 1.0, 0.0, 1.0], np.array([np.nan, 1, 1, np.nan]))


def test_evaluate_says_what_is_wrong(benchmark_set):
    whole = np.ones((4, 4), bool)
    flat = np.zeros((4, 4))
    with pytest.raises(ValueError, match=r"image 0 is labelled normal.*marks 16 defect pixels"):
        metrics.evaluate([1, -1], [0.0, 1.0], masks=[whole, whole], maps=[flat, flat])
    with pytest.raises(ValueError, match="masks were given without maps"):
        metrics.evaluate([1, -1], [0.0, 1.0], masks=[whole, whole])
    with pytest.raises(ValueError, match="maps were given without masks"):
        metrics.evaluate([1, -1], [0.0, 1.0], maps=[flat, flat])
    with pytest.raises(ValueError, match="y_true has 2 images, but masks and maps have 1"):
        metrics.evaluate([1, -1], [0.0, 1.0], masks=[None], maps=[flat])
    with pytest.raises(ValueError, match="y_true has 2 images, but masks and maps have more"):
        metrics.evaluate([1, -1], [0.0, 1.0], masks=[None] * 3, maps=[flat] * 3)
    with pytest.raises(ValueError, match="category must have one label for each of the 2 images"):
        metrics.evaluate([1, -1], [0.0, 1.0], ["nut"])
    with pytest.raises(ValueError, match="also holds 0"):
        metrics.evaluate([0, 1], [0.0, 1.0])
