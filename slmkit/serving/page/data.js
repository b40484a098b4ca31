// Data: what a tokenizer makes of a text, rows as a model is fed them, and the documents of shards.

import { element, field, kept, number } from "./dom.js";

const VIEWS = { tokenizer: "Tokenizer", rows: "Rows", documents: "Documents" };
const COLOURS = 6; // of tokens beside each other
const SHOWN = 2000; // tokens of a text, until more are asked for
const WAIT = 200; // milliseconds without a key, after which what was typed is tokenized
const SAMPLE = "The quick brown fox counts 12345 clouds.\nשלום, עולם! 😀 naïve café";
const ROWS = 2; // on a page
const DOCUMENTS = 10;
const PART = 2000; // tokens of a long document on a page
const options = { view: "tokenizer", first: "", second: "", set: "", text: SAMPLE, special: false, ...kept.get("data.options", {}) };

let app;
let view;
let sets = [];
let turn = 0; // of questions to the server: an answer to an earlier one is dropped

export async function mount(root, shell) {
  app = shell;
  view = { problem: element("p", { class: "error", role: "alert", hidden: true }), body: element("div", { class: "stack" }) };
  const choices = element("fieldset", { class: "choices" }, element("legend", { class: "unseen" }, "What to look at"),
    ...Object.entries(VIEWS).map(([key, label]) => element("label", {},
      element("input", { type: "radio", name: "data-view", value: key, checked: options.view === key, onchange: () => { keep("view", key); render(); } }),
      element("span", {}, label))));
  root.replaceChildren(element("div", { class: "page data" },
    element("div", { class: "row apart" }, element("h2", {}, "Data"), choices), view.problem, view.body));
  await refresh();
}

/** Runs and shards may have come and gone. */
export function show() {
  refresh();
}

async function refresh() {
  await tell(async () => {
    const found = await app.post("data_sets");
    if (JSON.stringify(found) === JSON.stringify(view.found)) return;
    view.found = found;
    sets = found.sets;
    render();
  });
}

function keep(name, value) {
  options[name] = value;
  kept.set("data.options", options);
}

/** Do something with the server, and show what went wrong, if anything. */
async function tell(work) {
  try {
    await work();
    view.problem.hidden = true;
  } catch (error) {
    view.problem.textContent = error instanceof TypeError ? "The server does not answer." : error.message;
    view.problem.hidden = false;
  }
}

function render() {
  turn += 1;
  view.problem.hidden = true;
  view.body.replaceChildren(...{ tokenizer, rows, documents }[options.view in VIEWS ? options.view : "tokenizer"]());
}

// ---------------------------------------------------------------- tokens

const PLAIN = { "\n": "↵\n", "\t": "→\t", "\r": "␍", "": "" };

