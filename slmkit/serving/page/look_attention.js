// Attention of one layer: a small map of every head, the chosen head's weights as a heat map, and what the chosen
// token attends to. Rows are queries, columns are keys; where the mask of the layer forbids, the map is grey.

import { element, svg } from "./dom.js";
import { label, percent } from "./look_tokens.js";

const UNIT = 10_000; // weights come as whole numbers of 1/10,000
const LABELS = 84; // pixels beside and above the map, for tokens
const LEAST_LABELLED = 12; // pixels of a cell, below which tokens are not written beside the map

export function addAttention(root, { app, choose, showWeights }) {
  let of = null; // what the maps show
  let layer = 0;
  let head = 0;
  let place = 0;
  let answer = null; // of `attention`
  let cell = null; // [query, key] that was pointed at last
  let asked = 0;

  const layers = element("div", { class: "look-layers", role: "radiogroup", "aria-label": "Layer", onkeydown: (event) => onRadioKey(event, layers) });
  const heads = element("div", { class: "look-heads", role: "radiogroup", "aria-label": "Head", onkeydown: (event) => onRadioKey(event, heads) });
  const canvas = element("canvas", { class: "look-map", tabindex: "0", role: "img",
    onpointermove: onPoint, onpointerleave: () => point(null), onclick: () => cell && choose(cell[0]), onkeydown: onMapKey });
  const fact = element("p", { class: "look-fact", role: "status" });
  const title = element("h3", {});
  const summary = element("p", { class: "muted" });
  const most = element("ol", { class: "look-bars" });
  const problem = element("p", { class: "error", role: "alert", hidden: true });
  root.append(
    element("div", { class: "card stack" },
      element("div", { class: "row apart" }, element("h3", {}, "Layer"), element("small", { class: "muted" }, "with the mask of each: a query, a row, sees the coloured keys")), layers),
    problem,
    element("div", { class: "card stack" }, title, heads, summary,
      element("div", { class: "look-two look-attention" }, element("div", { class: "stack" }, canvas, fact),
        element("div", { class: "stack" }, element("h4", {}, "The chosen token attends to"), most))));
  new ResizeObserver(() => draw()).observe(canvas.parentElement);
  document.addEventListener("themechange", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  async function show(found, at) {
    place = at;
    if (of !== found) {
      of = found;
      answer = null;
      [layer, head] = [Math.min(layer, found.windows.length - 1), Math.min(head, found.heads - 1)];
      addLayers();
      await fetchWeights();
    } else if (answer) {
      showQuery();
    }
  }

  async function fetchWeights() {
    const mine = ++asked;
    problem.hidden = true;
    try {
      const found = await app.post("attention", { model: of.model, ids: of.ids, layer, head });
      if (mine !== asked) return;
      answer = found;
    } catch (error) {
      if (mine !== asked) return;
      problem.textContent = error.message;
      problem.hidden = false;
      return;
    }
    title.textContent = `Layer ${layer + 1}, head ${head + 1}`;
    addHeads();
    summary.textContent = summaryOf(answer.weights);
    showQuery();
  }

  // -------------------------------------------------------------- pickers

  /** Radio buttons of a row or grid: the arrows choose. */
  function onRadioKey(event, group) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...group.children];
    const to = buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length];
    to.click();
    to.focus();
  }

  function addLayers() {
    layers.replaceChildren(...of.windows.map((window, index) => radio(layer === index, () => {
      layer = index;
      check(layers, index);
      fetchWeights();
    }, `Layer ${index + 1}, ${window ? `a window of ${window} tokens` : "all earlier tokens"}`,
    pictureOfMask(window), element("b", {}, String(index + 1)), element("small", {}, window ? `window ${window}` : "full"))));
  }

  function addHeads() {
    const isSame = heads.children.length === answer.maps.length;
    if (!isSame) {
      heads.replaceChildren(...answer.maps.map((_, index) => radio(head === index, () => {
        head = index;
        check(heads, index);
        fetchWeights();
      }, `Head ${index + 1}`, element("canvas", {}), element("small", {}, String(index + 1)))));
    }
    check(heads, head);
    answer.maps.forEach((map, index) => drawSmall(heads.children[index].querySelector("canvas"), map, reach() * map.length / of.ids.length));
  }

  // -------------------------------------------------------------- the chosen token

  /** How many tokens a query of the layer sees at most, itself included. */
  function reach() {
    return of.windows[layer] ?? of.ids.length;
  }

  function query() {
    return Math.min(place, of.ids.length - 1);
  }

  function showQuery() {
    const row = answer.weights[query()];
    showWeights(row.map((weight) => weight / UNIT));
    const order = row.map((weight, key) => ({ weight, key })).sort((a, b) => b.weight - a.weight).slice(0, 8);
    most.replaceChildren(...order.filter(({ weight }) => weight > 0).map(({ weight, key }) => {
      const bar = element("i", {});
      bar.style.width = `${(100 * weight) / UNIT}%`;
      return element("li", {}, element("div", { class: "look-bar-row" },
        element("bdi", {}, spelled(key), element("small", { class: "muted" }, ` ${distance(query(), key)}`)),
        element("span", { class: "look-bar", "aria-hidden": "true" }, bar), element("span", { class: "number" }, percent(weight / UNIT))));
    }));
    point(null);
  }

  function spelled(at) {
    return label(of.vocabulary[of.ids[at]]);
  }

  // -------------------------------------------------------------- the heat map

  /** Where the map lies within the canvas, in CSS pixels. */
  function measures() {
    const tokens = of.ids.length;
    const width = canvas.parentElement.clientWidth;
    const isLabelled = (Math.min(width, 560) - LABELS) / tokens >= LEAST_LABELLED;
    const edge = isLabelled ? LABELS : 0;
    const side = Math.max(60, Math.min(width, 560) - edge);
    return { tokens, edge, side, size: side / tokens };
  }

  function redraw() {
    if (answer) addHeads();
    draw();
  }

  function draw() {
    if (!answer || canvas.parentElement.clientWidth === 0) return;
    const { tokens, edge, side, size } = measures();
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round((edge + side) * ratio);
    canvas.style.width = canvas.style.height = `${edge + side}px`;
    const pen = canvas.getContext("2d");
    const colours = coloursOf(canvas);
    pen.scale(ratio, ratio);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(imageOf(answer.weights, reach(), colours), edge, edge, side, side);
    outline(pen, edge, size, tokens, reach(), colours.line);
    if (edge) writeTokens(pen, edge, size, colours);
    pen.strokeStyle = colours.mark;
    pen.lineWidth = size < 6 ? 0.75 : 1.5;
    pen.strokeRect(edge, edge + query() * size, (query() + 1) * size, size);
    if (cell) {
      pen.lineWidth = 2.5;
      pen.strokeRect(edge + cell[1] * size, edge + cell[0] * size, size, size);
    }
  }

  function writeTokens(pen, edge, size, colours) {
    pen.font = `11px ${getComputedStyle(canvas).fontFamily}`;
    pen.textBaseline = "middle";
    of.ids.forEach((_, index) => {
      const at = edge + (index + 0.5) * size;
      pen.fillStyle = cell && (cell[0] === index || cell[1] === index) ? colours.mark : colours.muted;
      pen.textAlign = "right";
      pen.fillText(cut(pen, spelled(index), edge - 10), edge - 6, at);
      pen.save();
      pen.translate(at, edge - 6);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillText(cut(pen, spelled(index), edge - 10), 0, 0);
      pen.restore();
    });
  }

  function onPoint(event) {
    if (!answer) return;
    const { tokens, edge, size } = measures();
    const box = canvas.getBoundingClientRect();
    const [key, row] = [event.clientX - box.left, event.clientY - box.top].map((x) => Math.floor((x - edge) / size));
    const isInside = row >= 0 && key >= 0 && row < tokens && key < tokens;
    point(isInside ? [row, key] : null);
  }

  function onMapKey(event) {
    const [down, right] = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key] ?? [0, 0];
    if (!answer) return;
    if (event.key === "Enter" && cell) choose(cell[0]);
    if (!down && !right) return;
    event.preventDefault();
    const [row, key] = cell ?? [query(), query()];
    const last = of.ids.length - 1;
    point([row + down, key + right].map((x) => Math.max(0, Math.min(last, x))));
  }

  function point(at) {
    cell = at;
    if (!answer) return;
    fact.textContent = at === null ? "Point at a cell, or move with the arrow keys; a click chooses the token of its row." : factOf(...at);
    canvas.setAttribute("aria-label", `Attention of layer ${layer + 1}, head ${head + 1}. ${summary.textContent} ${at ? factOf(...at) : ""}`);
    draw();
  }

  function factOf(row, key) {
    const weight = answer.weights[row][key];
    if (weight === undefined) return `${spelled(row)} does not see ${spelled(key)}, which comes later.`;
    if (key <= row - reach()) return `${spelled(row)} does not see ${spelled(key)}, ${row - key} tokens earlier: the window is ${reach()}.`;
    return `${spelled(row)} attends with ${percent(weight / UNIT)} to ${spelled(key)}, ${distance(row, key)}.`;
  }

  return { show };
}

