// The settings of the Chat tab: which models, and how they are asked.

import { element, field, icon, kept } from "./dom.js";

// Where nothing is written, what the server tells of the model holds.
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", min: 0, max: 100000, step: 1 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 10, step: 0.05 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 1000000, step: 1 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];
const MOST_TEXT = 256; // tokens
const WAYS = { auto: "As the model learned", chat: "As a conversation", text: "As plain text" };

export class Settings {
  constructor(app, changed) {
    this.app = app;
    this.changed = changed;
    this.values = { models: [], beside: false, way: "auto", system: "", isRaw: false, numbers: {}, ...kept.get("settings") };
    this.#build();
  }

  #build() {
    const ids = this.app.models.map(({ id }) => id);
    const { values } = this;
    const choice = (place, name) => {
      const known = ids.includes(values.models[place]) ? values.models[place] : ids[place % ids.length];
      values.models[place] = known;
      const select = element("select", { "aria-label": name, onchange: () => this.#set(() => { values.models[place] = select.value; }) },
        ids.map((id) => element("option", { value: id }, id)));
      select.value = known;
      return select;
    };
    const second = choice(1, "Second model");
    second.hidden = !values.beside;
    const beside = element("button", { type: "button", class: "quiet", "aria-label": "Side by side", "aria-pressed": String(values.beside), onclick: () => this.#set(() => {
      values.beside = !values.beside;
      second.hidden = !values.beside;
      beside.setAttribute("aria-pressed", String(values.beside));
    }) }, icon("M4 5h6v14H4zM14 5h6v14h-6z"), element("span", {}, "Side by side"));
    this.pickers = element("div", { class: "pickers" }, choice(0, "Model"), second, beside);

    this.inputs = NUMBERS.map(({ name, label, ...limits }) => {
      const input = element("input", { type: "number", name, inputmode: "decimal", ...limits, onchange: () => this.#set(() => { values.numbers[name] = input.value; }) });
      input.value = values.numbers[name] ?? "";
      return { name, label, input };
    });
    const system = element("textarea", { rows: 3, dir: "auto", placeholder: "None", onchange: () => this.#set(() => { values.system = system.value; }) });
    system.value = values.system;
    this.way = element("select", { onchange: () => this.#set(() => { values.way = this.way.value; }) },
      Object.entries(WAYS).map(([value, label]) => element("option", { value }, label)));
    this.way.value = values.way;
    const raw = element("input", { type: "checkbox", onchange: () => this.#set(() => { values.isRaw = raw.checked; }) });
    raw.checked = values.isRaw;
    const reset = element("button", { type: "button", class: "quiet small", onclick: () => this.#set(() => {
      values.numbers = {};
      for (const { input } of this.inputs) input.value = "";
    }) }, "Reset");
    this.root = element("aside", { class: "side settings", "aria-label": "Settings" },
      element("div", { class: "row apart" }, element("h3", {}, "Sampling"), reset),
      element("div", { class: "numbers" }, this.inputs.map(({ label, input }) => field(label, input))),
      field("System message", system),
      field("How to ask", this.way),
      element("label", { class: "check" }, raw, "Show raw text"));
    this.#showDefaults();
  }

  #set(change) {
    change();
    kept.set("settings", this.values);
    this.#showDefaults();
    this.changed();
  }

  /** What holds where nothing is written, as placeholders. */
  #showDefaults() {
    const advice = this.#advice(this.models[0]);
    for (const { name, input } of this.inputs) input.placeholder = String(advice[name] ?? (name === "seed" ? "Random" : "Model’s own"));
  }

  /** What a model is asked with where nothing is written. Plain text may never end by itself. */
  #advice(model) {
    const { settings, max_new_tokens: most } = this.app.about[model] ?? {};
    const advice = Object.fromEntries(NUMBERS.map(({ name }) => [name, settings?.[name]]));
    return { ...advice, max_tokens: this.isChat(model) ? most : Math.min(most ?? MOST_TEXT, MOST_TEXT) };
  }

  get models() {
    return this.values.models.slice(0, this.values.beside ? 2 : 1);
  }

  get isRaw() {
    return this.values.isRaw;
  }

  /** Whether all numbers are valid; if not, the browser shows the first that is not. */
  check() {
    const wrong = this.inputs.find(({ input }) => !input.checkValidity());
    if (wrong && !this.root.checkVisibility()) this.root.classList.add("open");
    wrong?.input.reportValidity();
    return !wrong;
  }

  /** Whether a model is asked as in a conversation. */
  isChat(model) {
    const { chat, learned_conversations: learned } = this.app.about[model] ?? {};
    return this.values.way === "auto" ? chat !== false && learned !== false : this.values.way === "chat";
  }

  /** Why a model gets plain text. */
  noteOn(model) {
    if (this.values.way !== "auto" || this.isChat(model)) return "";
    return this.app.about[model].chat === false
      ? `${model} has no chat template: it continues your text.`
      : `${model} never saw a conversation in training: it continues your text.`;
  }

  systemMessages() {
    return this.values.system.trim() ? [{ role: "system", content: this.values.system }] : [];
  }

  /** [path, body] of the request for an answer; `begun`: the answer so far, to be continued, or null. */
  request(model, messages, begun) {
    const written = Object.entries(this.values.numbers).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]);
    // What is undefined does not become JSON.
    const body = { model, ...this.#advice(model), ...Object.fromEntries(written), stream: true, stream_options: { include_usage: true } };
    if (!this.isChat(model)) {
      body.prompt = messages.map(({ content }) => content).join("") + (begun ?? "");
      return ["v1/completions", body];
    }
    body.messages = [...this.systemMessages(), ...messages];
    if (begun !== null) {
      body.messages.push({ role: "assistant", content: begun });
      Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
    }
    return ["v1/chat/completions", body];
  }
}
