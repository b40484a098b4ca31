// A conversation as a tree: editing a message or asking again adds a branch, and the old one stays.

import { kept } from "./dom.js";

/**
 * nodes: [{parent, role: "user", content} | {parent, role: "assistant", answers}]; a node's number is its place here.
 * answers: one for each model that was asked: {model, content, finish, error, tokens, first, rate}
 *   finish: "" while it is written, "stop", "length", "context", "stopped" (by the reader), "error"
 *   first: seconds to the first token; rate: tokens a second after it
 * chosen: number of a node, or -1 for the beginning → the number of the node that follows it in what is shown
 */
export class Conversation {
  constructor({ id = Date.now().toString(36) + Math.random().toString(36).slice(2, 6), nodes = [], chosen = {} } = {}) {
    Object.assign(this, { id, nodes, chosen });
  }

  get title() {
    const first = this.path()[0];
    return first === undefined ? "New conversation" : this.nodes[first].content.trim().slice(0, 80) || "…";
  }

  /** The numbers of the nodes that are shown, first to last. */
  path() {
    const found = [];
    for (let at = this.chosen[-1]; at !== undefined; at = this.chosen[at]) found.push(at);
    return found;
  }

  /** Add a node behind its parent and show it; returns its number. */
  add(node) {
    this.nodes.push(node);
    this.chosen[node.parent] = this.nodes.length - 1;
    return this.nodes.length - 1;
  }

  /** The numbers of a node and of those in its place in other branches. */
  branches(number) {
    const { parent } = this.nodes[number];
    return [...this.nodes.keys()].filter((other) => this.nodes[other].parent === parent);
  }

  /** Show the branch with this node. */
  choose(number) {
    this.chosen[this.nodes[number].parent] = number;
  }

  /** The messages before a node as model number `column` was told them. A turn without an answer is left out. */
  messagesBefore(number, column = 0) {
    const messages = [];
    for (let at = this.nodes[number].parent; at >= 0; at = this.nodes[at].parent) {
      const { role, content, answers } = this.nodes[at];
      if (role === "user") {
        messages.unshift({ role, content });
        continue;
      }
      const answer = answers[column] ?? answers[0];
      if (answer.error && !answer.content) at = this.nodes[at].parent;
      else messages.unshift({ role, content: answer.content });
    }
    return messages;
  }

  /** What is shown, as messages: the first model's answers. */
  messages() {
    const last = this.path().at(-1);
    if (last === undefined) return [];
    const end = this.nodes.length; // a node behind the last one, for the moment
    this.nodes.push({ parent: last });
    try {
      return this.messagesBefore(end);
    } finally {
      this.nodes.pop();
    }
  }

  save() {
    const { id, nodes, chosen } = this;
    return kept.set(`conversation.${id}`, { id, nodes, chosen });
  }

  delete() {
    kept.set(`conversation.${this.id}`, null);
  }

  /** Those that are kept, the newest first. What is not as expected is left out. */
  static all() {
    const found = [];
    for (const name of kept.names("conversation.")) {
      const stored = kept.get(name);
      if (!isConversation(stored)) continue;
      for (const answer of stored.nodes.flatMap((node) => node.answers ?? [])) {
        answer.finish ||= "stopped"; // the page was closed while it was written
      }
      found.push(new Conversation(stored));
    }
    return found.sort((a, b) => (a.id < b.id ? 1 : -1));
  }
}

function isConversation(stored) {
  const isNode = (node, number) => Number.isInteger(node?.parent) && node.parent < number
    && (typeof node.content === "string" || (Array.isArray(node.answers) && node.answers.length > 0
      && node.answers.every((answer) => typeof answer?.content === "string")));
  return typeof stored?.id === "string" && Array.isArray(stored.nodes) && stored.nodes.length > 0
    && stored.nodes.every(isNode) && typeof stored.chosen === "object" && stored.chosen !== null
    && Object.entries(stored.chosen).every(([from, to]) => stored.nodes[to]?.parent === Number(from));
}
