"""VQFlowDetector: VQ-Flow as a scikit-learn estimator."""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions

from vqad._parameters import with_shared_parameters
from vqad.backbones import DEFAULT_BACKBONE, check_stages, spread_stages
from vqad.base import BaseImageDetector
from vqad.nn.vq_flow import VQFlow


@with_shared_parameters
class VQFlowDetector(BaseImageDetector):
    """Normalizing flows conditioned on vector-quantised codes, for multi-class anomaly detection.

    A concept code says what kind of object an image shows, pattern codes what each cell of it should look like.
    Given both, normalizing flows on three stages of a frozen backbone, with a Gaussian for each concept, give the
    likelihood of every cell's features. What is unlikely is anomalous [1]_.

    One model serves many kinds of object, and no label of them enters the flows or codes. A kind that `partial_fit`
    adds later has codes of its own, and a short flow behind the shared ones.

    Parameters
    ----------
    backbone : str, transformer or None, default="tf_efficientnet_lite0"
        Name of a timm model; or a transformer that gives feature maps (n, h, w, C); or None when X is features
        already: rows (n, C) or maps (n, h, w, C). One map is taken as the finest stage, of which the coarser
        ones are averages.
    %(weights)s
    stages : tuple of 4 int or None, default=None
        Stages of the backbone, counted from 0 and from the finest. Flows run on the first three; the last one tells
        the concept. None takes the last four: (1, 2, 3, 4) of the default backbone; of a vision transformer, whose
        stages are its blocks, the last block of each quarter.
    %(image_size)s
    %(image_shape)s
    %(ignore)s
    %(tiles)s
    standardize : bool, default=True
        Whether each feature channel is brought to mean 0 and variance 1 over training images. The published
        system does not.
    gaussian : bool, default=True
        Whether scores and maps come from Gaussians by location, see `vqad.scoring.Scorer`: of the features
        themselves, the coarsest stage among them, and of the latents of the coarsest flow. They find far more than the
        published terms alone, which False gives.
    n_concepts : int, default=32
        Codes of the concept codebook: an upper bound on the kinds of object that are told apart.
    n_patterns : int, default=256
        Codes of each of the four pattern codebooks.
    d_concept : int, default=64
        Width of a concept.
    d_position : int, default=32
        Width of the positional encoding, a multiple of 4.
    n_blocks : tuple of 3 int, default=(2, 3, 4)
        Coupling blocks of each stage's flow, from the finest.
    hidden : int or None, default=64
        Width of the coupling blocks' subnets; None takes the published one, that of their input.
    clamp : float, default=1.9
        Largest log-scale of a coupling.
    %(max_iter)s
    batch_size : int, default=8
        Images per training step; also bounds the memory that images take.
    learning_rate : float, default=2e-3
        Peak rate of AdamW.
    schedule : {"cosine", "constant", "step"}, default="cosine"
        How the rate runs: a short warm-up and half a cosine down to zero; as published, a warm-up and then constant;
        or constant and a tenth of it over the last fifth of the passes.
    %(weight_decay)s
    %(category_balance)s
    feature_noise : float, default=0.0
        Standard deviation of the noise that training adds to each feature, after standardisation and the averaging of
        3 x 3 cells, which leaves channels of the first three stages a standard deviation of about 0.6. It keeps the
        density of a kind with few images from falling to nothing between them; worth a try, at 0.3, where there are
        some thirty images of every kind.
    %(early_stopping)s
    %(validation_fraction)s
    %(n_iter_no_change)s
    tol : float, default=1e-4
        Improvement of the validation loss that counts, in nats per dimension.
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
        Labels given to fit, sorted; or 0, 1, ... where the categories were discovered. Scores are standardised for
        each of them.
    %(offset_)s
    %(map_threshold_)s
    loss_curve_, validation_curve_ : list of float
        After every pass: minus the log-likelihood in nats per dimension, plus the codes' commitment.
    %(n_iter_)s
    %(training_log_)s
    %(n_images_)s
    model_ : vqad.nn.vq_flow.VQFlow
        The trained module, on the CPU.
    %(features_)s
    %(scorer_)s
    prototypes_ : vqad.prototypes.Prototypes
        Of every code the nearest patch of the normal images; of a concept, the nearest image.

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
        "stages": [tuple, list, None],
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

        Its weights have no package: give ``weights=`` a file, or "hub". What is not the paper's even so: the
        likelihood is exact, codes start from the data, dead codes are revived, and scores are calibrated.
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
        """Which concept code each image is read as.

        Returns
        -------
        concept : ndarray of shape (n,), int64
            In 0..n_concepts - 1. A kind of object may have several concepts. Each category that `partial_fit` added has
            n_concepts of its own, which are numbered on from there.
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
        check_stages(self.stages)
        _check_four(self.stages)
        if self.d_position % 4:
            raise ValueError(f"d_position must be a multiple of 4; got d_position={self.d_position}.")
        if len(self.n_blocks) != 3 or not all(isinstance(n, Integral) and n > 0 for n in self.n_blocks):
            raise ValueError(f"n_blocks must be three numbers of at least 1; got n_blocks={self.n_blocks!r}.")

    def _stages(self, strides):
        stages = self.stages
        if stages is None:
            stages = spread_stages(strides) or tuple(range(len(strides)))[-4:]
        _check_four(stages)
        return stages, True

    def _model_config(self, shape, n_categories, n_added):
        channels = shape.channels[:4]
        if min(channels) < 2:
            raise ValueError(f"A flow needs at least 2 features; got n_features = {min(channels)}.")
        top_grid = None
        if shape.has_deep_view and len(channels) == 4:  # what tells the concept, on the pooled grid of the third
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
        raise ValueError(f"VQFlowDetector reads four stages of the backbone; got stages={tuple(stages)}.")
