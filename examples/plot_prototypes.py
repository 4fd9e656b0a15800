"""
What the prototypes look like
=============================

The detectors quantise every patch of an image to the nearest of the codes that they learned from normal images. This
page shows what those codes stand for, and to which codes a defect is quantised: the solar cells of the quick start
[1]_, through the codes of `~vqad.HVQTransDetector`.

The images are few and the network is small, so that this page is built in less than a minute.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from vqad import HVQTransDetector
from vqad.datasets import load_elpv
from vqad.display import CodebookDisplay
from vqad.images import check_images
from vqad.report import overlay

# %%
# 120 sound cells to learn from, 40 surely defective ones to look at.

cells = load_elpv()
rng = np.random.default_rng(0)
sound = rng.permutation(np.flatnonzero(cells.probability == 0))[:120]
defective = rng.permutation(np.flatnonzero(cells.probability == 1))[:40]
known, new = cells[sound], cells[defective]

detector = HVQTransDetector(image_size=160, d_model=64, n_codes=64, max_iter=8, false_alarm_rate=0.05, random_state=0)
detector.fit(known, category=known.category)

# %%
# Codes
# -----
#
# There is one codebook for each kind of solar cell and each level of the network. No code is a picture, but for each
# there is a patch of a sound image that is nearest to it, its prototype. ``fit`` remembers where that is, how many
# patches have the code, and a thumbnail.

prototypes = detector.prototypes_
print(prototypes)
CodebookDisplay.from_estimator(detector, n_codes=36)

# %%
# The number under a picture is the share of all patches of sound cells that have the code. There are codes for plain
# silicon, for the bars that collect the current, at several heights, and for edges and corners; of polycrystalline
# cells also for grains of different brightness.
#
# A defect, and its nearest codes
# -------------------------------
#
# ``explain`` gives for each image the arrays behind its map. Below are the six most anomalous images: where the map is
# highest, the map, the patch at that place, and the prototype of the code that it was quantised to. All codes come from
# sound cells, so the model had to use a sound patch instead, and could not reconstruct the defect.

explanations = detector.explain(new)
order = np.argsort([-explanation.anomaly_score for explanation in explanations])[:6]
maps = detector.anomaly_map(new[order])
images = check_images(new[order])

figure, axes = plt.subplots(4, 6, figsize=(9, 6.4), layout="constrained")
for k, i in enumerate(order):
    explanation, image = explanations[i], images.pixels(k)
    cell = explanation.cell_of("level_0")
    top, left, height, width = prototypes.box("level_0", cell, image.shape)
    prototype = prototypes.of(explanation, "level_0")
    axes[0, k].imshow(image)
    axes[0, k].add_patch(Rectangle((left, top), width, height, fill=False, color="tab:orange", linewidth=1.5))
    axes[0, k].set_title(f"{explanation.category}\nscore {explanation.anomaly_score:.1f}", fontsize=8)
    axes[1, k].imshow(overlay(image, maps[k], detector.map_threshold_))
    axes[2, k].imshow(prototypes.patch(image, "level_0", cell))
    if prototype is not None and prototype.thumbnail is not None:  # some codes no sound patch has
        axes[3, k].imshow(prototype.thumbnail)
for row, name in zip(axes, ("image", "map", "worst patch", "its prototype")):
    row[0].set_ylabel(name, fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %%
# What the map is made of
# -----------------------
#
# A map is the sum of its terms, each standardised by what is normal at that place. Where the map of the first image is
# highest:

worst = explanations[order[0]]
for name, contribution in worst.contributions.items():
    print(f"{name}: {contribution[worst.worst_cell]:.1f}")
print(f"map: {worst.standardized[worst.worst_cell]:.1f}, threshold {detector.map_threshold_:.1f}")

# %%
# .. [1] Buerhop-Lutz et al.: A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
#    Imagery, EU PVSEC 2018. Licence of the images: CC BY-NC-SA 4.0.
