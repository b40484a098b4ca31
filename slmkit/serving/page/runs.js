// Runs: the list, live curves of one or several, and of the chosen one its samples, X-ray and recipe.

import { Chart, markSwatch, short, swatch } from "./charts.js";
import { element, field, kept, number, table } from "./dom.js";

const EVERY = 2000; // milliseconds between two looks at the server
const COLOURS = 6;
const AXES = { step: "steps", tokens: "tokens", seconds: "time" };
const NO_CURVE = new Set(["step", "tokens", "seconds"]);
// What is drawn of the keys of metrics.jsonl: label, sign of the unit, factor. Other numbers are drawn under their own name.
const QUANTITIES = {
  loss: { label: "Loss" },
  bits_per_byte: { label: "Bits per byte" },
  learning_rate: { label: "Learning rate" },
  grad_norm: { label: "Gradient norm" },
  tokens_per_second: { label: "Tokens/s" },
  mfu: { label: "MFU", sign: "%", factor: 100 },
  memory_bytes: { label: "Peak memory", sign: " GB", factor: 1e-9 },
  "answers/reward": { label: "Reward" },
  "answers/right": { label: "Right answers", sign: "%", factor: 100 },
  "rewards/accuracy": { label: "Pairs ranked correctly", sign: "%", factor: 100 },
};
const STATES = { running: "accent", finished: "good", stopped: "", damaged: "bad" };

let app;
let view; // the nodes that change
let timer = null;
let isShown = false;
let turn = 0; // of looks at the server: an answer to an earlier one is dropped

let list = []; // rows of the server's list
let chosen = null; // the name of the run shown below the chart
const ticked = new Set(); // names of further runs in the chart
const loaded = new Map(); // name → what is known of a run, with all its lines
const slots = new Map(); // name → colour, which it keeps while it is drawn
const options = { quantity: "loss", axis: "step", log: false, smoothing: 0.6, ...kept.get("runs.options", {}) };

export function mount(root, shell) {
  app = shell;
  view = {
    list: element("ul", { class: "run-list" }),
    count: element("span", { class: "muted" }),
    problem: element("p", { class: "error", role: "alert", hidden: true }),
    empty: element("p", { class: "empty", hidden: true }, "No runs yet. ",
      element("code", {}, "slm train"), " and ", element("code", {}, "slm quickstart"), " make some; they appear here as they start."),
    main: element("div", { class: "stack runs-main" }),
    controls: element("div", { class: "row chart-controls" }),
    quantity: element("select", { onchange: (event) => set("quantity", event.target.value) }),
    legend: element("ul", { class: "legend" }),
    small: element("div", { class: "small-charts" }),
    head: element("section", { class: "card stack", "aria-label": "The chosen run" }),
    samples: element("section", { class: "card", "aria-label": "Samples" }),
    xray: element("section", { class: "card", "aria-label": "What is fed and learned" }),
    recipe: element("section", { class: "card", "aria-label": "Recipe" }),
    facts: element("section", { class: "card", "aria-label": "Checkpoints and environment" }),
    chart: new Chart({ label: "Curve" }),
    smallCharts: new Map(),
  };
  addControls();
  view.main.append(view.head,
    element("section", { class: "card stack", "aria-label": "Curves" }, view.controls, view.chart.node, view.legend, view.small),
    view.samples, view.xray, view.recipe, view.facts);
  root.replaceChildren(element("div", { class: "page runs" },
    element("aside", { class: "stack runs-side" },
      element("div", { class: "row apart" }, element("h2", {}, "Runs"), view.count), view.list),
    element("div", { class: "stack" }, view.problem, view.empty, view.main)));
  document.addEventListener("visibilitychange", watch);
  return look();
}

export function show() {
  isShown = true;
  watch();
}

export function hide() {
  isShown = false;
  watch();
}

/** Look at the server now and every two seconds, while somebody can see it. */
function watch() {
  clearTimeout(timer);
  timer = null;
  if (isShown && !document.hidden) look();
}

