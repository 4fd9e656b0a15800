"""The plainest competitor: distance to the nearest patch of normal images, which the demonstration measures beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vqad.features import BackboneFeatures
from vqad.images import check_images


class PatchMemoryBank:
    """The yardstick: distance of an image's patches to the nearest patch of normal images.

    Features of the default backbone at strides 8 and 16, on the grid of stride 8, averaged over 3 x 3 cells,
    every channel standardised; an image's score is its farthest patch's. PatchCore [1]_ in its plainest form,
    with a random sample in place of a coreset.

    Parameters
    ----------
    n_patches : int
        Patches to keep of each category.
    device : str, default="auto"
    random_state : int, default=0

    References
    ----------
    .. [1] Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection, CVPR
       2022. arXiv:2106.08265.
    """

    def __init__(self, n_patches: int, *, device: str = "auto", random_state: int = 0):
        self.n_patches = n_patches
        self.features = BackboneFeatures(stages=(2, 3), grid_scale=2, device=device)
        self.random_state = random_state

    def fit(self, images: Any, category: NDArray[Any]) -> PatchMemoryBank:
        """Keep a random sample of the patches of normal images, as many of every image as of any other."""
        self.features.fit()
        rng = np.random.RandomState(self.random_state)
        counts = {name: (np.asarray(category) == name).sum() for name in np.unique(category)}
        cells = int(np.prod(self.features.grid_))
        kept = []
        for rows, patches in self._patches(images):
            for row, own in zip(rows, patches):
                # Rounded up, and cut to the exact number below.
                wanted = -(-self.n_patches // counts[category[row]])
                kept.append((category[row], own[rng.permutation(cells)[:wanted]]))
        bank = torch.cat([torch.cat([own for name, own in kept if name == kind])[: self.n_patches] for kind in counts])
        self.scale = bank.std(0).clamp_min(1e-6)
        self.bank = bank / self.scale
        self.squares = self.bank.square().sum(1)
        return self

    def anomaly_score(self, images: Any) -> NDArray[np.float64]:
        """Distance of every image's farthest patch to the bank, (n,)."""
        scores = []
        for _, patches in self._patches(images):
            for own in patches / self.scale:
                # |q - b|² = |q|² - 2 q·b + |b|²: a matrix product, and one minimum over the bank.
                nearest = torch.addmm(self.squares, own, self.bank.T, alpha=-2).amin(1) + own.square().sum(1)
                scores.append(float(nearest.max().clamp_min(0).sqrt()))
        return np.array(scores)

    def _patches(self, images: Any) -> Any:
        """Rows and their patches (n, cells, C), chunk by chunk."""
        for rows, (maps,) in self.features.iter_maps(check_images(images)):
            smooth = F.avg_pool2d(maps.float().cpu(), 3, stride=1, padding=1, count_include_pad=False)
            yield rows, smooth.flatten(2).transpose(1, 2)
