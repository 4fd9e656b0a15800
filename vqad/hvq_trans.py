"""HVQTransDetector: HVQ-Trans as a scikit-learn estimator."""

from __future__ import annotations

from numbers import Integral, Real

from sklearn.utils._param_validation import Interval, StrOptions

from vqad._parameters import with_shared_parameters
from vqad._warn import warn
from vqad.backbones import DEFAULT_BACKBONE, check_stages, default_stages, spread_stages
from vqad.base import BaseImageDetector
from vqad.nn.hvq_trans import HVQTrans


@with_shared_parameters
class HVQTransDetector(BaseImageDetector):
    """Hierarchical vector-quantised transformer for multi-class anomaly detection.

    Features of a frozen backbone go through a transformer in which every layer's output is replaced by the
    nearest of a category's learned codes, level by level, and are rebuilt from those codes. What normal images
    did not teach cannot be rebuilt: the reconstruction error, and the cost of transporting an image's cells to
    the codes, say how anomalous an image is and where [1]_.

    One model serves many kinds of object. The kind of a new image is inferred from the image.

    Parameters
    ----------
    backbone : str, transformer or None, default="tf_efficientnet_lite0"
        Name of a timm model; or a transformer that gives feature maps (n, h, w, C); or None when X is features
        already: rows (n, C) or maps (n, h, w, C).
    %(weights)s
    stages : tuple of int or None, default=None
        Stages of the backbone whose features are rebuilt, counted from 0; the coarsest has the grid of the tokens. None
        takes those of strides 8 and 16: (2, 3) of the default backbone. Of a vision transformer, whose stages are its
        blocks, it takes the last block of each quarter.
    %(image_size)s
    %(image_shape)s
    %(ignore)s
    %(tiles)s
    standardize : bool, default=True
        Whether each feature channel is brought to mean 0 and variance 1 over training images, so that all channels
        count alike in the reconstruction. The published system does not.
    gaussian : bool, default=True
        Whether scores and maps come from Gaussians by location, see `vqad.scoring.Scorer`: of the features
        themselves, the coarsest stage among them, and of the decoder's error. They find far more than the
        published terms alone, which False gives.
    patch_size : int, default=2
        Cells along each side of a token: features are taken on a grid this many times finer than the tokens' and
        rebuilt there. Finer features and maps at the same cost of attention. No more than the finest stage has in one
        cell of the coarsest; 1, with a warning, for maps that it does not divide. The published system has 1.
    n_codes : int, default=512
        Codes of one codebook: one a category and level.
    d_model : int, default=128
        Width of the encoder; the decoder has twice that.
    n_layers : int, default=2
        Layers of the encoder and of the decoder; there is one level of codes more.
    n_heads : int, default=8
        Attention heads.
    dim_feedforward : int, default=256
        Width of the transformer's feed-forward layers.
    dropout : float, default=0.0
        Share of activations that are dropped in training.
    transport : {"conditional", "nearest", "sinkhorn", "exact"}, default="nearest"
        How cells are transported to codes. "conditional" is the published one-directional cost. "sinkhorn" and
        "exact" are optimal transport plans between an image's cells and the codes, whose marginal is their usage.
        "nearest" is the plan when only the cells' marginal is fixed.
    transport_weight : float, default=0.0
        Weight of the transport cost in the training loss.
    %(max_iter)s
    batch_size : int, default=16
        Images per training step; also bounds the memory that images take.
    learning_rate : float, default=1e-3
        Peak rate of AdamW.
    schedule : {"cosine", "step"}, default="cosine"
        How the rate runs: a short warm-up and half a cosine down to zero; or, as published, constant and a tenth of it
        over the last fifth of the passes.
    %(weight_decay)s
    %(category_balance)s
    %(early_stopping)s
    %(validation_fraction)s
    %(n_iter_no_change)s
    tol : float, default=1e-4
        Improvement of the validation loss that counts.
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
        Labels given to fit, sorted; or 0, 1, ... where the categories were discovered.
    %(offset_)s
    %(map_threshold_)s
    loss_curve_, validation_curve_ : list of float
        After every pass.
    %(n_iter_)s
    %(training_log_)s
    %(n_images_)s
    model_ : vqad.nn.hvq_trans.HVQTrans
        The trained module, on the CPU.
    %(features_)s
    %(scorer_)s
    prototypes_ : vqad.prototypes.Prototypes
        Of every code the nearest patch of the normal images.

    References
    ----------
    .. [1] Lu, Wu, Tian, Wang, Chen, Liu, Hu: Hierarchical Vector Quantized Transformer for Multi-class
       Unsupervised Anomaly Detection, NeurIPS 2023. arXiv:2310.14228.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.datasets import make_textured_parts
    >>> parts = make_textured_parts(n_normal=30, n_anomalous=0, random_state=0)
    >>> detector = HVQTransDetector(image_size=64, d_model=32, max_iter=2, false_alarm_rate=0.2, random_state=0)
    >>> detector.fit(parts.images).predict(parts.images[:2]).shape
    (2,)
    """

    model_class = HVQTrans
    _parameter_constraints = {
        **BaseImageDetector._parameter_constraints,
        "stages": [tuple, list, None],
        "patch_size": [Interval(Integral, 1, None, closed="left")],
        "n_codes": [Interval(Integral, 2, None, closed="left")],
        "d_model": [Interval(Integral, 2, None, closed="left")],
        "n_layers": [Interval(Integral, 1, None, closed="left")],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "dim_feedforward": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "transport": [StrOptions({"conditional", "nearest", "sinkhorn", "exact"})],
        "transport_weight": [Interval(Real, 0, None, closed="left")],
        "schedule": [StrOptions({"cosine", "step"})],
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
        patch_size=2,
        n_codes=512,
        d_model=128,
        n_layers=2,
        n_heads=8,
        dim_feedforward=256,
        dropout=0.0,
        transport="nearest",
        transport_weight=0.0,
        max_iter=5,
        batch_size=16,
        learning_rate=1e-3,
        schedule="cosine",
        weight_decay=1e-4,
        category_balance=0.5,
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
        self.patch_size = patch_size
        self.n_codes = n_codes
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.transport = transport
        self.transport_weight = transport_weight

    @classmethod
    def paper(cls, **overrides):
        """The published configuration: EfficientNet-B4 at 224², d = 256, 4 layers, 512 codes, 1000 passes.

        Its weights have no package: give ``weights=`` a file, or "hub". What is not the paper's even so: codes start
        from the data, dead codes are revived, and scores are calibrated.
        """
        published = {
            "backbone": "tf_efficientnet_b4",
            "stages": (0, 1, 2, 3),
            "image_size": 224,
            "standardize": False,
            "gaussian": False,
            "patch_size": 1,
            "n_codes": 512,
            "d_model": 256,
            "n_layers": 4,
            "n_heads": 8,
            "dim_feedforward": 1024,
            "dropout": 0.1,
            "transport": "conditional",
            "max_iter": 1000,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "schedule": "step",
            "category_balance": 0.0,
            "weight_decay": 1e-4,
        }
        return cls(**{**published, **overrides})

    def _validate_params(self):
        super()._validate_params()
        check_stages(self.stages)
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(
                f"d_model must be even and a multiple of n_heads; got d_model={self.d_model}, n_heads={self.n_heads}."
            )
        if self.transport == "exact" and self.transport_weight:
            raise ValueError("transport='exact' has no gradient to train with: set transport_weight=0.")

    def _stages(self, strides):
        if self.stages is None:
            at_8_and_16 = tuple(i for i, stride in enumerate(strides) if stride in (8, 16))
            return spread_stages(strides) or at_8_and_16 or default_stages(strides), True
        return self.stages, max(self.stages) < len(strides) - 1  # else the last one is rebuilt too

    def _model_config(self, shape, n_categories, n_added):
        n_maps = len(shape.grids) - shape.has_deep_view
        (height, width), patch_size = shape.grids[n_maps - 1], self.patch_size
        if shape.strides is not None:
            # A grid finer than all stages would show no more.
            strides = shape.strides[:n_maps]
            patch_size = min(patch_size, max(1, strides[-1] // min(strides)))
        if n_maps > 1:
            height, width = patch_size * height, patch_size * width
        if height % patch_size or width % patch_size:
            if height * width > 1:  # not rows, which are a grid of a single cell
                warn(f"patch_size={patch_size} does not divide maps of {height, width} cells: each cell is a token.")
            patch_size = 1
        return {
            "in_channels": sum(shape.channels[:n_maps]),
            "grid": (height, width),
            "n_maps": n_maps,
            "n_categories": n_categories,
            "patch_size": patch_size,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "dim_feedforward": self.dim_feedforward,
            "dropout": self.dropout,
            "n_codes": self.n_codes,
            "transport": self.transport,
            "transport_weight": self.transport_weight,
        }
