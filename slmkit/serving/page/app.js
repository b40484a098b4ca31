// The shell: tabs, theme, the key, and what every tab gets as `app`.

import { element, icon, keptInTab } from "./dom.js";

const TABS = [
  { name: "chat", label: "Chat" },
  { name: "runs", label: "Runs" },
  { name: "look", label: "Look inside" },
  { name: "data", label: "Data" },
];
const THEMES = { // and their icons
  system: "M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18v18c12 0 12-18 0-18",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 1 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6l1.4 1.4M5 19l1.4-1.4M17.6 6.4l1.4-1.4",
  dark: "M20 14A8.5 8.5 0 0 1 10 4a8.5 8.5 0 1 0 10 10z",
};

export const app = {
  /** [{id, …}] of /v1/models. */
  models: [],
  /** What the server tells of its models beside that: id → {chat, learned_conversations, context, settings, …}. */
  about: {},

  /** `fetch` with the key; asks for one where the server wants it. */
  async api(path, options = {}) {
    for (;;) {
      const used = keptInTab.get("key");
      const headers = new Headers(options.headers);
      if (used) headers.set("Authorization", `Bearer ${used}`);
      const response = await fetch(path, { ...options, headers });
      if (response.status !== 401) return response;
      if (keptInTab.get("key") === used && !(await askForKey(used ? "That key was not accepted." : ""))) return response;
    }
  },

  /** Call a function of the server: POST /page/`name`. Throws an Error with the server's message. */
  async post(name, body = {}, options = {}) {
    const response = await app.api(`page/${name}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options,
    });
    if (!response.ok) throw new Error(await messageOf(response));
    return response.json();
  },

  messageOf,

  /** Have a screen reader say something, when it has finished what it says. */
  announce(text) {
    document.getElementById("announcer").textContent = text;
  },
};

/** The one line of an error that the server sent. */
async function messageOf(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    return String(error?.message ?? detail ?? response.statusText);
  } catch {
    return `${response.status} ${response.statusText}`.trim();
  }
}

let asking = null; // one dialog for all requests that wait for the key

function askForKey(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    const line = document.getElementById("key-problem");
    line.textContent = problem;
    line.hidden = !problem;
    input.value = "";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const isGiven = dialog.returnValue === "use" && input.value.trim() !== "";
      if (isGiven) keptInTab.set("key", input.value.trim());
      input.value = "";
      resolve(isGiven);
    }, { once: true });
  });
  return asking;
}

// ---------------------------------------------------------------- theme

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  const button = document.getElementById("theme");
  button.replaceChildren(icon(THEMES[theme]));
  button.title = `Theme: ${theme}`;
  button.setAttribute("aria-label", `Theme: ${theme}. Change it`);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % names.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "system") localStorage.removeItem("slmkit.theme");
    else localStorage.setItem("slmkit.theme", next);
  } catch {
    // Storage is off: the choice holds until the page is loaded again.
  }
  showTheme();
  app.announce(`Theme: ${next}`);
  document.dispatchEvent(new Event("themechange"));
}

// ---------------------------------------------------------------- tabs

function addTabs() {
  const list = document.getElementById("tabs");
  const panels = document.getElementById("panels");
  for (const tab of TABS) {
    tab.button = element("button", {
      type: "button", role: "tab", id: `tab-${tab.name}`, "aria-controls": `panel-${tab.name}`,
      onclick: () => choose(tab),
    }, tab.label);
    tab.panel = element("section", {
      role: "tabpanel", id: `panel-${tab.name}`, "aria-labelledby": `tab-${tab.name}`, tabindex: "-1", "aria-busy": "true", hidden: true,
    });
    list.append(tab.button);
    panels.append(tab.panel);
  }
  list.addEventListener("keydown", (event) => {
    const index = TABS.findIndex((tab) => tab.button === document.activeElement);
    const last = TABS.length - 1;
    const to = { ArrowRight: index === last ? 0 : index + 1, ArrowLeft: index === 0 ? last : index - 1, Home: 0, End: last }[event.key];
    if (to === undefined || index < 0) return;
    event.preventDefault();
    TABS[to].button.focus();
    choose(TABS[to]);
  });
  window.addEventListener("hashchange", () => choose(ofAddress()));
}

function ofAddress() {
  return TABS.find((tab) => `#${tab.name}` === location.hash) ?? TABS[0];
}

let chosen = null;

async function choose(tab) {
  if (tab === chosen) return;
  const before = chosen;
  chosen = tab;
  for (const { button, panel } of TABS) {
    const isChosen = button === tab.button;
    button.setAttribute("aria-selected", String(isChosen));
    button.tabIndex = isChosen ? 0 : -1;
    panel.hidden = !isChosen;
  }
  document.title = `${tab.label} · slmkit`;
  if (location.hash !== `#${tab.name}`) history.replaceState(null, "", `#${tab.name}`);
  before?.module?.hide?.();
  try {
    tab.loading ??= import(`./${tab.name}.js`).then(async (module) => {
      await module.mount(tab.panel, app);
      tab.module = module;
    });
    await tab.loading;
    if (chosen === tab) tab.module.show?.();
    tab.panel.setAttribute("aria-busy", "false");
  } catch (error) {
    tab.loading = null;
    tab.panel.replaceChildren(problem(`${tab.label}: ${error.message}`, () => { chosen = null; tab.panel.replaceChildren(); choose(tab); }));
  }
}

/** A line that says what went wrong, with a button to try again. */
function problem(message, retry) {
  return element("div", { class: "page" }, element("div", { class: "error row", role: "alert" },
    element("span", {}, message), element("button", { type: "button", onclick: retry }, "Retry")));
}

// ---------------------------------------------------------------- start

async function start() {
  const panels = document.getElementById("panels");
  try {
    const response = await app.api("v1/models");
    if (!response.ok) throw new Error(await messageOf(response));
    app.models = (await response.json()).data;
    app.about = (await app.post("about").catch(() => ({}))).models ?? {};
  } catch (error) {
    const isAway = error instanceof TypeError;
    panels.replaceChildren(problem(isAway ? "The server does not answer." : error.message, start));
    return;
  }
  panels.replaceChildren();
  document.getElementById("tabs").replaceChildren();
  addTabs();
  await choose(ofAddress());
}

document.getElementById("no-key").addEventListener("click", () => document.getElementById("key-dialog").close("cancel"));
document.getElementById("theme").addEventListener("click", nextTheme);
showTheme();
start();
