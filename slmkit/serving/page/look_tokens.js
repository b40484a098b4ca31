// How the Look inside tab writes tokens and numbers. A spelling is [text, kind], as `token_spelling` gives it.

// Steps of probability, each with a colour of its own: --step-0 to --step-5 in look.css.
export const STEPS = [
  { least: 0.5, name: "≥ 50%" }, { least: 0.2, name: "≥ 20%" }, { least: 0.05, name: "≥ 5%" },
  { least: 0.01, name: "≥ 1%" }, { least: 0.001, name: "≥ 0.1%" }, { least: 0, name: "less" },
];

export function stepOf(p) {
  return STEPS.findIndex(({ least }) => p >= least);
}

const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 2 });

/** 0.3456 → "35%", 0.0123 → "1.2%", 0.00002 → "1 in 50K", 0 → "0%". */
export function percent(p) {
  if (p === 0) return "0%";
  if (p < 1e-4) return `1 in ${COMPACT.format(1 / p)}`;
  const value = 100 * p;
  return `${value >= 10 ? Math.round(value) : Number(value.toPrecision(2))}%`;
}

/** The surprise of a token of probability p, -log2 p. */
export function bits(p) {
  const value = -Math.log2(p);
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} bits`;
}

/** Characters that show nothing, or turn the writing around, as symbols. */
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
}

/** A token's text; line ends and tabs have signs. */
export function shown(text) {
  return visible(text).replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** A token's text in the running text, where spaces at the end of a line vanish, and no others. */
export function running(text) {
  return shown(text).replace(text.trim() === "" ? / /g : / (?= )/g, "\u00a0");
}

/** A token by itself: spaces, tabs and line ends have signs. */
export function label([text, kind]) {
  if (kind === "bytes") return `bytes ${text}`;
  if (kind === "unused") return `unused id ${text}`;
  return shown(text).replaceAll(" ", "·") || "(empty)";
}

/** A token for screen readers. */
export function nameOf([text, kind]) {
  if (kind !== "text") return label([text, kind]);
  return text.trim() === "" ? { " ": "space", "\n": "line end", "\t": "tab" }[text] ?? "white space" : text.trim();
}

/** The background of a share from 0 to 1: the accent, as strong as text over it stays legible. */
export function shade(share) {
  return share > 0 ? `color-mix(in oklab, var(--accent) ${(44 * Math.min(1, share)).toFixed(1)}%, transparent)` : "";
}
