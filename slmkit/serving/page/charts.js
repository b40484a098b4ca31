// Line charts in SVG: axes with round ticks, several series, smoothing, a crosshair with a read-out, a table.

import { element, number, svg, table } from "./dom.js";

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4"]; // of the colours: series differ without colour too
const ROWS = 200; // of the table
const FONT = 11; // pixels
const DIGIT = 6.4; // pixels of a digit of that size

/** A round step, 1, 2 or 5 times a power of ten, of about `count` ticks between two numbers. */
export function roundStep(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.7);
}

/** Whether two numbers are further apart than rounding errors, of which a smoothed constant has some. */
function isRange(low, high) {
  return high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high));
}

/** Round numbers from `low` to `high`. On a logarithmic scale of more than one decade, powers of ten, their doubles and halves. */
export function ticks(low, high, count, log = false) {
  if (!isRange(low, high)) return [low];
  if (log && high / low >= 10) {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const powers = Array.from({ length: last - first + 1 }, (_, index) => first + index);
    const inside = (value) => value >= low * 0.999 && value <= high * 1.001;
    const many = powers.flatMap((power) => [1, 2, 5].map((factor) => Number(`${factor}e${power}`))).filter(inside);
    if (many.length <= 1.4 * count) return many;
    const every = Math.ceil((last - first) / count);
    return powers.filter((_, index) => index % every === 0).map((power) => Number(`1e${power}`)).filter(inside);
  }
  const step = roundStep(low, high, count);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) {
    found.push(Number((index * step).toPrecision(12)) || 0);
  }
  return found;
}

/** A tick's label: 0.25, 12k, 3M, 1e-5. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 10000) return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value).replace("K", "k");
  if (size > 0 && size < 0.001) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(6)));
}

/** The moving mean of [[x, y], …] in which each point weighs `1 - weight` and those before it the rest; without bias at the start. */
export function smoothed(points, weight) {
  if (!weight) return points;
  let sum = 0;
  let share = 0;
  return points.map(([x, y]) => {
    if (!Number.isFinite(y)) return [x, y];
    sum = weight * sum + (1 - weight) * y;
    share = weight * share + (1 - weight);
    return [x, sum / share];
  });
}

/** Of points closer than a pixel, the lowest and the highest of each pixel: what is drawn looks the same. */
function thinned(points, places) {
  if (points.length < 3 * places.width) return points;
  const kept = [];
  let column = null;
  let low = null;
  let high = null;
  const flush = () => kept.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  for (const point of points) {
    if (!Number.isFinite(point[1])) continue;
    const at = Math.round(places.x(point[0]));
    if (at !== column) {
      if (column !== null) flush();
      [column, low, high] = [at, point, point];
    }
    if (point[1] < low[1]) low = point;
    if (point[1] > high[1]) high = point;
  }
  if (column !== null) flush();
  return kept;
}

function path(points, places) {
  let line = "";
  let isDown = false;
  for (const [x, y] of thinned(points, places)) {
    const isDrawn = Number.isFinite(y) && (!places.log || y > 0);
    if (isDrawn) line += `${isDown ? "L" : "M"}${places.x(x).toFixed(1)} ${places.y(y).toFixed(1)}`;
    isDown = isDrawn;
  }
  return line;
}

/** The dashed line of `marks`, for legends. */
export function markSwatch() {
  return svg("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": "true" }, svg("path", { class: "mark-line", d: "M1 5H21" }));
}

/** A short line in a series' colour, for legends and read-outs. */
export function swatch(colour, isValidation = false) {
  return svg("svg", { class: `swatch series-${colour}`, width: 22, height: 10, "aria-hidden": "true" },
    svg("path", { d: "M1 5H21", "stroke-dasharray": DASHES[colour - 1] || null }),
    isValidation && svg("circle", { cx: 11, cy: 5, r: 3 }));
}

