"""
A threshold without defects
===========================

When a production line starts, there are good parts and no defective ones. A threshold can be set all the same: not by
the defects that it finds, which nobody knows yet, but by its false-alarm rate on good parts.

Here the detector learns solar cells of one kind, without defects. A fifth of them is held out of training and sets the
threshold. Then the detector scores hundreds of others. It trains for few epochs: the guarantee below does not depend on
how good the model is.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from vqad import HVQTransDetector
from vqad.datasets import load_elpv

cells = load_elpv(category="poly")
sound = np.random.default_rng(0).permutation(np.flatnonzero(cells.probability == 0))
known, further = cells[sound[:200]], cells[sound[200:600]]
defective = cells[np.flatnonzero(cells.probability == 1)[:60]]

# %%
# Ask for a rate of false alarms
# ------------------------------

small = {"image_size": 96, "d_model": 32, "n_codes": 32, "max_iter": 4, "random_state": 0}
detector = HVQTransDetector(**small, false_alarm_rate=0.05).fit(known)
alarms = detector.predict(further) == -1
print(f"asked: 5 %; of {len(further)} further sound cells {np.mean(alarms):.1%} are called anomalous")

# %%
# A p-value for every image
# -------------------------
#
# ``p_values`` says how often a sound cell would look this anomalous. Calling a p-value of at most :math:`\alpha`
# anomalous gives a false-alarm rate of at most :math:`\alpha` in expectation, for any :math:`\alpha`, even one chosen
# later. The blue line is the rate that was measured. It cannot follow the diagonal exactly: with :math:`n`
# held-out cells, the rate of one fitted detector at :math:`\alpha = k / (n + 1)` is a draw from Beta(k, n + 1 − k).
# The band holds 90 % of these draws at each rate; the sampling of the further cells comes on top of it, and is small.

p_sound, p_defective = detector.p_values(further), detector.p_values(defective)
n = len(detector.conformal_.scores_[0])
k = np.arange(1, n + 1)
asked = k / (n + 1)
low, high = stats.beta.ppf([[0.05], [0.95]], k, n + 1 - k)

figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.fill_between(asked, low, high, color="0.85", label=f"90 % of detectors with {n} held-out cells")
axis.plot([0, 1], [0, 1], color="0.4", linestyle="--", label="as asked")
axis.plot(asked, [np.mean(p_sound <= a + 1e-12) for a in asked], label="sound cells")
axis.plot(asked, [np.mean(p_defective <= a + 1e-12) for a in asked], label="defective cells")
axis.set(xlabel="rate that was asked for", ylabel="share that is called anomalous", xlim=(0, 0.5), ylim=(0, 1))
axis.legend(frameon=False, fontsize=8)

# %%
# Too few images
# --------------
#
# :math:`n` held-out images support no rate below :math:`1 / (n + 1)`. If you ask for one, the detector warns and says
# which rate it reached; so does ``recalibrate``, which trains nothing again.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    detector.recalibrate(false_alarm_rate=0.001)
for warning in caught:
    print(warning.message)
