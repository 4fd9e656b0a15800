"""The public checks: a sound detector passes every one, and for each there is a broken one that fails it."""

import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

from vqad import HVQTransDetector, VQFlowDetector
from vqad.images import check_images
from vqad.testing import check_image_detector, image_detector_checks, parametrize_with_image_checks


class Thumbnails(TransformerMixin, BaseEstimator):
    """A backbone that takes no time: the mean colours of the cells of a grid."""

    def __init__(self, cells=8):
        self.cells = cells

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        pool = torch.nn.AdaptiveAvgPool2d(self.cells)
        return np.stack([pool(torch.from_numpy(x).movedim(2, 0)).movedim(0, 2).numpy() for x in X])


# A further detector is one more line.
DETECTORS = [
    HVQTransDetector(
        backbone=Thumbnails(), n_codes=16, d_model=32, n_layers=1, n_heads=4, dim_feedforward=32, max_iter=1,
        false_alarm_rate=0.2,
    ),
    VQFlowDetector(
        backbone=Thumbnails(), n_concepts=8, n_patterns=16, d_concept=8, d_position=4, n_blocks=(1, 1, 1), hidden=8,
        max_iter=1, false_alarm_rate=0.2,
    ),
]  # fmt: skip


@parametrize_with_image_checks(DETECTORS)
def test_our_detectors_pass(estimator, check):
    check(estimator)


# Checks whose outcome depends on who reads images and makes features of them.
OF_THE_BACKBONE = {
    "check_anomaly_map_form", "check_anomaly_map_is_higher_on_defects", "check_batch_size_of_scoring",
    "check_company_of_images", "check_dtypes", "check_fit_is_repeatable", "check_global_random_state_is_left_alone",
    "check_grey", "check_higher_is_more_normal", "check_input_is_not_written_to", "check_lists",
    "check_number_of_channels", "check_order_of_images", "check_paths", "check_pickle", "check_pixels_must_be_finite",
    "check_predicted_categories", "check_read_only_images",
}  # fmt: skip


def checks_of_backbones():
    """Of one detector with the packaged backbone, of the others with one of few layers, which all go through alike."""
    packaged = {"backbone": "tf_efficientnet_lite0", "image_size": 64}
    of_few_layers = {"backbone": "test_efficientnet", "weights": "random", "image_size": 64}
    first, *others = map(clone, DETECTORS)
    made = [first.set_params(**packaged), *(detector.set_params(**of_few_layers) for detector in others)]
    cases = parametrize_with_image_checks(made).mark.args[1]
    return [case for case in cases if case.values[1].func.__name__ in OF_THE_BACKBONE]


def test_checks_of_the_backbone_are_checks():
    assert set(BROKEN) >= OF_THE_BACKBONE
    assert len(checks_of_backbones()) == len(DETECTORS) * len(OF_THE_BACKBONE)


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "check"), checks_of_backbones())
def test_our_detectors_pass_with_backbones(estimator, check):
    check(estimator)


# ---- scikit-learn's own checks, of flattened images ----------------------------------------------


class OfRows:
    """Makes a detector of flattened images take the numbers of scikit-learn's checks, which know no pixels in 0..1.

    Rows of any length are images of one row; a logistic curve brings their numbers to 0..1.
    """

    def _check_X(self, X, before):
        X = validate_data(self, X, reset=before is None, dtype=np.float64)
        return check_images(1 / (1 + np.exp(-X)), image_shape=(1, X.shape[1]))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = False
        return tags


class HVQTransOfRows(OfRows, HVQTransDetector):
    pass


