"""The displays: what they draw is what the detector says, and on which axes."""

import sys

import matplotlib
import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from vqad import HVQTransDetector, VQFlowDetector
from vqad.datasets import make_textured_parts
from vqad.display import AnomalyMapDisplay, CodebookDisplay, ScoreDistributionDisplay
from vqad.report import overlay

matplotlib.use("agg")
from matplotlib import pyplot as plt

TINY = {"image_size": 64, "d_model": 32, "n_codes": 16, "max_iter": 1, "false_alarm_rate": 0.2, "random_state": 0}


@pytest.fixture(scope="module")
def parts():
    return make_textured_parts(16, 4, categories=("disc", "weave"), image_size=64, random_state=0)


@pytest.fixture(scope="module")
def detector(parts):
    normal = parts.target == 1
    return HVQTransDetector(**TINY).fit(parts.images[normal], category=parts.category[normal])


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    plt.close("all")


def counts(axis):
    """Heights of all bars of a histogram, added up."""
    return sum(patch.get_height() for patch in axis.patches)


# ---- maps ----------------------------------------------------------------------------------------


def test_images_are_drawn_above_and_their_overlays_below(detector, parts):
    shown = parts.images[14:18]
    display = AnomalyMapDisplay.from_estimator(detector, shown)
    assert display.axes_.shape == (2, 4)
    assert display.figure_ is display.axes_[0, 0].figure
    maps = detector.anomaly_map(shown)
    for column, image, anomaly_map in zip(display.axes_.T, shown, maps):
        np.testing.assert_allclose(column[0].images[0].get_array(), image / 255, atol=1e-6)
        expected = overlay(image, anomaly_map, detector.map_threshold_)
        drawn = np.asarray(column[1].images[0].get_array())
        assert np.abs(drawn.astype(int) - expected).max() <= 1  # grey of float pixels and of bytes


def test_titles_say_what_the_detector_says(detector, parts):
    shown = parts.images[14:18]
    display = AnomalyMapDisplay.from_estimator(detector, shown, y=parts.target[14:18])
    for axis, category, label, score, y in zip(
        display.axes_[0], detector.predict_category(shown), detector.predict(shown), detector.score_samples(shown),
        parts.target[14:18],
    ):  # fmt: skip
        title = axis.get_title()
        assert title.startswith(f"{category}: {'normal' if label == 1 else 'anomaly'}")
        assert f"score {-score:.1f}," in title
        assert title.endswith("labelled normal" if y == 1 else "labelled anomalous")


def test_names_are_drawn_as_they_are(parts):
    names = ["$5_{$", "no utf-8 \udcff"]
    displays = (
        AnomalyMapDisplay.from_predictions(parts.images[:2], parts.masks[:2], map_threshold=1.0, titles=names),
        ScoreDistributionDisplay.from_predictions([0.0, 1.0], threshold=2.0, category=names),
        CodebookDisplay([parts.images[:1], parts.images[:1]], [[1.0], [1.0]], titles=names).plot(),
    )
    for display in displays:
        display.figure_.canvas.draw()
        axes = np.ravel(display.axes_)
        assert (axes[0].get_title("left") or axes[0].get_title()).startswith(names[0])
        assert (axes[1].get_title("left") or axes[1].get_title()).startswith(r"no utf-8 \udcff")


def test_given_axes_are_used_and_one_row_of_them_gets_overlays_alone(detector, parts):
    _, axes = plt.subplots(1, 2)
    before = plt.get_fignums()
    display = AnomalyMapDisplay.from_estimator(detector, parts.images[:2], ax=axes)
    assert plt.get_fignums() == before
    assert list(display.axes_) == list(axes)
    assert all(len(axis.images) == 1 for axis in axes)
    _, single = plt.subplots()
    assert AnomalyMapDisplay.from_estimator(detector, parts.images[:1], ax=single).axes_[0] is single


def test_axes_of_another_number_are_refused(detector, parts):
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) or \(2,\) for 2 images; got \(3,\)"):
        AnomalyMapDisplay.from_estimator(detector, parts.images[:2], ax=axes)


def test_images_of_different_sizes_are_shown_at_their_own(detector, parts):
    images = [parts.images[0], parts.images[1][:40], parts.images[2][:, :50, 0]]
    display = AnomalyMapDisplay.from_estimator(detector, images)
    assert [axis.images[0].get_array().shape[:2] for axis in display.axes_[1]] == [(64, 64), (40, 64), (64, 50)]


def test_maps_at_hand_need_no_detector():
    image, heat = np.full((8, 8), 0.2), np.zeros((8, 8))
    heat[:4] = 3
    display = AnomalyMapDisplay.from_predictions([image], [heat], map_threshold=1.0, titles=["half"])
    assert display.axes_[0, 0].get_title() == "half"
    drawn = np.asarray(display.axes_[1, 0].images[0].get_array())
    assert (drawn[6:] == 51).all()  # grey where the map is 0
    assert not (drawn[:3] == 51).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [({"maps": []}, "images and maps must have the same length"), ({"titles": ["a", "b"]}, "titles must have one")],
)
def test_maps_or_titles_of_another_number_are_refused(more, message):
    arguments = {"images": [np.zeros((4, 4))], "maps": [np.zeros((4, 4))], "map_threshold": 1.0, **more}
    with pytest.raises(ValueError, match=message):
        AnomalyMapDisplay.from_predictions(**arguments)


