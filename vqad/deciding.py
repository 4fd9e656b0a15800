"""What a fitted detector calls an anomaly: its thresholds, which can be set anew without another training."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real

import numpy as np

from vqad import fitting, recalibration
from vqad._checks import check_category, check_labels
from vqad.thresholds import labelled_offset, quantile_rule, threshold_rule


class Deciding:
    """The part of `BaseImageDetector` that sets thresholds after `fit`."""

    def set_params(self, **params):
        """Set parameters, which take effect at the next `fit`; but ``false_alarm_rate`` at once, as `recalibrate` does.

        Returns
        -------
        self : object
        """
        super().set_params(**params)
        rate = params.get("false_alarm_rate")
        if isinstance(rate, Real) and 0 < rate < 1 and self.__sklearn_is_fitted__():
            self._fitted = recalibration.at_rate(self._fitted, self.contamination, rate)
        return self

    def set_threshold(self, X, y, target="f1", *, recall=0.95, miss_cost=1.0, false_alarm_cost=1.0):
        """Set ``offset_`` by labelled images, where some defects are at hand.

        With ``threshold="category"`` each category gets its own, from the images that are judged as it; categories
        without both labels keep theirs. Scores, p-values and ``map_threshold_`` stay as they are. `fit` and
        `partial_fit` set ``offset_`` anew.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            None that `fit` has seen: those it trained on score too well.
        y : array-like of shape (n,) of +1 / -1
            +1 normal, -1 anomaly. Of normal images alone the threshold is the conformal quantile of their scores at
            ``false_alarm_rate``.
        target : {"f1", "recall", "cost"}, default="f1"
            What the threshold is best for: the largest F1, anomalies being the positive class; the fewest false alarms
            with at least the share ``recall`` of the anomalies found; or the smallest total cost. Where several serve
            equally well it is the one with the fewest false alarms. It lies midway between two scores.
        recall : float in (0, 1], default=0.95
            Least share of the anomalies to find, of ``target="recall"``.
        miss_cost, false_alarm_cost : float, default=1.0
            What one missed anomaly and one false alarm cost, of ``target="cost"``.

        Returns
        -------
        self : object

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When y has other values, only one of the two or the wrong length, or a parameter is out of its range.
        RuntimeError
            When meanwhile another thread fitted the detector.

        Warns
        -----
        UserWarning
            Of categories that keep their offset.

        Examples
        --------
        >>> import numpy as np
        >>> from vqad import HVQTransDetector
        >>> rng = np.random.default_rng(0)
        >>> good, bad = rng.normal(0, 1, (120, 8)), rng.normal(9, 1, (10, 8))
        >>> detector = HVQTransDetector(backbone=None, max_iter=1, false_alarm_rate=0.1, random_state=0)
        >>> detector = detector.fit(good[:80]).set_threshold(np.vstack([good[80:], bad]), np.repeat([1, -1], [40, 10]))
        >>> detector.predict(bad[:3])
        array([-1, -1, -1])
        """
        now = self._now()
        rule = threshold_rule(target, recall, miss_cost, false_alarm_cost)
        source, before = now.map_source(X), now._fitted
        y = check_labels(y, len(source))
        if (y == 1).all():
            rule = quantile_rule(self.false_alarm_rate)
        judged = now._judged(source, np.arange(len(source)), keep_maps=False)
        per_category = self.threshold == "category"
        old = before.thresholds
        offset = labelled_offset(old.offset, per_category, before.categories, -judged.score, judged.category, y, rule)
        if self._fitted.scorer is not before.scorer:
            raise RuntimeError("Another thread's fit ended while the threshold was set: set it again.")
        origin = f"{target} on {len(y)} labelled images"
        self._fitted = replace(before, thresholds=replace(old, offset=offset, origin=origin))
        return self

    def recalibrate(self, X=None, y=None, *, category=None, groups=None, false_alarm_rate=None):
        """Set scales and thresholds anew, without training: for another rate, or from new normal images.

        The model stays. With images, scores of their categories are standardised by them, and they take the place of
        those that `fit` held out: after a change of lamp or camera, normal images are normal again. How much is found
        then is to be tried: a model has not learned what the new light looks like.

        Parameters
        ----------
        X : None or images, or features with ``backbone=None``, default=None
            New normal images, none that `fit` has seen. None: thresholds come from the images that were held out.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            As for `fit`: images labelled -1 are left out.
        category : array-like of shape (n,) of str or int, default=None
            Known labels. When left out, each image is taken for the category that it is nearest to.
        groups : array-like of shape (n,), default=None
            As for `fit`; of each group one image counts.
        false_alarm_rate : float in (0, 1), default=None
            Takes the place of the parameter of this name, which counts when left out.

        Returns
        -------
        self : object
            As it was before if the call fails.

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When X has the wrong form, a label is not known, a category has a single image or the rate is out of range.

        Examples
        --------
        >>> import numpy as np
        >>> from vqad import HVQTransDetector
        >>> rng = np.random.default_rng(0)
        >>> detector = HVQTransDetector(backbone=None, max_iter=1, random_state=0).fit(rng.normal(size=(200, 8)))
        >>> X = rng.normal(size=(400, 8))
        >>> few, many = (int((detector.recalibrate(false_alarm_rate=r).predict(X) == -1).sum()) for r in (0.05, 0.3))
        >>> few < 40 < many
        True
        """
        now = self._now()
        if false_alarm_rate is not None:
            now.false_alarm_rate = false_alarm_rate
        now._validate_params()
        before, rate = now._fitted, now.false_alarm_rate
        if X is None:
            fitted = recalibration.at_rate(before, self.contamination, rate)
        else:
            data, rows, category, groups = now._check_images(X, y, category, groups, before)
            images = fitting.Images(now._source_of(data), rows, category, groups)
            fitted = recalibration.on_images(images, before, self.contamination, rate)
        self._take(now, fitted)
        self.false_alarm_rate = rate
        return self

    def rename_categories(self, names):
        """Give the categories other labels.

        Parameters
        ----------
        names : array-like of shape (n_categories,) of str or int
            In the order of ``categories_``, all different.

        Returns
        -------
        self : object
        """
        before = self.fitted_
        names = check_category(names, len(before.categories))
        if len(np.unique(names)) < len(names):
            raise ValueError(f"names must be all different; got {names.tolist()}.")
        self._fitted = replace(before, categories=names)
        return self
