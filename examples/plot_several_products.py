"""
Several products in one model
=============================

Synthetic parts of three kinds, some with defects. One detector learns the good ones of all kinds together and
discovers the kinds itself, without labels. Then it tells the kind of each new part, whether it is defective, and where.
At the end it learns a fourth kind without forgetting the others.

The network is small and the passes are few, so that this page is built in a minute.
"""

import numpy as np

from vqad import HVQTransDetector
from vqad.datasets import make_textured_parts
from vqad.display import AnomalyMapDisplay
from vqad.metrics import evaluate

# %%
# Good parts to learn from, and other parts, some of them defective.

kinds = ["disc", "weave", "tile"]
known = make_textured_parts(n_normal=150, n_anomalous=0, categories=kinds, random_state=0)
new = make_textured_parts(n_normal=30, n_anomalous=24, categories=kinds, random_state=1)

# %%
# No labels: neither of kinds nor of defects. The 30 held-out images support a false-alarm rate of 5 %, not of 1 %.

detector = HVQTransDetector(image_size=128, d_model=64, n_codes=128, max_iter=4, false_alarm_rate=0.05, random_state=0)
detector.fit(known.images)
print("kinds found:", len(detector.categories_))

# %%
# The numbers are the detector's own; they agree with the kinds that were drawn.

judged = detector.predict_category(new.images)
for kind in kinds:
    print(kind, "is judged as", np.unique(judged[new.category == kind]).tolist())

# %%
# Are defects found? Scores compare across kinds, so the pooled row means something.

label = detector.predict(new.images)
maps = detector.anomaly_map(new.images)
print(f"good parts called anomalous: {np.mean(label[new.target == 1] == -1):.0%}")
print(f"defective parts called anomalous: {np.mean(label[new.target == -1] == -1):.0%}")
print(evaluate(new.target, -detector.score_samples(new.images), new.category, masks=new.masks, maps=maps))

# %%
# The two most anomalous parts of each kind.

score = -detector.score_samples(new.images)
order = np.argsort(-score)
chosen = np.concatenate([order[new.category[order] == kind][:2] for kind in kinds])
AnomalyMapDisplay.from_estimator(detector, new.images[chosen], new.target[chosen])

# %%
# A new product
# -------------
#
# ``partial_fit`` adds a kind that the model has never seen. It needs no image of the others, and cannot move their
# scores: what all kinds share stays as it is, and the new one gets codes and a last layer of its own.

pills = make_textured_parts(n_normal=40, n_anomalous=0, categories=["pill"], random_state=2)
detector.partial_fit(pills.images, category=np.full(40, 3))
print("kinds now:", detector.categories_.tolist())
unmoved = np.array_equal(-detector.score_samples(new.images), score)
print("scores of the other kinds are the same to the last bit:", unmoved)

# %%
# New pills, of which the last four are defective. The shared weights have never seen a pill, so this is not as good as
# a fit on all four kinds.

test = make_textured_parts(n_normal=4, n_anomalous=4, categories=["pill"], random_state=3)
print("judged as", np.unique(detector.predict_category(test.images)).tolist())
AnomalyMapDisplay.from_estimator(detector, test.images, test.target)
