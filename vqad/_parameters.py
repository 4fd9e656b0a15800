"""Descriptions of the parameters and attributes that all detectors share, inserted into each docstring."""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import TypeVar

Class = TypeVar("Class", bound=type)


class Shared:
    """Parameters and attributes.

    weights : None, "hub", "random", str or path, default=None
        Weights of the backbone: None uses an installed weight package, a path a local ``.safetensors`` or ``.pth``
        file, and "hub" lets timm download them. Nothing is downloaded unless you ask for it.
    image_size : int or (int, int), default=288
        Height and width in pixels that the backbone sees. Its coarsest stage sees the image at 7/9 of that size.
    image_shape : tuple of int or None, default=None
        (H, W) or (H, W, C) of images that come as flattened rows.
    ignore : None, array-like of shape (h, w), str or path, default=None
        Which part of every image to ignore: an array that is true there, or the path of an image that is not black
        there, stretched to the size of each image. That part is neither learned nor judged, and maps are 0 there. For
        a mask per image see `vqad.images.ImageSequence.ignoring`.
    tiles : None, int or (int, int), default=None
        Size of square tiles in pixels of the image, or (size, overlap); the overlap defaults to an eighth of the size.
        Each tile is resized to ``image_size``, so that small defects in large images show. Results are still per image:
        its score is that of the worst tile, its map covers the whole image, thresholds hold for whole images, and its
        category is inferred from a small view of all of it.
    max_iter : int, default=5
        Passes over the training images (epochs).
    weight_decay : float, default=1e-4
        Weight decay of AdamW.
    category_balance : float in [0, 1], default=0.5
        How far training compensates for categories of different sizes, given or discovered. A pass draws as many images
        as there are, and from a category of n images a share proportional to ``n ** (1 - category_balance)``. 0 draws
        each image once, as published; 1 draws all categories equally often.
    early_stopping : bool, default=False
        Whether to hold out ``validation_fraction`` of the training images, stop when their loss no longer falls, and
        restore the best pass.
    validation_fraction : float, default=0.1
        Share of the training images that early stopping holds out.
    n_iter_no_change : int, default=10
        Passes without an improvement of ``tol`` after which early stopping stops.
    warm_start : bool, default=False
        Whether the next `fit` continues from the current model, for ``max_iter`` more passes and with the same
        categories. The backbone, the scale of the features and the routing stay those of the first fit. Pass the images
        of that fit in the same order: then the images held out for thresholds stay held out.
    checkpoint_dir : str, path or None, default=None
        Folder for the state of the training, one file per fit. If the process is killed, the same fit with the same
        images resumes from there and ends with the same model. The file of a finished fit is kept, so that nothing is
        lost before the detector is saved. With ``random_state=None`` the file also holds the seed and is deleted when
        the fit is finished, because the next fit is a different one. `partial_fit` writes no checkpoints.
    contamination : "auto" or float in (0, 0.5], default="auto"
        "auto": the training images are taken as clean, and ``offset_`` is the conformal quantile of the scores of
        held-out images at ``false_alarm_rate``. A float: ``offset_`` is that quantile of the scores of all images
        given to `fit`.
    false_alarm_rate : float, default=0.05
        Share of normal images that may be called anomalous. Setting it after `fit` moves the thresholds at once.
    calibration_fraction : float, default=0.2
        Share of the images, or of the groups given to `fit`, that is held out of training to set scales and thresholds.
    threshold : {"global", "category"}, default="global"
        One threshold for all images, or one per category.
    device : "auto", str or torch.device, default="auto"
        "auto" uses CUDA if there is a GPU, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Precision of training and of the model. "auto" uses bfloat16 where the hardware supports it natively. The
        backbone uses bfloat16 only with "bfloat16".
    n_jobs : int or None, default=None
        Number of threads that read and decode images while the backbone computes, at least one per computing thread;
        -1 uses all processors, None reads each image when it is needed. Within ``joblib.parallel_config`` of a backend
        of processes or machines ("loky", "dask", "ray") it is the number of workers that score many images, as in
        scikit-learn; None then follows the configuration. Results are the same in all cases.
    memory : None, str, path or joblib.Memory, default=None
        Where to cache the features of images on disk, as in scikit-learn's `Pipeline`: an image that any fit or scoring
        call with the same backbone has seen does not pass through the backbone again.
    random_state : int, RandomState instance or None, default=None
        An int makes two fits on one machine identical, provided that torch uses as many threads in both.
    verbose : int, default=0
        Whether to show progress bars.
    offset_ : float or ndarray of shape (n_categories,)
        ``decision_function`` is ``score_samples`` minus this.
    map_threshold_ : float
        Values of ``anomaly_map`` above this are anomalous.
    n_iter_ : int
        Passes that were run.
    training_log_ : vqad.training_run.TrainingLog
        The last training: loss curves, codes in use, seconds, and whether Ctrl-C ended it.
    n_images_ : int
        Number of normal images given, including held-out ones.
    features_ : BackboneFeatures
        The backbone.
    scorer_ : vqad.scoring.Scorer
        The module that turns features into scores and maps, on the CPU.
    """


_BLOCK = re.compile(r"^(\w+) : .*\n(?: {4}.*\n)*", re.MULTILINE)


def with_shared_parameters(cls: Class) -> Class:
    """Replace each line ``%(name)s`` of a class's docstring with the description of that shared parameter."""
    if cls.__doc__ is not None:  # python -OO drops it
        blocks = _BLOCK.finditer(cleandoc(Shared.__doc__ or "") + "\n")
        text = {block[1]: block[0].rstrip("\n") for block in blocks}
        shown = lambda line: re.sub("^", line[1], text[line[2]], flags=re.MULTILINE)  # noqa: E731
        cls.__doc__ = re.sub(r"^( *)%\((\w+)\)s$", shown, cls.__doc__, flags=re.MULTILINE)
    return cls
