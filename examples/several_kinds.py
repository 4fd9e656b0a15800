"""
Several kinds of object in one model
====================================

Drawn parts of four kinds, some with planted defects. One detector learns the good ones of all kinds together, is not
told which kind is which, and finds out on its own; then it says for new parts what kind they are, whether they are
defective and where. Takes about a minute on two CPU cores.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from vqad import HVQTransDetector
from vqad.datasets import make_textured_parts
from vqad.metrics import evaluate
from vqad.report import overlay

# %%
# Good parts to learn from, and other parts, a third of them defective.
known = make_textured_parts(n_normal=160, n_anomalous=0, random_state=0)
new = make_textured_parts(n_normal=40, n_anomalous=20, random_state=1)

# %%
# No labels: neither of kinds nor of defects. 32 held-out images support a false-alarm rate of 5 %, not of 1 %.
detector = HVQTransDetector(image_size=128, d_model=64, n_codes=64, max_iter=8, false_alarm_rate=0.05, random_state=0)
detector.fit(known.images)
print("kinds found:", len(detector.categories_))

# %%
# New parts.
label = detector.predict(new.images)
maps = detector.anomaly_map(new.images)
print("false alarms:", np.mean(label[new.target == 1] == -1))
print("defects found:", np.mean(label[new.target == -1] == -1))
print(evaluate(new.target, -detector.score_samples(new.images), new.category, masks=new.masks, maps=maps))

# %%
# The six parts that look worst, with what is wrong about them.
worst = np.argsort(detector.score_samples(new.images))[:6]
pairs = [np.vstack([new.images[i], overlay(new.images[i], maps[i], threshold=detector.map_threshold_)]) for i in worst]
Image.fromarray(np.hstack(pairs)).save(Path("several_kinds.png"))
print("wrote several_kinds.png")
