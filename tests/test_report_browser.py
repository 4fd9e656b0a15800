"""The report's page in a browser: its sliders say what Python says, and nothing is asked for from anywhere."""

import copy
import re
import shutil

import numpy as np
import pytest

from vqad import HVQTransDetector
from vqad.datasets import make_textured_parts
from vqad.report import judge, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="NO SELENIUM: the page's scripts go untested")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="NO BROWSER: the page's scripts go untested; apt-get install chromium-driver"
)
CATEGORIES = ("disc", "weave")


@pytest.fixture(scope="module")
def parts():
    return make_textured_parts(30, 6, categories=CATEGORIES, image_size=64, random_state=0)


@pytest.fixture(scope="module")
def detector(parts):
    rows = np.flatnonzero(parts.target == 1)[:24]
    made = HVQTransDetector(image_size=64, d_model=32, n_codes=16, max_iter=1, false_alarm_rate=0.3, random_state=0)
    return made.fit(parts.images[rows], category=parts.category[rows])


@pytest.fixture(scope="module")
def verdicts(detector, parts):
    return judge(detector, parts.images)


@pytest.fixture(scope="module")
def page(detector, parts, verdicts, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    y, category = parts.target, parts.category
    return write_report(path, detector, parts.images, y=y, category=category, masks=parts.masks, verdicts=verdicts)


def started(**preferences):
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser():
    made = started()
    yield made
    made.quit()


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    return browser


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def set_threshold(browser, category, value):
    """As a user does who types it in."""
    script = """const dial = document.querySelector(`.dial[data-category="${arguments[0]}"]`);
      const box = dial.querySelector("input[type=number]");
      box.value = arguments[1]; box.dispatchEvent(new Event("input", {bubbles: true}));
      return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"""
    run(browser, script, category, value)


def choose(browser, name, value):
    script = """const box = document.getElementById(arguments[0]); box.value = arguments[1];
      box.dispatchEvent(new Event("input", {bubbles: true}));"""
    run(browser, script, name, value)


def press(browser, key, selector="body"):
    script = """document.querySelector(arguments[1]).dispatchEvent(
      new KeyboardEvent("keydown", {key: arguments[0], bubbles: true, cancelable: true}));"""
    run(browser, script, key, selector)


def says(browser, category):
    script = """return Array.from(document.querySelectorAll(
      `.dial[data-category="${arguments[0]}"] output`), o => o.textContent);"""
    return run(browser, script, category)


def shown_rows(browser):
    script = "return Array.from(document.querySelectorAll('.card:not([hidden])'), c => Number(c.dataset.row));"
    return run(browser, script)


def expected(detector, parts, verdicts, category, threshold):
    """What the page should say of a category, -1 all, with a threshold each."""
    position = np.searchsorted(detector.categories_, verdicts.category)
    mine = np.full(len(position), True) if category < 0 else position == category
    called, y, held_out = verdicts.score > threshold[position], parts.target, detector.fitted_.held_out
    known = np.full(len(held_out), True) if category < 0 else held_out.category == category
    rate = (1 + (known & (held_out.score > threshold[held_out.category])).sum()) / (known.sum() + 1)
    percent = np.ceil(1000 * rate - 1e-9) / 10
    one_in = f", 1 in {int(1 / rate + 1e-9)}" if rate <= 0.5 else ""
    return [
        f"{(mine & called).sum()} of {mine.sum()} images called anomalous",
        f"false alarms: {(mine & called & (y == 1)).sum()} of {(mine & (y == 1)).sum()} labelled normal; "
        f"missed: {(mine & ~called & (y == -1)).sum()} of {(mine & (y == -1)).sum()} labelled anomalous",
        f"good images: at most {percent:.1f} % called anomalous{one_in} (by {known.sum()} held out)",
    ]


def test_the_page_says_the_same_with_and_without_its_script(opened, page):
    static = re.findall(r"<output class=\"(?:called|known|good)\">(.*?)</output>", page.read_text(encoding="utf-8"))
    assert [text for c in (-1, 0, 1) for text in says(opened, c)] == static


def test_counts_and_labels_follow_the_threshold(opened, detector, parts, verdicts):
    limits = np.quantile(verdicts.score, [0.1, 0.5, 0.9]).round(3)
    for limit in limits:
        set_threshold(opened, -1, float(limit))
        everywhere = np.full(2, limit)
        for category in (-1, 0, 1):
            assert says(opened, category) == expected(detector, parts, verdicts, category, everywhere)
        script = """return Array.from(document.querySelectorAll(".card"),
          c => [Number(c.dataset.row), c.querySelector(".verdict").textContent, !!c.querySelector(".wrong")]);"""
        for row, label, wrong in run(opened, script):
            assert (label == "anomaly") == (verdicts.score[row] > limit)
            assert wrong == ((label == "anomaly") != (parts.target[row] == -1))
    run(opened, "document.getElementById('reset').click()")
    model = np.full(2, -detector.offset_)
    assert says(opened, -1) == expected(detector, parts, verdicts, -1, model)


def test_each_category_has_a_threshold_of_its_own(opened, detector, parts, verdicts):
    limits = np.quantile(verdicts.score, [0.3, 0.8]).round(3)
    for category, limit in enumerate(limits):
        set_threshold(opened, category, float(limit))
    for category in (-1, 0, 1):
        assert says(opened, category) == expected(detector, parts, verdicts, category, limits)


def test_the_rate_that_the_page_names_gives_the_model_the_same_threshold(opened, detector, verdicts):
    held_out = np.sort(detector.fitted_.held_out.score)
    for limit in held_out[:-1] + 1e-3:
        set_threshold(opened, -1, float(limit))
        (rate,) = re.findall(r"--false-alarm-rate ([\d.]+) ", run(opened, "return use.textContent"))
        made = copy.deepcopy(detector).recalibrate(false_alarm_rate=float(rate))
        assert (held_out > -made.offset_).sum() == (held_out > limit).sum()
    set_threshold(opened, -1, float(held_out[-1] + 1))
    assert "No rate sets a threshold this high" in run(opened, "return use.textContent")


def test_images_are_sorted_and_filtered(opened, detector, parts, verdicts):
    limit = float(np.median(verdicts.score).round(3))
    set_threshold(opened, -1, limit)
    called, y = verdicts.score > limit, parts.target
    for value, mine in {
        "anomaly": called,
        "normal": ~called,
        "missed": ~called & (y == -1),
        "false": called & (y == 1),
    }.items():
        choose(opened, "verdict", value)
        assert set(shown_rows(opened)) == set(np.flatnonzero(mine))
        assert run(opened, "return shown.textContent") == f"{mine.sum()} of {len(y)} shown"
    choose(opened, "category", "weave")
    assert set(shown_rows(opened)) == set(np.flatnonzero(called & (y == 1) & (verdicts.category == "weave")))
    choose(opened, "verdict", "all")
    choose(opened, "category", "")
    choose(opened, "name", "image 3")
    assert set(shown_rows(opened)) == {3, *range(30, 36)}
    choose(opened, "name", "")
    choose(opened, "sort", "low")
    score = verdicts.score[shown_rows(opened)]
    assert (np.diff(score) >= 0).all()
    choose(opened, "sort", "near")
    distance = np.abs(verdicts.score[shown_rows(opened)] - limit)
    assert (np.diff(distance) >= -1e-12).all()
    choose(opened, "sort", "name")
    assert shown_rows(opened) == list(range(len(y)))


def test_an_image_opens_in_full_size_and_the_keys_work(opened, verdicts):
    order = np.argsort(-verdicts.score, kind="stable")
    caption = "return document.querySelector('.viewer-text').textContent"
    press(opened, "Enter", ".shot")
    assert run(opened, "return viewer.open")
    assert run(opened, caption).endswith(f"image {order[0]}")
    width, height, wide = run(
        opened,
        "const b = document.querySelector('.big img').getBoundingClientRect(); return [b.width, b.height, innerHeight]",
    )
    assert width == pytest.approx(height)
    assert width > 0.7 * wide
    opacity = "return Number(getComputedStyle(document.querySelector('.big .heat')).opacity)"
    assert run(opened, opacity) == 1
    press(opened, "m", "#viewer")
    assert run(opened, opacity) == 0
    press(opened, "ArrowRight", "#viewer")
    assert run(opened, caption).endswith(f"image {order[1]}")
    press(opened, "ArrowLeft", "#viewer")
    press(opened, "ArrowLeft", "#viewer")  # there is none before the first
    assert run(opened, caption).endswith(f"image {order[0]}")
    run(opened, "viewer.close(); return new Promise(done => setTimeout(done, 50))")
    assert run(opened, "return document.activeElement === document.querySelector('.shot')")
    press(opened, "m")
    assert run(opened, "return getComputedStyle(document.querySelector('.card .heat')).visibility") == "hidden"


def test_nothing_is_asked_for_and_nothing_fails(browser, page):
    browser.get(page.as_uri())
    asked = run(browser, "return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in asked)
    assert browser.get_log("browser") == []


def test_a_heatmap_lies_over_its_picture(opened):
    """The grey of the picture must not lift it over the heatmap."""
    script = """const b = document.querySelector(".shot").getBoundingClientRect();
      return document.elementFromPoint(b.x + b.width / 2, b.y + 5).className"""
    assert run(opened, f"document.querySelector('.shot').scrollIntoView({{block: 'center'}}); {script}") == "heat"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_all_of_the_width_in_either_scheme(browser, page, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        browser.get(page.as_uri())
        run(browser, "each.open = true")
        assert run(browser, "return document.documentElement.scrollWidth") <= 360
        assert contrast(browser, "body") > 7
        assert min(contrast(browser, name) for name in (".anomaly", ".hint", ".name")) > 4.5
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser, selector):
    """Contrast of an element's text with the page, as WCAG 2 has it."""
    script = """const of = (e, what) => getComputedStyle(e)[what].match(/[\\d.]+/g).slice(0, 3).map(Number);
      return [of(document.querySelector(arguments[0]), "color"), of(document.body, "backgroundColor")]"""
    light = []
    for colour in run(browser, script, selector):
        share = np.array(colour) / 255
        linear = np.where(share <= 0.03928, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_the_page_is_readable_without_scripts(page):
    browser = started(**{"profile.managed_default_content_settings.javascript": 2})
    try:
        browser.get(page.as_uri())
        script = """const seen = s => document.querySelector(s).getBoundingClientRect().width > 0;
          return [[".called", ".known", ".good", ".card .photo", ".card .heat", ".metrics", ".plot"].map(seen),
                  ["input[type=range]", "#verdict", "#reset"].map(seen)]"""
        there, useless = run(browser, script)
        assert all(there)
        assert not any(useless)
    finally:
        browser.quit()


def test_a_model_of_good_parts_calls_no_anomaly_good(browser, parts, tmp_path):
    rows = np.flatnonzero(parts.target == 1)[:12]
    made = HVQTransDetector(image_size=64, d_model=32, n_codes=16, max_iter=1, false_alarm_rate=0.4, random_state=0)
    made.fit(parts.images[rows], category=np.repeat("good", len(rows)))
    browser.get(write_report(tmp_path / "page.html", made, parts.images[-3:]).as_uri())
    set_threshold(browser, -1, -100)
    cards = run(browser, "return Array.from(document.querySelectorAll('.card'), c => c.textContent)")
    assert len(cards) == 3
    assert all("anomaly" in text and "good" not in text for text in cards)