async function look() {
  clearTimeout(timer);
  const mine = turn += 1;
  try {
    const found = await app.post("runs");
    if (mine !== turn) return;
    list = found;
    forgetDeleted();
    chosen ??= list[0]?.name ?? null;
    await Promise.all(drawn().map(load));
    if (mine !== turn) return;
    view.problem.hidden = true;
  } catch (error) {
    if (mine !== turn) return;
    view.problem.textContent = error instanceof TypeError ? "The server does not answer; trying again." : error.message;
    view.problem.hidden = false;
  }
  render();
  if (isShown && !document.hidden) timer = setTimeout(look, EVERY);
}

function forgetDeleted() {
  const names = new Set(list.map(({ name }) => name));
  for (const name of [...loaded.keys(), ...ticked, chosen].filter((name) => name !== null && !names.has(name))) {
    loaded.delete(name);
    ticked.delete(name);
    slots.delete(name);
    if (name === chosen) {
      app.announce(`${name} is no longer there`);
      chosen = null;
    }
  }
}

/** Read the new lines of a run, if it changed since it was read. */
async function load(name) {
  const row = list.find((one) => one.name === name);
  const before = loaded.get(name);
  if (before && before.state !== "running" && same(before.row, row)) return;
  let known = before;
  do {
    let answer;
    try {
      answer = await app.post("run", known ? { name, since: known.position, mark: known.mark } : { name });
    } catch (error) {
      if (error instanceof TypeError) throw error;
      loaded.delete(name); // deleted since the list was made, or not readable
      return;
    }
    const earlier = answer.since ? known.reports : [];
    known = { ...answer, row, reports: answer.reports.length || !answer.since ? [...earlier, ...answer.reports] : earlier };
  } while (known.more);
  loaded.set(name, known);
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** The names of the runs in the chart, the chosen one first. */
function drawn() {
  return [chosen, ...ticked].filter((name, index, all) => name !== null && all.indexOf(name) === index);
}

function choose(name) {
  chosen = name;
  ticked.delete(name);
  look();
  render();
}

function set(name, value) {
  options[name] = value;
  kept.set("runs.options", options);
  drawCurves();
}

// ---------------------------------------------------------------- list

function render() {
  for (const name of slots.keys()) if (!drawn().includes(name)) slots.delete(name);
  for (const name of drawn()) {
    if (slots.has(name)) continue;
    const free = Array.from({ length: COLOURS }, (_, index) => index + 1).find((colour) => ![...slots.values()].includes(colour));
    slots.set(name, free ?? 1);
  }
  view.count.textContent = list.length ? `${list.length}` : "";
  view.empty.hidden = list.length > 0 || !view.problem.hidden;
  view.main.hidden = list.length === 0;
  renderList();
  if (!list.length) return;
  drawCurves();
  renderRun();
}

function renderList() {
  const focused = document.activeElement?.closest?.(".run-list [data-key]")?.dataset.key;
  view.list.replaceChildren(...list.map((run) => {
    const isChosen = run.name === chosen;
    const isFull = !ticked.has(run.name) && ticked.size >= COLOURS - 1;
    return element("li", { class: "run" },
      element("label", { class: "run-tick", title: isChosen ? "In the chart" : "Compare in the chart" },
        element("input", {
          type: "checkbox", "data-key": `tick ${run.name}`, "aria-label": `${run.name} in the chart`, checked: isChosen || ticked.has(run.name),
          disabled: isChosen || isFull || run.state === "damaged",
          onchange: (event) => {
            if (event.target.checked) ticked.add(run.name);
            else ticked.delete(run.name);
            look();
          },
        }),
        slots.has(run.name) && swatch(slots.get(run.name))),
      element("button", { type: "button", class: "run-name", "data-key": run.name, "aria-current": String(isChosen), onclick: () => choose(run.name) },
        element("span", { class: "row apart" }, element("b", {}, run.name), badge(run.state)),
        element("span", { class: "muted run-facts" }, ...facts(run)),
        run.state === "running" && progress(run)));
  }));
  if (focused) view.list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function badge(state) {
  return element("span", { class: `badge ${STATES[state] ?? ""}` }, state);
}

function facts(run) {
  if (run.state === "damaged") return [run.problem];
  const done = `${number(run.step)} ${run.step === 1 ? "step" : "steps"}`;
  const steps = run.steps && run.steps !== run.step ? `${number(run.step)} of ${number(run.steps)} steps` : done;
  const parts = [run.objective, run.parameters && compact(run.parameters), steps];
  if (run.validation_loss !== null) parts.push(`loss ${run.validation_loss.toFixed(3)}`);
  return [parts.filter(Boolean).join(" · ")];
}

function progress(run) {
  return element("progress", { max: run.steps || 1, value: run.step, "aria-label": `${run.name}: ${run.step} of ${run.steps ?? "unknown"} steps` });
}

function compact(value) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

// ---------------------------------------------------------------- curves

function addControls() {
  const choices = element("fieldset", { class: "choices" }, element("legend", { class: "unseen" }, "Horizontal axis"),
    ...Object.entries(AXES).map(([key, label]) => element("label", {},
      element("input", { type: "radio", name: "runs-axis", value: key, checked: options.axis === key, onchange: () => set("axis", key) }),
      element("span", {}, label))));
  const percent = element("output", { class: "number" }, String(options.smoothing));
  const smoothing = element("input", {
    type: "range", min: 0, max: 0.98, step: 0.02, value: options.smoothing, "aria-label": "Smoothing",
    oninput: (event) => {
      percent.textContent = event.target.value;
      set("smoothing", Number(event.target.value));
    },
  });
  view.controls.append(
    element("label", { class: "quantity" }, element("span", { class: "unseen" }, "Curve"), view.quantity), choices,
    element("label", { class: "check" },
      element("input", { type: "checkbox", checked: options.log, onchange: (event) => set("log", event.target.checked) }), "Log scale"),
    element("label", { class: "check smoothing" }, "Smoothing", smoothing, percent));
}

/** Whether it is a figure of an evaluation on a task, which is not measured in training steps. */
function isOfTask(quantity) {
  return quantity.startsWith("eval/");
}

/** The quantity that a key of metrics.jsonl belongs to: validation/x and validation_x are drawn beside x. */
function quantityOf(key) {
  return key.replace(/^validation[/_]/, "");
}

const counted = new WeakMap(); // lines → their quantities: of a long run there are many lines

function quantitiesIn(reports) {
  if (!counted.has(reports)) {
    const found = new Set();
    for (const report of reports) {
      for (const key in report) {
        if (typeof report[key] === "number" && !NO_CURVE.has(key) && !key.endsWith("_stderr")) found.add(quantityOf(key));
      }
    }
    counted.set(reports, found);
  }
  return counted.get(reports);
}

/** The quantities that the runs in the chart have, those of QUANTITIES first. */
function quantities(runs) {
  const found = new Set(runs.flatMap(({ reports }) => [...quantitiesIn(reports)]));
  const order = Object.keys(QUANTITIES);
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  return [...found].sort((a, b) => place(a) - place(b) || a.localeCompare(b));
}

function labelOf(quantity) {
  return QUANTITIES[quantity]?.label ?? quantity.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
}

/** The unit of the horizontal axis, and how much of it one is. */
function unitOf(runs) {
  if (options.axis !== "seconds") return [options.axis === "step" ? "steps" : "trained tokens", 1];
  const last = Math.max(0, ...runs.map(({ reports }) => reports.at(-1)?.seconds ?? 0));
  return last >= 10800 ? ["hours", 3600] : last >= 180 ? ["minutes", 60] : ["seconds", 1];
}

function seriesOf(quantity, runs, divisor) {
  const factor = QUANTITIES[quantity]?.factor ?? 1;
  return runs.flatMap((run) => {
    const keys = [[quantity, isOfTask(quantity)], [`validation_${quantity}`, true], [`validation/${quantity}`, true]];
    return keys.flatMap(([key, isValidation]) => {
      const points = run.reports.filter((report) => key in report && Number.isFinite(report[options.axis]))
        .map((report) => [report[options.axis] / divisor, typeof report[key] === "number" ? report[key] * factor : null]);
      const name = (runs.length > 1 ? `${run.name}, ` : "") + (isValidation ? "validation" : "training");
      return points.length ? [{ name, colour: slots.get(run.name), isValidation, points }] : [];
    });
  });
}

function drawCurves() {
  const runs = drawn().map((name) => loaded.get(name)).filter(Boolean);
  const names = quantities(runs);
  const quantity = names.includes(options.quantity) ? options.quantity : names[0];
  if (!same([...view.quantity.options].map(({ value }) => value), names)) {
    view.quantity.replaceChildren(...names.map((name) => element("option", { value: name }, labelOf(name))));
  }
  view.quantity.value = quantity ?? "";
  view.quantity.disabled = !names.length;
  const [unit, divisor] = unitOf(runs);
  const series = quantity ? seriesOf(quantity, runs, divisor) : [];
  const perfect = quantity === "loss" ? runs.filter((run) => Number.isFinite(run.perfect_loss)) : [];
  view.chart.label = quantity ? labelOf(quantity) : "Curve";
  view.chart.draw({
    series, x: { label: unit }, log: options.log, smoothing: options.smoothing,
    marks: perfect.map((run) => ({ y: run.perfect_loss, label: runs.length > 1 ? `a perfect model on ${run.name}` : "a perfect model" })),
  });
  view.legend.replaceChildren(...series.map((one) => {
    const values = one.points.map(([, y]) => y).filter(Number.isFinite);
    const best = one.isValidation && quantity === "loss" ? `best ${number(Math.min(...values))}` : values.length ? number(values.at(-1)) : "";
    return element("li", {}, swatch(one.colour, one.isValidation), element("span", {}, one.name), element("b", {}, best));
  }), ...perfect.map((run) => element("li", {}, markSwatch(),
    element("span", {}, runs.length > 1 ? `a perfect model on ${run.name}` : "a perfect model"), element("b", {}, number(run.perfect_loss)))),
  series.length ? "" : element("li", { class: "muted" }, "Nothing is logged yet."));
  drawSmall(names.filter((name) => name !== quantity), runs, unit, divisor);
}

/** All other quantities, as buttons that make them the large one. */
function drawSmall(names, runs, unit, divisor) {
  for (const [name, { button }] of view.smallCharts) {
    if (names.includes(name)) continue;
    button.remove();
    view.smallCharts.delete(name);
  }
  names.forEach((name, index) => {
    if (!view.smallCharts.has(name)) {
      const chart = new Chart({ label: labelOf(name), small: true });
      const value = element("b", {});
      const button = element("button", { type: "button", class: "small-chart", onclick: () => set("quantity", name) },
        element("span", { class: "row apart" }, element("span", { class: "muted" }, labelOf(name)), value), chart.node);
      view.smallCharts.set(name, { chart, value, button });
    }
    const { chart, value, button } = view.smallCharts.get(name);
    if (view.small.children[index] !== button) view.small.insertBefore(button, view.small.children[index] ?? null);
    const series = seriesOf(name, runs, divisor);
    const last = series[0]?.points.findLast(([, y]) => Number.isFinite(y))?.[1];
    value.textContent = last === undefined ? "" : `${short(Number(last.toPrecision(3)))}${QUANTITIES[name]?.sign ?? ""}`;
    chart.draw({ series, x: { label: unit }, smoothing: options.smoothing });
  });
}

// ---------------------------------------------------------------- the chosen run

let rendered = {}; // part → what it was made of, so that nothing is made again while somebody reads or types in it

function part(name, content, make) {
  const key = JSON.stringify([chosen, content]);
  if (rendered[name] === key) return;
  rendered[name] = key;
  const made = make();
  view[name].hidden = !made;
  view[name].replaceChildren(...(made || []).filter(Boolean));
}

function renderRun() {
  const run = loaded.get(chosen);
  const row = list.find(({ name }) => name === chosen);
  if (!run) {
    rendered = {};
    view.head.replaceChildren(element("h3", {}, chosen ?? ""), element("p", { class: "muted" }, row?.problem ?? "Loading…"));
    for (const name of ["samples", "xray", "recipe", "facts"]) view[name].hidden = true;
    return;
  }
  const last = run.reports.at(-1) ?? {};
  part("head", [row, last, run.plan], () => head(row, run, last));
  part("samples", run.samples, () => samples(run));
  part("xray", run.xray, () => run.xray && xray(run.xray));
  const others = list.filter(({ name, state }) => name !== chosen && state !== "damaged").map(({ name }) => name);
  part("recipe", [run.recipe, others, [...ticked]], () => run.recipe && recipe(run, others));
  part("facts", [run.checkpoints, run.environment, run.plan], () => environment(run));
}

function head(row, run, last) {
  const figure = (value, label) => element("div", { class: "figure" }, element("b", {}, value), element("span", {}, label));
  const isRunning = row.state === "running";
  const left = isRunning ? secondsLeft(row, run) : null;
  const figures = [
    row.validation_loss !== null && row.validation_loss !== undefined && figure(row.validation_loss.toFixed(3), "best validation loss"),
    Number.isFinite(last.loss) && figure(last.loss.toFixed(3), "training loss"),
    row.state === "finished" && figure(number(row.step), row.step === 1 ? "step" : "steps"),
    row.parameters && figure(compact(row.parameters), "parameters"),
    figure(compact(row.tokens ?? 0), "trained tokens"),
    Number.isFinite(last.tokens_per_second) && figure(compact(last.tokens_per_second), "tokens per second"),
    Number.isFinite(last.seconds) && figure(clock(last.seconds), "training time"),
    left !== null && figure(clock(left), "left"),
  ].filter(Boolean);
  const steps = row.steps ? `Step ${number(row.step)} of ${number(row.steps)}` : `Step ${number(row.step ?? 0)}`;
  return [
    element("div", { class: "row apart" }, element("h3", {}, row.name), element("span", { class: "row" },
      element("span", { class: "muted" }, `${row.objective ?? ""} · changed ${ago(row.changed)}`), badge(row.state))),
    row.state !== "finished" && element("div", { class: "run-progress" }, progress(row), element("span", { class: "muted number" }, steps)),
    element("div", { class: "figures" }, ...figures),
  ];
}

/** Seconds until the last step, at the speed of the last twenty logged lines; before there are two, as it was planned. */
function secondsLeft(row, run) {
  if (!row.steps) return null;
  const recent = run.reports.filter(({ seconds, step }) => Number.isFinite(seconds) && Number.isFinite(step)).slice(-20);
  const [first, last] = [recent[0], recent.at(-1)];
  if (last && last.step > first.step && last.seconds > first.seconds) {
    return Math.max(0, ((last.seconds - first.seconds) / (last.step - first.step)) * (row.steps - row.step));
  }
  const planned = run.plan?.predicted?.seconds;
  return Number.isFinite(planned) ? planned * (1 - row.step / row.steps) : null;
}

/** 3723 → "1:02:03". */
function clock(seconds) {
  const rest = Math.round(seconds);
  const parts = [Math.floor(rest / 3600), Math.floor(rest / 60) % 60, rest % 60];
  return parts[0] ? `${parts[0]}:${String(parts[1]).padStart(2, "0")}:${String(parts[2]).padStart(2, "0")}`
    : `${parts[1]}:${String(parts[2]).padStart(2, "0")}`;
}

function ago(changed) {
  const seconds = (changed * 1000 - Date.now()) / 1000;
  const units = [["second", 60], ["minute", 60], ["hour", 24], ["day", Infinity]];
  let value = seconds;
  for (const [unit, size] of units) {
    if (Math.abs(value) < size) return new Intl.RelativeTimeFormat("en", { numeric: "auto" }).format(Math.round(value), unit);
    value /= size;
  }
  return "";
}

// ---------------------------------------------------------------- samples

const slider = { run: null, index: null }; // the evaluation that is shown; null: the newest, also as it comes

function samples(run) {
  const found = run.samples.filter(({ texts }) => texts.length);
  if (!found.length) return null;
  if (slider.run !== run.name) Object.assign(slider, { run: run.name, index: null });
  const prompts = run.recipe?.["train.sample_prompts"] ?? [];
  const title = element("output", {}, "");
  const body = element("div", { class: "stack" });
  const showOne = (index) => {
    const [first, now] = [found[0], found[index]];
    title.textContent = `Step ${number(now.step)}`;
    body.replaceChildren(...now.texts.map((text, place) => {
      const [prompt, written] = apart(text, prompts[place]);
      const [, before] = apart(first.texts[place] ?? "", prompts[place]);
      return element("div", { class: "stack sample" },
        prompt && element("p", { class: "prompt", dir: "auto" }, prompt),
        element("div", { class: "sides" },
          element("figure", {}, element("figcaption", { class: "muted" }, `First, step ${number(first.step)}`), element("blockquote", { dir: "auto" }, before)),
          element("figure", {}, element("figcaption", { class: "muted" }, `Step ${number(now.step)}`), element("blockquote", { dir: "auto" }, written))));
    }));
  };
  const index = Math.min(slider.index ?? found.length - 1, found.length - 1);
  const input = element("input", {
    type: "range", min: 0, max: found.length - 1, step: 1, value: index, "aria-label": "Evaluation",
    oninput: (event) => {
      const place = Number(event.target.value);
      slider.index = place === found.length - 1 ? null : place;
      event.target.setAttribute("aria-valuetext", `step ${found[place].step}`);
      showOne(place);
    },
  });
  input.setAttribute("aria-valuetext", `step ${found[index].step}`);
  showOne(index);
  return [
    element("div", { class: "row apart" }, element("h3", {}, "Samples as they improve"),
      element("label", { class: "check sample-slider" }, input, title)),
    body,
  ];
}

/** A sample's prompt, and what was written after it. */
function apart(text, prompt = "") {
  const start = prompt.trim();
  return text.startsWith(start) ? [start, text.slice(start.length).trim()] : ["", text.trim()];
}

// ---------------------------------------------------------------- X-ray

/** xray.md: figures, findings and notes as a list, then rows between ``` lines with ⟦what is not learned⟧. */
function xray(text) {
  const [top, ...rest] = text.split("\nIn ⟦");
  const lines = top.split("\n").filter((line) => line.startsWith("- ")).map((line) => line.slice(2));
  const findings = lines.filter((line) => line.startsWith("**")).map((line) => line.replaceAll("**", ""));
  const notes = lines.filter((line) => line.startsWith("note: ")).map((line) => line.slice(6));
  const figures = lines.filter((line) => !line.startsWith("**") && !line.startsWith("note: ")).map((line) => {
    const [name, ...value] = line.split(": ");
    return [name, value.join(": ")];
  });
  const rows = [...rest.join("\nIn ⟦").matchAll(/^```\n([\s\S]*?)\n```$/gm)].map((match) => match[1]);
  return [
    element("h3", {}, "What is fed and what is learned"),
    element("div", { class: "stack" },
      ...findings.map((line) => element("p", { class: "error" }, line)),
      ...notes.map((line) => element("p", { class: "warn" }, `Note: ${line}`)),
      !findings.length && element("p", { class: "good" }, "The checks before the first step found nothing wrong."),
      element("dl", { class: "facts" }, ...figures.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
      rows.length > 0 && element("p", { class: "legend-line" }, element("mark", { class: "learned" }, "learned"),
        element("span", { class: "muted" }, "read, not learned")),
      ...rows.map((row) => element("div", { class: "fed", dir: "auto" }, ...fedParts(row)))),
  ];
}

function fedParts(row) {
  return row.split(/(⟦[^⟧]*⟧| … [\d,]+ tokens … )/).filter(Boolean).map((text) => (/^(⟦| … )/.test(text)
    ? element("span", { class: "muted" }, text.replace(/^⟦|⟧$/g, "")) : element("mark", { class: "learned" }, text)));
}

// ---------------------------------------------------------------- recipe, checkpoints, environment

const recipeOptions = { other: "", filter: "" };

function recipe(run, others) {
  const body = element("div");
  const words = (value) => (value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const fill = async () => {
    const other = recipeOptions.other;
    const wanted = recipeOptions.filter.toLowerCase();
    let theirs = null;
    if (other) {
      if (!loaded.has(other)) await load(other).catch(() => null);
      theirs = loaded.get(other)?.recipe ?? {};
      if (other !== recipeOptions.other) return;
    }
    const keys = [...new Set([...Object.keys(run.recipe), ...Object.keys(theirs ?? {})])]
      .filter((key) => key.toLowerCase().includes(wanted) && (!theirs || !same(run.recipe[key], theirs[key])));
    body.replaceChildren(keys.length === 0
      ? element("p", { class: "muted" }, theirs && !wanted ? "Both recipes have the same values." : "No such key.")
      : table(theirs ? ["key", run.name, other] : ["key", "value"],
        keys.map((key) => [element("code", {}, key), words(run.recipe[key]), ...(theirs ? [words(theirs[key])] : [])]), "Recipe"));
  };
  if (!others.includes(recipeOptions.other)) recipeOptions.other = [...ticked].find((name) => others.includes(name)) ?? "";
  const select = element("select", { onchange: (event) => { recipeOptions.other = event.target.value; fill(); } },
    element("option", { value: "" }, "nothing: all values"), ...others.map((name) => element("option", { value: name }, name)));
  select.value = recipeOptions.other;
  const filter = element("input", {
    type: "search", value: recipeOptions.filter, placeholder: "learning_rate",
    oninput: (event) => { recipeOptions.filter = event.target.value; fill(); },
  });
  const details = element("details", { open: kept.get("runs.recipe", false), ontoggle: (event) => kept.set("runs.recipe", event.target.open) },
    element("summary", {}, element("h3", {}, "Recipe")),
    element("div", { class: "stack" },
      element("div", { class: "grid" }, field("Only what differs from", select), field("Keys with", filter)), body));
  fill();
  return [details];
}

function environment(run) {
  const { data, packages, fingerprints, changes, ...machine } = run.environment ?? {};
  const rows = Object.entries({ ...machine, ...(packages ?? {}) }).filter(([, value]) => value !== null && typeof value !== "object");
  const size = (bytes) => (bytes >= 1e9 ? `${number(bytes / 1e9, 3)} GB` : `${number(bytes / 1e6, 3)} MB`);
  const marks = ({ best, latest }) => [best && "best", latest && "latest"].filter(Boolean).join(", ");
  const changed = (changes ?? []).map(({ step, key, was, now }) => [step ?? "", element("code", {}, key ?? ""), JSON.stringify(was), JSON.stringify(now)]);
  return [element("details", { open: kept.get("runs.facts", false), ontoggle: (event) => kept.set("runs.facts", event.target.open) },
    element("summary", {}, element("h3", {}, "Checkpoints and environment")),
    element("div", { class: "stack" },
      run.checkpoints.length ? table(["step", "size", ""], run.checkpoints.map((one) => [one.step, size(one.bytes), marks(one)]), "Checkpoints")
        : element("p", { class: "muted" }, "No checkpoint yet."),
      changed.length > 0 && table(["step", "changed key", "was", "now"], changed, "Changes of the recipe"),
      rows.length > 0 && table(["", ""], rows.map(([name, value]) => [name.replaceAll("_", " "), String(value)]), "Environment")))];
}
