"""Setting the thresholds of a fitted detector without training it again."""

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
        """Set parameters. They take effect at the next `fit`, except ``false_alarm_rate``, which takes effect at once.

        Parameters
        ----------
        **params
            Parameters of the detector.

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
        """Set ``offset_`` from labelled images, if some defects are available.

        With ``threshold="category"`` each category gets its own offset, from the images that are judged as it;
        categories without both labels keep theirs. Scores, p-values and ``map_threshold_`` do not change. `fit` and
        `partial_fit` reset ``offset_``.

        Parameters
        ----------
        X : images, or features with ``backbone=None``
            Images that `fit` has not seen: images it was trained on score too well.
        y : array-like of shape (n,) of +1 / -1
            +1 normal, -1 anomaly. If all are normal, the threshold is the conformal quantile of their scores at
            ``false_alarm_rate``.
        target : {"f1", "recall", "cost"}, default="f1"
            What to optimise: "f1", the largest F1 with anomalies as the positive class; "recall", the fewest false
            alarms with at least the share ``recall`` of the anomalies found; "cost", the smallest total cost. Of
            equally good thresholds the one with the fewest false alarms is used. It lies midway between two scores.
        recall : float in (0, 1], default=0.95
            Minimum recall for ``target="recall"``.
        miss_cost, false_alarm_cost : float, default=1.0
            Cost of one missed anomaly and of one false alarm for ``target="cost"``.

        Returns
        -------
        self : object

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When y has other values or the wrong length or holds no normal image, or a parameter is out of range; with
            ``threshold="category"``, when no category has both labels.
        RuntimeError
            When another thread fitted the detector in the meantime.

        Warns
        -----
        UserWarning
            When some categories keep their offset.

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
            raise RuntimeError(
                "Another thread fitted the detector while the threshold was set: call set_threshold again."
            )
        origin = f"{target} on {len(y)} labelled images"
        self._fitted = replace(before, thresholds=replace(old, offset=offset, origin=origin))
        return self

    def recalibrate(self, X=None, y=None, *, category=None, groups=None, false_alarm_rate=None):
        """Reset scales and thresholds without training: for another rate, or from new normal images.

        The model does not change. With images, the scores of their categories are standardised on them, and they
        replace the images that `fit` held out: after a change of lamp or camera, normal images score as normal again.
        Check how many defects are still found then, because the model has not learned what the new light looks like.

        Parameters
        ----------
        X : None or images, or features with ``backbone=None``, default=None
            New normal images that `fit` has not seen. None: thresholds come from the images that were held out.
        y : None or array-like of shape (n,) of +1 / -1, default=None
            As for `fit`: images labelled -1 are left out.
        category : array-like of shape (n,) of str or int, default=None
            Known labels. If None, each image is assigned to the nearest category.
        groups : array-like of shape (n,), default=None
            As for `fit`; one image of each group is used.
        false_alarm_rate : float in (0, 1), default=None
            New value of this parameter; None keeps the current one.

        Returns
        -------
        self : object
            Unchanged if the call fails.

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When X has the wrong form, a label is unknown, a category has a single image or the rate is out of range.

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
        """Rename the categories.

        Parameters
        ----------
        names : array-like of shape (n_categories,) of str or int
            New labels, all different, in the order of ``categories_``.

        Returns
        -------
        self : object

        Raises
        ------
        NotFittedError
            When the detector is not fitted.
        ValueError
            When there are not as many labels as categories, or some are equal.
        """
        before = self.fitted_
        names = check_category(names, len(before.categories))
        if len(np.unique(names)) < len(names):
            raise ValueError(f"names must be all different; got {names.tolist()}.")
        self._fitted = replace(before, categories=names)
        return self