function distance(query, key) {
  return key === query ? "itself" : `${query - key} earlier`;
}

/** On the average of all queries but the first, which sees nothing else. */
function summaryOf(weights) {
  const rows = weights.slice(1);
  if (rows.length === 0) return "A single token attends to itself.";
  const mean = (of) => percent(rows.reduce((sum, row) => sum + of(row), 0) / rows.length / UNIT);
  return `On average ${mean((row) => row[0])} of the attention goes to the first token, ${mean((row) => row.at(-2))} to the token before, `
    + `${mean((row) => row.at(-1))} to the token itself.`;
}

function radio(isChecked, onclick, name, ...children) {
  return element("button", { type: "button", role: "radio", "aria-checked": String(isChecked), "aria-label": name,
    tabindex: isChecked ? "0" : "-1", onclick }, ...children);
}

function check(group, chosen) {
  [...group.children].forEach((node, index) => {
    node.setAttribute("aria-checked", String(index === chosen));
    node.tabIndex = index === chosen ? 0 : -1;
  });
}

// ---------------------------------------------------------------- pictures

/** A mask as a small picture: what queries, from top to bottom, see of the keys, from left to right. */
function pictureOfMask(window) {
  const [side, width] = [24, window ? 7 : 24]; // a window is drawn with the same width, whatever its length
  return svg("svg", { viewBox: `0 0 ${side} ${side}`, width: side, height: side, "aria-hidden": "true" },
    svg("rect", { width: side, height: side, class: "hidden-keys" }),
    svg("path", { class: "seen-keys", d: window ? `M0 0 L${side} ${side} H${side - width} L0 ${width} Z` : `M0 0 L${side} ${side} H0 Z` }));
}