def test_a_detector_of_features_has_no_images_to_show():
    rows = np.random.default_rng(0).normal(size=(30, 5))
    fitted = HVQTransDetector(**TINY, backbone=None).fit(rows)
    with pytest.raises(ValueError, match="it takes no images"):
        AnomalyMapDisplay.from_estimator(fitted, rows)


# ---- scores --------------------------------------------------------------------------------------


def test_every_image_is_in_the_histogram_and_the_line_is_at_the_threshold(detector, parts):
    display = ScoreDistributionDisplay.from_estimator(detector, parts.images, parts.target)
    (axis,) = display.axes_
    assert counts(axis) == len(parts.images)
    (line,) = axis.lines
    assert line.get_xdata()[0] == pytest.approx(-detector.offset_)
    labels = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert sorted(labels) == ["labelled anomalous", "labelled normal", "threshold"]
    np.testing.assert_allclose(display.anomaly_score, -detector.score_samples(parts.images))


def test_each_category_that_images_are_judged_as_gets_a_histogram(detector, parts):
    display = ScoreDistributionDisplay.from_estimator(detector, parts.images, per_category=True)
    judged = detector.predict_category(parts.images)
    assert [axis.get_title(loc="left") for axis in display.axes_] == [
        f"{name} ({(judged == name).sum()} images)" for name in np.unique(judged)
    ]
    assert [counts(axis) for axis in display.axes_] == [(judged == name).sum() for name in np.unique(judged)]


def test_a_threshold_a_category_is_drawn_for_each(parts):
    normal = parts.target == 1
    fitted = HVQTransDetector(**{**TINY, "false_alarm_rate": 0.4}, threshold="category").fit(
        parts.images[normal], category=parts.category[normal]
    )
    display = ScoreDistributionDisplay.from_estimator(fitted, parts.images, per_category=True)
    drawn = [axis.lines[0].get_xdata()[0] for axis in display.axes_]
    np.testing.assert_allclose(drawn, -fitted.offset_)


def test_a_histogram_goes_on_the_axes_that_are_given():
    _, axis = plt.subplots()
    display = ScoreDistributionDisplay.from_predictions([0.0, 1.0], threshold=0.5, ax=axis)
    assert display.axes_[0] is axis
    assert axis.get_legend() is not None
    with pytest.raises(ValueError, match="one Axes for each of 2 categories; got 1"):
        ScoreDistributionDisplay.from_predictions([0.0, 1.0], threshold=0.5, category=["a", "b"], ax=axis)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anomaly_score": []}, "anomaly_score must be finite"),
        ({"anomaly_score": [np.nan, 0]}, "anomaly_score must be finite"),
        ({"y": [1]}, r"y must have one label for each of 2 images; got shape \(1,\)"),
        ({"y": [0, 1]}, r"y must be .*; got \[0, 1\]"),
        ({"category": ["a"]}, "category has 1 entries for 2 scores"),
    ],
)
def test_scores_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreDistributionDisplay.from_predictions(**{"anomaly_score": [0.0, 1.0], "threshold": 0.5, **arguments})


# ---- prototypes ----------------------------------------------------------------------------------


def test_the_most_used_codes_are_drawn_for_each_category(detector):
    display = CodebookDisplay.from_estimator(detector, codebook="level_1", n_codes=5, n_columns=3)
    prototypes = detector.prototypes_
    assert len(display.axes_) == len(detector.categories_) == 2
    for group, axis in enumerate(display.axes_):
        codes = prototypes.most_used("level_1", group)[:5]
        assert len(axis.images) == 5
        for drawn, code in zip(axis.images, codes):
            np.testing.assert_array_equal(drawn.get_array(), prototypes.get("level_1", code, group).thumbnail)
        share = prototypes.usage["level_1"][group, codes] / prototypes.usage["level_1"][group].sum()
        assert [text.get_text() for text in axis.texts] == [f"{s:.1%}" if s < 0.0995 else f"{s:.0%}" for s in share]
        title = axis.get_title(loc="left")
        assert title.startswith(f"{detector.categories_[group]}, level_1: 5 of ")
        assert title.endswith(f"{share.sum():.0%} of the cells")


