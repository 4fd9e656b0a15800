"""How large a report is, how long it takes to write and open, and how smoothly it scrolls in headless Chromium.

    python benchmarks/bench_report.py [N_IMAGES ...]

Needs selenium, chromium and chromedriver. Images are drawn parts of 256 pixels; their verdicts are drawn, too, as
judging images is measured elsewhere.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from selenium import webdriver

from vqad import HVQTransDetector
from vqad.datasets import make_textured_parts
from vqad.report import Verdicts, write_report

SIZES = (100, 1000, 5000)
# Scrolls on by 150 pixels a frame, ten screens a second, and tells how long each frame took.
SCROLL = """const done = arguments[0], times = [];
let last = performance.now(), k = 0;
const step = now => {
  times.push(now - last); last = now;
  if (++k > 300) return done(times.slice(1));
  scrollBy(0, 150);
  requestAnimationFrame(step);
};
requestAnimationFrame(step);"""
# Moves the slider over its whole range, one step a frame.
SLIDE = """const done = arguments[0], times = [], slider = document.querySelector(".decide input[type=range]");
let last = performance.now(), k = 0;
const step = now => {
  times.push(now - last); last = now;
  if (++k > 100) return done(times.slice(1));
  slider.value = 10 * k; slider.dispatchEvent(new Event("input"));
  requestAnimationFrame(step);
};
requestAnimationFrame(step);"""


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    parts = make_textured_parts(200, 0, image_size=256, random_state=0)
    detector = HVQTransDetector(image_size=64, d_model=32, n_codes=16, max_iter=1, random_state=0)
    detector.fit(parts.images, category=parts.category)
    print("images  MB     written in s  opened in s  scroll ms/frame: median, 95 %  slider ms/frame: median, 95 %")
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            path, seconds = written(Path(folder), detector, parts, n)
            opened, *frames = tried(path)
            shown = "".join(f"{np.median(f):12.0f} {np.quantile(f, 0.95):5.0f}" for f in frames)
            print(f"{n:6d}  {path.stat().st_size / 1e6:5.1f}  {seconds:12.1f}  {opened:11.1f}  {shown}")


def written(folder: Path, detector: HVQTransDetector, parts: object, n: int) -> tuple[Path, float]:
    rng = np.random.default_rng(0)
    score = np.sort(rng.gamma(2.0, 1.0, n))[::-1]
    category = detector.categories_[rng.integers(0, len(detector.categories_), n)]
    label = np.where(score > -detector.offset_, -1, 1)
    bumps = rng.normal(size=(n, 8, 8)).astype(np.float32).repeat(2, 1).repeat(2, 2) + score[:, None, None] - 1
    limit = np.full(n, -float(detector.offset_))
    verdicts = Verdicts(score, limit, np.exp(-score), label, category, np.float32(bumps))
    images = [parts.images[i % len(parts.images)] for i in range(n)]
    started = time.monotonic()
    path = write_report(folder / f"{n}.html", detector, images, verdicts=verdicts, n_images=n)
    return path, time.monotonic() - started


def tried(path: Path) -> tuple[float, list[float], list[float]]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_script_timeout(300)
    started = time.monotonic()
    browser.get(path.as_uri())
    opened = time.monotonic() - started
    frames = browser.execute_async_script(SCROLL), browser.execute_async_script(SLIDE)
    browser.quit()
    return opened, *frames


if __name__ == "__main__":
    main()
