// The Chat tab.

import { element } from "./dom.js";

export function mount(root) {
  root.append(element("div", { class: "page" }, element("h2", {}, "Chat")));
}
