// The logit lens: what each layer expects in each token's place. Columns are tokens of the text, rows are layers.

import { element } from "./dom.js";
import { label, nameOf, percent, shade } from "./look_tokens.js";

export function addLens(root, { app, choose }) {
  const fact = element("p", { class: "look-fact", role: "status" });
  const box = element("div", { class: "look-grid", tabindex: "0", role: "region", "aria-label": "Logit lens, a table of layers and tokens" });
  const shading = element("fieldset", { class: "choices" }, element("legend", { class: "unseen" }, "Shade by the probability of"),
    [["likeliest", "Likeliest token"], ["own", "The text's token"]].map(([value, name]) => element("label", {},
      element("input", { type: "radio", name: "look-shade", value, checked: value === "likeliest", onchange: () => colour(value) }),
      element("span", {}, name))));
  root.append(element("div", { class: "card stack" },
    element("div", { class: "row apart" }, element("h3", {}, "What each layer expects"),
      element("div", { class: "row" }, element("small", { class: "muted" }, "Shade by"), shading)),
    element("p", { class: "muted" }, "The model's last norm and head read the hidden states after every layer: the token that would be ",
      "likeliest there. Framed: it is the text's own."),
    box, fact));
  let of = null; // whose lens the table shows
  let lens = null;
  let by = "likeliest";

  async function show(found, place) {
    if (of !== found) {
      of = found;
      lens = null;
      box.replaceChildren(element("p", { class: "empty" }, "…"));
      fact.textContent = "";
      try {
        const answer = await app.post("lens", { model: found.model, ids: found.ids });
        if (of !== found) return;
        lens = answer;
      } catch (error) {
        of = null;
        box.replaceChildren(element("p", { class: "error" }, error.message));
        return;
      }
      box.replaceChildren(tableOf(found));
      colour(by);
    }
    if (lens) mark(place);
  }

  function tableOf(found) {
    const head = (id) => element("bdi", {}, label(found.vocabulary[id]));
    const places = found.ids.map((_, index) => index + 1); // a column for each token but the first, and one for what comes next
    const layers = lens.likeliest.map((_, layer) => layer);
    return element("table", { role: "grid", onclick: onCell, onpointerover: onCell, onfocusin: onCell, onkeydown: onKey },
      element("caption", { class: "unseen" }, "The likeliest token after each layer, in each token's place"),
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Text"),
        places.map((at) => element("th", { scope: "col", "data-place": at }, at < found.ids.length ? head(found.ids[at]) : "next")))),
      element("tbody", {}, layers.map((layer) => element("tr", {}, element("th", { scope: "row" }, `Layer ${layer + 1}`),
        places.map((at) => {
          const id = lens.likeliest[layer][at - 1];
          return element("td", { role: "gridcell", tabindex: "-1", "data-place": at, "data-layer": layer, class: id === found.ids[at] ? "own" : null },
            element("bdi", {}, label(lens.vocabulary[id])));
        })))));
  }

  function colour(how) {
    by = how;
    for (const cell of box.querySelectorAll("td")) {
      const [at, layer] = [Number(cell.dataset.place), Number(cell.dataset.layer)];
      cell.style.background = shade((by === "own" ? lens.probabilities[layer][at - 1] : lens.likeliest_probabilities[layer][at - 1]) ?? 0);
    }
  }

  /** Mark the column of the chosen token and scroll it into the box; its last row can be reached by Tab. */
  function mark(place) {
    for (const cell of box.querySelectorAll("[data-place]")) {
      cell.classList.toggle("chosen", Number(cell.dataset.place) === place);
      if (cell.matches("td")) cell.tabIndex = -1;
    }
    const cells = box.querySelectorAll("td.chosen");
    const last = cells[cells.length - 1];
    if (!last) return;
    last.tabIndex = 0;
    const [column, around, first] = [last, box, box.querySelector("th")].map((node) => node.getBoundingClientRect());
    if (column.left < first.right || column.right > around.right) {
      box.scrollLeft += column.left - first.right - (around.right - first.right - column.width) / 2;
    }
    tell(last);
  }

  function tell(cell) {
    const [at, layer] = [Number(cell.dataset.place), Number(cell.dataset.layer)];
    const spelled = lens.vocabulary[lens.likeliest[layer][at - 1]];
    const own = lens.probabilities[layer][at - 1];
    fact.textContent = `After layer ${layer + 1} the likeliest is ${label(spelled)} with ${percent(lens.likeliest_probabilities[layer][at - 1])}`
      + (own === undefined ? "." : `; the text's own, ${label(of.vocabulary[of.ids[at]])}, has ${percent(own)}.`);
  }

  function onCell(event) {
    const cell = event.target.closest("td");
    if (cell) tell(cell);
    const at = event.target.closest("[data-place]")?.dataset.place;
    if (event.type === "click" && at !== undefined) choose(Number(at));
  }

  function onKey(event) {
    const cell = event.target.closest("td");
    const [right, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] ?? [0, 0];
    if (!cell || (right === 0 && down === 0)) return;
    event.preventDefault();
    const [at, layer] = [Number(cell.dataset.place) + right, Number(cell.dataset.layer) + down];
    const to = box.querySelector(`td[data-place="${at}"][data-layer="${layer}"]`);
    if (!to) return;
    if (right) choose(at);
    cell.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  return { show };
}