@pytest.mark.slow
def test_scikit_learns_own_checks_of_flattened_images():
    """Of one detector: what they look at is the contract, which is written once."""
    parameters = {
        **DETECTORS[0].get_params(deep=False), "backbone": Thumbnails(2), "image_shape": (1, 1), "n_codes": 4,
        "d_model": 8, "n_heads": 2, "dim_feedforward": 8,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(HVQTransOfRows(**parameters), on_fail=None, on_skip=None)
    assert len(results) > 40
    assert not {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}


# ---- a sound detector, small enough to break in many ways ----------------------------------------


class Sound(OutlierMixin, BaseEstimator):
    """Distance of an image's thumbnail to the nearest of some training images, drawn at random."""

    _sign = -1

    def __init__(self, n_kept=20, cells=8, contamination=0.1, batch_size=4, random_state=None):
        self.n_kept = n_kept
        self.cells = cells
        self.contamination = contamination
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X, y=None, *, category=None):
        images = self._check(X)
        category = np.zeros(len(images), dtype=int) if category is None else np.asarray(category)
        for name, labels in (("y", y), ("category", category)):
            if labels is not None and np.shape(labels) != (len(images),):
                raise ValueError(f"{name} needs one label for each of {len(images)} images.")
        normal = np.arange(len(images)) if y is None else np.flatnonzero(np.asarray(y) == 1)
        if len(normal) < 2:
            raise ValueError("At least 2 normal images are needed.")
        self._learn(images, normal, category, check_random_state(self.random_state))
        return self

    def _learn(self, images, normal, category, rng):
        kept = rng.permutation(normal)[: self.n_kept]
        self.bank_, self.category_ = self._features(images)[kept], category[kept]
        # Most training images are their own nearest: the second says how far a new one will be.
        second = np.sort(self._distances(self._features(images)[normal]), axis=1)[:, 1]
        self.offset_ = self._sign * np.quantile(second, 1 - self.contamination)

    def score_samples(self, X):
        check_is_fitted(self)
        return self._score(self._features(self._check(X)))

    def decision_function(self, X):
        return self.score_samples(X) - self.offset_

    def predict(self, X):
        return np.where(self.decision_function(X) < 0, -1, 1)

    def predict_category(self, X):
        check_is_fitted(self)
        return self.category_[self._distances(self._features(self._check(X))).argmin(axis=1)]

    def anomaly_map(self, X):
        check_is_fitted(self)
        images = self._check(X)
        grids = np.abs(self._features(images)[:, None] - self.bank_).min(axis=1)
        grids = grids.reshape(len(images), 3, self.cells, self.cells).mean(axis=1)
        maps = [self._resize(grid, images.size(i)) for i, grid in enumerate(grids)]
        return np.stack(maps) if len({m.shape for m in maps}) == 1 else maps

    def _check(self, X):
        return check_images(X)

    def _features(self, images):
        parts = [
            images.load(range(start, min(start + self.batch_size, len(images))), (self.cells, self.cells))
            for start in range(0, len(images), self.batch_size)
        ]
        return torch.cat(parts).flatten(1).double().numpy()

    def _distances(self, features):
        return np.abs(features[:, None] - self.bank_).mean(axis=2)

    def _score(self, features):
        return self._sign * self._distances(features).min(axis=1)

    def _resize(self, grid, size):
        rows, columns = (np.arange(n) * self.cells // n for n in size)
        return grid[np.ix_(rows, columns)].astype(np.float32)


class Copies(Sound):
    def __init__(self, n_kept=20, cells=8, contamination=0.1, batch_size=4, random_state=None):
        super().__init__(n_kept, cells, contamination, batch_size, random_state)
        self.rng = check_random_state(0)


class Converts(Sound):
    def __init__(self, n_kept=20, cells=8, contamination=0.1, batch_size=4, random_state=None):
        super().__init__(n_kept, cells, contamination, [batch_size], random_state)


class ForgetsParameters(Sound):
    def set_params(self, **params):
        params.pop("cells", None)
        return super().set_params(**params)


class FitsNothing(Sound):
    def fit(self, X, y=None, *, category=None):
        super().fit(X, y, category=category)


class FitsAClone(Sound):
    def fit(self, X, y=None, *, category=None):
        super().fit(X, y, category=category)
        return clone(self)


class ChangesParameter(Sound):
    def _learn(self, images, normal, category, rng):
        self.n_kept = min(self.n_kept, len(normal) - 5)
        super()._learn(images, normal, category, rng)


class PublicAttribute(Sound):
    def _learn(self, *args):
        super()._learn(*args)
        self.n_images = len(args[0])


class NoOffset(Sound):
    def _learn(self, *args):
        super()._learn(*args)
        self._limit = self.offset_
        del self.offset_

    def decision_function(self, X):
        return self.score_samples(X) - self._limit


class AttributeError_(Sound):
    def predict_category(self, X):
        return self.category_[np.zeros(len(X), dtype=int)]


class AnswersUnfitted(Sound):
    def predict(self, X):
        return super().predict(X) if hasattr(self, "bank_") else np.ones(len(X), dtype=int)


class PlusOffset(Sound):
    def decision_function(self, X):
        return self.score_samples(X) + self.offset_


class ColumnOfScores(Sound):
    def score_samples(self, X):
        return super().score_samples(X)[:, None]

    def decision_function(self, X):
        return super().decision_function(X)[:, 0]


class OneMeansAnomaly(Sound):
    def predict(self, X):
        return (self.decision_function(X) < 0).astype(int)


class SignReversed(Sound):
    def predict(self, X):
        return -super().predict(X)


class FitPredictAllAnomalous(Sound):
    def fit_predict(self, X, y=None):
        return np.full_like(self.fit(X, y).predict(X), -1)


class HigherIsAnomalous(Sound):
    _sign = 1


class CoarseMap(Sound):
    def _resize(self, grid, size):
        return grid.astype(np.float32)


class DoubleMap(Sound):
    def _resize(self, grid, size):
        return super()._resize(grid, size).astype(np.float64)


class MapWithHoles(Sound):
    def _resize(self, grid, size):
        made = super()._resize(grid, size)
        made[0, 0] = np.nan
        return made


class ListOfMaps(Sound):
    def anomaly_map(self, X):
        return list(super().anomaly_map(X))


class MapUpsideDown(Sound):
    def _resize(self, grid, size):
        return super()._resize(-grid, size)


class NeedsCategory(Sound):
    def fit(self, X, y=None, *, category=None):
        if category is None and len(X) == 24:
            raise ValueError("category is needed.")
        return super().fit(X, y, category=category)


class AnyCategory(Sound):
    def fit(self, X, y=None, *, category=None):
        return super().fit(X, y, category=None if category is None or len(category) != len(X) else category)


class NumbersForCategories(Sound):
    def predict_category(self, X):
        return np.unique(self.category_, return_inverse=True)[1][:1].repeat(len(X))


class FarthestCategory(Sound):
    def predict_category(self, X):
        return self.category_[self._distances(self._features(self._check(X))).argmax(axis=1)]


class TakesTwelveBits(Sound):
    """Scales 16 bits as if only 12 were used."""

    def _check(self, X):
        if isinstance(X, np.ndarray) and X.dtype == np.uint16:
            X = np.minimum(X, 4095) / 4095
        return super()._check(X)


class RoundsFloats(Sound):
    def _check(self, X):
        if isinstance(X, np.ndarray) and X.dtype.kind == "f":
            X = np.floor(X * 31) / 31
        return super()._check(X)


class OneSize(Sound):
    """Gives every image of a list the first one's share of pixels."""

    def _check(self, X):
        if isinstance(X, list) and X and isinstance(X[0], np.ndarray):
            low = min(len(image) for image in X)
            X = [image[:low] for image in X]
        return super()._check(X)


class NoPaths(Sound):
    def _check(self, X):
        if isinstance(X, list) and X and not isinstance(X[0], np.ndarray):
            raise TypeError(f"images must be arrays; got the path {X[-1]}, image 5 is {X[5]}")
        return super()._check(X)


class GreyIsRed(Sound):
    def _check(self, X):
        if isinstance(X, np.ndarray) and X.ndim == 3:
            X = X[..., None] * np.array([1, 0, 0], dtype=X.dtype)
        return super()._check(X)


class ScalesInPlace(Sound):
    def _check(self, X):
        if isinstance(X, np.ndarray) and X.dtype == np.float64 and X.ndim == 4:
            X *= 0.5
        return super()._check(X)


class NeedsWritable(Sound):
    def _check(self, X):
        if isinstance(X, np.ndarray):
            X.flat[0] = X.flat[0]
        return super()._check(X)


class ReplacesItems(Sound):
    def _check(self, X):
        if isinstance(X, list):
            X[:] = [np.array(image) if isinstance(image, np.ndarray) else image for image in X]
        return super()._check(X)


class WritesToY(Sound):
    def fit(self, X, y=None, *, category=None):
        super().fit(X, y, category=category)
        if y is not None:
            y[:2] = -1
        return self


class LearnsOutliers(Sound):
    def _learn(self, images, normal, category, rng):
        super()._learn(images, np.arange(len(images)), category, rng)


class GlobalChance(Sound):
    """Draws from the global random state of numpy, and puts it back."""

    def _learn(self, images, normal, category, rng):
        before = np.random.get_state()  # noqa: NPY002
        super()._learn(images, normal, category, np.random.mtrand._rand)
        np.random.set_state(before)  # noqa: NPY002


class SeedsNumpy(Sound):
    def _learn(self, images, normal, category, rng):
        np.random.seed(0)  # noqa: NPY002
        super()._learn(images, normal, category, rng)


class DrawsFromPython(Sound):
    def predict(self, X):
        random.random()
        return super().predict(X)


class SeedsTorch(Sound):
    def _learn(self, images, normal, category, rng):
        torch.manual_seed(0)
        super()._learn(images, normal, category, rng)


class Remembers(Sound):
    """Adds to what an earlier fit has left."""

    def _learn(self, *args):
        old = getattr(self, "bank_", None)
        super()._learn(*args)
        if old is not None:
            self.bank_ = np.concatenate([self.bank_, old])
            self.category_ = np.resize(self.category_, len(self.bank_))


class ComparesToFirst(Sound):
    def score_samples(self, X):
        score = super().score_samples(X)
        return score + 0.01 * score[0]


class MapOfItsRank(Sound):
    """Scales the maps by the largest value among them."""

    def anomaly_map(self, X):
        maps = super().anomaly_map(X)
        largest = max(m.max() for m in maps)
        return maps / largest if isinstance(maps, np.ndarray) else [m / largest for m in maps]


class BatchStatistics(Sound):
    """Centres each batch on its own mean, as batch normalisation does in training mode."""

    def score_samples(self, X):
        score = super().score_samples(X)
        for start in range(0, len(score), self.batch_size):
            score[start : start + self.batch_size] -= 0.1 * score[start : start + self.batch_size].mean()
        return score


class SizeOfBatch(Sound):
    def _score(self, features):
        return super()._score(features) * (1 + 0.001 * self.batch_size)


class LosesBank(Sound):
    def __getstate__(self):
        state = dict(super().__getstate__())
        if "bank_" in state:
            state["bank_"] = state["bank_"].round(1)
        return state


class DropsLastImage(Sound):
    """Leaves out the last batch if it is not full."""

    def score_samples(self, X):
        score = super().score_samples(X)
        return score[: max(1, len(score) // 2 * 2 - 1)] if len(score) == 2 else score


class SingleIsScalar(Sound):
    def predict(self, X):
        label = super().predict(X)
        return label[0] if len(label) == 1 else label


class SplitsIntoNothing(Sound):
    def _learn(self, images, normal, category, rng):
        super()._learn(images, normal, category, rng)
        if len(normal) == 2:
            self.bank_ = self.bank_ * np.nan


class WordlessError(Sound):
    def fit(self, X, y=None, *, category=None):
        if len(X) == 2:
            raise ValueError
        return super().fit(X, y, category=category)


class TakesNaN(Sound):
    def _check(self, X):
        return super()._check(np.nan_to_num(X, posinf=1.0) if isinstance(X, np.ndarray) and X.dtype.kind == "f" else X)


class SaysNothingOfNaN(Sound):
    def _check(self, X):
        if isinstance(X, np.ndarray) and X.dtype.kind == "f" and not np.isfinite(X).all():
            raise ValueError("bad input")
        return super()._check(X)


class TakesNone(Sound):
    def score_samples(self, X):
        return np.zeros(0) if len(X) == 0 else super().score_samples(X)


class TakesFirstChannels(Sound):
    def _check(self, X):
        return super()._check(X[..., :3] if isinstance(X, np.ndarray) and X.shape[-1] == 5 else X)


class RawError(Sound):
    """Lets an error of numpy through."""

    def _check(self, X):
        if isinstance(X, np.ndarray) and X.ndim == 5:
            X = X[0, 0, 0, 0, 0, 0]
        return super()._check(X)


class HidesFileName(Sound):
    def _features(self, images):
        try:
            return super()._features(images)
        except ValueError as error:
            raise ValueError("a file could not be read") from error


class SkipsFolders(Sound):
    def _check(self, X):
        if isinstance(X, list):
            X = [item for item in X if not str(item).endswith("more-images")]
        return super()._check(X)


class IgnoresLengthOfY(Sound):
    def fit(self, X, y=None, *, category=None):
        y = None if y is not None and len(y) != len(X) else y
        return super().fit(X, y, category=category)


class LearnsFromAnomalies(Sound):
    def fit(self, X, y=None, *, category=None):
        y = None if y is not None and (np.asarray(y) == -1).all() else y
        return super().fit(X, y, category=category)


# Every check, with detectors that fail it and what is said of them.
BROKEN = {
    "check_constructor_only_stores": [(Copies, "attributes .*rng"), (Converts, r"does not store \['batch_size'\]")],
    "check_clone_and_parameters": [(ForgetsParameters, r"set for \['cells'\]")],
    "check_fit_returns_self": [(FitsNothing, "must return the detector"), (FitsAClone, "must return the detector")],
    "check_fit_changes_no_parameter": [(ChangesParameter, r"parameters \['n_kept'\]")],
    "check_fitted_attributes": [(PublicAttribute, r"attributes \['n_images'\]"), (NoOffset, "has no offset_")],
    "check_not_fitted": [(AttributeError_, "predict_category before fit raises"), (AnswersUnfitted, "works before")],
    "check_decision_is_score_minus_offset": [
        (PlusOffset, "must be score_samples - offset_"),
        (ColumnOfScores, r"shape \(16, 1\)"),
    ],
    "check_labels_are_signs_of_decisions": [
        (OneMeansAnomaly, r"predict gives \[0 1\]"),
        (SignReversed, "must be -1 where"),
    ],
    "check_fit_predict": [(FitPredictAllAnomalous, "is not fit")],
    "check_higher_is_more_normal": [(HigherIsAnomalous, "higher must be more normal")],
    "check_anomaly_map_form": [
        (CoarseMap, r"shape \(8, 8, 8\)"),
        (DoubleMap, "gives float64"),
        (MapWithHoles, "not finite"),
        (ListOfMaps, "gives list"),
    ],
    "check_anomaly_map_is_higher_on_defects": [(MapUpsideDown, "higher must be more anomalous")],
    "check_category_is_optional": [(NeedsCategory, "category is needed"), (AnyCategory, "accepts 5 labels")],
    "check_predicted_categories": [(NumbersForCategories, "not among the labels"), (FarthestCategory, "right for")],
    "check_dtypes": [(TakesTwelveBits, "as uint16"), (RoundsFloats, "as float32")],
    "check_lists": [(OneSize, "other sizes")],
    "check_paths": [(NoPaths, "must be arrays")],
    "check_grey": [(GreyIsRed, r"shape \(H, W\)")],
    "check_read_only_images": [(NeedsWritable, "read-only")],
    "check_input_is_not_written_to": [
        (ScalesInPlace, "writes to X"),
        (ReplacesItems, "other images into the list"),
        (WritesToY, "writes to y"),
    ],
    "check_labelled_outliers_are_left_out": [(LearnsOutliers, "further images -1")],
    "check_fit_is_repeatable": [(GlobalChance, "second fit")],
    "check_global_random_state_is_left_alone": [
        (SeedsNumpy, "state of numpy.random"),
        (DrawsFromPython, "state of random"),
        (SeedsTorch, "state of torch"),
    ],
    "check_refit_forgets": [(Remembers, "fitted before")],
    "check_order_of_images": [(ComparesToFirst, "another order")],
    "check_company_of_images": [(ComparesToFirst, "score_samples .* alone"), (MapOfItsRank, "anomaly_map .* alone")],
    "check_batch_size_of_scoring": [(BatchStatistics, "batch_size=1"), (SizeOfBatch, "batch_size=1")],
    "check_pickle": [(LosesBank, "after pickling")],
    "check_few_images_are_scored": [(DropsLastImage, "1 results for 2"), (SingleIsScalar, "len")],
    "check_fit_on_two_images": [(SplitsIntoNothing, "not finite"), (WordlessError, "without a message")],
    "check_pixels_must_be_finite": [(TakesNaN, "accepts nan"), (SaysNothingOfNaN, "does not explain")],
    "check_no_images": [(TakesNone, "accepts an empty list")],
    "check_number_of_channels": [(TakesFirstChannels, "accepts images of 5 channels")],
    "check_number_of_axes": [(RawError, "raises IndexError")],
    "check_truncated_file": [(HidesFileName, "does not explain")],
    "check_folder_in_place_of_file": [(SkipsFolders, "accepts the folder")],
    "check_labels_must_match_images": [(IgnoresLengthOfY, "accepts 5 labels"), (LearnsFromAnomalies, "accepts y = -1")],
}  # fmt: skip
CASES = [(check, *case) for check, cases in BROKEN.items() for case in cases]


def checks_of(detector):
    return {check.func.__name__: check for _, check in image_detector_checks(detector)}


def test_a_sound_detector_passes_every_check():
    results = check_image_detector(Sound())
    assert {result["check_name"] for result in results} == set(BROKEN)
    assert {result["status"] for result in results} == {"passed"}


@pytest.mark.parametrize(("check", "broken", "match"), CASES, ids=[f"{c[6:]}-{b.__name__}" for c, b, _ in CASES])
def test_a_broken_detector_fails_its_check(check, broken, match):
    with pytest.raises(Exception, match=f"(?s){match}"):
        checks_of(broken())[check](broken())


def test_all_failures_are_reported_together():
    results = check_image_detector(NoOffset(), on_fail=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert set(failed) == {"check_fitted_attributes", "check_decision_is_score_minus_offset"}
    assert isinstance(failed["check_decision_is_score_minus_offset"], AttributeError)
    match = rf"(?s)NoOffset fails 2 of {len(BROKEN)} checks:\n  check_fitted_attributes: .*\n  check_decision.*offset_"
    with pytest.raises(AssertionError, match=match):
        check_image_detector(NoOffset())
    with pytest.raises(ValueError, match="on_fail must be 'raise' or None"):
        check_image_detector(Sound(), on_fail="warn")


class Plain(OutlierMixin, BaseEstimator):
    """Has no maps, no categories and no batches."""

    def __init__(self, random_state=None):
        self.random_state = random_state

    def fit(self, X, y=None):
        self._inner = Sound(random_state=self.random_state).fit(X, y)
        self.offset_ = self._inner.offset_
        return self

    def score_samples(self, X):
        check_is_fitted(self)
        return self._inner.score_samples(X)

    def decision_function(self, X):
        return self.score_samples(X) - self.offset_

    def predict(self, X):
        return np.where(self.decision_function(X) < 0, -1, 1)


def test_checks_are_those_that_apply():
    left_out = {
        "check_anomaly_map_form",
        "check_anomaly_map_is_higher_on_defects",
        "check_batch_size_of_scoring",
        "check_category_is_optional",
        "check_predicted_categories",
    }
    assert set(checks_of(Plain())) == set(BROKEN) - left_out
    check_image_detector(Plain())
    with pytest.raises(TypeError, match=r"must be an instance, such as Sound\(\); got the class"):
        next(image_detector_checks(Sound))


class OnDevices(Sound):
    def __init__(self, device="cpu", shift=0.0, random_state=None):
        super().__init__(random_state=random_state)
        self.device, self.shift = device, shift

    def _score(self, features):
        return super()._score(features) + (self.shift if self.device == "cuda" else 0.0)


def test_scores_may_differ_a_little_between_devices(monkeypatch):
    """Where there is CUDA; here its place is taken by a detector that only claims to compute there."""
    monkeypatch.setattr("vqad.testing._invariance.has_cuda", lambda: True)
    checks_of(OnDevices(shift=1e-4))["check_pickle_between_devices"](OnDevices(shift=1e-4))
    with pytest.raises(AssertionError, match="fitted on cuda, scores otherwise on cpu"):
        checks_of(OnDevices(shift=1.0))["check_pickle_between_devices"](OnDevices(shift=1.0))
    assert "check_pickle_between_devices" not in checks_of(Sound())


def test_cases_of_a_test_are_readable():
    mark = parametrize_with_image_checks([Sound(), OnDevices(), Sound(n_kept=10)])
    names, cases = mark.mark.args
    assert names == ("estimator", "check")
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids) == sum(len(checks_of(d)) for d in (Sound(), OnDevices(), Sound()))
    assert {"Sound0-check_pickle", "OnDevices-check_pickle", "Sound2-check_pickle"} <= set(ids)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_checks_leave_the_global_random_states_alone(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    check_image_detector(Sound())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002
