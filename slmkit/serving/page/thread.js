// What is shown of a conversation: questions, answers, and what can be done with them.

import { copy, element, number } from "./dom.js";
import { Markdown } from "./markdown.js";
import { isComposing, watchComposition } from "./typing.js";

const LONG = 1_500; // characters of a question that is folded

/** A small button under a message. */
export function action(label, onclick, attributes = {}) {
  return element("button", { type: "button", class: "quiet small", onclick, ...attributes }, label);
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text, name) {
  return action("Copy", (event) => showCopied(event.currentTarget, text()), { "aria-label": `Copy ${name}` });
}

export async function showCopied(button, text) {
  button.textContent = (await copy(text)) ? "Copied" : "Could not copy";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/**
 * A question: its text, or the box in which it is edited.
 * actions: {edit(text), branches: element or null, isRunning}
 */
export function question(content, { edit, branches, isRunning }) {
  const text = element("div", { class: "text", dir: "auto" }, content);
  const root = element("article", { class: "question", "aria-label": "You" });
  const foot = element("div", { class: "foot" }, branches,
    action("Edit", () => root.replaceChildren(editBox(content, edit, show)), { disabled: isRunning }), copyButton(() => content, "the message"));
  const isLong = content.length > LONG || content.split("\n").length > 20;
  const unfold = isLong && action("Show all", (event) => {
    const isFolded = text.classList.toggle("folded");
    event.currentTarget.textContent = isFolded ? "Show all" : "Show less";
    event.currentTarget.setAttribute("aria-expanded", String(!isFolded));
  }, { "aria-expanded": "false" });
  if (isLong) {
    text.classList.add("folded");
    foot.prepend(unfold);
  }
  function show() {
    root.replaceChildren(text, foot);
    foot.querySelector("button:not([disabled])")?.focus();
  }
  root.append(text, foot);
  return root;
}

function editBox(content, edit, cancel) {
  const box = element("textarea", { "aria-label": "Edit the message", dir: "auto", rows: Math.min(12, content.split("\n").length + 1) });
  box.value = content;
  const send = () => box.value.trim() && edit(box.value);
  watchComposition(box);
  box.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  });
  requestAnimationFrame(() => box.focus());
  return element("div", { class: "edit stack" }, box, element("div", { class: "row end" },
    element("button", { type: "button", onclick: cancel }, "Cancel"),
    element("button", { type: "button", class: "primary", onclick: send }, "Send")));
}

/** One model's answer, which may grow. */
export class AnswerView {
  #markdown;
  #raw;

  /** options: {isRaw, isBeside: another answer, context: tokens or undefined, retry(), goOn() or null} */
  constructor(answer, options) {
    Object.assign(this, { answer, options });
    this.body = element("div", { class: options.isRaw ? "body raw" : "body" });
    if (options.isRaw) {
      this.#raw = document.createTextNode("");
      this.body.append(this.#raw);
    } else {
      this.#markdown = new Markdown(this.body);
    }
    this.body.addEventListener("click", ({ target }) => {
      if (target.dataset?.copy !== undefined) showCopied(target, target.dataset.copy);
    });
    this.foot = element("div", { class: "foot" });
    this.problem = element("div", { class: "error row", hidden: true });
    this.root = element("article", { class: "answer", "aria-label": answer.model },
      element("div", { class: "name muted" }, answer.model), this.body, this.problem, this.foot);
    this.update();
  }

  update() {
    const { answer, options } = this;
    if (this.#raw) this.#raw.data = answer.content;
    else this.#markdown.update(answer.content);
    const isWriting = answer.finish === "";
    this.body.classList.toggle("writing", isWriting);
    if (isWriting === this.wasWriting) return;
    this.wasWriting = isWriting;
    this.root.setAttribute("aria-busy", String(isWriting));
    this.problem.hidden = !answer.error;
    this.problem.replaceChildren(element("span", {}, answer.error ?? ""), element("button", { type: "button", onclick: options.retry }, "Retry"));
    this.foot.replaceChildren(...(isWriting ? [] : [
      element("span", { class: "muted" }, figures(answer, options.context)),
      element("span", { class: "actions" },
        answer.content && copyButton(() => answer.content, "the answer"),
        !options.isBeside && !answer.error && action("Retry", options.retry),
        options.goOn && answer.finish === "length" && action("Continue", options.goOn)),
    ]));
  }
}

/** "42 tokens · 38 tokens/s · first after 0.12 s · …" */
function figures({ tokens, rate, first, finish, content }, context) {
  const parts = [];
  if (tokens) parts.push(`${number(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate) parts.push(`${number(rate, 3)} tokens/s`);
  if (first) parts.push(`first after ${first < 0.995 ? `${Math.max(1, Math.round(first * 1000))} ms` : `${number(first, 3)} s`}`);
  if (finish === "length") parts.push("ended at the limit of tokens");
  if (finish === "context") parts.push(context ? `the context of ${number(context)} tokens is full` : "the context is full");
  if (finish === "stopped") parts.push("stopped");
  if (finish === "stop" && !content) parts.push("the model ended at once");
  return parts.join(" · ");
}

/** "‹ 2 of 3 ›": from one branch to another. Null if there is one. */
export function branchSwitch(branches, current, choose, isRunning) {
  if (branches.length < 2) return null;
  const place = branches.indexOf(current);
  return element("span", { class: "branches", role: "group", "aria-label": "Versions" },
    action("‹", () => choose(branches[place - 1]), { "aria-label": "Earlier version", disabled: isRunning || place === 0 }),
    element("span", { class: "muted" }, `${place + 1} of ${branches.length}`),
    action("›", () => choose(branches[place + 1]), { "aria-label": "Later version", disabled: isRunning || place === branches.length - 1 }));
}
