// Functions that tests run inside the page: `evaluate(page, "name", argument)` in browser.py.
({
  /** Texts with less contrast than 4.5 : 1 (WCAG 2, AA) with what is painted behind them. */
  lowContrast() {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
      return [red, green, blue, alpha / 255];
    };
    const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const behind = (node) => {
      const layers = [];
      for (let at = node; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
      return layers.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    };
    const luminance = (colour) => colour.slice(0, 3).map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
      .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
      const style = getComputedStyle(node);
      const ownText = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.textContent.trim());
      const text = ownText || (node.matches("input, textarea, select") && (node.value || node.placeholder));
      const isShown = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
      if (!text || !isShown || node.closest(".unseen, :disabled, title")) continue;
      const colour = rgba(node.matches("svg *") ? style.fill : style.color);
      const ground = behind(node);
      const [high, low] = [luminance(over(colour, ground)), luminance(ground)].sort((a, b) => b - a);
      const ratio = (high + 0.05) / (low + 0.05);
      const name = `${node.tagName} ${node.getAttribute("class") ?? ""}`;
      if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${name} ${(node.textContent || node.value).trim().slice(0, 30)}`);
    }
    return [...new Set(found)];
  },

  /** Controls that can be reached by keyboard, and have no name for screen readers. */
  unnamed() {
    const controls = "button, input, select, textarea, [role=tab], [role=button], a[href], summary, [tabindex]";
    const named = (node) => {
      const by = document.getElementById(node.getAttribute("aria-labelledby") ?? "")?.textContent;
      const labels = [...(node.labels ?? [])].some((label) => label.textContent.trim());
      const content = node.matches("button, [role], a, summary") && node.textContent.trim();
      return node.getAttribute("aria-label") || by || labels || content;
    };
    return [...document.querySelectorAll(controls)]
      .filter((node) => node.checkVisibility() && node.tabIndex >= 0 && !named(node))
      .map((node) => node.outerHTML.slice(0, 120));
  },

  /** The events that come of one stream of bytes, cut in every way: [JSON of what was parsed]. */
  async eventsOfEverySplit(text) {
    const { EventParser } = await import("/page/stream.js");
    const bytes = new TextEncoder().encode(text);
    const parsed = (...cuts) => {
      const parser = new EventParser();
      const ends = [...cuts, bytes.length];
      return JSON.stringify(ends.flatMap((end, i) => parser.push(bytes.slice(i ? ends[i - 1] : 0, end))));
    };
    const results = new Set([parsed(...bytes.keys())]);
    for (let a = 0; a < bytes.length; a++) {
      for (let b = a; b < bytes.length; b += 3) results.add(parsed(a, b));
    }
    return [...results];
  },

  /** Texts that look different when they grow from when they are there at once. */
  async growsDifferently(story) {
    const { Markdown } = await import("/page/markdown.js");
    const shown = (...texts) => {
      const root = document.createElement("div");
      const markdown = new Markdown(root);
      for (const text of texts) markdown.update(text);
      return root.innerHTML;
    };
    let state = 7;
    const random = (below) => (state = (state * 1103515245 + 12345) % 2147483648) % below;
    const pieces = [
      "*", "**", "_", "`", "```", "\n", "\n\n", "- ", "1. ", "  ", "> ", "# ", "[", "](", ")", "a", " b ", "\\", "~~", "---",
      "<i>", "é", "\r\n", "10) ", "    - ",
    ];
    const wrong = [];
    for (let round = 0; round < 400; round++) {
      const drawn = Array.from({ length: 1 + random(40) }, () => pieces[random(pieces.length)]).join("");
      const text = round ? drawn : story;
      const texts = [];
      for (let end = 0; end < text.length; end += 1 + random(5)) texts.push(text.slice(0, end));
      if (shown(...texts, text) !== shown(text)) wrong.push(text);
    }
    return wrong;
  },

  /** Markdown of a text in an element that is not shown. */
  async drawn(text) {
    const { Markdown } = await import("/page/markdown.js");
    new Markdown(document.createElement("div")).update(text);
  },

  /** Enter in every stage of a composition. */
  pressEnterWhileComposing(node) {
    const enter = (options) => node.dispatchEvent(
      new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...options }));
    node.dispatchEvent(new CompositionEvent("compositionstart", { bubbles: true }));
    enter({ isComposing: true });
    enter({ keyCode: 13 }); // between start and end, whatever the event says of itself
    node.dispatchEvent(new CompositionEvent("compositionend", { bubbles: true, data: "日本" }));
    enter({ keyCode: 229 }); // Safari's, after the end
  },

  /** With `focused`: [name of the control that has the focus, whether that is seen]; else the names of all that can have it. */
  controls(focused) {
    const name = (node) => [node.tagName, node.getAttribute("aria-label") ?? "", node.name ?? "", node.textContent.slice(0, 20)].join(" ");
    if (!focused) {
      const all = [...document.querySelectorAll("button, input, select, textarea")];
      return [...new Set(all.filter((node) => node.checkVisibility() && !node.disabled && node.tabIndex >= 0).map(name))];
    }
    const node = document.activeElement;
    const isSeen = getComputedStyle(node).outlineStyle !== "none" || getComputedStyle(node.closest(".box") ?? node).boxShadow !== "none";
    return [name(node), isSeen];
  },
})
