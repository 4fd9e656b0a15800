"""The report: what the page holds, what it escapes, and the overlay that it draws."""

import base64
import copy
import hashlib
import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vqad import HVQTransDetector
from vqad.datasets import load_folder, make_textured_parts
from vqad.report import heat_colours, judge, overlay, write_report
from vqad.report._cards import picture_side

TINY = {"image_size": 64, "d_model": 32, "n_codes": 16, "max_iter": 1, "false_alarm_rate": 0.2, "random_state": 0}
# The title of a page, or the name of a file, that would run as a script if it were not escaped.
SCRIPT = "<img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def parts():
    return make_textured_parts(16, 4, categories=("disc", "weave"), image_size=64, random_state=0)


@pytest.fixture(scope="module")
def detector(parts):
    normal = parts.target == 1
    return HVQTransDetector(**TINY).fit(parts.images[normal], category=parts.category[normal])


def pictures(page):
    """The pictures of a page, decoded."""
    return decoded(page, "jpeg")


def layers(page):
    """The heatmaps of a page, decoded: red, green, blue and opacity."""
    return decoded(page, "png")


def decoded(page, kind):
    found = re.findall(rf'src="data:image/{kind};base64,([^"]+)"', page)
    form = "RGB" if kind == "jpeg" else "RGBA"
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert(form)) for text in found]


def written(tmp_path, *args, **more):
    return write_report(tmp_path / "page.html", *args, **more).read_text(encoding="utf-8")


# ---- one pass ------------------------------------------------------------------------------------


def test_one_pass_says_what_the_detectors_methods_say(detector, parts):
    verdicts = judge(detector, parts.images)
    np.testing.assert_array_equal(-verdicts.score, detector.score_samples(parts.images))
    np.testing.assert_array_equal(verdicts.label, detector.predict(parts.images))
    np.testing.assert_array_equal(verdicts.p_value, detector.p_values(parts.images))
    np.testing.assert_array_equal(verdicts.category, detector.predict_category(parts.images))
    np.testing.assert_array_equal(verdicts.score > verdicts.threshold, verdicts.label == -1)
    maps = detector.anomaly_map(parts.images)
    for i in range(len(verdicts)):
        np.testing.assert_array_equal(verdicts.anomaly_map(i, (64, 64)), maps[i])


def test_rows_judged_alone_are_judged_alike(detector, parts):
    some = judge(detector, parts.images, [3, 17])
    np.testing.assert_array_equal(some.score, judge(detector, parts.images).score[[3, 17]])


def test_a_threshold_a_category_is_given_to_each_image(parts):
    normal = parts.target == 1
    fitted = HVQTransDetector(**{**TINY, "false_alarm_rate": 0.4}, threshold="category").fit(
        parts.images[normal], category=parts.category[normal]
    )
    verdicts = judge(fitted, parts.images)
    of = dict(zip(fitted.categories_, -fitted.offset_))
    np.testing.assert_array_equal(verdicts.threshold, [of[name] for name in verdicts.category])
    np.testing.assert_array_equal(verdicts.label, fitted.predict(parts.images))


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_holds_picture_and_heatmap_of_every_image_most_anomalous_first(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images)
    order = np.argsort(detector.score_samples(parts.images), kind="stable")
    maps = detector.anomaly_map(parts.images)
    assert len(pictures(page)) == len(layers(page)) == len(parts.images)
    for picture, heat, i in zip(pictures(page), layers(page), order):
        # JPEG is not exact, but nearer to its own image than to any other
        distance = np.abs(parts.images.astype(float) - picture).mean((1, 2, 3))
        assert distance.argmin() == i
        # Laid over the grey image it is what `overlay` draws, but for the steps of its colours
        grey = overlay(parts.images[i], np.zeros((64, 64)), 1.0).astype(float)
        share = heat[..., 3:] / 255
        mixed = (1 - share) * grey + share * heat[..., :3]
        np.testing.assert_allclose(mixed, overlay(parts.images[i], maps[i], detector.map_threshold_), atol=6)
    scores = [float(text) for text in re.findall(r"· score (-?[\d.]+)<", page)]
    np.testing.assert_allclose(scores, -detector.score_samples(parts.images)[order], atol=0.0051)


def test_the_page_needs_no_other_file(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images[:3])
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|WebSocket|sendBeacon|\bimport\b", page)


