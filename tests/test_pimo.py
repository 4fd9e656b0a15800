"""vqad.metrics.aupimo against a sweep over every threshold."""

from __future__ import annotations

import tracemalloc
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from vqad.metrics import _pimo, aupimo, pixel_auroc

few_examples = settings(max_examples=40, deadline=None)
LIMITS = [(1e-3, 1e-2), (0.01, 0.3), (0.2, 1.0), (0.5, 0.6)]


@st.composite
def masks_with_maps(draw: st.DrawFn) -> tuple[list[np.ndarray | None], list[np.ndarray]]:
    """Normal, defective and unknown images of different sizes, with scores that are mostly tied or hardly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))
    kinds = ["normal", "defective", *rng.choice(["normal", "defective", "unknown"], draw(st.integers(0, 5)))]
    masks, maps = [], []
    for kind in rng.permutation(kinds):
        shape = rng.integers(1, 9, 2)
        mask = (rng.random(shape) < 0.4) & (kind == "defective")
        mask[0, 0] |= kind == "defective"
        dtype = rng.choice([np.float32, np.float64])
        masks.append(None if kind == "unknown" else mask)
        maps.append((rng.integers(0, levels, shape) / 3 - 1 + mask * rng.integers(0, 2)).astype(dtype))
    return masks, maps


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The normal images have", UserWarning)
        return aupimo(*args, **kwargs)


def swept(masks, maps, low, high):
    """One threshold after the other, one pixel after the other; the integral by quadrature."""
    normal = [s for m, s in zip(masks, maps) if m is not None and not m.any()]
    thresholds = np.unique(np.concatenate([s.ravel().astype(float) for s in maps]))[::-1]
    out = []
    for mask, scores in zip(masks, maps):
        if mask is None or not mask.any():
            out.append(np.nan)
            continue
        corners = [(0.0, 0.0)]
        for t in thresholds:
            rate = sum(sum(p >= t for p in s.ravel()) / s.size for s in normal) / len(normal)
            corners.append((rate, sum(p >= t for p in scores[mask]) / mask.sum()))
        area = 0.0
        for (x0, y0), (x1, y1) in pairwise(corners):
            a, b = np.clip([x0, x1], low, high)
            if b > a:
                area += quad(lambda z: np.interp(np.exp(z), [x0, x1], [y0, y1]), np.log(a), np.log(b))[0]  # noqa: B023
        out.append(area / np.log(high / low))
    return out


@few_examples
@given(masks_with_maps(), st.sampled_from(LIMITS))
def test_it_is_the_sweep_over_every_threshold(data, limits):
    np.testing.assert_allclose(quiet(*data, fpr_limits=limits), swept(*data, *limits), atol=1e-7)


@few_examples
@given(masks_with_maps(), st.sampled_from(LIMITS), st.integers(1, 30))
def test_neither_pruning_nor_iterators_nor_increasing_transforms_matter(data, limits, chunk):
    masks, maps = data
    expected = quiet(masks, maps, fpr_limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pimo, "HELD_PIXELS", chunk)
        np.testing.assert_allclose(quiet(masks, maps, fpr_limits=limits), expected, rtol=1e-12)
    np.testing.assert_allclose(quiet(iter(masks), iter(maps), fpr_limits=limits), expected, rtol=1e-12)
    levels = np.unique(np.concatenate([s.ravel().astype(np.float64) for s in maps]))
    ranks = [np.searchsorted(levels, s) ** 2 for s in maps]
    np.testing.assert_allclose(quiet(masks, ranks, fpr_limits=limits), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_pixels_lower_than_all_before_are_not_let_go_too_early(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    masks = np.zeros((8, 4, 5), bool)
    masks[0, 1:3], masks[3] = True, True
    maps = [rng.random((4, 5)) * (k + 1) for k in rng.permutation(8)]
    expected = quiet(masks, maps, fpr_limits=(0.05, 0.9))
    for held in (5, 20, 40):
        monkeypatch.setattr(_pimo, "HELD_PIXELS", held)
        np.testing.assert_allclose(quiet(masks, maps, fpr_limits=(0.05, 0.9)), expected, rtol=1e-12)


def example():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 100, 120), bool)
    masks[3:, 20:30, 40:60] = True
    return masks, (rng.random(masks.shape) + masks * rng.random(masks.shape)).astype(np.float32)


def test_a_map_equal_to_its_mask_is_perfect():
    masks, _ = example()
    found = quiet(masks, masks.astype(np.float32))
    assert np.isnan(found[:3]).all()
    assert found[3:] == pytest.approx(1.0)


@pytest.mark.parametrize("limits", LIMITS)
def test_a_constant_map_finds_as_much_as_it_alarms(limits):
    masks, _ = example()
    low, high = limits
    expected = (high - low) / np.log(high / low)
    assert aupimo(masks, np.ones(masks.shape), fpr_limits=limits)[3:] == pytest.approx(expected)


def test_sound_pixels_of_defective_images_play_no_part():
    masks, maps = example()
    other = np.where(masks.any((1, 2))[:, None, None] & ~masks, 9.0, maps).astype(np.float32)
    np.testing.assert_array_equal(quiet(masks, other), quiet(masks, maps))
    assert pixel_auroc(masks, other) < pixel_auroc(masks, maps)


def test_normal_images_weigh_the_same_whatever_their_size():
    mask, scores = np.ones((1, 2), bool), np.array([[0.5, 3.0]])
    # Half of the small one is over 0.5, nothing of the large one: the rate there is a quarter, not 1 / 51.
    maps = [scores, np.array([[1.0, 0.0]]), np.zeros((10, 10))]
    masks = [mask, np.zeros((1, 2), bool), np.zeros((10, 10), bool)]
    assert aupimo(masks, maps, fpr_limits=(0.05, 0.25))[0] == pytest.approx(0.5)
    assert aupimo(masks, maps, fpr_limits=(0.05, 1.0))[0] > 0.5


def test_the_share_over_all_normal_pixels_stands_for_rates_that_cannot_be_had():
    masks, maps = [np.ones((1, 4), bool), np.zeros((1, 10), bool)], [np.array([[0.0, 1, 2, 3]]), np.full((1, 10), 1.5)]
    with pytest.warns(UserWarning, match=r"have 10 pixels, too few for a false-positive rate of 1e-05: 100000 are"):
        assert aupimo(masks, maps)[0] == 0.5


def test_enough_normal_pixels_raise_no_warning():
    masks, maps = example()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aupimo(masks, maps, fpr_limits=(1e-4, 1e-2))


def test_memory_stays_a_share_of_the_normal_pixels(monkeypatch):
    monkeypatch.setattr(_pimo, "HELD_PIXELS", 100_000)

    class Maps:
        def __len__(self):
            return 300

        def __getitem__(self, i):
            return np.random.default_rng(i).random((100, 100), np.float32)

    class Masks(Maps):
        def __getitem__(self, i):
            return np.full((100, 100), i == 0)

    tracemalloc.start()
    try:
        quiet(Masks(), Maps())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Three million pixels of 4 bytes and a weight of 8: 36 MB, were they all held.
    assert peak < 6e6


def test_an_image_without_pixels_changes_nothing():
    masks, maps = example()
    empty = np.zeros((0, 5))
    np.testing.assert_array_equal(
        quiet([empty > 0, *masks], [empty, *maps]), np.append(np.nan, quiet(list(masks), list(maps)))
    )


@pytest.mark.parametrize("limits", [(0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.1, 1.1), (np.nan, 0.1), 0.1])
def test_limits_must_rise_within_0_1(limits):
    with pytest.raises(ValueError, match="fpr_limits must be two numbers with 0 < lower < upper <= 1"):
        aupimo(*example(), fpr_limits=limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks, maps: (masks[3:], maps[3:]), "every mask marks a defect"),
        (lambda masks, maps: (masks[:3], maps[:3]), "the masks mark no defect pixel"),
        (lambda masks, maps: (masks[:5], maps), "there are 5 masks and more maps"),
        (lambda masks, maps: (masks, maps * np.nan), "map 0 must be finite"),
    ],
)
def test_it_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        aupimo(*change(*example()))
