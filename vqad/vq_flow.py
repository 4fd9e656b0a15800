"""VQFlowDetector: VQ-Flow as a scikit-learn estimator."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions

from vqad._parameters import with_shared_parameters
from vqad.backbones import DEFAULT_BACKBONE, spread_stages
from vqad.base import BaseImageDetector
from vqad.nn.vq_flow import VQFlow


@with_shared_parameters
class VQFlowDetector(BaseImageDetector):
    """Normalizing flows conditioned on vector-quantised codes, for multi-class anomaly detection.

    A concept code stands for the kind of object in an image, pattern codes for what each of its cells should look like.
    Conditioned on both, normalizing flows on three stages of a frozen backbone, with a Gaussian per concept, give the
    likelihood of each cell's features. Unlikely cells are anomalous [1]_.

    One model serves many kinds of object. The flows and codes do not use category labels. A category added later by
    `partial_fit` has its own codes and a short flow after the shared ones.

    Parameters
    ----------
    backbone : str, transformer or None, default="tf_efficientnet_lite0"
        Name of a timm model; or a transformer whose ``transform`` returns feature maps (n, h, w, C); or None if X
        already holds features: rows (n, C) or maps (n, h, w, C). A single map is used as the finest stage, and the
        coarser stages are averages of it.
    %(weights)s
    stages : tuple of 4 int or None, default=None
        Stages of the backbone, counted from 0 for the finest. Flows run on the first three; the last one determines
        the concept. None selects the last four, (1, 2, 3, 4) for the default backbone; for a vision transformer, whose
        stages are its blocks, the last block of each quarter.
    %(image_size)s
    %(image_shape)s
    %(ignore)s
    %(tiles)s
    standardize : bool, default=True
        Whether to standardise each feature channel to mean 0 and variance 1 over the training images. The published
        method does not.
    gaussian : bool, default=True
        Whether scores and maps come from Gaussians fitted at each location, see `vqad.scoring.Scorer`: to the features
        themselves, including the coarsest stage, and to the latents of the coarsest flow. They find far more than the
        published terms alone, which False selects.
    n_concepts : int, default=32
        Codes of the concept codebook: an upper bound on the number of kinds of object that can be told apart.
    n_patterns : int, default=256
        Codes of each of the four pattern codebooks.
    d_concept : int, default=64
        Width of a concept.
    d_position : int, default=32
        Width of the positional encoding, a multiple of 4.
    n_blocks : tuple of 3 int, default=(2, 3, 4)
        Coupling blocks of each stage's flow, from the finest.
    hidden : int or None, default=64
        Width of the coupling blocks' subnets; None uses the width of their input, as published.
    clamp : float, default=1.9
        Bound on the log-scales of the couplings.
    %(max_iter)s
    batch_size : int, default=8
        Images per training step.
    learning_rate : float, default=2e-3
        Peak learning rate of AdamW.
    schedule : {"cosine", "constant", "step"}, default="cosine"
        Learning-rate schedule. "cosine": a short warm-up, then half a cosine down to zero. "constant", as published: a
        warm-up, then constant. "step": constant, then a tenth of it over the last fifth of the passes.
    %(weight_decay)s
    %(category_balance)s
    feature_noise : float, default=0.0
        Standard deviation of the noise that training adds to each feature, after standardisation and averaging over
        3 x 3 cells; by then, channels of the first three stages have a standard deviation of about 0.6. Noise smooths
        the learned density, which helps if a category has few images: try 0.3 with about thirty images per category.
    %(early_stopping)s
    %(validation_fraction)s
    %(n_iter_no_change)s
    tol : float, default=1e-4
        Smallest decrease of the validation loss, in nats per dimension, that counts as an improvement.
    %(warm_start)s
    %(checkpoint_dir)s
    %(contamination)s
    %(false_alarm_rate)s
    %(calibration_fraction)s
    %(threshold)s
    %(device)s
    %(precision)s
    %(n_jobs)s
    %(memory)s
    %(random_state)s
    %(verbose)s

    Attributes
    ----------
    categories_ : ndarray of shape (n_categories,)
        Labels given to `fit`, sorted; or 0, 1, ... if the categories were discovered. Scores are standardised per
        category.
    %(offset_)s
    %(map_threshold_)s
    loss_curve_, validation_curve_ : list of float
        Training and validation loss after each pass: negative log-likelihood in nats per dimension plus the commitment
        loss of the codes.
    %(n_iter_)s
    %(training_log_)s
    %(n_images_)s
    model_ : vqad.nn.vq_flow.VQFlow
        The trained module, on the CPU.
    %(features_)s
    %(scorer_)s
    prototypes_ : vqad.prototypes.Prototypes
        For each code, the nearest patch of the normal images; for each concept, the nearest image.

    References
    ----------
    .. [1] Zhou, Xu, Sun, Song, Cichocki, Shen: VQ-Flow: Taming Normalizing Flows for Multi-Class Anomaly Detection via
       Hierarchical Vector Quantization, arXiv:2409.00942.

    Examples
    --------
    >>> from vqad import VQFlowDetector
    >>> from vqad.datasets import make_textured_parts
    >>> parts = make_textured_parts(n_normal=30, n_anomalous=0, random_state=0)
    >>> detector = VQFlowDetector(image_size=64, hidden=16, max_iter=2, false_alarm_rate=0.2, random_state=0)
    >>> detector.fit(parts.images).predict(parts.images[:2]).shape
    (2,)
    """

    model_class = VQFlow
    _parameter_constraints = {
        **BaseImageDetector._parameter_constraints,
        "n_concepts": [Interval(Integral, 1, None, closed="left")],
        "n_patterns": [Interval(Integral, 2, None, closed="left")],
        "d_concept": [Interval(Integral, 1, None, closed="left")],
        "d_position": [Interval(Integral, 4, None, closed="left")],
        "n_blocks": [tuple, list],
        "hidden": [Interval(Integral, 1, None, closed="left"), None],
        "clamp": [Interval(Real, 0, None, closed="neither")],
        "feature_noise": [Interval(Real, 0, None, closed="left")],
        "schedule": [StrOptions({"cosine", "constant", "step"})],
    }

    def __init__(
        self,
        *,
        backbone=DEFAULT_BACKBONE,
        weights=None,
        stages=None,
        image_size=288,
        image_shape=None,
        ignore=None,
        tiles=None,
        standardize=True,
        gaussian=True,
        n_concepts=32,
        n_patterns=256,
        d_concept=64,
        d_position=32,
        n_blocks=(2, 3, 4),
        hidden=64,
        clamp=1.9,
        max_iter=5,
        batch_size=8,
        learning_rate=2e-3,
        schedule="cosine",
        weight_decay=1e-4,
        category_balance=0.5,
        feature_noise=0.0,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        tol=1e-4,
        warm_start=False,
        checkpoint_dir=None,
        contamination="auto",
        false_alarm_rate=0.05,
        calibration_fraction=0.2,
        threshold="global",
        device="auto",
        precision="auto",
        n_jobs=None,
        memory=None,
        random_state=None,
        verbose=0,
    ):
        super().__init__(
            backbone=backbone, weights=weights, image_size=image_size, image_shape=image_shape, ignore=ignore,
            tiles=tiles, standardize=standardize, gaussian=gaussian, max_iter=max_iter, batch_size=batch_size,
            learning_rate=learning_rate, schedule=schedule, weight_decay=weight_decay,
            category_balance=category_balance, early_stopping=early_stopping, validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change, tol=tol, warm_start=warm_start, checkpoint_dir=checkpoint_dir,
            contamination=contamination, false_alarm_rate=false_alarm_rate, calibration_fraction=calibration_fraction,
            threshold=threshold, device=device, precision=precision, n_jobs=n_jobs, memory=memory,
            random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.stages = stages
        self.n_concepts = n_concepts
        self.n_patterns = n_patterns
        self.d_concept = d_concept
        self.d_position = d_position
        self.n_blocks = n_blocks
        self.hidden = hidden
        self.clamp = clamp
        self.feature_noise = feature_noise

    @classmethod
    def paper(cls, **overrides):
        """The published configuration: ConvNeXtV2-Base at 384², 512-wide concepts, 2, 5 and 8 blocks, 60 passes.

        This backbone has no weight package: pass ``weights=`` a file or "hub". It still differs from the paper in that
        the likelihood is exact, codes are initialised from the data, dead codes are revived, and scores are calibrated.

        Parameters
        ----------
        **overrides
            Parameters of the detector that replace published ones.

        Returns
        -------
        VQFlowDetector
            Not fitted.
        """
        published = {
            "backbone": "convnextv2_base.fcmae_ft_in22k_in1k_384",
            "stages": (0, 1, 2, 3),
            "image_size": 384,
            "standardize": False,
            "gaussian": False,
            "n_concepts": 32,
            "n_patterns": 512,
            "d_concept": 512,
            "d_position": 64,
            "n_blocks": (2, 5, 8),
            "hidden": None,
            "clamp": 1.9,
            "max_iter": 60,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "category_balance": 0.0,
            "feature_noise": 0.0,
            "weight_decay": 0.0,
        }
        return cls(**{**published, **overrides})

    def predict_concept(self, X):
        """Concept code of each image.

        Parameters
        ----------
        X : images, or features with ``backbone=None``

        Returns
        -------
        concept : ndarray of shape (n,), int64
            In 0..n_concepts - 1. A kind of object may have several concepts. Each category added by `partial_fit` has
            its own n_concepts codes, numbered after those before it.
        """
        now = self._now()
        scorer, source = now.fitted_.scorer, now.map_source(X)
        ready = source.engine.ready(scorer)

        def concepts(part: np.ndarray) -> list[np.ndarray]:
            found = []
            with torch.inference_mode():
                for _, maps in source.chunks(part):
                    category, _ = ready.route(maps)
                    found.append(ready.model.concept(ready.model_input(maps), category).cpu().numpy())
            return found

        return np.concatenate(list(source.side_by_side(concepts, np.arange(len(source)))))

    def _validate_params(self):
        super()._validate_params()
        _check_four(self.stages)
        if self.d_position % 4:
            raise ValueError(f"d_position must be a multiple of 4; got d_position={self.d_position}.")
        if len(self.n_blocks) != 3 or not all(isinstance(n, Integral) and n > 0 for n in self.n_blocks):
            raise ValueError(f"n_blocks must be three integers of at least 1; got n_blocks={self.n_blocks!r}.")

    def _stages(self, strides):
        stages = self.stages
        if stages is None:
            stages = spread_stages(strides) or tuple(range(len(strides)))[-4:]
        _check_four(stages)
        return stages, True

    def _model_config(self, shape, n_categories, n_added):
        channels = shape.channels[:4]
        if min(channels) < 2:
            raise ValueError(f"A flow needs at least 2 feature channels; got n_features = {min(channels)}.")
        top_grid = None
        if shape.has_deep_view and len(channels) == 4:  # the fourth stage goes on the pooled grid of the third
            top_grid = tuple(-(-cells // 2) for cells in shape.grids[2])
        return {
            "channels": channels * 4 if len(channels) == 1 else channels,
            "n_concepts": self.n_concepts,
            "n_patterns": self.n_patterns,
            "d_concept": self.d_concept,
            "d_position": self.d_position,
            "n_blocks": self.n_blocks,
            "hidden": self.hidden,
            "clamp": self.clamp,
            "noise": self.feature_noise,
            "n_shared": n_categories - n_added,
            "n_added": n_added,
            "top_grid": top_grid,
        }


def _check_four(stages):
    if stages is not None and len(stages) != 4:
        raise ValueError(f"VQFlowDetector needs four stages of the backbone; got stages={tuple(stages)}.")