/** A token's text as it is shown: with signs for what cannot be seen. */
function visible(text) {
  // eslint-disable-next-line no-control-regex
  return text.replace(/[\u0000-\u001f\u007f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (sign) => PLAIN[sign] ?? `⟨${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

const quoted = (text) => (text ? JSON.stringify(text) : "");
const hexadecimal = (bytes) => bytes.toUpperCase().replace(/../g, "$& ").trim();

/** What a token is, in words. */
function about(token, index) {
  const part = token.span === 1 ? "" : token.span ? `, with the ${token.span - 1} after it` : ", part of the character before";
  return `token ${number(index + 1)}: ${[quoted(token.text) || "–", `id ${token.id}`, `bytes ${hexadecimal(token.bytes)}`].join(", ")}${part}${token.special ? ", special" : ""}`;
}

/**
 * Tokens in a row, of which the pointer or the arrow keys show ids and bytes below. `learned`: whether each is learned, if
 * that is to be shown; else the colours only tell tokens from each other. `begins`: where documents begin. `isFirst`: of
 * several on the page, which says how to use it.
 */
function tokenView(tokens, { learned = null, begins = [], label, firstIndex = 0, isFirst = true }) {
  const told = element("p", { class: "token-about muted", role: "status" }, isFirst && "Point to a token, or walk with the arrow keys.");
  const area = element("div", { class: "tokens", dir: "auto", role: "group", "aria-label": label });
  const nodes = [];
  let [letter, letterEnds] = ["", -1]; // of the last character that several tokens make
  const borders = new Set(begins.filter((index) => index > 0));
  const add = (from, to) => {
    for (let index = from; index < to; index += 1) {
      const token = tokens[index];
      if (borders.has(index)) area.append(element("span", { class: "border", role: "separator", "aria-label": "a new document" }));
      // Several tokens that make one character: the character, and of each token its bytes.
      const isPart = token.span !== 1;
      const kinds = ["token", learned ? (learned[index] ? "learned" : "read") : `hue-${(index % COLOURS) + 1}`, token.special && "special", isPart && "bytes"];
      if (token.span > 1) area.append(element("span", { class: learned?.[index] ? "whole learned" : "whole" }, visible(token.text)));
      const node = element("span", {
        class: kinds.filter(Boolean).join(" "), role: "img", tabindex: nodes.length ? "-1" : "0", "data-index": index,
        "aria-label": `${quoted(token.text) || hexadecimal(token.bytes)}, id ${token.id}${token.special ? ", special" : ""}${learned?.[index] ? ", learned" : ""}`,
      }, isPart ? hexadecimal(token.bytes) : visible(token.text));
      nodes.push(node);
      area.append(node);
      if (token.span > 1) [letter, letterEnds] = [token.text, index + token.span - 1];
      if (index === letterEnds) area.append(element("span", { class: directionOf(letter) }));
    }
  };
  const point = (index) => {
    area.querySelector(".pointed")?.classList.remove("pointed");
    nodes[index]?.classList.add("pointed");
    told.textContent = nodes[index] ? about(tokens[index], index + firstIndex) : "";
  };
  const indexOf = (event) => Number(event.target.closest?.(".token")?.dataset.index ?? NaN);
  area.addEventListener("pointerover", (event) => { if (indexOf(event) >= 0) point(indexOf(event)); });
  area.addEventListener("focusin", (event) => { if (indexOf(event) >= 0) point(indexOf(event)); });
  area.addEventListener("keydown", (event) => {
    const from = indexOf(event);
    const step = isRightToLeft(nodes, from) ? -1 : 1;
    const to = { ArrowRight: from + step, ArrowLeft: from - step, Home: 0, End: nodes.length - 1 }[event.key];
    if (!(to >= 0 && to < nodes.length)) return;
    event.preventDefault();
    nodes[from].tabIndex = -1;
    nodes[to].tabIndex = 0;
    nodes[to].focus();
  });
  add(0, Math.min(SHOWN, tokens.length));
  const more = tokens.length > SHOWN && element("button", {
    type: "button", onclick: (event) => { add(SHOWN, tokens.length); event.target.remove(); },
  }, `Show all ${number(tokens.length)} tokens`);
  return element("div", { class: "stack token-view" }, tokens.length ? area : element("p", { class: "muted" }, "No tokens."), more, tokens.length > 0 && told);
}

const RIGHT_TO_LEFT = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

/** The class of a mark after a character's bytes, without which those at the end of a line go to the line's other side. */
function directionOf(text) {
  return RIGHT_TO_LEFT.test(text) ? "from-right" : /\p{L}/u.test(text) ? "from-left" : "";
}

/** Whether the token after one, or before it at the end of a line, is on the side where it is in right-to-left text. */
function isRightToLeft(nodes, index) {
  const [before, here, after] = [index - 1, index, index + 1].map((place) => nodes[place]?.getBoundingClientRect());
  const isBeside = (other) => other && Math.abs(other.top - here.top) < here.height && other.height < 2 * here.height;
  return isBeside(after) ? after.left < here.left : isBeside(before) ? before.left > here.left : false;
}

function learnedLegend() {
  return element("p", { class: "legend-line" }, element("mark", { class: "learned" }, "learned"), element("span", { class: "muted" }, "read, not learned"));
}

const figure = (value, label) => element("div", { class: "figure" }, element("b", {}, value), element("span", {}, label));

// ---------------------------------------------------------------- tokenizer

function tokenizer() {
  const names = view.found?.tokenizers ?? [];
  if (!names.length) return [element("p", { class: "empty" }, "No tokenizer: serve a model, or train one.")];
  if (!names.includes(options.first)) options.first = names[0];
  if (options.second && !names.includes(options.second)) options.second = "";
  const sides = element("div", { class: "sides" });
  let timer = null;
  const again = (wait) => {
    clearTimeout(timer);
    timer = setTimeout(() => tokenize(sides), wait);
  };
  const area = element("textarea", { rows: 4, dir: "auto", spellcheck: "false", oninput: (event) => { keep("text", event.target.value); again(WAIT); } });
  area.value = options.text;
  const select = (key, choices) => {
    const node = element("select", { onchange: (event) => { keep(key, event.target.value); again(0); } }, ...choices);
    node.value = options[key];
    return node;
  };
  const option = (name) => element("option", { value: name }, name);
  again(0);
  return [
    element("section", { class: "card stack", "aria-label": "What is tokenized" }, field("Text", area),
      element("div", { class: "grid" },
        field("Tokenizer of", select("first", names.map(option))),
        field("Compare with", select("second", [element("option", { value: "" }, "nothing"), ...names.map(option)]))),
      element("label", { class: "check" }, element("input", {
        type: "checkbox", checked: options.special, onchange: (event) => { keep("special", event.target.checked); again(0); },
      }), "Read spelled special tokens, such as <|im_end|>, as special")),
    sides,
  ];
}

async function tokenize(sides) {
  const mine = turn += 1;
  const names = [options.first, options.second].filter(Boolean);
  await tell(async () => {
    const found = await Promise.all(names.map((model) => app.post("tokenize", { model, text: options.text, special: options.special })));
    if (mine !== turn) return;
    sides.replaceChildren(...found.map((one, place) => element("section", { class: "card stack", "aria-label": `Tokens of ${names[place]}` },
      element("h3", {}, names[place]),
      element("div", { class: "figures" },
        figure(number(one.count), one.count === 1 ? "token" : "tokens"), figure(number(one.distinct), "different ones"),
        figure(ratio(one.characters, one.count), "characters per token"), figure(ratio(one.bytes, one.count), "bytes per token"),
        figure(number(one.vocabulary), "in the vocabulary")),
      tokenView(one.tokens, { label: `Tokens of ${names[place]}` }),
      one.tokens.length < one.count && element("p", { class: "muted" }, `The first ${number(one.tokens.length)} of ${number(one.count)} tokens.`))));
  });
}

function ratio(amount, count) {
  return count ? (amount / count).toFixed(2) : "–";
}

// ---------------------------------------------------------------- data sets

/** The choice of a data set, what is known of it, and where its pages go. */
function ofDataSet(fill) {
  if (!sets.length) {
    return [element("p", { class: "empty" }, "No token shards yet. ", element("code", {}, "slm train"), " and ",
      element("code", {}, "slm data prepare"), " make some.")];
  }
  if (!sets.some(({ name }) => name === options.set)) options.set = sets[0].name;
  const facts = element("div", { class: "figures" });
  const place = element("div", { class: "stack" });
  const select = element("select", { onchange: (event) => { keep("set", event.target.value); choose(); } },
    ...sets.map(({ name }) => element("option", { value: name }, name)));
  select.value = options.set;
  const choose = () => {
    const set = sets.find(({ name }) => name === options.set);
    place.replaceChildren();
    facts.replaceChildren(...(set.problem ? [element("p", { class: "error" }, set.problem)] : [
      figure(number(set.documents), set.judged ? "answers" : set.masked ? "conversations" : "documents"), figure(number(set.tokens), "tokens"),
      figure(ratio(set.text_bytes, set.tokens), "bytes per token"), figure(number(set.vocab_size), "in the vocabulary"),
      figure(number(set.shards), set.shards === 1 ? "shard" : "shards")]));
    if (!set.problem) fill(set, place);
  };
  choose();
  return [element("section", { class: "card stack", "aria-label": "Chosen shards" }, field("Data set", select), facts), place];
}

/** Buttons and a number to go through `total` things, `count` at a time; `go(first)` shows those from `first` on. */
function pager(what, first, count, total, go) {
  const last = Math.max(0, total - 1);
  const to = (place) => go(Math.min(last, Math.max(0, place)));
  const input = element("input", {
    type: "number", min: 1, max: total, value: first + 1, "aria-label": `${what} number`,
    onchange: (event) => to((Number.parseInt(event.target.value, 10) || 1) - 1),
  });
  const button = (label, name, place, isOff) => element("button", { type: "button", "aria-label": name, title: name, disabled: isOff, onclick: () => to(place) }, label);
  return element("nav", { class: "row pager", "aria-label": `${what}s` },
    button("«", "First", 0, first <= 0), button("‹", "Previous", first - count, first <= 0),
    element("label", { class: "row" }, element("span", { class: "muted what" }, what), input, element("span", { class: "muted" }, `of ${number(total)}`)),
    button("›", "Next", first + count, first + count >= total), button("»", "Last", total - count, first + count >= total));
}

function rows() {
  return ofDataSet((set, place) => showRows(set, place, 0));
}

async function showRows(set, place, first) {
  const mine = turn += 1;
  await tell(async () => {
    const found = await app.post("rows", { data_set: set.name, first, count: ROWS });
    if (mine !== turn) return;
    const order = found.is_shuffled ? "in the order in which the run is fed them" : "as they are stored";
    place.replaceChildren(
      element("div", { class: "row apart" },
        element("p", { class: "muted" }, `${number(found.total)} rows of ${number(found.length)} tokens, ${order}`), learnedLegend()),
      ...found.left_out.map((line) => element("p", { class: "warn" }, line)),
      pager("Row", first, ROWS, found.total, (to) => showRows(set, place, to)),
      ...found.rows.map((row, index) => element("section", { class: "card stack", "aria-label": `Row ${row.number + 1}` },
        element("div", { class: "row apart" },
          element("h3", {}, `Row ${number(row.number + 1)}${row.kind && `, ${row.kind}`}`),
          element("span", { class: "muted" }, summary(row))),
        tokenView(row.tokens, { learned: row.learned, begins: row.begins, label: `Tokens of row ${row.number + 1}`, isFirst: index === 0 }),
        row.padding > 0 && element("p", { class: "muted" }, `Padding: ${number(row.padding)} tokens`))));
  });
}

function summary(row) {
  const learned = row.learned.filter(Boolean).length;
  const documents = Math.max(1, row.begins.length);
  return `${number(row.tokens.length)} tokens, ${number(learned)} learned, of ${documents === 1 ? "one document" : `${number(documents)} documents`}`;
}

function documents() {
  return ofDataSet((set, place) => showDocuments(set, place, 0));
}

async function showDocuments(set, place, first) {
  const mine = turn += 1;
  await tell(async () => {
    const found = await app.post("documents", { data_set: set.name, first, count: DOCUMENTS, tokens: 48 });
    if (mine !== turn) return;
    place.replaceChildren(
      pager("Document", first, DOCUMENTS, found.total, (to) => showDocuments(set, place, to)),
      element("ul", { class: "documents" }, ...found.documents.map((one) => element("li", {},
        element("button", { type: "button", class: "document", onclick: () => showDocument(set, place, one.number, 0, first) },
          element("span", { class: "row apart" }, element("b", {}, `Document ${number(one.number + 1)}${one.kind && `, ${one.kind}`}`),
            element("span", { class: "muted" }, `${number(one.length)} tokens`)),
          element("span", { class: "excerpt", dir: "auto" },
            one.tokens.map(({ text }) => text).join("") + (one.tokens.length < one.length ? " …" : "")))))));
  });
}

async function showDocument(set, place, which, start, back) {
  const mine = turn += 1;
  await tell(async () => {
    const found = await app.post("documents", { data_set: set.name, first: which, count: 1, start, tokens: PART });
    if (mine !== turn) return;
    const [one] = found.documents;
    const isLong = one.length > PART;
    place.replaceChildren(
      element("div", { class: "row apart" },
        element("button", { type: "button", onclick: () => showDocuments(set, place, back) }, "‹ All documents"), set.masked && learnedLegend()),
      pager("Document", which, 1, found.total, (to) => showDocument(set, place, to, 0, back)),
      element("section", { class: "card stack", "aria-label": `Document ${which + 1}` },
        element("div", { class: "row apart" }, element("h3", {}, `Document ${number(which + 1)}${one.kind && `, ${one.kind}`}`),
          element("span", { class: "muted" }, `${number(one.length)} tokens`)),
        isLong && pager("Part", Math.floor(start / PART), 1, Math.ceil(one.length / PART), (to) => showDocument(set, place, which, to * PART, back)),
        tokenView(one.tokens, { learned: set.masked ? one.learned : null, label: `Tokens of document ${which + 1}`, firstIndex: start })));
    place.querySelector("button").focus({ preventScroll: true });
  });
}