/**
 * A chart. `draw` shows, and shows again:
 * - `series`: [{ name, colour (1 to 6), isValidation, points: [[x, y], …] by x }]; y may be null, where the line is broken
 * - `x`, `y`: { label } of the axes; `log`: a logarithmic y; `smoothing`: from 0 to below 1, of series but validation
 * - `marks`: [{ y, label }], horizontal lines
 * A `small` chart has no read-out and no table.
 */
export class Chart {
  constructor({ label, small = false }) {
    this.label = label;
    this.small = small;
    this.shown = { series: [], x: { label: "" }, y: { label: "" } };
    this.at = null; // the x of the crosshair
    this.picture = svg("svg", { class: "chart-picture", role: "img", "aria-label": label });
    this.readout = element("div", { class: "chart-readout", role: "status", hidden: true });
    const keys = small ? {} : { tabindex: "0", role: "group", "aria-roledescription": "chart", "aria-label": label };
    this.plot = element("div", { class: small ? "chart-plot small" : "chart-plot", ...keys }, this.picture, this.readout);
    this.node = element("div", { class: "chart" }, this.plot);
    new ResizeObserver(() => this.redraw()).observe(this.plot);
    if (small) return;
    this.rows = element("div");
    this.details = element("details", { class: "chart-table", ontoggle: () => this.fillTable() },
      element("summary", {}, "Show as a table"), this.rows);
    this.node.append(this.details);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX - this.plot.getBoundingClientRect().left));
    this.plot.addEventListener("pointerdown", (event) => this.point(event.clientX - this.plot.getBoundingClientRect().left));
    this.plot.addEventListener("pointerleave", () => this.pointTo(null));
    this.plot.addEventListener("blur", () => this.pointTo(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  draw(shown) {
    this.shown = { log: false, smoothing: 0, marks: [], ...shown };
    if (!this.small) this.plot.setAttribute("aria-label", this.label);
    this.redraw();
    if (this.details?.open) this.fillTable();
  }

  redraw() {
    const width = Math.round(this.plot.clientWidth);
    if (!width) return; // not on the page, or its tab is not shown
    const height = this.small ? 92 : width < 500 ? 240 : 320;
    const lines = this.shown.series.map((one) => ({
      ...one, line: smoothed(one.points, one.isValidation ? 0 : this.shown.smoothing),
    }));
    this.lines = lines;
    const places = this.places = this.scales(lines, width, height);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.picture.setAttribute("width", width);
    this.picture.setAttribute("height", height);
    this.picture.setAttribute("aria-label", this.summary());
    const clip = `clip-${this.id ??= Math.random().toString(36).slice(2)}`;
    const [markLines, markTexts] = this.markLines(places);
    this.picture.replaceChildren(
      svg("clipPath", { id: clip }, svg("rect", {
        x: places.left - 4, y: places.top - 4, width: places.width + 8, height: places.bottom - places.top + 8,
      })),
      ...(places.isEmpty ? [] : this.axes(places)),
      svg("g", { "clip-path": `url(#${clip})` }, markLines, lines.flatMap((one) => this.lineOf(one, places)), markTexts),
      svg("g", { class: "crosshair" }));
    if (!this.small) this.pointTo(this.at);
  }

  /** The area of the lines in pixels, and functions from numbers to pixels. */
  scales(lines, width, height) {
    const { log, marks = [], smoothing } = this.shown;
    const isShown = (y) => Number.isFinite(y) && (!log || y > 0);
    const range = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { line, points, isValidation } of lines) {
      // What is smoothed away may leave the picture: one wild step would flatten all others.
      const judged = smoothing && !isValidation ? line : points;
      for (const [x, y] of judged) {
        if (!isShown(y)) continue;
        range[0] = Math.min(range[0], x);
        range[1] = Math.max(range[1], x);
        range[2] = Math.min(range[2], y);
        range[3] = Math.max(range[3], y);
      }
    }
    const isEmpty = range[0] === Infinity;
    if (isEmpty) range.splice(0, 4, 0, 1, log ? 0.1 : 0, 1);
    let [left, right, low, high] = range;
    // A line that is far away is left out: it would flatten the curves.
    const reach = high - low || Math.abs(high) * 0.1;
    for (const { y } of marks) {
      if (isShown(y) && y > low - reach && y < high + reach) [low, high] = [Math.min(low, y), Math.max(high, y)];
    }
    if (!isRange(left, right)) [left, right] = [Math.max(0, left - 1), right + 1];
    if (!isRange(low, high)) [low, high] = log ? [low / 1.1, high * 1.1] : [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
    const pad = log ? (high / low) ** 0.04 : (high - low) * 0.05;
    if (log) [low, high] = [low / pad, high * pad];
    else [low, high] = [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
    const bottom = height - (this.small ? 6 : 36);
    const top = this.small ? 6 : 10;
    const yTicks = ticks(low, high, this.small ? 2 : Math.max(2, Math.floor((bottom - top) / 52)), log);
    const edge = this.small ? 6 : 12 + DIGIT * Math.max(...yTicks.map((value) => short(value).length), 1);
    const inner = width - edge - (this.small ? 6 : 14);
    const toY = log ? (y) => Math.log(y / low) / Math.log(high / low) : (y) => (y - low) / (high - low);
    return {
      isEmpty, log, left: edge, top, bottom, width: inner, low: left, high: right, yTicks,
      xTicks: ticks(left, right, Math.max(2, Math.floor(inner / 90))),
      x: (x) => edge + ((x - left) / (right - left)) * inner,
      y: (y) => bottom - toY(y) * (bottom - top),
    };
  }

  axes(places) {
    const { left, width, bottom } = places;
    const across = places.yTicks.map((value) => svg("path", { class: "grid-line", d: `M${left} ${places.y(value).toFixed(1)}h${width}` }));
    if (this.small) return across;
    const label = (x, y, anchor, text) => svg("text", { class: "axis", x, y, "text-anchor": anchor, "font-size": FONT }, text);
    return [
      ...across,
      svg("path", { class: "axis-line", d: `M${left} ${bottom}h${width}` }),
      ...places.yTicks.map((value) => label(left - 8, places.y(value) + FONT / 3, "end", short(value))),
      ...places.xTicks.map((value) => svg("path", { class: "axis-line", d: `M${places.x(value).toFixed(1)} ${bottom}v4` })),
      ...places.xTicks.map((value) => label(Math.min(places.x(value), left + width - 2), bottom + 17, "middle", short(value))),
      label(left + width, bottom + 32, "end", this.shown.x.label),
    ];
  }

  markLines(places) {
    const shown = (this.shown.marks ?? []).filter(({ y }) => Number.isFinite(y) && (!places.log || y > 0));
    const line = ({ y }) => svg("path", { class: "mark-line", d: `M${places.left} ${places.y(y).toFixed(1)}h${places.width}` });
    const text = ({ y, label }) => svg("text", {
      class: "axis", x: places.left + places.width - 4, y: places.y(y) - 5, "text-anchor": "end", "font-size": FONT,
    }, label);
    return [shown.map(line), this.small ? [] : shown.map(text)];
  }

  lineOf(one, places) {
    const shared = { class: `series-${one.colour}`, "data-name": one.name, "data-points": one.points.length };
    const dash = DASHES[one.colour - 1] || null;
    const isSmoothed = one.line !== one.points;
    const drawn = [];
    if (isSmoothed && !this.small) drawn.push(svg("path", { class: `line raw series-${one.colour}`, d: path(one.points, places) }));
    drawn.push(svg("path", { ...shared, class: `line series-${one.colour}`, d: path(one.line, places), "stroke-dasharray": dash }));
    const isSparse = one.points.length * 12 < places.width; // else the points hide the line
    if (one.points.length === 1 || (one.isValidation && isSparse && !this.small)) {
      drawn.push(...one.points.filter(([, y]) => Number.isFinite(y) && (!places.log || y > 0)).map(([x, y]) => svg("circle", {
        class: `point series-${one.colour}`, cx: places.x(x).toFixed(1), cy: places.y(y).toFixed(1), r: 3,
      })));
    }
    return drawn;
  }

  // -------------------------------------------------------------- crosshair

  /** Point to the place nearest to a pixel from the left. */
  point(pixel) {
    if (!this.places || this.places.isEmpty) return;
    const wanted = this.places.low + ((pixel - this.places.left) / this.places.width) * (this.places.high - this.places.low);
    this.pointTo(this.nearest(this.xs(), wanted));
  }

  key(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") this.pointTo(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const xs = this.xs();
    if (!xs.length) return;
    const index = this.at === null ? (moves[event.key] > 0 ? -1 : xs.length) : xs.indexOf(this.nearest(xs, this.at));
    this.pointTo(xs[Math.min(xs.length - 1, Math.max(0, index + moves[event.key]))]);
  }

  /** All x of the lines, in order. */
  xs() {
    return [...new Set((this.lines ?? []).flatMap(({ points }) => points.filter(([, y]) => Number.isFinite(y)).map(([x]) => x)))].sort((a, b) => a - b);
  }

  nearest(xs, wanted) {
    return xs.reduce((best, x) => (Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best), xs[0] ?? null);
  }

  /** Show the crosshair and what each line has there; null: hide them. */
  pointTo(x) {
    const cross = this.picture.querySelector(".crosshair");
    this.at = x;
    this.readout.hidden = x === null || x === undefined || this.places.isEmpty;
    cross?.replaceChildren();
    if (this.readout.hidden || !cross) return;
    const { places } = this;
    const near = ((places.high - places.low) / places.width) * 24; // a line says what it has within 24 pixels
    const found = this.lines.flatMap((one) => {
      const last = this.at;
      const place = one.points.reduce((best, [at, y], index) => (Number.isFinite(y) && (best < 0
        || Math.abs(at - last) < Math.abs(one.points[best][0] - last)) ? index : best), -1);
      return place >= 0 && Math.abs(one.points[place][0] - last) <= near ? [{ one, place }] : [];
    });
    cross.append(svg("path", { d: `M${places.x(x).toFixed(1)} ${places.top}V${places.bottom}` }));
    for (const { one, place } of found) {
      const [at, y] = one.line[place];
      if (!places.log || y > 0) cross.append(svg("circle", { class: `point series-${one.colour}`, cx: places.x(at), cy: places.y(y), r: 4 }));
    }
    this.readout.replaceChildren(
      element("b", {}, `${number(x, 5)} ${this.shown.x.label}`),
      ...found.map(({ one, place }) => element("div", { class: "chart-value" }, swatch(one.colour, one.isValidation),
        element("span", {}, one.name), element("b", {}, number(one.points[place][1], 5)))));
    const isRight = places.x(x) > places.left + places.width / 2;
    this.readout.style.left = isRight ? "" : `${places.x(x) + 12}px`;
    this.readout.style.right = isRight ? `${this.plot.clientWidth - places.x(x) + 12}px` : "";
  }

  // -------------------------------------------------------------- words and table

  summary() {
    const parts = this.shown.series.map(({ name, points }) => {
      const last = points.findLast(([, y]) => Number.isFinite(y));
      return last ? `${name}: ${number(last[1])} at ${number(last[0])}` : `${name}: nothing yet`;
    });
    return `${this.label} over ${this.shown.x.label}. ${parts.join("; ") || "Nothing yet"}`;
  }

  /** All figures by x; of many, at most ROWS rows at even distances, with the last. */
  fillTable() {
    if (!this.details.open) return;
    const { series, x } = this.shown;
    const values = series.map(({ points }) => new Map(points));
    const xs = [...new Set(series.flatMap(({ points }) => points.map(([at]) => at)))].sort((a, b) => a - b);
    const every = Math.ceil(xs.length / ROWS);
    const kept = xs.filter((_, index) => (xs.length - 1 - index) % every === 0);
    const rows = kept.map((at) => [at, ...values.map((found) => found.get(at) ?? "")]);
    this.rows.replaceChildren(table([x.label, ...series.map(({ name }) => name)], rows, this.label),
      every > 1 && element("p", { class: "muted" }, `${rows.length} of ${number(xs.length)} rows`) || "");
  }
}
