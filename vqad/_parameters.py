"""What the parameters and attributes that all detectors share mean: written once, shown in each docstring."""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import TypeVar

Class = TypeVar("Class", bound=type)


class Shared:
    """Parameters and attributes.

    weights : None, "hub", "random", str or path, default=None
        Weights of the backbone: None takes an installed weight package, a path a local ``.safetensors`` or ``.pth``
        file, "hub" lets timm download them. Nothing is downloaded unasked.
    image_size : int or (int, int), default=288
        Height and width in pixels that the backbone sees. Its coarsest stage sees a view of 7/9 of that.
    image_shape : tuple of int or None, default=None
        (H, W) or (H, W, C) of images that come as flattened rows.
    ignore : None, array-like of shape (h, w), str or path, default=None
        Where not to look in any image: an array that is true, or the path of an image that is not black, there; it is
        stretched to the size of each image. What is there is neither learned nor judged, and maps are 0 there. For a
        mask of each image see `vqad.images.ImageSequence.ignoring`.
    tiles : None, int or (int, int), default=None
        Size of square tiles in pixels of the image, or (size, overlap); an eighth of the size overlaps where it is not
        given. Each tile is seen at ``image_size``, so that small defects in large images show. Images stay what is
        counted: the score is that of the worst tile, maps are of the whole, thresholds hold for whole images, and
        categories are told by a small view of all.
    max_iter : int, default=5
        Passes over the training images.
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
        Share of normal images that may be called anomalous. Set after `fit` it moves the thresholds at once.
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
        takes all processors. None reads each image when it is its turn. Within ``joblib.parallel_config`` of a backend
        of processes or machines ("loky", "dask", "ray") it is the number of workers instead, on which many images are
        scored, as in scikit-learn; None takes as many as the configuration says. Results are the same.
    memory : None, str, path or joblib.Memory, default=None
        Where features of images are kept on disk, as in scikit-learn's `Pipeline`: an image that was seen before, by
        any fit or scoring call with the same backbone, is not passed through the backbone again.
    random_state : int, RandomState instance or None, default=None
        An int makes two fits on one machine identical, if torch has as many threads in both.
    verbose : int, default=0
        Whether to show progress.
    offset_ : float or ndarray of shape (n_categories,)
        ``decision_function`` is ``score_samples`` minus this.
    map_threshold_ : float
        Values of ``anomaly_map`` over this are anomalous.
    n_iter_ : int
        Passes that were run.
    training_log_ : vqad.training_run.TrainingLog
        The last training: its curves, codes in use, seconds, and whether Ctrl-C ended it.
    n_images_ : int
        Normal images given, held-out ones among them.
    features_ : BackboneFeatures
        The backbone.
    scorer_ : vqad.scoring.Scorer
        What makes scores and maps of features and model, on the CPU.
    """


_BLOCK = re.compile(r"^(\w+) : .*\n(?: {4}.*\n)*", re.MULTILINE)


def with_shared_parameters(cls: Class) -> Class:
    """Put the text of a shared parameter in place of each line ``%(name)s`` of a class's docstring."""
    if cls.__doc__ is not None:  # python -OO drops it
        blocks = _BLOCK.finditer(cleandoc(Shared.__doc__ or "") + "\n")
        text = {block[1]: block[0].rstrip("\n") for block in blocks}
        shown = lambda line: re.sub("^", line[1], text[line[2]], flags=re.MULTILINE)  # noqa: E731
        cls.__doc__ = re.sub(r"^( *)%\((\w+)\)s$", shown, cls.__doc__, flags=re.MULTILINE)
    return cls