def test_no_script_but_the_pages_own_may_run(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images[:3])
    (digest,) = re.findall(r"default-src 'none'; img-src data:; .*script-src 'sha256-([^']+)'\">", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == digest


def test_names_and_titles_are_escaped(detector, parts, tmp_path):
    Image.fromarray(parts.images[0]).save(tmp_path / f"{SCRIPT}.png")
    hostile = np.array([SCRIPT])
    page = written(
        tmp_path, detector, load_folder(tmp_path), title=SCRIPT, category=hostile, y=[1], facts={SCRIPT: SCRIPT}
    )
    assert "<img src=x" not in page
    escaped = "&lt;img src=x onerror=alert(1)&gt;&amp;"
    assert f"<title>{escaped}</title>" in page
    assert f"{escaped}.png" in page


@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_one_image_is_enough(detector, parts, tmp_path, colour):
    image = parts.images[:1] if colour == "rgb" else parts.images[:1, :, :, 0]
    page = written(tmp_path, detector, image)
    assert len(pictures(page)) == len(layers(page)) == 1


def test_images_of_different_sizes_keep_their_shape_and_are_made_small(detector, parts, tmp_path):
    sizes = [(64, 64), (1200, 600), (80, 1600)]
    images = [np.asarray(Image.fromarray(parts.images[0]).resize(size[::-1])) for size in sizes]
    page = written(tmp_path, detector, images)
    assert sorted(p.shape[:2] for p in pictures(page)) == [(40, 800), (64, 64), (800, 400)]
    assert sorted(p.shape[:2] for p in layers(page)) == [(20, 400), (64, 64), (400, 200)]


def test_pictures_are_the_smaller_the_more_there_are():
    sides = [picture_side(n) for n in (1, 100, 101, 1000, 1001, 50_000)]
    assert sides == [800, 800, 320, 320, 192, 192]


def test_no_more_images_are_shown_than_asked_for_and_none_twice(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images, y=parts.target, n_images=12)
    names = re.findall(r'<img [^>]*alt="(image \d+)"', page)
    assert len(names) == len(set(names)) == 12
    score = -detector.score_samples(parts.images)
    order = [f"image {i}" for i in np.argsort(-score, kind="stable")]
    assert names == [name for name in order if name in names]
    nearest = np.argsort(np.abs(score + detector.offset_), kind="stable")[:2]
    assert {*order[:5], *order[-2:], *(f"image {i}" for i in nearest)} <= set(names)
    assert "12 of 20 images: the most and the least anomalous" in page


def test_few_normal_images_leave_their_room_to_others(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images, y=-np.ones(20), n_images=15)
    assert len(pictures(page)) == 15


def test_n_images_of_one_shows_the_most_anomalous(detector, parts, tmp_path):
    page = written(tmp_path, detector, parts.images, n_images=1)
    worst = detector.score_samples(parts.images).argmin()
    assert re.findall(r'<img [^>]*alt="(image \d+)"', page) == [f"image {worst}"]


def test_known_labels_bring_metrics_and_mark_what_was_judged_wrong(detector, parts, tmp_path):
    halving, median = copy.copy(detector), float(np.median(detector.score_samples(parts.images)))
    thresholds = replace(detector.fitted_.thresholds, offset=median)
    halving._fitted = replace(detector.fitted_, thresholds=thresholds)
    y = -halving.predict(parts.images)
    page = written(tmp_path, halving, parts.images, y=y, n_images=len(y))
    assert page.count('class="wrong"') == len(y)
    assert "AUROC" in page
    assert f"{(y == 1).sum()} of {(y == 1).sum()} images labelled normal (100.0%)" in page
    assert "AUROC" not in written(tmp_path, detector, parts.images)


@pytest.mark.filterwarnings("ignore:.*too few")
@pytest.mark.parametrize("threshold", ["global", "category"])
def test_the_page_says_what_the_threshold_keeps(parts, tmp_path, threshold):
    """The false alarms that held-out images vouch for, whatever the parameters are now."""
    normal = parts.target == 1
    few = HVQTransDetector(**TINY, threshold=threshold).set_params(false_alarm_rate=0.01)
    few.fit(parts.images[normal], category=parts.category[normal])
    X, y = parts.images[10:], parts.target[10:]
    n_fewest = min(map(len, few.conformal_.scores_))
    page = written(tmp_path, few, X, n_images=1)
    assert f"at most {100 / (n_fewest + 1):.3g} %" in page
    few.false_alarm_rate = 0.5  # of which the threshold knows nothing
    assert f"at most {100 / (n_fewest + 1):.3g} %" in written(tmp_path, few, X, n_images=1)
    for change in (lambda: few.set_params(false_alarm_rate=0.6), lambda: few.set_threshold(X, y, "recall")):
        change()
        over = [
            (1 + (own > limit).sum()) / (len(own) + 1)
            for own, limit in zip(few.conformal_.scores_, np.atleast_1d(-few.offset_))
        ]
        page = written(tmp_path, few, X, n_images=1)
        assert f"at most {100 * max(over):.3g} %" in page
    assert f"recall on {len(X)} labelled images" in page


def test_categories_may_have_any_name(detector, parts, tmp_path):
    names = np.array(["$5_{$", "no utf-8 \udcff"])
    page = written(tmp_path, detector, parts.images[:2], category=names, y=[1, 1])
    assert "no utf-8 \\udcff" in page


def test_scores_at_hand_are_not_computed_again(detector, parts, tmp_path, monkeypatch):
    verdicts = judge(detector, parts.images)
    expected = written(tmp_path, detector, parts.images)
    monkeypatch.setattr(type(detector), "judge", None)
    assert written(tmp_path, detector, parts.images, verdicts=verdicts) == expected


def test_a_page_that_cannot_be_written_is_told_before_images_are_judged(detector, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(type(detector), "judge", None)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(tmp_path / "nodir" / "page.html", detector, parts.images)
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        write_report(tmp_path, detector, parts.images)
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(PermissionError, match="is not writable"):
        write_report(tmp_path / "page.html", detector, parts.images)


def test_what_does_not_go_with_the_images_is_refused(detector, parts, tmp_path):
    images = parts.images[:4]
    with pytest.raises(ValueError, match=r"y has shape \(3,\), but there are 4 images"):
        written(tmp_path, detector, images, y=[1, 1, 1])
    with pytest.raises(ValueError, match="category has shape"):
        written(tmp_path, detector, images, category=["disc"])
    with pytest.raises(ValueError, match="verdicts has 20 entries for 4 images"):
        written(tmp_path, detector, images, verdicts=judge(detector, parts.images))
    with pytest.raises(ValueError, match="n_images must be at least 1"):
        written(tmp_path, detector, images, n_images=0)
    assert not (tmp_path / "page.html").exists()


def test_a_detector_of_features_has_no_images_to_show(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    fitted = HVQTransDetector(**{**TINY, "image_size": 224}, backbone=None).fit(rows)
    with pytest.raises(ValueError, match="fitted on features"):
        written(tmp_path, fitted, rows)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_cure(detector, parts, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'{missing}: pip install "vqad\[report\]"'):
        written(tmp_path, detector, parts.images[:1])


# ---- the overlay ---------------------------------------------------------------------------------


def test_what_is_not_anomalous_shows_the_grey_image_itself():
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    drawn = overlay(grey, np.linspace(-3, 0, 1200).reshape(30, 40), 2.0)
    np.testing.assert_array_equal(drawn, np.repeat(grey[:, :, None], 3, axis=2))


def test_colours_mean_the_same_whatever_else_is_on_the_image():
    image = np.full((20, 20), 128, np.uint8)
    low, high = np.full((20, 20), 0.5), np.full((20, 20), 0.5)
    high[:5] = 50.0
    np.testing.assert_array_equal(overlay(image, low, 1.0)[10:], overlay(image, high, 1.0)[10:])


def test_colour_depends_on_the_ratio_to_the_threshold_alone():
    image = np.full((8, 8), 100, np.uint8)
    heat = np.random.default_rng(0).random((8, 8)) * 3
    np.testing.assert_array_equal(overlay(image, heat, 1.0), overlay(image, 4 * heat, 4.0))


def test_a_line_goes_round_what_is_over_the_threshold_and_nothing_else():
    image = np.zeros((40, 40), np.uint8)
    heat = np.zeros((40, 40))
    heat[10:20, 0:15] = 1.5
    drawn = overlay(image, heat, 1.0)
    is_line = (drawn[..., 2].astype(int) - drawn[..., 0]) > 100  # the only blue there is
    expected = np.zeros((40, 40), bool)
    expected[10, 0:15] = expected[19, 0:15] = expected[10:20, 14] = True  # not along the image's edge
    np.testing.assert_array_equal(is_line, expected)
    assert not ((drawn[..., 2].astype(int) - drawn[..., 0]) > 100)[heat <= 1.0].any()


def test_one_picture_in_every_form_gives_one_overlay():
    grey = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    heat = np.random.default_rng(1).normal(size=(9, 7))
    expected = overlay(grey, heat, 0.5)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    rgba = np.concatenate([rgb, np.zeros((9, 7, 1), np.uint8)], axis=2)
    wide = grey.astype(np.uint16) * 257
    for image in (grey[:, :, None], rgb, rgba, rgb / 255.0, (grey / 255.0).astype(np.float32), wide):
        drawn = overlay(image, heat, 0.5)
        assert drawn.dtype == np.uint8
        np.testing.assert_allclose(drawn, expected, atol=1)


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"height and width of the image, \(9, 7\); got shape \(7, 9\)"):
        overlay(np.zeros((9, 7)), np.zeros((7, 9)), 1.0)
    with pytest.raises(ValueError, match="C = 1, 3 or 4"):
        overlay(np.zeros((9, 7, 2)), np.zeros((9, 7)), 1.0)
    with pytest.raises(ValueError, match=r"float pixels from 0 to 255, but 0\.\.1 is expected"):
        overlay(np.linspace(0, 255, 63).reshape(9, 7), np.zeros((9, 7)), 1.0)


def test_heat_gets_darker_all_the_way():
    lightness = heat_colours(np.linspace(0, 1, 101)) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) < 0).all()
