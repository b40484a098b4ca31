// The page: loads the engine into a worker, shows a conversation or a text, and the probabilities of its tokens.
"use strict";

const $ = (id) => document.getElementById(id);
const header = JSON.parse($("header").textContent);
// Least probabilities of the colours, from the likely ones, which have none.
const STEPS = [0.5, 0.2, 0.05, 0.01];
const LEGEND = ["50 % or more", "20 %", "5 %", "1 %", "less"];
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.00095 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

// ---------------------------------------------------------------- engine

const waiting = new Map(); // id → {resolve, reject, emit}
let calls = 0;

function startWorker() {
  const source = new Blob([$("engine").textContent], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(source));
  worker.onmessage = ({ data: { id, result, error, event } }) => {
    if (!waiting.has(id)) return; // the answer to `stop`
    const { resolve, reject, emit } = waiting.get(id);
    if (event) emit(event);
    else {
      waiting.delete(id);
      if (error) reject(new Error(error));
      else resolve(result);
    }
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "the engine does not start"));
  };
  return worker;
}

let worker;

/** The result of a call to the engine. `emit` gets its events; `started` the number with which it can be stopped. */
function ask(call, argument = {}, emit = () => {}, started = () => {}) {
  const id = ++calls;
  started(id);
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, emit });
    worker.postMessage({ id, call, argument });
  });
}

/** Weights decoded one part after the other, then the comparison with slmkit. */
async function load() {
  worker = startWorker();
  // ?kernels=javascript: without WebAssembly, to compare.
  const kernels = new URLSearchParams(location.search).get("kernels") === "javascript" ? null : $("kernels").textContent;
  const about = await ask("begin", { header, kernels });
  for (const part of document.querySelectorAll("script.weights")) {
    const done = await ask("weights", { text: part.textContent });
    part.remove();
    $("progress").value = done / header.bytes;
    $("checked").textContent = `Decoding weights: ${megabytes(done)} of ${megabytes(header.bytes)}`;
  }
  $("checked").textContent = "Comparing with slmkit…";
  const checked = await ask("check");
  $("progress").hidden = true;
  $("checked").textContent = checked.equal ? "checked: equal to slmkit" : `Warning: this browser computes something else (${checked.what})`;
  $("checked").className = checked.equal ? "muted good" : "problem";
  return { ...about, ...checked };
}

/** Float32Arrays after each other, in base64. */
function base64(arrays) {
  const blob = new Blob(arrays);
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1] ?? "");
    reader.readAsDataURL(blob);
  });
}

const ready = load();
// For programs, such as the test of this file.
window.slm = {
  ready: () => ready,
  encode: async (text) => (await ask("encode", { texts: [text] }))[0],
  encodeAll: (texts) => ask("encode", { texts }),
  encodeChat: (messages) => ask("encodeChat", { messages }),
  logProbs: async (ids, lengths) => base64(await ask("logProbs", { ids, lengths })),
  greedy: (ids, count) => ask("greedy", { ids, count }),
};

// ---------------------------------------------------------------- text

const isChat = () => header.chat !== null && !$("continue").checked;
let messages = []; // of the conversation so far
let running = null; // the number of the call that generates

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A token's bytes as text: what is not a whole character in hexadecimal. */
function spelled(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes)).replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  } catch {
    return bytes.map((byte) => `<${byte.toString(16).padStart(2, "0")}>`).join("");
  }
}

const tokenOf = new WeakMap(); // element → the token's event

function addToken(turn, event) {
  const mark = event.isEnd || event.special;
  const made = element("span", mark ? "token mark" : "token", mark ? spelled(event.bytes) : event.text);
  made.dataset.step = STEPS.filter((least) => event.probability < least).length;
  tokenOf.set(made, event);
  turn.append(made);
}

function turnOf(kind) {
  $("conversation").querySelector(".hint")?.remove();
  const turn = element("div", `turn ${kind}`);
  if (kind.startsWith("model")) {
    turn.tabIndex = 0;
    turn.setAttribute("aria-label", "The model's text. Arrow keys go through its tokens.");
    turn.setAttribute("role", "group");
  }
  $("conversation").append(turn);
  return turn;
}

function settings() {
  const number = (id, fallback) => {
    const field = $(id);
    const value = field.value === "" ? fallback : Number(field.value);
    if (!(value >= Number(field.min)) || (field.max && value > Number(field.max))) {
      throw new Error(`${field.labels[0].textContent.trim()}: expected ${field.min} ${field.max ? `to ${field.max}` : "or more"}`);
    }
    return value;
  };
  const anySeed = crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    temperature: number("temperature", 1), topK: Math.round(number("top-k", 0)), topP: number("top-p", 1),
    tokens: Math.round(number("tokens", 256)), seed: number("seed", anySeed),
  };
}

function show(problem) {
  $("problem").hidden = !problem;
  $("problem").textContent = problem ?? "";
}

function setRunning(id) {
  running = id;
  $("send").hidden = id !== null;
  $("stop").hidden = id === null;
  $("clear").disabled = id !== null;
}

