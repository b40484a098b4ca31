// Helpers of all tabs: elements, storage that may be off, numbers.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. Strings among `children` become text, never markup; null and false are left out.
 * `attributes`: `onclick: f` adds a listener, true sets an empty attribute, false and null none.
 * No `style` attribute, which the content policy forbids: set `node.style.…` instead.
 */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A picture of lines, 24 by 24, in the colour of the text. */
export function icon(path) {
  return svg("svg", {
    viewBox: "0 0 24 24", width: 20, height: 20, fill: "none", stroke: "currentColor", "stroke-width": 2,
    "stroke-linecap": "round", "stroke-linejoin": "round", "aria-hidden": "true",
  }, svg("path", { d: path }));
}

function fill(node, attributes, children) {
  // Children first: below an element with dir="auto" each further child costs a look at all before it.
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  return node;
}

/** A labelled input, select or textarea: `field("Seed", input)`. */
export function field(label, control, hint = "") {
  return element("label", { class: "field" }, element("span", {}, label), control,
    hint && element("small", { class: "muted" }, hint));
}

/** A table from heads and rows of strings or nodes; numbers are right-aligned. */
export function table(heads, rows, caption = "") {
  const cell = (value) => element("td", { class: typeof value === "number" ? "number" : null },
    typeof value === "number" ? number(value) : value);
  return element("div", { class: "table-wrap", tabindex: "0", role: "region", "aria-label": caption || "Table" },
    element("table", {},
      caption && element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, heads.map((head, column) => element("th", {
        scope: "col", class: rows.some((row) => typeof row[column] === "number") ? "number" : null,
      }, head)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell))))));
}

/** 1234567.891 → "1,234,568", 0.123456 → "0.1235". */
export function number(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  return Math.abs(value) >= 1000 || Number.isInteger(value)
    ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
}

/** JSON in `localStorage`, or in `sessionStorage`. Where storage is off or full, nothing is kept. */
function store(area) {
  return {
    get(name, otherwise = null) {
      try {
        const text = window[area].getItem(`slmkit.${name}`);
        return text === null ? otherwise : JSON.parse(text);
      } catch {
        return otherwise;
      }
    },
    /** Whether it was kept. */
    set(name, value) {
      try {
        if (value === null) window[area].removeItem(`slmkit.${name}`);
        else window[area].setItem(`slmkit.${name}`, JSON.stringify(value));
        return true;
      } catch {
        return false;
      }
    },
    names(beginning) {
      try {
        const names = Object.keys(window[area]).filter((name) => name.startsWith(`slmkit.${beginning}`));
        return names.map((name) => name.slice("slmkit.".length));
      } catch {
        return [];
      }
    },
  };
}

/** Put a text on the clipboard; whether that went well. Pages that are not at localhost or https have no clipboard API. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = element("textarea", { class: "unseen", "aria-hidden": "true" });
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return isCopied;
}

export const kept = store("localStorage");
export const keptInTab = store("sessionStorage");
