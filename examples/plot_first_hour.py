"""
A first hour
============

From a folder of images to a decision on the production line: how many images to take, fitting, the report, the
false-alarm rate, some defects, an ONNX graph, a new lamp, and one more product. Each step is shown in Python and on the
command line.

The images are synthetic, small and few, and the network is small, so that this page is built in about a minute. With
photographs of your own, leave out ``image_size``, ``d_model``, ``n_codes`` and ``max_iter``.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
from PIL import Image

import vqad
from vqad import HVQTransDetector
from vqad.datasets import load_folder, make_textured_parts
from vqad.report import write_report

# %%
# Pictures
# --------
#
# A folder has one sub-folder for each product, and in it pictures of good parts alone: as they come from the line, with
# all that varies there, from several days and shifts. The same camera, lamp and distance as later. No defects, no
# duplicates. Crop to the part if most of the picture is something else.

folder = Path(tempfile.mkdtemp())
parts = make_textured_parts(260, 40, categories=("disc", "weave"), image_size=96, random_state=0)


def save(rows, name):
    """Write pictures to a folder, as a camera would."""
    for i in rows:
        path = folder / name / parts.category[i] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(parts.images[i]).save(path)


good, bad = np.flatnonzero(parts.target == 1), np.flatnonzero(parts.target == -1)
save(good[:200], "good-parts")
save(good[200:], "new-good-parts")
save(bad, "defects")
normal = load_folder(folder / "good-parts")
print(normal)

# %%
# **How many?** A fifth of the pictures is held out of training to set the threshold. n held-out ones support a
# false-alarm rate of 1 / (n + 1) and none below: 5 % takes 19, which is 95 pictures in all, and 1 % takes 99, which is
# 495. Products share the threshold, so these are numbers of all products together; 30 pictures of a product are few,
# 100 are good. These 200 pictures support 2.5 %.
#
# Learning
# --------
#
# .. code-block:: sh
#
#    vqad fit good-parts/ -o model.safetensors

small = {"image_size": 96, "d_model": 64, "n_codes": 32, "max_iter": 2}
detector = HVQTransDetector(random_state=0, **small).fit(normal, category=normal.category)
vqad.save(detector, folder / "model.safetensors")
print(f"learned {', '.join(detector.categories_)}; threshold {-detector.offset_:.2f}")

# %%
# The first look
# --------------
#
# Score images that the model has not seen. Good ones first: the share called anomalous should be about the false-alarm
# rate. If it is much larger, the new images differ from the training images. ``drift`` tests this: a small p-value says
# that they do.

fresh = load_folder(folder / "new-good-parts")
alarms = detector.predict(fresh) == -1
print(f"{alarms.sum()} of {len(fresh)} good parts called anomalous; drift: p = {detector.drift(fresh):.2g}")

# %%
# Then look at the report, with defects if you have some. Are the heatmaps high where you would look? Do the good parts
# with high scores look odd to you too? If one of them is defective, take it out of the folder and fit again.
#
# .. code-block:: sh
#
#    vqad report model.safetensors new-parts/ -o page.html

defects = load_folder(folder / "defects", target=-1)
both = fresh + defects
page = write_report(folder / "page.html", detector, both, y=both.target, category=both.category)
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")

# %%
# .. image:: /images/report.png
#    :alt: A report: a histogram of scores over a slider, counts under it, images with heatmaps
#
# A rate
# ------
#
# How many false alarms can you inspect a day? Divide that by the number of parts a day: this is the false-alarm rate. A
# higher rate finds more defects. The held-out images give the threshold for any rate, so nothing is trained again:
#
# .. code-block:: sh
#
#    vqad recalibrate model.safetensors --false-alarm-rate 0.1 -o chosen.safetensors

for rate in (0.025, 0.05, 0.1, 0.2):
    detector.recalibrate(false_alarm_rate=rate)
    alarms, found = (np.sum(detector.predict(images) == -1) for images in (fresh, defects))
    print(f"rate {rate:5.1%}: {alarms} of {len(fresh)} good parts, {found} of {len(defects)} defects")
detector.recalibrate(false_alarm_rate=0.05)

# %%
# Defects
# -------
#
# With some labelled defects, and good parts that were not learned from, the threshold can be set by what errors cost:
# here a miss costs as much as twenty false alarms. Use half of them, and the other half to see what it is worth.

detector.set_threshold(both[::2], both.target[::2], target="cost", miss_cost=20, false_alarm_cost=1)
rest = both[1::2]
label = detector.predict(rest)
print(
    f"threshold {-detector.offset_:.2f}: "
    f"missed {np.sum(label[rest.target == -1] == 1)} of {np.sum(rest.target == -1)}, "
    f"false alarms {np.sum(label[rest.target == 1] == -1)} of {np.sum(rest.target == 1)}"
)

# %%
# At the line
# -----------
#
# One ONNX graph holds everything from pixels to score, label, map and category, and runs without Python and torch. It
# is compared with the detector before it is written.
#
# .. code-block:: sh
#
#    vqad export model.safetensors -o model.onnx --images new-parts/

vqad.export_onnx(detector, folder / "model.onnx", X=rest[:4])
session = onnxruntime.InferenceSession(folder / "model.onnx")
pixels = parts.images[bad[0]].astype(np.float32) / 255
score, judged, heat, category = session.run(["score", "label", "map", "category"], {"image": pixels})
print(f"score {float(np.squeeze(score)):.1f}, label {int(np.squeeze(judged))}, map {np.squeeze(heat).shape}")

figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
axes[0].imshow(pixels)
axes[1].imshow(np.squeeze(heat), cmap="inferno", vmin=0, vmax=2 * detector.map_threshold_)
for axis, title in zip(axes, ("a defective part", "its map, by ONNX")):
    axis.set_title(title)
    axis.set_axis_off()

# %%
# Another lamp
# ------------
#
# Some weeks later a lamp is replaced. Normal parts score higher, and ``drift`` notices. ``recalibrate`` with a few
# dozen good
# pictures under the new lamp sets the scales anew; the model stays. Then try the defects again, under the new lamp:
# if too few are found, learn again.
#
# .. code-block:: sh
#
#    vqad recalibrate model.safetensors good-parts-under-the-new-lamp/ -o new.safetensors


def lamp(images):
    """The same pictures under a brighter lamp."""
    return (np.clip(images / 255 * 1.25 + 0.02, 0, 1) * 255).astype(np.uint8)


under = lamp(parts.images[good[:80]])
print(f"drift under the new lamp: p = {detector.drift(under):.2g}")
detector.recalibrate(under, category=parts.category[good[:80]])
new_good, new_bad = lamp(parts.images[good[200:]]), lamp(parts.images[bad])
alarms, found = (np.sum(detector.predict(images) == -1) for images in (new_good, new_bad))
print(f"recalibrated: {alarms} of {len(new_good)} good parts, {found} of {len(new_bad)} defects")

# %%
# One more product
# ----------------
#
# ``partial_fit`` adds a product: it learns from its pictures alone, and no score of the others changes.

detector = vqad.load(folder / "model.safetensors")
before = detector.score_samples(fresh)
tiles = make_textured_parts(100, 10, categories=("tile",), image_size=96, random_state=1)
detector.partial_fit(tiles.images[:100], category=tiles.category[:100])
after = detector.score_samples(fresh)
same = detector.predict_category(fresh) == fresh.category
print(f"products: {', '.join(detector.categories_)}; tiles with a defect found: ", end="")
print(f"{np.sum(detector.predict(tiles.images[100:]) == -1)} of 10")
print(
    f"judged as before: {same.sum()} of {len(fresh)}; "
    f"largest change of their scores: {np.abs(after - before)[same].max():.1g}"
)

# %%
# What next: :doc:`/guide/expect` has measured figures, :doc:`/guide/thresholds` has more on rates, and
# :doc:`/guide/report` explains the page.