async function send() {
  const text = $("text").value;
  if (running !== null || $("send").disabled || (isChat() && !text.trim())) return;
  let chosen;
  try {
    chosen = settings();
  } catch (error) {
    $("settings").open = true;
    show(error.message);
    return;
  }
  show(null);
  const talks = isChat();
  const system = $("system").value.trim() && talks ? [{ role: "system", content: $("system").value }] : [];
  const asked = talks ? { messages: [...system, ...messages, { role: "user", content: text }] } : { text };
  if (talks) turnOf("user").textContent = text;
  const turn = turnOf(talks ? "model" : "model continued");
  if (!talks) turn.append(element("span", "given", text));
  else $("text").value = "";
  turn.scrollIntoView({ block: "nearest" });
  let said = "";
  let scrolling = 0; // the number of the frame that will scroll
  try {
    const end = await ask("generate", { ...asked, settings: chosen }, (event) => {
      said += event.text;
      addToken(turn, event);
      scrolling ||= requestAnimationFrame(() => {
        scrolling = 0;
        turn.scrollIntoView({ block: "end" });
      });
    }, setRunning);
    if (end.rest) turn.append(end.rest);
    said += end.rest;
    const why = { length: "the limit of tokens, or of the context", stopped: "stopped", end: "" }[end.reason];
    if (why) turn.append(element("span", "ended", `Ended: ${why}.`));
    $("speed").textContent = `${end.count} tokens, ${(end.count / end.seconds).toFixed(0)} a second`;
    if (talks && said.trim()) messages = [...messages, { role: "user", content: text }, { role: "assistant", content: said }];
  } catch (error) {
    show(error.message);
  }
  setRunning(null);
  $("text").focus();
}

// ---------------------------------------------------------------- details of a token

function showDetails(token) {
  document.querySelector(".token.chosen")?.classList.remove("chosen");
  const event = token && tokenOf.get(token);
  $("details").hidden = !event;
  if (!event) return;
  token.classList.add("chosen");
  const rows = event.top.map((one) => ({ ...one, own: String(one.bytes) === String(event.bytes) }));
  if (!rows.some((row) => row.own)) rows.push({ ...event, own: true });
  const list = element("ol");
  for (const { bytes, probability, own } of rows) {
    const item = element("li", own ? "own" : "");
    const bar = element("span", "bar");
    const part = element("i");
    part.style.width = `${100 * probability}%`;
    bar.append(part);
    item.append(element("code", "", spelled(bytes) || "(empty)"), bar, element("span", "number", percent(probability)));
    list.append(item);
  }
  $("details").replaceChildren(element("p", "muted", `${percent(event.probability)} likely; the likeliest here:`), list);
  const place = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const box = $("details").getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, document.documentElement.clientWidth - box.width - 8));
  const below = place.bottom + 6 + box.height < innerHeight || place.top < box.height + 6;
  $("details").style.left = `${left + scrollX}px`;
  $("details").style.top = `${(below ? place.bottom + 6 : place.top - box.height - 6) + scrollY}px`;
}

const conversation = $("conversation");
conversation.addEventListener("pointerover", (event) => showDetails(event.target.closest(".token")));
conversation.addEventListener("pointerleave", () => showDetails(null));
conversation.addEventListener("click", (event) => showDetails(event.target.closest(".token")));
conversation.addEventListener("focusout", () => showDetails(null));
conversation.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const turn = event.target.closest(".turn");
  if (!step || !turn) return;
  event.preventDefault();
  const tokens = [...turn.querySelectorAll(".token")];
  const at = tokens.findIndex((token) => token.classList.contains("chosen"));
  const token = tokens[at < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, at + step))];
  token?.scrollIntoView({ block: "nearest" });
  showDetails(token);
});

// ---------------------------------------------------------------- controls

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && isChat()) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => worker.postMessage({ id: 0, call: "stop", argument: { of: running } }));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running !== null) $("stop").click();
  showDetails(null);
});
$("colors").addEventListener("change", () => document.body.classList.toggle("colored", $("colors").checked));

function hint() {
  const how = isChat() ? "Write a message. " : header.chat || !header.has_template ? "Write the beginning of a text. "
    : "This page cannot render the model's chat template, so the model continues a text. ";
  return element("p", "hint", `${how}Each token of the model is coloured by its probability. Point at one, tap it, or use the arrow keys in the text, to see what else was likely. Nothing leaves this page.`);
}

/** Begins anew, as a conversation or as a text to continue. */
function begin() {
  messages = [];
  conversation.replaceChildren(hint());
  show(null);
  $("speed").textContent = "";
  const talks = isChat();
  $("text").placeholder = talks ? "Message" : "Once upon a time";
  $("send").textContent = talks ? "Send" : "Continue";
  $("text-label").textContent = talks ? "Message" : "Text to continue";
  $("system-field").hidden = !talks || header.chat.between[">system"] === undefined;
}

$("clear").addEventListener("click", () => {
  begin();
  $("text").focus();
});
$("continue").addEventListener("change", begin);
$("continue").checked = !header.talks;
$("continue-field").hidden = !header.chat;
begin();
document.title = `${header.name}: a language model in one file`;
$("name").textContent = header.name;
$("facts").textContent = `${(header.parameters / 1e6).toFixed(1)} million parameters, ${header.kind}, ${megabytes(header.bytes)} of weights`;
document.body.classList.add("colored");
LEGEND.forEach((text, step) => {
  const item = element("span");
  item.append(element("i", `step-${step}`), text);
  $("legend").append(item);
});
ready.then(() => {
  $("send").disabled = false;
  $("text").focus();
}, (error) => {
  $("checked").textContent = "";
  show(`This page cannot run the model: ${error.message}`);
});
