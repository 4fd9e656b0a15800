"""HVQTransDetector: HVQ-Trans as a scikit-learn estimator."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from sklearn.utils._param_validation import Interval, StrOptions

from vqad._warn import warn
from vqad.backbones import DEFAULT_BACKBONE, check_stages, default_stages, spread_stages
from vqad.base import BaseImageDetector
from vqad.features import merge_maps
from vqad.nn.hvq_trans import HVQTrans
from vqad.scoring import Term


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
    weights : None, "hub", "random", str or path, default=None
        Weights of the backbone: None takes an installed weight package, a path a local ``.safetensors`` or ``.pth``
        file, "hub" lets timm download them. Nothing is downloaded unasked.
    stages : tuple of int or None, default=None
        Stages of the backbone whose features are rebuilt, counted from 0; the coarsest has the grid of the tokens. None
        takes those of strides 8 and 16: (2, 3) of the default backbone. Of a vision transformer, whose stages are its
        blocks, it takes the last block of each quarter.
    image_size : int or (int, int), default=288
        Height and width in pixels that the backbone sees. Its coarsest stage sees a view of 7/9 of that.
    image_shape : tuple of int or None, default=None
        (H, W) or (H, W, C) of images that come as flattened rows.
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
    max_iter : int, default=10
        Passes over the training images.
    batch_size : int, default=16
        Images per training step; also bounds the memory that images take.
    learning_rate : float, default=1e-3
        Peak rate of AdamW.
    schedule : {"cosine", "step"}, default="cosine"
        How the rate runs: a short warm-up and half a cosine down to zero; or, as published, constant and a tenth of it
        over the last fifth of the passes.
    weight_decay : float, default=1e-4
        Of AdamW.
    category_balance : float in [0, 1], default=0.5
        How far training makes up for different sizes of the categories, given or found: a pass draws as many images as
        there are, those of a category of n in proportion to ``n ** (1 - category_balance)``. 0 draws each image once,
        as published; 1 draws all categories equally often.
    early_stopping : bool, default=False
        Whether to hold out ``validation_fraction`` of the training images, stop when their loss no longer falls, and go
        back to the best pass.
    validation_fraction : float, default=0.1
        Share of the training images that early stopping watches.
    n_iter_no_change : int, default=10
        Passes without an improvement of ``tol`` before stopping early.
    tol : float, default=1e-4
        Improvement of the validation loss that counts.
    warm_start : bool, default=False
        Whether a further `fit` goes on from the model as it is, for ``max_iter`` more passes, with the same categories.
        Backbone, scale of the features and routing stay those of the first fit. Give it the images of that fit, in
        their order: then those held out to set thresholds stay held out.
    checkpoint_dir : str, path or None, default=None
        Folder to keep the state of the training in, a file for each fit. After a kill at any moment, the same fit with
        the same images goes on from there, to the very model that it would have come to. The file of a finished fit
        stays, so that nothing is lost before the detector is saved. With ``random_state=None`` the seed is in the file,
        and the file goes when the fit is finished: the next one is another. `partial_fit` keeps nothing.
    contamination : "auto" or float in (0, 0.5], default="auto"
        "auto": the training images are taken as clean and ``offset_`` is the conformal quantile of held-out
        images at ``false_alarm_rate``. A float: that quantile of the training images' scores.
    false_alarm_rate : float, default=0.05
        Share of normal images that may be called anomalous.
    calibration_fraction : float, default=0.2
        Share of the images, or of the groups given to `fit`, that is not trained on but sets scales and thresholds.
    threshold : {"global", "category"}, default="global"
        One threshold for all images, or one for each category.
    device : "auto", str or torch.device, default="auto"
        "auto" takes CUDA where there is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the training and of the model. "auto" takes bfloat16 where the hardware has it natively. The backbone
        computes in bfloat16 only where "bfloat16" is asked for.
    n_jobs : int or None, default=None
        Threads that read and decode images while the backbone works, at least one for each thread that computes; -1
        takes all processors. None reads each image when it is its turn. Results are the same.
    memory : None, str, path or joblib.Memory, default=None
        Where features of images are kept on disk, as in scikit-learn's `Pipeline`: an image that was seen before, by
        any fit or scoring call with the same backbone, is not passed through the backbone again.
    random_state : int, RandomState instance or None, default=None
        An int makes two fits on one machine identical, if torch has as many threads in both.
    verbose : int, default=0
        Whether to show progress.

    Attributes
    ----------
    categories_ : ndarray of shape (n_categories,)
        Labels given to fit, sorted; or 0, 1, ... where the categories were discovered.
    offset_ : float or ndarray of shape (n_categories,)
        ``decision_function`` is ``score_samples`` minus this.
    map_threshold_ : float
        Values of ``anomaly_map`` over this are anomalous.
    loss_curve_, validation_curve_ : list of float
        After every pass.
    n_iter_ : int
        Passes that were run.
    training_log_ : vqad.training.TrainingLog
        The last training: its curves, codes in use, seconds, and whether Ctrl-C ended it.
    n_images_ : int
        Normal images given, held-out ones among them.
    model_ : vqad.nn.hvq_trans.HVQTrans
        The trained module, on the CPU.
    features_ : BackboneFeatures
        The backbone.
    scorer_ : vqad.scoring.Scorer
        What makes scores and maps of features and model, on the CPU.
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

    _clip_norm = 0.1
    _takes_merged = True
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
        max_iter=10,
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
        self.backbone = backbone
        self.weights = weights
        self.stages = stages
        self.image_size = image_size
        self.image_shape = image_shape
        self.standardize = standardize
        self.gaussian = gaussian
        self.patch_size = patch_size
        self.n_codes = n_codes
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.transport = transport
        self.transport_weight = transport_weight
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.category_balance = category_balance
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.checkpoint_dir = checkpoint_dir
        self.contamination = contamination
        self.false_alarm_rate = false_alarm_rate
        self.calibration_fraction = calibration_fraction
        self.threshold = threshold
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

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

    def _stages_of(self, strides):
        if self.stages is not None:
            return self.stages
        at_8_and_16 = tuple(i for i, stride in enumerate(strides) if stride in (8, 16))
        return spread_stages(strides) or at_8_and_16 or default_stages(strides)

    def _feature_options(self, strides):
        options = super()._feature_options(strides)
        if self.stages is not None and max(self.stages) >= len(strides) - 1:  # the last one is rebuilt too
            options.pop("deep_size", None)
        return options

    def _arranged(self, maps):
        """All but the smaller view, side by side on a grid as fine as the tokens' patches want."""
        if len(maps) == 1:
            return maps[0]
        strides = self.features_.strides_
        if self.features_.deep_size_ is not None:
            maps, strides = maps[:-1], strides[:-1]
        if hasattr(self, "_model_shapes"):  # whatever patch_size was set to since
            return merge_maps(maps, self._model_shapes[1][0])
        # A grid finer than all stages would show no more.
        scale = min(self.patch_size, max(1, strides[-1] // min(strides)))
        return merge_maps(maps, tuple(scale * cells for cells in maps[-1].shape[2:]))

    def _make_model(self, channels, shapes, n_categories):
        patch_size = self.patch_size
        if isinstance(self.backbone, str):
            strides = self.features_.strides_[: -1 if self.features_.deep_size_ is not None else None]
            patch_size = min(patch_size, max(1, strides[-1] // min(strides)))
        if any(cells % patch_size for cells in shapes[0]):
            if math.prod(shapes[0]) > 1:  # not rows, which are a grid of a single cell
                warn(f"patch_size={patch_size} does not divide maps of {shapes[0]} cells: each cell is a token.")
            patch_size = 1
        return HVQTrans(
            channels[0],
            shapes[0],
            n_categories,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            dim_feedforward=self.dim_feedforward,
            dropout=self.dropout,
            n_codes=self.n_codes,
            transport=self.transport,
            transport_weight=self.transport_weight,
            patch_size=patch_size,
        )

    def _initialise(self, batches):
        self.model_.initialise_projection(batches)
        super()._initialise(batches)

    def _add_categories(self, n, batches):
        """Codes from the data; weights that are the mean of those of the known categories."""
        heads = list(self.model_.output_projection)
        for _ in range(n):
            new = self.model_.output_projection[self.model_.add_category()]
            with torch.no_grad():
                new.weight.copy_(torch.stack([head.weight for head in heads]).mean(0))
                new.bias.copy_(torch.stack([head.bias for head in heads]).mean(0))
        self.model_.initialise_codes(batches)

    def _parts_of(self, categories):
        return [*self.model_.codebook, *(self.model_.output_projection[c] for c in categories)]

    def _scoring_model(self, model, dtype):
        return model if dtype == torch.float32 else model.scoring_copy(dtype)

    def _model_fields(self, model, features, category):
        if self._has_gaussians:
            return model.deviations(features, category)
        return model.anomaly_map(features, category)

    def _terms(self):
        """Decoder's error and transport beside the features; or half the reconstruction's length, half the transport.

        The transport counts on the map alone, where it outlines what is missing (docs/choices.md).
        """
        levels = range(self.n_layers + 1)
        transport = [Term(f"transport_{j}", 1.0 / len(levels), (), is_trained=True) for j in levels]
        if self.gaussian:
            return [*self._feature_terms(), Term("error", 1.0, (0.0,), is_trained=True), *transport], None
        return [Term("reconstruction", 1.0, (), is_trained=True), *transport], 0.01

    def _codebooks(self):
        return {f"level_{j}": quantizer for j, quantizer in enumerate(self.model_.quantizers)}

    def _look_up(self, model, features, category):
        found = {}
        for j, level in enumerate(model.look_up(features, category)):
            distance = (level.input.float() - level.quantized.float()).norm(dim=-1)
            found[f"level_{j}"] = tuple(cells.view(-1, *model.token_grid) for cells in (level.indices, distance))
        return found
