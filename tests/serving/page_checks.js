// Checks that run inside the page. `page.evaluate` gets the name of one of these functions.
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
})
