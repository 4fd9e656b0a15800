"""
Tuning with GridSearchCV, InlierKFold and cached features
=========================================================

Which parameters suit these images? With some defective parts, scikit-learn's searches answer that. They need folds that
train on good images only and scorers with anomalies as the positive class; caching the features saves time.

The grid is tiny, the network small and the images few: this page shows how to search, not which parameters are best.
"""

import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import optuna
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

from vqad import HVQTransDetector
from vqad.datasets import load_elpv
from vqad.model_selection import InlierKFold, image_auroc_scorer

cells = load_elpv(category="poly")
rng = np.random.default_rng(0)
sound = rng.permutation(np.flatnonzero(cells.probability == 0))[:75]
defective = rng.permutation(np.flatnonzero(cells.probability == 1))[:36]
images = cells[np.append(sound, defective)]
y = images.target  # +1 sound, -1 defective

# %%
# A grid
# ------
#
# `~vqad.model_selection.InlierKFold` trains on sound cells alone and tests on its share of both. With ``memory``, the
# backbone sees each image once for all candidates that use the same features: the first of them computes them, the
# others read them from disk.

cache = tempfile.TemporaryDirectory()
detector = HVQTransDetector(
    image_size=96, d_model=32, n_codes=32, max_iter=1, false_alarm_rate=0.1, memory=cache.name, random_state=0
)
folds = InlierKFold(3, random_state=0)
grid = {"n_codes": [16, 128], "gaussian": [True, False]}
search = GridSearchCV(detector, grid, cv=folds, scoring=image_auroc_scorer)

started = time.perf_counter()
search.fit(images, y)
print(f"{len(search.cv_results_['params'])} candidates, {folds.n_splits} folds: {time.perf_counter() - started:.0f} s")

# %%
# The folds of one candidate differ, and so may two candidates by chance: a difference that is small beside the spread
# over the folds is no reason to prefer one.

results = search.cv_results_
for i in np.argsort(results["rank_test_score"]):
    mean, spread = results["mean_test_score"][i], results["std_test_score"][i]
    print(f"{results['params'][i]}: AUROC {mean:.3f} ± {spread:.3f}")

terms = {True: "Gaussians beside", False: "published terms"}
names = [f"{p['n_codes']} codes\n{terms[p['gaussian']]}" for p in results["params"]]
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for k in range(folds.n_splits):
    axis.plot(names, results[f"split{k}_test_score"], "o", label=f"fold {k}")
axis.set(ylabel="AUROC", xlabel="candidate")
axis.legend(frameon=False, fontsize=8)

# %%
# The best candidate is refitted on all sound cells; those that it holds out set its threshold.

print("share of all cells called anomalous:", f"{np.mean(search.predict(images) == -1):.0%}")

# %%
# What the cache saves
# --------------------
#
# The same images, scored with features computed anew and with features from disk. What remains is the time of the model
# and of reading the files. The larger the backbone and the images, the more the cache saves.

started = time.perf_counter()
search.best_estimator_.set_params(memory=None).score_samples(images)
computed = time.perf_counter() - started
started = time.perf_counter()
search.best_estimator_.set_params(memory=cache.name).score_samples(images)
found = time.perf_counter() - started
print(f"scoring {len(images)} images: {computed:.1f} s with the backbone, {found:.1f} s from the cache")

# %%
# With Optuna
# -----------
#
# Optuna asks for a function of a trial. The same folds, scorer and cache serve it.

optuna.logging.set_verbosity(optuna.logging.WARNING)


def auroc(trial):
    candidate = clone(detector).set_params(
        n_codes=trial.suggest_int("n_codes", 8, 256, log=True),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
    )
    return cross_val_score(candidate, images, y, cv=folds, scoring=image_auroc_scorer).mean()


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(auroc, n_trials=3)
print(f"AUROC {study.best_value:.3f} with {study.best_params}")

# %%
# The folder of the cache is yours to keep, for the next search, or to remove.

cache.cleanup()