def test_pictures_do_not_overlap_and_lie_on_the_axes(detector):
    (axis,) = CodebookDisplay.from_estimator(detector, category="disc", n_codes=7, n_columns=4).axes_
    boxes = np.array([image.get_extent() for image in axis.images])  # left, right, bottom, top
    assert len({tuple(box) for box in boxes}) == 7
    for a in boxes:
        apart = (boxes[:, 0] >= a[1]) | (boxes[:, 1] <= a[0]) | (boxes[:, 3] >= a[2]) | (boxes[:, 2] <= a[3])
        assert (~apart).sum() == 1, "each but itself"
    assert boxes[:, 1].max() <= axis.get_xlim()[1]
    assert boxes[:, 2].max() <= axis.get_ylim()[0]


def test_one_category_is_drawn_on_the_axes_that_are_given(detector):
    _, axis = plt.subplots()
    display = CodebookDisplay.from_estimator(detector, category="weave", ax=axis)
    assert display.axes_[0] is axis
    assert display.figure_ is axis.figure
    assert axis.get_title(loc="left").startswith("weave, level_0")
    with pytest.raises(ValueError, match="one Axes for each of 2 groups of codes; got 1"):
        CodebookDisplay.from_estimator(detector, ax=axis)


def test_codes_that_all_categories_share_are_drawn_once(parts):
    normal = parts.target == 1
    flow = VQFlowDetector(
        image_size=64, n_concepts=4, n_patterns=8, d_concept=8, d_position=4, n_blocks=(1, 1, 1), hidden=4, max_iter=1,
        false_alarm_rate=0.2, random_state=0,
    ).fit(parts.images[normal], category=parts.category[normal])  # fmt: skip
    for category in (None, "disc"):
        (axis,) = CodebookDisplay.from_estimator(flow, codebook="concept", category=category).axes_
        assert axis.get_title(loc="left").startswith("all categories, concept: ")


def test_codes_that_there_are_not_are_refused(detector):
    with pytest.raises(ValueError, match="category must be one of 'disc', 'weave'; got 'tile'"):
        CodebookDisplay.from_estimator(detector, category="tile")
    with pytest.raises(ValueError, match=r"codebook must be one of 'level_0', .*; got 'concept'"):
        CodebookDisplay.from_estimator(detector, codebook="concept")
    rows = np.random.default_rng(0).normal(size=(30, 5))
    with pytest.raises(ValueError, match="no thumbnails of its prototypes: it was fitted on features"):
        CodebookDisplay.from_estimator(HVQTransDetector(**TINY, backbone=None).fit(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": [[0.5]]}, "thumbnails and shares must have the same lengths"),
        ({"thumbnails": [], "shares": []}, "thumbnails and shares must have the same lengths"),
        ({"titles": ["a", "b"]}, "titles must have one entry per group, 1; got 2"),
    ],
)
def test_prototypes_that_cannot_be_drawn_are_refused(arguments, message):
    fine = {"thumbnails": [np.zeros((2, 4, 4, 3), np.uint8)], "shares": [[0.5, 0.5]]}
    with pytest.raises(ValueError, match=message):
        CodebookDisplay(**{**fine, **arguments})


def test_codes_are_drawn_of_the_detector_at_the_end_of_a_pipeline_or_a_search(detector):
    pipeline = make_pipeline(FunctionTransformer(), detector)
    shown = CodebookDisplay.from_estimator(Search(pipeline), n_codes=3)
    np.testing.assert_array_equal(shown.thumbnails, CodebookDisplay.from_estimator(detector, n_codes=3).thumbnails)
    with pytest.raises(TypeError, match=r"CodebookDisplay.from_estimator needs a detector of vqad; got \w+\.$"):
        CodebookDisplay.from_estimator(FunctionTransformer())


# ---- both ----------------------------------------------------------------------------------------


class Search:
    """What a finished search looks like."""

    def __init__(self, best):
        self.best_estimator_ = best


@pytest.mark.parametrize("display", [AnomalyMapDisplay, ScoreDistributionDisplay])
def test_a_detector_is_found_at_the_end_of_a_pipeline_or_a_search(display, detector, parts):
    brighter = FunctionTransformer(lambda X: np.clip(X, 40, 255).astype(np.uint8)).fit(parts.images)
    pipeline = make_pipeline(brighter, detector)
    shown = display.from_estimator(Search(pipeline), parts.images[:3])
    directly = display.from_estimator(detector, brighter.transform(parts.images[:3]))
    if display is AnomalyMapDisplay:
        np.testing.assert_array_equal(shown.maps, directly.maps)
    else:
        np.testing.assert_array_equal(shown.anomaly_score, directly.anomaly_score)


@pytest.mark.parametrize("display", [AnomalyMapDisplay, ScoreDistributionDisplay])
def test_what_is_no_detector_is_refused(display, parts):
    with pytest.raises(TypeError, match=f"{display.__name__}.from_estimator needs a detector of vqad; got Search"):
        display.from_estimator(type("Search", (), {})(), parts.images)


@pytest.mark.parametrize("display", [AnomalyMapDisplay, ScoreDistributionDisplay])
def test_without_matplotlib_the_error_says_what_to_install(display, detector, parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf"{display.__name__} needs matplotlib: pip install vqad\[report\]"):
        display.from_estimator(detector, parts.images[:1])
