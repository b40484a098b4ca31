// The Chat tab: the list of conversations, the conversation, the box to write in, the settings.

import { Conversation } from "./conversation.js";
import { element, icon, kept, number, svg } from "./dom.js";
import { answer as answerOf } from "./stream.js";
import { Settings } from "./chat_settings.js";
import { action, AnswerView, branchSwitch, question } from "./thread.js";
import { grow, isComposing, watchComposition } from "./typing.js";

const EXAMPLES = ["Hello!", "Who are you?", "Tell me a story about a fox and a kite."];
const STARTS = ["Once upon a time", "The fox had a red kite.", "It was a rainy day, and"];
const LEAST = 10; // milliseconds: less tells nothing of the model's speed
const NEAR_END = 48; // pixels: a reader this near the end follows what is written

export function mount(root, app) {
  const chat = new Chat(app);
  root.append(chat.root);
  // Where there are keys to type with; on a phone the focus would open the keyboard over the page.
  if (matchMedia("(pointer: fine)").matches) chat.box.focus();
}

class Chat {
  constructor(app) {
    this.app = app;
    this.settings = new Settings(app, () => this.show());
    this.conversations = Conversation.all();
    const current = kept.get("current");
    this.conversation = this.conversations.find(({ id }) => id === current) ?? new Conversation();
    this.running = new Map(); // conversation → AbortController
    this.views = new Map(); // answer → AnswerView, of what is shown
    this.follows = true;
    this.#build();
    this.show();
  }

