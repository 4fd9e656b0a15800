"""HVQTransDetector: HVQ-Trans as a scikit-learn estimator."""

from __future__ import annotations

from numbers import Integral, Real

from sklearn.utils._param_validation import Interval, StrOptions

from vqad._parameters import with_shared_parameters
from vqad._warn import warn
from vqad.backbones import DEFAULT_BACKBONE, default_stages, spread_stages
from vqad.base import BaseImageDetector
from vqad.nn.hvq_trans import HVQTrans


@with_shared_parameters
class HVQTransDetector(BaseImageDetector):
    """Hierarchical vector-quantised transformer for multi-class anomaly detection.

    Features of a frozen backbone pass through a transformer that replaces the output of each encoder layer with the
    nearest of the category's learned codes, and reconstructs the features from these codes. Because the codes are
    learned from normal images, anomalies cannot be reconstructed: the reconstruction error, and the cost of
    transporting the image's cells to the codes, tell how anomalous an image is and where [1]_.

    One model serves many kinds of object. Each new image's category is inferred from the image.

    Parameters
    ----------
    backbone : str, transformer or None, default="tf_efficientnet_lite0"
        Name of a timm model; or a transformer whose ``transform`` returns feature maps (n, h, w, C); or None if X
        already holds features: rows (n, C) or maps (n, h, w, C).
    %(weights)s
    stages : tuple of int or None, default=None
        Stages of the backbone whose features are reconstructed, counted from 0; the coarsest sets the grid of tokens.
        None selects those of strides 8 and 16, (2, 3) for the default backbone; for a vision transformer, whose stages
        are its blocks, the last block of each quarter.
    %(image_size)s
    %(image_shape)s
    %(ignore)s
    %(tiles)s
    standardize : bool, default=True
        Whether to standardise each feature channel to mean 0 and variance 1 over the training images, so that all
        channels weigh the same in the reconstruction. The published method does not.
    gaussian : bool, default=True
        Whether scores and maps come from Gaussians fitted at each location, see `vqad.scoring.Scorer`: to the features
        themselves, including the coarsest stage, and to the decoder's error. They find far more than the published
        terms alone, which False selects.
    patch_size : int, default=2
        Cells along each side of a token: features are reconstructed on a grid this many times finer than the grid of
        tokens, which gives finer maps at the same cost of attention. It is limited to the ratio of the coarsest to the
        finest stride; 1, with a warning, is used for maps that it does not divide. The published method has 1.
    n_codes : int, default=512
        Codes per codebook; each category has a codebook at each level.
    d_model : int, default=128
        Width of the encoder; the decoder has twice that.
    n_layers : int, default=2
        Layers of the encoder and of the decoder. There is one more level of codes.
    n_heads : int, default=8
        Attention heads.
    dim_feedforward : int, default=256
        Width of the transformer's feed-forward layers.
    dropout : float, default=0.0
        Dropout rate in training.
    transport : {"conditional", "nearest", "sinkhorn", "exact"}, default="nearest"
        How the transport cost is computed. "conditional" is the published one-directional cost. "sinkhorn" and "exact"
        use an optimal transport plan between the image's cells and the codes, whose marginal is their usage. "nearest"
        fixes only the cells' marginal, so each cell goes to its nearest code.
    transport_weight : float, default=0.0
        Weight of the transport cost in the training loss.
    %(max_iter)s
    batch_size : int, default=16
        Images per training step.
    learning_rate : float, default=1e-3
        Peak learning rate of AdamW.
    schedule : {"cosine", "step"}, default="cosine"
        Learning-rate schedule. "cosine": a short warm-up, then half a cosine down to zero. "step", as published:
        constant, then a tenth of it over the last fifth of the passes.
    %(weight_decay)s
    %(category_balance)s
    %(early_stopping)s
    %(validation_fraction)s
    %(n_iter_no_change)s
    tol : float, default=1e-4
        Smallest decrease of the validation loss that counts as an improvement.
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
        Labels given to `fit`, sorted; or 0, 1, ... if the categories were discovered.
    %(offset_)s
    %(map_threshold_)s
    loss_curve_, validation_curve_ : list of float
        Training and validation loss after each pass.
    %(n_iter_)s
    %(training_log_)s
    %(n_images_)s
    model_ : vqad.nn.hvq_trans.HVQTrans
        The trained module, on the CPU.
    %(features_)s
    %(scorer_)s
    prototypes_ : vqad.prototypes.Prototypes
        For each code, the nearest patch of the normal images.

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

        This backbone has no weight package: pass ``weights=`` a file or "hub". It still differs from the paper in that
        codes are initialised from the data, dead codes are revived, and scores are calibrated.

        Parameters
        ----------
        **overrides
            Parameters of the detector that replace published ones.

        Returns
        -------
        HVQTransDetector
            Not fitted.
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
        return self.stages, max(self.stages) < len(strides) - 1  # else the last stage is reconstructed too

    def _model_config(self, shape, n_categories, n_added):
        n_maps = len(shape.grids) - shape.has_deep_view
        (height, width), patch_size = shape.grids[n_maps - 1], self.patch_size
        if shape.strides is not None:
            # A grid finer than the finest stage would show nothing new.
            strides = shape.strides[:n_maps]
            patch_size = min(patch_size, max(1, strides[-1] // min(strides)))
        if n_maps > 1:
            height, width = patch_size * height, patch_size * width
        if height % patch_size or width % patch_size:
            if height * width > 1:  # rows of features are a grid of one cell
                warn(f"patch_size={patch_size} does not divide maps of {height, width} cells: using patch_size=1.")
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
