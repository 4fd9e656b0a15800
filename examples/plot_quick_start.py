"""
Quick start: solar cells
========================

Learn what sound solar cells look like, and find defective ones. The images are electroluminescence pictures of the
ELPV data set [1]_: cells of two kinds, mono- and polycrystalline, of which the same model learns both.

The images are few and the network is small, so that this page is built in less than a minute. For better results
leave the parameters at their defaults, and give it all the sound cells that there are.
"""

import numpy as np

from vqad import HVQTransDetector
from vqad.datasets import load_elpv
from vqad.display import AnomalyMapDisplay, ScoreDistributionDisplay
from vqad.metrics import evaluate

# %%
# Images
# ------
#
# The data set is a list of files with labels: no image is read yet. Experts rated how probable a defect is; here we
# take the cells that they were sure of: 150 sound cells to learn from, and 60 sound and 60 defective ones to test on.

cells = load_elpv()
rng = np.random.default_rng(0)
sound = rng.permutation(np.flatnonzero(cells.probability == 0))
defective = rng.permutation(np.flatnonzero(cells.probability == 1))
known = cells[sound[:150]]
new = cells[np.append(sound[150:210], defective[:60])]
print({str(kind): int((known.category == kind).sum()) for kind in np.unique(known.category)})

# %%
# Fit
# ---
#
# ``category`` tells which kind of cell each image shows; scoring will not need it. A fifth of the images is held out
# and sets the threshold: 30 of them support a false-alarm rate of 5 %, not one of 1 %.

detector = HVQTransDetector(image_size=160, d_model=64, n_codes=128, max_iter=3, false_alarm_rate=0.05, random_state=0)
detector.fit(known, category=known.category)

# %%
# Score
# -----
#
# ``score_samples`` is higher for normal images, as everywhere in scikit-learn; metrics take anomaly scores.

label = detector.predict(new)
print(f"sound cells called anomalous: {np.mean(label[new.target == 1] == -1):.0%}")
print(f"defective cells called anomalous: {np.mean(label[new.target == -1] == -1):.0%}")
print(f"kind inferred right: {np.mean(detector.predict_category(new) == new.category):.0%}")
print(evaluate(new.target, -detector.score_samples(new), new.category))

# %%
# Scores are standardised for each category, so that one threshold serves all.

ScoreDistributionDisplay.from_estimator(detector, new, new.target, per_category=True)

# %%
# Where
# -----
#
# The two most anomalous of the defective cells, two around their median, and the sound cells with the lowest and the
# highest score: the last one shows what a false alarm looks like, or what comes closest to it. Colours are on one
# scale for all images: orange is the threshold of the maps.

score = -detector.score_samples(new)
bad, good = np.flatnonzero(new.target == -1), np.flatnonzero(new.target == 1)
bad, good = bad[np.argsort(-score[bad])], good[np.argsort(score[good])]
chosen = [bad[0], bad[1], bad[29], bad[30], good[0], good[-1]]
AnomalyMapDisplay.from_estimator(detector, new[chosen], new.target[chosen])

# %%
# .. [1] Buerhop-Lutz et al.: A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
#    Imagery, EU PVSEC 2018. Licence of the images: CC BY-NC-SA 4.0.
