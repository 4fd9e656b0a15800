"""Intervals and curves of the report, beside the package's own metrics and slower computations of them."""

import numpy as np
import pytest
from scipy.integrate import trapezoid

from vqad.metrics import aupro, bootstrap_interval, image_auroc
from vqad.report._curves import FPR_LIMIT, evidence
from vqad.verdicts import Verdicts


@pytest.fixture(scope="module")
def case():
    """60 images of two kinds with maps that mark the defects of a third of them, by and large."""
    rng = np.random.default_rng(0)
    y = np.where(np.arange(60) % 3 == 0, -1, 1)
    masks = np.zeros((60, 24, 24), bool)
    for i in np.flatnonzero(y == -1):
        row, column = rng.integers(0, 18, 2)
        masks[i, row : row + 6, column : column + 6] = True
    maps = (rng.normal(size=masks.shape) + 1.2 * masks).astype(np.float32)
    score = rng.normal(size=60) + 1.2 * (y == -1)
    return y, score, masks, maps, np.repeat(["a", "b"], 30)


def table(case, **changes):
    y, score, masks, maps, group = case
    verdicts = Verdicts(score, np.zeros(60), np.ones(60), np.ones(60), group, maps)
    return evidence(verdicts, y, group, **{"masks": masks, "maps": maps, **changes})


def numbers(cell):
    return [float(part) for part in cell.replace("(", "").replace(")", "").replace("to", "").split()]


def test_image_auroc_is_exact_and_its_interval_the_bootstraps(case):
    y, score, _, _, group = case
    found = table(case)
    column = found.header.index("image AUROC")
    for row, name in zip(found.rows, "ab"):
        mine = group == name
        value, *interval = numbers(row[column])
        assert value == pytest.approx(image_auroc(y[mine], score[mine]), abs=6e-4)
        # Another draw of the same resamples
        expected = bootstrap_interval(image_auroc, y[mine], score[mine], n_resamples=500, random_state=1)
        np.testing.assert_allclose(interval, expected, atol=0.03)


def test_aupro_is_exact_and_its_interval_is_that_of_resampled_images(case):
    y, _, masks, maps, group = case
    found = table(case)
    value, low, high = numbers(found.rows[0][found.header.index(f"AUPRO to {FPR_LIMIT:g}")])
    mine = np.flatnonzero(group == "a")
    assert value == pytest.approx(aupro(masks[mine], maps[mine]), abs=6e-4)
    rng, values = np.random.default_rng(1), []
    for _ in range(200):
        drawn = np.concatenate([rng.choice(mine[y[mine] == label], (y[mine] == label).sum()) for label in (1, -1)])
        values.append(aupro(masks[drawn], maps[drawn]))
    np.testing.assert_allclose([low, high], np.quantile(values, [0.025, 0.975]), atol=0.03)


def test_the_area_under_a_drawn_curve_is_the_metric(case):
    y, score, masks, maps, _ = case
    roc, pro = table(case).curves
    for curve, expected in ((roc, image_auroc(y, score)), (pro, aupro(masks, maps))):
        area = trapezoid(curve.y, curve.x) / curve.limit
        assert area == pytest.approx(expected, abs=0.012)
        assert (curve.low <= curve.y + 1e-9).all()
        assert (curve.y <= curve.high + 1e-9).all()


def test_what_the_labels_do_not_allow_is_left_out_and_said(case):
    y, score, _, maps, group = case
    normal = np.where(group == "b", 1, y)
    verdicts = Verdicts(score, np.zeros(60), np.ones(60), np.ones(60), group, maps)
    found = evidence(verdicts, normal, group, None, None)
    assert found.rows[1][found.header.index("image AUROC")] == "–"
    assert any("no anomalies, so no image metrics: b" in note for note in found.notes)
    assert [curve.title for curve in found.curves] == ["ROC of the images"]
    nothing = evidence(verdicts, np.ones(60, int), group, [None] * 60, maps)
    assert nothing.curves == []