/** The colours of the theme, as [red, green, blue] or CSS. */
function coloursOf(node) {
  const style = getComputedStyle(node);
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(${name})`;
    node.parentElement.append(probe);
    pen.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const css = (name) => `rgb(${rgb(name).join(" ")})`;
  return { none: rgb("--map-none"), full: rgb("--map-full"), hidden: rgb("--map-hidden"), line: css("--control"),
    muted: css("--muted"), mark: css("--ink"), font: style.fontFamily };
}

/** Rows of weights as an image of one pixel each, with another colour for what the mask hides. */
function imageOf(rows, window, colours) {
  const side = rows.length;
  const image = new ImageData(side, side);
  for (let row = 0; row < side; row += 1) {
    for (let column = 0; column < side; column += 1) {
      const isHidden = column > row || column <= row - window;
      const share = isHidden ? 0 : Math.sqrt(rows[row][column] / UNIT);
      const colour = isHidden ? colours.hidden : colours.none.map((none, channel) => none + (colours.full[channel] - none) * share);
      image.data.set([...colour, 255], 4 * (row * side + column));
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** `window` in rows of the map. */
function drawSmall(canvas, map, window) {
  const image = imageOf(map, window, coloursOf(canvas));
  canvas.width = canvas.height = map.length;
  canvas.getContext("2d").drawImage(image, 0, 0);
}

/** A line around what the mask lets queries see. */
function outline(pen, edge, size, tokens, window, colour) {
  pen.beginPath();
  pen.moveTo(edge, edge);
  for (let query = 0; query < tokens; query += 1) {
    pen.lineTo(edge + (query + 1) * size, edge + query * size);
    pen.lineTo(edge + (query + 1) * size, edge + (query + 1) * size);
  }
  for (let query = tokens - 1; query >= 0; query -= 1) {
    const first = Math.max(0, query - window + 1);
    pen.lineTo(edge + first * size, edge + (query + 1) * size);
    pen.lineTo(edge + first * size, edge + query * size);
  }
  pen.closePath();
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.stroke();
}

/** A text that is at most `width` pixels wide. */
function cut(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let characters = [...text];
  while (characters.length > 1 && pen.measureText(`${characters.join("")}…`).width > width) characters = characters.slice(0, -1);
  return `${characters.join("")}…`;
}