  #build() {
    this.list = element("ul", { class: "conversations" });
    this.thread = element("div", { class: "thread", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: "0" });
    this.note = element("p", { class: "note muted", role: "note", hidden: true });
    this.toEnd = element("button", { type: "button", class: "to-end", hidden: true, onclick: () => this.#scrollToEnd() }, "↓ Latest");
    this.box = element("textarea", { rows: 1, dir: "auto", "aria-label": "Message", enterkeyhint: "send" });
    this.sendButton = element("button", { type: "submit", class: "primary send", "aria-label": "Send" }, icon("M12 19V5M6 11l6-6 6 6"));
    this.stopButton = element("button", { type: "button", class: "send", "aria-label": "Stop", hidden: true, onclick: () => this.stop() },
      svg("svg", { viewBox: "0 0 24 24", width: 20, height: 20, "aria-hidden": "true" }, svg("rect", { x: 6, y: 6, width: 12, height: 12, rx: 2, fill: "currentColor" })));
    const composer = element("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); this.send(); } },
      element("div", { class: "box" }, this.box, this.sendButton, this.stopButton));

    watchComposition(this.box);
    this.box.addEventListener("input", () => grow(this.box));
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
      event.preventDefault();
      this.send();
    });
    this.thread.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.thread;
      this.follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
      this.toEnd.hidden = this.follows;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]") || !this.root.checkVisibility()) return;
      if (!this.#closeSides()) this.stop();
    });
    // What is written when the page is left is kept as it is: that the browser ends its requests is no error to be kept.
    window.addEventListener("pagehide", () => {
      for (const conversation of this.running.keys()) conversation.save();
      this.isLeft = true;
    });
    window.addEventListener("pageshow", () => { this.isLeft = false; });

    const chats = element("aside", { class: "side", id: "chats", "aria-label": "Conversations" },
      element("button", { type: "button", onclick: () => this.open(new Conversation()) }, "New conversation"),
      element("nav", { "aria-label": "Conversations" }, this.list),
      element("div", { class: "row" }, action("Export", () => this.export()), this.#deleteAll()));
    this.settings.root.id = "chat-settings";
    this.sides = [
      [chats, toggle("Conversations", "M4 6h16M4 12h16M4 18h10", "chats")],
      [this.settings.root, toggle("Settings", "M4 8h9M19 8h1M4 16h1M11 16h9M13 8a3 3 0 1 0 6 0 3 3 0 1 0-6 0M5 16a3 3 0 1 0 6 0 3 3 0 1 0-6 0", "chat-settings")],
    ];
    for (const [side, button] of this.sides) {
      button.addEventListener("click", () => {
        const isOpen = !side.classList.contains("open");
        this.#closeSides();
        side.classList.toggle("open", isOpen);
        button.setAttribute("aria-expanded", String(isOpen));
        if (isOpen) side.querySelector("button, input, select")?.focus();
      });
    }
    const bar = element("div", { class: "bar" }, this.sides[0][1], this.settings.pickers, this.sides[1][1]);
    this.root = element("div", { class: "chat" }, chats,
      element("div", { class: "middle" }, bar, this.thread, element("div", { class: "below" }, this.toEnd, this.note, composer)),
      this.settings.root);
  }

  /** On narrow screens the two sides lie over the conversation. Whether one was open. */
  #closeSides() {
    const open = this.sides.filter(([side]) => side.classList.contains("open"));
    for (const [side, button] of open) {
      side.classList.remove("open");
      button.setAttribute("aria-expanded", "false");
      if (side.contains(document.activeElement)) button.focus();
    }
    return open.length > 0;
  }

  // -------------------------------------------------------------- what is shown

  get isRunning() {
    return this.running.has(this.conversation);
  }

  /** Show the conversation from its beginning to its end. */
  show() {
    const { conversation } = this;
    const path = conversation.path();
    const hadFocus = this.thread.contains(document.activeElement);
    this.views.clear();
    this.thread.replaceChildren(element("div", { class: "lines" }, path.length ? path.map((at, place) => this.#shown(at, place === path.length - 1)) : this.#welcome()));
    this.#showState();
    this.#showList();
    if (this.follows) this.#scrollToEnd();
    if (hadFocus) this.thread.focus({ preventScroll: true });
  }

  #shown(at, isLast) {
    const { conversation, isRunning } = this;
    const node = conversation.nodes[at];
    const branches = branchSwitch(conversation.branches(at), at, (other) => { conversation.choose(other); this.#keep(); this.follows = false; this.show(); }, isRunning);
    if (node.role === "user") {
      return question(node.content, { branches, isRunning, edit: (text) => this.ask(text, node.parent) });
    }
    const retry = () => this.#answer(node.parent);
    const views = node.answers.map((answer, column) => {
      const view = new AnswerView(answer, {
        isRaw: this.settings.isRaw, isBeside: node.answers.length > 1, context: this.app.about[answer.model]?.context, retry,
        goOn: isLast && node.answers.length === 1 ? () => this.#write(conversation, at, [column], true) : null,
      });
      this.views.set(answer, view);
      return view.root;
    });
    return element("div", { class: "turn" },
      element("div", { class: views.length > 1 ? "answers beside" : "answers" }, views),
      !isRunning && (branches || views.length > 1) && element("div", { class: "foot" }, branches, views.length > 1 && action("Retry", retry)));
  }

  #welcome() {
    const model = this.settings.models[0];
    const isChat = this.settings.isChat(model);
    const context = this.app.about[model]?.context;
    const use = (text) => {
      this.box.value = text;
      grow(this.box);
      this.box.focus();
    };
    return element("div", { class: "welcome" },
      element("img", { src: "page/icon.svg", alt: "", width: 44, height: 44 }),
      element("h2", {}, isChat ? "Say something to " : "Begin a text for ", element("span", { class: "model" }, model)),
      element("p", { class: "muted" }, [isChat ? "It answers you." : "It goes on from where you stop.", context && `It reads up to ${number(context)} tokens.`].filter(Boolean).join(" ")),
      element("div", { class: "row examples" }, (isChat ? EXAMPLES : STARTS).map((text) => element("button", { type: "button", onclick: () => use(text) }, text))));
  }

  #showState() {
    const { isRunning } = this;
    const hadFocus = [this.sendButton, this.stopButton].includes(document.activeElement);
    this.sendButton.hidden = isRunning;
    this.stopButton.hidden = !isRunning;
    if (hadFocus) this.box.focus();
    const isChat = this.settings.models.every((model) => this.settings.isChat(model));
    this.box.placeholder = isChat ? "Write a message" : "Write the beginning of a text";
    const notes = new Set(this.settings.models.map((model) => this.settings.noteOn(model)).filter(Boolean));
    if (this.isLost) notes.add("This browser keeps no more conversations: its storage is off or full.");
    this.note.hidden = !notes.size;
    this.note.textContent = [...notes].join(" ");
  }

  #showList() {
    this.list.replaceChildren(...this.conversations.map((conversation) => element("li", {},
      element("button", {
        type: "button", class: "quiet", dir: "auto", "aria-current": conversation === this.conversation ? "true" : null,
        onclick: () => this.open(conversation),
      }, conversation.title),
      action("✕", () => this.delete(conversation), { "aria-label": `Delete ${conversation.title}` }))));
  }

  #scrollToEnd() {
    this.follows = true;
    this.toEnd.hidden = true;
    this.thread.scrollTop = this.thread.scrollHeight;
  }

  // -------------------------------------------------------------- the list of conversations

  open(conversation) {
    this.conversation = conversation;
    kept.set("current", conversation.id);
    this.follows = true;
    this.#closeSides();
    this.show();
    this.box.focus();
  }

  delete(conversation) {
    this.running.get(conversation)?.abort();
    conversation.delete();
    this.conversations = this.conversations.filter((other) => other !== conversation);
    if (conversation === this.conversation) this.open(this.conversations[0] ?? new Conversation());
    else this.#showList();
  }

  #deleteAll() {
    const button = action("Delete all", () => {
      if (button.textContent === "Delete all") {
        button.textContent = "Really delete all?";
        setTimeout(() => { button.textContent = "Delete all"; }, 4000);
        return;
      }
      button.textContent = "Delete all";
      for (const conversation of [...this.conversations]) this.delete(conversation);
    });
    return button;
  }

  /** A file {"messages": […]}, as `slm chat` reads it and fine-tuning takes it. */
  export() {
    const messages = [...this.settings.systemMessages(), ...this.conversation.messages()];
    const url = URL.createObjectURL(new Blob([`${JSON.stringify({ messages })}\n`], { type: "application/json" }));
    const link = element("a", { href: url, download: "conversation.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  #keep(conversation = this.conversation) {
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    this.isLost = !conversation.save();
    kept.set("current", this.conversation.id);
  }

  // -------------------------------------------------------------- asking and answering

  send() {
    const text = this.box.value;
    if (!text.trim() || this.isRunning) return;
    const last = this.conversation.path().at(-1) ?? -1;
    if (!this.ask(text, last)) return;
    this.box.value = "";
    grow(this.box);
  }

  /** Add a question behind a node, and have it answered. Whether the settings allowed it. */
  ask(content, parent) {
    if (!this.settings.check()) return false;
    this.#answer(this.conversation.add({ parent, role: "user", content }));
    this.box.focus();
    return true;
  }

  #answer(parent) {
    if (this.isRunning || !this.settings.check()) return;
    const answers = this.settings.models.map((model) => ({ model, content: "", finish: "" }));
    const at = this.conversation.add({ parent, role: "assistant", answers });
    this.follows = true;
    this.#write(this.conversation, at, [...answers.keys()], false);
  }

  /** Let the models write their answers of a node, or write on. */
  async #write(conversation, at, columns, goesOn) {
    const controller = new AbortController();
    this.running.set(conversation, controller);
    const { answers } = conversation.nodes[at];
    for (const column of columns) Object.assign(answers[column], { finish: "", error: "" });
    this.#keep(conversation);
    this.show();
    const saving = setInterval(() => this.conversations.includes(conversation) && conversation.save(), 1000);
    await Promise.all(columns.map((column) => this.#writeOne(conversation, at, column, goesOn, controller.signal)));
    clearInterval(saving);
    this.running.delete(conversation);
    if (this.isLeft || !this.conversations.includes(conversation)) return; // or deleted meanwhile
    conversation.save();
    if (conversation === this.conversation) this.show();
    const names = answers.length > 1 ? (answer) => `${answer.model}: ` : () => "";
    this.app.announce(answers.map((answer) => names(answer) + (answer.error || answer.content || "No answer")).join("\n"));
  }

  async #writeOne(conversation, at, column, goesOn, signal) {
    const answer = conversation.nodes[at].answers[column];
    const before = conversation.messagesBefore(at, column);
    const [path, body] = this.settings.request(answer.model, before, goesOn ? answer.content : null);
    const start = performance.now();
    let first = 0, last = 0, pieces = 0, usage = null, finish = "";
    try {
      for await (const part of answerOf(this.app, path, body, signal)) {
        if (part.text) {
          last = performance.now();
          first ||= last;
          pieces++;
          answer.content += part.text;
          this.#grew(answer);
        }
        finish = part.finish ?? finish;
        usage = part.usage ?? usage;
      }
      answer.finish = finish || "stop";
      const context = this.app.about[answer.model]?.context;
      if (finish === "length" && context && usage?.total_tokens >= context) answer.finish = "context";
    } catch (error) {
      answer.finish = signal.aborted ? "stopped" : "error";
      answer.error = signal.aborted ? "" : error instanceof TypeError ? "The server does not answer." : error.message;
    }
    const tokens = usage?.completion_tokens ?? pieces;
    answer.tokens = tokens + (goesOn ? answer.tokens ?? 0 : 0);
    answer.first = first && (first - start) / 1000;
    answer.rate = last - first > LEAST ? (1000 * (tokens - 1)) / (last - first) : 0;
    this.views.get(answer)?.update();
  }

  #grew(answer) {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      for (const [one, view] of this.views) if (one.finish === "") view.update();
      if (this.follows) this.#scrollToEnd();
    });
  }

  stop() {
    this.running.get(this.conversation)?.abort();
  }
}

function toggle(label, path, controls) {
  return element("button", { type: "button", class: "quiet icon toggle", "aria-label": label, title: label, "aria-expanded": "false", "aria-controls": controls }, icon(path));
}
