// The Look inside tab: the tokens of a text with what the model expected in their places, and three views of the
// chosen token: what else could stand there, what each layer expects there, and what the token attends to.

import { Conversation } from "./conversation.js";
import { element, field, kept, number } from "./dom.js";
import { addAttention } from "./look_attention.js";
import { addLens } from "./look_lens.js";
import { addNext } from "./look_next.js";
import { bits, label, nameOf, percent, running, shade, stepOf, STEPS } from "./look_tokens.js";

const EXAMPLE = "Once there was a little fox who loved to play. One day she found a key near the river.";
const VIEWS = [
  { name: "next", label: "Next tokens", add: addNext },
  { name: "lens", label: "Logit lens", add: addLens },
  { name: "attention", label: "Attention", add: addAttention },
];

let app; // the shell's, see app.js
let found = null; // what `look` returned, with the name of its model
let place = 0; // of the chosen token; after the last one: what comes next
let view = VIEWS[0];
let weights = null; // of the chosen token on each token, while the view is attention
const parts = {}; // elements that change

export function mount(root, shell) {
  app = shell;
  parts.model = element("select", {}, app.models.map((model) => element("option", { value: model.id }, model.id)));
  parts.text = element("textarea", { rows: 3, spellcheck: "false", dir: "auto", onkeydown: onTextKey }, EXAMPLE);
  parts.go = element("button", { type: "submit", class: "primary" }, "Look inside");
  parts.problem = element("p", { class: "error", role: "alert", hidden: true });
  parts.result = element("div", { class: "stack look-result", hidden: true });
  const takeChat = element("button", { type: "button", onclick: lookAtChat }, "Take the last chat");
  parts.form = element("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); lookAtText(); } },
    app.models.length > 1 && field("Model", parts.model),
    field("Text, up to 512 tokens", parts.text),
    element("div", { class: "row" }, parts.go, takeChat, element("small", { class: "muted look-hint" }, "Ctrl + Enter: look inside")));
  root.append(element("div", { class: "page" },
    element("div", { class: "stack look-head" }, element("h2", {}, "Look inside"),
      element("p", { class: "muted" }, "What the model expects at every token, layer by layer, and what each head attends to.")),
    parts.form, parts.problem, parts.result));
  addResult();
}

function onTextKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    event.preventDefault();
    lookAtText();
  }
}

// ---------------------------------------------------------------- asking the server

function lookAtText(text = parts.text.value) {
  parts.text.value = text;
  return look({ text });
}

/** The chat that is shown in its tab; where it is too long, its last question and answer. */
async function lookAtChat() {
  const chats = Conversation.all();
  const chat = chats.find(({ id }) => id === kept.get("current")) ?? chats[0];
  const answer = chat?.nodes[chat.path().at(-1)]?.answers?.[0];
  if (!answer) return showProblem("There is no chat that ends with an answer: talk to the model in the Chat tab first.");
  if (app.models.some((model) => model.id === answer.model)) parts.model.value = answer.model;
  const system = kept.get("settings")?.system?.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...chat.messages()];
  if (await look({ messages }) || messages.length <= 2) return;
  const problem = parts.problem.textContent;
  if (await look({ messages: messages.slice(-2) })) showProblem(`The last question and answer alone, since of the whole chat: ${problem}`);
}

/** Whether it was shown. */
async function look(request) {
  const model = parts.model.value || app.models[0]?.id;
  parts.go.disabled = true;
  parts.form.setAttribute("aria-busy", "true");
  showProblem("");
  try {
    found = { model, ...await app.post("look", { model, ...request }) };
    place = Math.min(found.ids.length, Math.max(1, firstOfAnswer()));
    weights = null;
    parts.result.hidden = false;
    parts.title.textContent = request.messages ? `A chat with ${model}` : `Your text, read by ${model}`;
    showFigures();
    addTokens();
    showView();
    scrollToPlace();
    app.announce(`${found.ids.length} tokens`);
    return true;
  } catch (error) {
    showProblem(error.message);
    return false;
  } finally {
    parts.go.disabled = false;
    parts.form.removeAttribute("aria-busy");
  }
}

function showProblem(message) {
  parts.problem.textContent = message;
  parts.problem.hidden = !message;
}

/** Of a conversation the place where the last answer begins, else of the second token. */
function firstOfAnswer() {
  const last = found.answers.lastIndexOf(true);
  return last < 0 ? 1 : found.answers.lastIndexOf(false, last) + 1;
}

// ---------------------------------------------------------------- the result

function addResult() {
  parts.title = element("h3");
  parts.figures = element("div", { class: "look-figures" });
  parts.tokens = element("div", {
    class: "look-tokens", role: "listbox", "aria-label": "Tokens of the text", "aria-orientation": "horizontal", dir: "auto",
    onkeydown: onTokenKey, onclick: (event) => choose(placeOf(event)), onpointerover: showTip, onpointerout: hideTip,
    onfocusin: showTip, onfocusout: hideTip,
  });
  parts.legend = element("div", { class: "look-legend muted" });
  parts.tip = element("div", { class: "look-tip", "aria-hidden": "true", hidden: true });
  parts.views = element("fieldset", { class: "choices" }, element("legend", { class: "unseen" }, "View"),
    VIEWS.map((one) => element("label", {}, element("input", {
      type: "radio", name: "look-view", value: one.name, checked: one === view, onchange: () => { view = one; showView(); },
    }), element("span", {}, one.label))));
  for (const one of VIEWS) {
    one.root = element("div", { class: "stack", hidden: true });
    Object.assign(one, one.add(one.root, { app, choose, lookAtText, showWeights }));
  }
  parts.result.append(element("div", { class: "card stack look-text" }, parts.title, parts.figures, parts.tokens, parts.legend), parts.views,
    ...VIEWS.map((one) => one.root), parts.tip);
}

