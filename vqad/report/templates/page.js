/* The report's page: tries thresholds, sorts, filters and enlarges. It asks for nothing from anywhere. */
"use strict";
(() => {
  const ALL = -1;
  const STEPS = 1000; // of a slider
  const CHUNK = 60; // images that are laid out together, see the style
  const data = JSON.parse(document.getElementById("scores").textContent);
  const byId = (id) => document.getElementById(id);

  const model = data.threshold; // of each category, as the model has it
  let threshold = model.slice();

  // ---- what a threshold means ----------------------------------------------------------------

  /** Number of sorted values that are over a limit. */
  const countOver = (sorted, limit) => {
    let low = 0;
    let high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] > limit) high = middle;
      else low = middle + 1;
    }
    return sorted.length - low;
  };

  const isCalled = (row) => data.score[row] > threshold[data.category[row]];

  /** Counts of one category, or of all, at the thresholds as they are. */
  const tally = (category) => {
    const found = { n: 0, called: 0, good: 0, alarms: 0, bad: 0, missed: 0, heldOut: 0, over: 0 };
    for (let row = 0; row < data.score.length; row++) {
      if (category !== ALL && data.category[row] !== category) continue;
      const called = isCalled(row);
      found.n++;
      if (called) found.called++;
      if (!data.truth) continue;
      if (data.truth[row] === 1) {
        found.good++;
        if (called) found.alarms++;
      } else {
        found.bad++;
        if (!called) found.missed++;
      }
    }
    data.heldOut.forEach((sorted, c) => {
      if (category !== ALL && c !== category) return;
      found.heldOut += sorted.length;
      found.over += countOver(sorted, threshold[c]);
    });
    return found;
  };

  /** Share of good images called anomalous that the held-out ones vouch for. */
  const rateOf = (found) => (1 + found.over) / (found.heldOut + 1);

  const goodText = (found) => {
    const rate = rateOf(found);
    const percent = (Math.ceil(1000 * rate - 1e-9) / 10).toFixed(1);
    const oneIn = rate <= 0.5 ? `, 1 in ${Math.floor(1 / rate + 1e-9)}` : "";
    return `good images: at most ${percent} % called anomalous${oneIn} (by ${found.heldOut} held out)`;
  };

  // ---- dials ---------------------------------------------------------------------------------

  const span = data.high - data.low;
  const dials = Array.from(document.querySelectorAll(".dial"), (root) => ({
    root,
    category: Number(root.dataset.category),
    slider: root.querySelector("input[type=range]"),
    number: root.querySelector("input[type=number]"),
    mark: root.querySelector(".mark"),
    width: root.querySelector("svg").viewBox.baseVal.width,
    called: root.querySelector(".called"),
    known: root.querySelector(".known"),
    good: root.querySelector(".good"),
  }));

  const median = (values) => {
    const sorted = values.slice().sort((a, b) => a - b);
    const half = sorted.length >> 1;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  };

  const valueOf = (dial) => (dial.category === ALL ? median(threshold) : threshold[dial.category]);

  const drawDial = (dial, source) => {
    const value = valueOf(dial);
    const share = (value - data.low) / span;
    if (source !== dial.slider) dial.slider.value = Math.round(STEPS * share);
    if (source !== dial.number) dial.number.value = value.toFixed(3);
    dial.slider.setAttribute("aria-valuetext", value.toFixed(2));
    const x = dial.width * Math.min(Math.max(share, 0), 1);
    dial.mark.setAttribute("x1", x);
    dial.mark.setAttribute("x2", x);
    const found = tally(dial.category);
    dial.called.textContent = `${found.called} of ${found.n} images called anomalous`;
    dial.good.textContent = goodText(found);
    if (dial.known) {
      dial.known.textContent =
        `false alarms: ${found.alarms} of ${found.good} labelled normal; ` +
        `missed: ${found.missed} of ${found.bad} labelled anomalous`;
    }
    return found;
  };

  /** How to give the model the threshold that is shown. */
  const advice = (found) => {
    if (threshold.every((value, c) => value === model[c])) return "";
    if (threshold.some((value) => value !== threshold[0])) return "Thresholds differ: a rate sets one for all images.";
    if (found.over === 0) return "No rate sets a threshold this high: that needs more held-out images.";
    const rate = rateOf(found);
    if (rate >= 1) return "";
    const digits = 10 ** (3 - Math.floor(Math.log10(rate)));
    const text = String(Math.ceil(rate * digits) / digits);
    return `To set it: vqad recalibrate MODEL --false-alarm-rate ${text} -o NEW`;
  };

  const setThreshold = (category, value, source) => {
    if (!Number.isFinite(value)) return;
    threshold = threshold.map((old, c) => (category === ALL || c === category ? value : old));
    refresh(source);
  };

  for (const dial of dials) {
    dial.slider.addEventListener("input", () =>
      setThreshold(dial.category, data.low + (span * dial.slider.valueAsNumber) / STEPS, dial.slider));
    dial.number.addEventListener("input", () => setThreshold(dial.category, dial.number.valueAsNumber, dial.number));
  }
  byId("reset").addEventListener("click", () => {
    threshold = model.slice();
    refresh(null);
  });

  // ---- cards ---------------------------------------------------------------------------------

  const grid = byId("cards");
  const cards = Array.from(grid.querySelectorAll(".card"), (root, place) => {
    const row = Number(root.dataset.row);
    const shot = root.querySelector(".shot");
    shot.tabIndex = 0;
    shot.setAttribute("role", "button");
    return {
      root,
      place,
      row,
      shot,
      verdict: root.querySelector(".verdict"),
      truth: root.querySelector(".right, .wrong"),
      label: data.truth ? data.truth[row] : 0,
      called: root.querySelector(".verdict").classList.contains("anomaly"),
      name: root.querySelector(".name").textContent,
      path: (root.querySelector(".name").title || root.querySelector(".name").textContent).toLowerCase(),
      category: data.names[data.category[row]],
    };
  });
  const byRoot = new Map(cards.map((card) => [card.root, card]));
  let visible = cards.slice(); // in the order in which they are shown

  const drawVerdict = (card) => {
    const called = isCalled(card.row);
    if (called === card.called) return;
    card.called = called;
    card.verdict.textContent = called ? "anomaly" : "normal";
    card.verdict.className = `verdict ${called ? "anomaly" : "normal"}`;
    if (card.truth) card.truth.className = called === (card.label === -1) ? "right" : "wrong";
  };

  const FILTERS = {
    all: () => true,
    anomaly: (card) => card.called,
    normal: (card) => !card.called,
    missed: (card) => !card.called && card.label === -1,
    false: (card) => card.called && card.label === 1,
  };
  const distance = (card) => Math.abs(data.score[card.row] - threshold[data.category[card.row]]);
  const text = new Intl.Collator(undefined, { numeric: true });
  const ORDERS = {
    high: (a, b) => a.place - b.place,
    low: (a, b) => b.place - a.place,
    near: (a, b) => distance(a) - distance(b),
    category: (a, b) => text.compare(a.category, b.category) || a.place - b.place,
    name: (a, b) => text.compare(a.path, b.path),
  };
  const choice = (id) => (byId(id) ? byId(id).value : "");

  const arrange = () => {
    const passes = FILTERS[choice("verdict")];
    const category = choice("category");
    const part = choice("name").trim().toLowerCase();
    const found = cards.filter((card) =>
      passes(card) && (!category || card.category === category) && card.path.includes(part));
    byId("shown").textContent = `${found.length} of ${cards.length} shown`;
    if (found.length === visible.length && found.every((card, k) => card === visible[k])) return;
    visible = found;
    const chunks = [];
    for (let first = 0; first < visible.length; first += CHUNK) {
      const chunk = document.createElement("div");
      chunk.className = "chunk";
      chunk.append(...visible.slice(first, first + CHUNK).map((card) => card.root));
      chunks.push(chunk);
    }
    grid.replaceChildren(...chunks);
  };

  const sortCards = () => {
    cards.sort(ORDERS[choice("sort")]);
    arrange();
  };

  for (const id of ["verdict", "category", "name"]) byId(id)?.addEventListener("input", arrange);
  byId("sort").addEventListener("input", sortCards);

  let waiting = false; // for the next frame: a slider reports more often than the screen is drawn
  const refresh = (source) => {
    const found = dials.map((dial) => drawDial(dial, source));
    byId("use").textContent = advice(found[0]);
    byId("reset").disabled = threshold.every((value, c) => value === model[c]);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      cards.forEach(drawVerdict);
      if (choice("sort") === "near" && source?.type !== "range") sortCards();
      else if (choice("verdict") !== "all") arrange();
    });
  };
  // Sorting by nearness waits until the slider is let go, or images would run away under the hand.
  for (const dial of dials) {
    dial.slider.addEventListener("change", () => choice("sort") === "near" && sortCards());
  }

  // ---- one image in full size ----------------------------------------------------------------

  const viewer = byId("viewer");
  const [bigPhoto, bigHeat] = viewer.querySelectorAll(".big img");
  const viewerMap = byId("viewer-map");
  let current = null;

  const drawMap = () => {
    bigHeat.style.opacity = viewerMap.checked ? byId("strength").value / 100 : 0;
    bigPhoto.style.filter = viewerMap.checked ? "grayscale(1)" : "";
  };

  const fit = () => {
    if (!current) return;
    const photo = current.root.querySelector(".photo");
    const shape = photo.getAttribute("width") / photo.getAttribute("height");
    const width = Math.min(0.94 * innerWidth - 20, (0.97 * innerHeight - 130) * shape);
    bigPhoto.parentElement.style.width = `${width}px`;
    bigPhoto.parentElement.style.height = `${width / shape}px`;
  };

  const show = (card) => {
    current = card;
    bigPhoto.src = card.root.querySelector(".photo").src;
    bigHeat.src = card.root.querySelector(".heat").src;
    bigPhoto.alt = card.name;
    viewer.querySelector(".viewer-text").textContent =
      card.root.querySelector("figcaption").innerText.replace(/\s*\n\s*/g, " \u00b7 ");
    fit();
    drawMap();
    if (!viewer.open) viewer.showModal();
  };

  const step = (by) => {
    const place = visible.indexOf(current) + by;
    if (visible[place]) show(visible[place]);
  };

  const cardOf = (event) => {
    const shot = event.target.closest(".shot");
    return shot && byRoot.get(shot.parentElement);
  };
  grid.addEventListener("click", (event) => {
    const card = cardOf(event);
    if (card) show(card);
  });
  grid.addEventListener("keydown", (event) => {
    const card = cardOf(event);
    if (!card || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    show(card);
  });
  viewer.addEventListener("close", () => {
    current?.shot.focus();
    current = null;
  });
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewerMap.addEventListener("input", drawMap);
  byId("strength").addEventListener("input", drawMap);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  addEventListener("resize", fit);

  // ---- keys ----------------------------------------------------------------------------------

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches?.("input[type=number], input[type=search], select");
    if (typing) return;
    if (event.key === "m") (viewer.open ? viewerMap : byId("maps")).click();
    else if (event.key === "/" && !viewer.open) {
      event.preventDefault();
      byId("name").focus();
    } else if (viewer.open && event.target.type !== "range") {
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
    }
  });

  document.documentElement.classList.remove("plain");
  refresh(null);
  arrange();
})();
