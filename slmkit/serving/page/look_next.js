// What the model expected in the chosen token's place, and how it goes on if another token stands there.

import { element, number } from "./dom.js";
import { bits, label, percent, shown } from "./look_tokens.js";

const NEW_TOKENS = 48;
const SHOWN_BEFORE = 24; // tokens of the text before the chosen one, beside a continuation

export function addNext(root, { app, lookAtText }) {
  const facts = element("div", { class: "card stack" });
  const other = element("div", { class: "card stack", "aria-live": "polite" });
  root.append(element("div", { class: "look-two" }, facts, other));
  let running = new AbortController();
  let shownOf = null; // whose continuation `other` shows

  function show(found, place) {
    facts.replaceChildren(...heading(found, place), ...(place === 0 ? [] : [barsOf(found, place, (id) => whatIf(found, place, id))]));
    if (shownOf?.found !== found || shownOf.place !== place) {
      running.abort();
      shownOf = { found, place };
      other.replaceChildren(element("h3", {}, "What if?"),
        element("p", { class: "muted" }, place === 0 ? "Choose a token that has others before it." :
          "Choose one of the likeliest tokens: the model puts it there and writes on."));
    }
  }

  async function whatIf(found, place, id) {
    running.abort();
    running = new AbortController();
    const before = found.ids.slice(0, place);
    const text = element("p", { class: "look-story", dir: "auto" },
      element("span", { class: "muted" }, place > SHOWN_BEFORE && "… ", before.slice(-SHOWN_BEFORE).map((one) => spelling(found, one))),
      element("mark", {}, spelling(found, id)));
    other.replaceChildren(element("h3", {}, `What if ${label(found.vocabulary[id])} stood there?`), text);
    other.setAttribute("aria-busy", "true");
    try {
      const response = await app.api("v1/completions", {
        method: "POST", signal: running.signal, headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ model: found.model, prompt: [...before, id], max_tokens: NEW_TOKENS, temperature: 0 }),
      });
      if (!response.ok) throw new Error(await app.messageOf(response));
      const [choice] = (await response.json()).choices;
      text.append(element("span", {}, choice.text || " (the text ends here)"));
      const isText = [...before, id].every((one, index) => found.vocabulary[one][1] === "text" || index === 0);
      if (isText) {
        const first = found.vocabulary[before[0]][1] === "text" ? before : before.slice(1);
        const whole = [...first, id].map((one) => found.vocabulary[one][0]).join("") + choice.text;
        other.append(element("div", { class: "row" },
          element("button", { type: "button", onclick: () => lookAtText(whole) }, "Look inside this text")));
      }
    } catch (error) {
      if (error.name !== "AbortError") other.append(element("p", { class: "error" }, error.message));
    } finally {
      other.removeAttribute("aria-busy");
    }
  }

  return { show };
}

function spelling(found, id) {
  const [text, kind] = found.vocabulary[id];
  return kind === "text" ? shown(text).replaceAll("↵", "↵\n") : element("code", {}, text);
}

function heading(found, place) {
  const figure = (value, name) => element("div", { class: "figure" }, element("b", {}, value), element("span", {}, name));
  if (place === 0) {
    return [element("h3", {}, label(found.vocabulary[found.ids[0]])),
      element("p", { class: "muted" }, "The first token: nothing is before it, so the model expected nothing in its place.")];
  }
  const entropy = found.entropies[place - 1];
  const uncertainty = figure(number(2 ** entropy, 2), `effective choices (entropy ${number(entropy, 2)} bits)`);
  if (place === found.ids.length) {
    return [element("h3", {}, "What comes next"), element("div", { class: "look-figures" }, uncertainty)];
  }
  const id = found.ids[place];
  const p = found.probabilities[place - 1];
  return [
    element("h3", {}, element("bdi", {}, label(found.vocabulary[id])), element("small", { class: "muted" }, ` id ${id}, token ${place + 1} of ${found.ids.length}`)),
    element("div", { class: "look-figures" }, figure(percent(p), `probability (${bits(p)})`),
      figure(number(found.ranks[place - 1]), "rank"), uncertainty)];
}

/** The likeliest tokens of a place as bars; the text's own is marked, and comes last if it is none of them. */
function barsOf(found, place, onChoose) {
  const rows = found.likeliest[place - 1].map((id, index) => ({ id, p: found.likeliest_probabilities[place - 1][index] }));
  const own = found.ids[place];
  if (own !== undefined && !rows.some(({ id }) => id === own)) rows.push({ id: own, p: found.probabilities[place - 1] });
  return element("ol", { class: "look-bars" }, rows.map(({ id, p }) => {
    const bar = element("i", {});
    bar.style.width = `${100 * p}%`;
    const isOwn = id === own;
    return element("li", {}, element("button", {
      type: "button", class: isOwn ? "own" : null, title: `What if ${label(found.vocabulary[id])} stood there?`, onclick: () => onChoose(id),
    }, element("bdi", {}, label(found.vocabulary[id]), isOwn && element("span", { class: "unseen" }, ", the text's own")),
    element("span", { class: "look-bar", "aria-hidden": "true" }, bar), element("span", { class: "number" }, percent(p))));
  }));
}