function showFigures() {
  const isCounted = found.answers.some(Boolean) ? (index) => found.answers[index] : () => true;
  const counted = found.probabilities.map((p, index) => ({ p, rank: found.ranks[index], index: index + 1 }))
    .filter(({ index }) => isCounted(index));
  const surprise = counted.reduce((sum, { p }) => sum - Math.log2(p), 0) / counted.length;
  const share = counted.filter(({ rank }) => rank === 1).length / counted.length;
  const figure = (value, name) => element("div", { class: "figure" }, element("b", {}, value), element("span", {}, name));
  parts.figures.replaceChildren(
    figure(number(found.ids.length), "tokens"),
    ...(counted.length ? [
      figure(number(2 ** surprise, 3), found.answers.some(Boolean) ? "perplexity of the answers" : "perplexity"),
      figure(number(surprise, 3), "bits per token"),
      figure(percent(share), "were the likeliest token")] : []));
}

function addTokens() {
  const nodes = found.ids.map((id, index) => {
    const [text, kind] = found.vocabulary[id];
    const node = element("span", {
      role: "option", tabindex: "-1", "data-place": index,
      class: `look-token of-kind-${kind}${found.answers[index] ? " of-answer" : ""}`,
    }, kind === "text" ? running(text) : text);
    return text.includes("\n") && kind === "text" ? [node, element("br")] : node;
  });
  nodes.push(element("span", { role: "option", tabindex: "-1", "data-place": found.ids.length, class: "look-token of-kind-next" }, "next"));
  parts.tokens.replaceChildren(...nodes.flat());
}

/** Colours and names of the tokens: by probability, or while the view is attention by the weights on them. */
function colourTokens() {
  const isByWeight = view.name === "attention" && weights !== null;
  for (const node of parts.tokens.querySelectorAll(".look-token")) {
    const at = Number(node.dataset.place);
    node.setAttribute("aria-selected", String(at === place));
    node.tabIndex = at === place ? 0 : -1;
    node.style.background = isByWeight ? shade(Math.sqrt(weights[at] ?? 0)) : "";
    node.dataset.step = isByWeight || at === 0 || at === found.ids.length ? "" : stepOf(found.probabilities[at - 1]);
    const spelling = at < found.ids.length ? nameOf(found.vocabulary[found.ids[at]]) : "What comes next";
    node.setAttribute("aria-label", `${spelling}: ${factOf(at)}`);
  }
  parts.legend.replaceChildren(...(isByWeight ? legendOfWeights() : legendOfSteps()));
}

/** What hovering and focus tell of a token. */
function factOf(at) {
  if (view.name === "attention" && weights !== null) {
    return at < weights.length ? `attention ${percent(weights[at])}` : "not seen from the chosen token";
  }
  if (at === found.ids.length) return "the model's expectation after the text";
  if (at === 0) return "the first token, nothing is before it";
  const p = found.probabilities[at - 1];
  return `${percent(p)}, rank ${number(found.ranks[at - 1])}, ${bits(p)}`;
}

function legendOfSteps() {
  const swatch = (step, text) => element("span", { class: "look-swatch" }, element("i", { class: "look-token", "data-step": step }), text);
  return [element("span", {}, "Probability:"), ...STEPS.map(({ name }, step) => swatch(step, name)),
    found.answers.some(Boolean) && element("span", { class: "look-swatch" }, element("i", { class: "look-token of-answer" }), "an answer of the assistant")]
    .filter(Boolean);
}

function legendOfWeights() {
  return [element("span", {}, `Attention of ${label(found.vocabulary[found.ids[weights.length - 1]])}:`),
    ...[0, 0.05, 0.25, 0.5, 1].map((weight) => {
      const box = element("i", { class: "look-token" });
      box.style.background = shade(Math.sqrt(weight));
      return element("span", { class: "look-swatch" }, box, percent(weight));
    })];
}

// ---------------------------------------------------------------- choosing a token

function placeOf(event) {
  const node = event.target.closest("[data-place]");
  return node ? Number(node.dataset.place) : null;
}

function onTokenKey(event) {
  const to = { ArrowRight: place + 1, ArrowLeft: place - 1, ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: found.ids.length }[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(found.ids.length, to)));
  parts.tokens.querySelector(`[data-place="${place}"]`).focus();
}

function choose(at) {
  if (at === null || at === place) return;
  place = at;
  showView();
}

/** A long text scrolls in its box, which then has the chosen token in its middle. */
function scrollToPlace() {
  const [box, token] = [parts.tokens, parts.tokens.querySelector(`[data-place="${place}"]`)].map((one) => one.getBoundingClientRect());
  parts.tokens.scrollTop += token.top - box.top - box.height / 2;
}

function showView() {
  for (const one of VIEWS) one.root.hidden = one !== view;
  if (!found) return;
  colourTokens();
  view.show(found, place);
}

/** The view of attention has the weights of the chosen token on itself and those before it, or none: null. */
function showWeights(row) {
  weights = row;
  colourTokens();
}

// ---------------------------------------------------------------- the number beside the pointer or the focus

function showTip(event) {
  const node = event.target.closest("[data-place]");
  if (!node) return;
  const at = Number(node.dataset.place);
  parts.tip.textContent = factOf(at);
  parts.tip.hidden = false;
  const [box, around] = [node.getClientRects()[0], parts.result.getBoundingClientRect()];
  const most = around.width - parts.tip.offsetWidth;
  parts.tip.style.left = `${Math.max(0, Math.min(most, box.left - around.left))}px`;
  parts.tip.style.top = `${box.top - around.top - parts.tip.offsetHeight - 4}px`;
}

function hideTip() {
  parts.tip.hidden = true;
}
