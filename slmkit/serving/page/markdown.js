// A small Markdown, as elements. What a model writes becomes text nodes, never markup; links are shown, not followed.

import { element } from "./dom.js";

const DEEPEST = 6; // quotes in lists in quotes …
const LONGEST = 5_000; // characters of a paragraph in which marks are looked for

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

const INLINE = new RegExp(
  [
    String.raw`\\(?<escaped>[!-\/:-@\[-\x60{-~])`,
    String.raw`(?<ticks>\x60+)(?<code>[^\x60]|[^\x60][\s\S]*?[^\x60])\k<ticks>(?!\x60)`,
    String.raw`\*\*(?=\S)(?<bold>[\s\S]*?\S)\*\*`,
    String.raw`(?<![\p{L}\p{N}_])__(?=\S)(?<bold2>[\s\S]*?\S)__(?![\p{L}\p{N}_])`,
    String.raw`\*(?![\s*])(?<italic>[\s\S]*?[^\s*])\*(?!\*)`,
    String.raw`(?<![\p{L}\p{N}_])_(?![\s_])(?<italic2>[\s\S]*?[^\s_])_(?![\p{L}\p{N}_])`,
    String.raw`~~(?=\S)(?<struck>[\s\S]*?\S)~~`,
    String.raw`!?\[(?<label>[^\[\]]*)\]\((?<target>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"[^"]*")?\)`,
  ].join("|"),
  "gu",
);

/** Shows a text that grows: only the blocks that changed are made anew. */
export class Markdown {
  #shown = []; // [source, element] of each block

  constructor(root) {
    this.root = root;
  }

  update(text) {
    const blocks = blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0);
    let same = 0;
    while (same < blocks.length && same < this.#shown.length && blocks[same].source === this.#shown[same][0]) same++;
    for (const [, node] of this.#shown.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = block.make();
      this.#shown.push([block.source, node]);
      this.root.append(node);
    }
  }
}

/** Lines → [{source, make}]: `make()` gives the element of a block. */
function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const end = endOfBlock(lines, at, depth);
    const own = lines.slice(at, end);
    blocks.push({ source: own.join("\n"), make: () => made(own, depth) });
    at = end;
  }
  return blocks;
}

function begins(line, depth) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line)));
}

/** Where the block that begins at line `at` ends. A fence that is not closed yet ends with the text. */
function endOfBlock(lines, at, depth) {
  const line = lines[at];
  const fence = line.match(FENCE)?.[1];
  let end = at + 1;
  if (fence) {
    while (end < lines.length && !closes(lines[end], fence)) end++;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(line) || RULE.test(line)) return end;
  if (depth < DEEPEST && QUOTE.test(line)) {
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    return end;
  }
  if (depth < DEEPEST && ITEM.test(line)) {
    const isNumbered = /\d/.test(line.match(ITEM)[2]);
    const goesOn = (next) => /^ {2,}\S/.test(next) || (ITEM.test(next) && !RULE.test(next) && /\d/.test(next.match(ITEM)[2]) === isNumbered);
    for (; end < lines.length; end++) {
      if (lines[end].trim() ? !goesOn(lines[end]) && (!lines[end - 1].trim() || begins(lines[end], depth)) : !goesOn(lines[end + 1] ?? "")) break;
    }
    return end;
  }
  while (end < lines.length && lines[end].trim() && !begins(lines[end], depth)) end++;
  return end;
}

function closes(line, fence) {
  const mark = line.trim();
  return mark.length >= fence.length && mark === fence[0].repeat(mark.length);
}

function made(lines, depth) {
  const [line] = lines;
  const fence = line.match(FENCE);
  if (fence) return codeBlock(lines, fence);
  const heading = line.match(HEADING);
  if (heading) {
    const level = Math.min(6, heading[1].length + 2); // the page has a first and second level of its own
    return element(`h${level}`, { dir: "auto" }, inline(heading[2].replace(/[ \t]+#+$/, ""), 0));
  }
  if (RULE.test(line)) return element("hr");
  if (depth < DEEPEST && QUOTE.test(line)) {
    const inner = lines.map((one) => one.replace(QUOTE, ""));
    return element("blockquote", { dir: "auto" }, blocksOf(inner, depth + 1).map((block) => block.make()));
  }
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, depth);
  return element("p", { dir: "auto" }, inline(lines.join("\n"), 0));
}

function codeBlock(lines, [, fence, language]) {
  const isClosed = lines.length > 1 && closes(lines.at(-1), fence);
  const code = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const name = language.trim().split(/\s+/)[0];
  return element("div", { class: "code" },
    element("div", { class: "row apart" },
      element("span", { class: "muted mono" }, name),
      element("button", { type: "button", class: "quiet small", "data-copy": code, "aria-label": "Copy the code" }, "Copy")),
    element("pre", { dir: "ltr", tabindex: "0", role: "region", "aria-label": `Code ${name}`.trim() }, element("code", {}, code)));
}

function list(lines, depth) {
  const [, indent, mark] = lines[0].match(ITEM);
  const indented = new RegExp(`^ {0,${indent.length + (/\d/.test(mark) ? 3 : 2)}}`);
  const items = [];
  for (const line of lines) {
    const match = line.match(ITEM);
    if (match && (!items.length || match[1].length < indent.length + 2)) items.push([line.slice(match[0].length)]);
    else items.at(-1).push(line.replace(indented, ""));
  }
  const made = items.map((own) => {
    const blocks = blocksOf(own, depth + 1).map((block) => block.make());
    // A single line needs no paragraph inside its item.
    const isPlain = blocks[0]?.tagName === "P";
    return element("li", {}, isPlain ? [[...blocks[0].childNodes], blocks.slice(1)].flat() : blocks);
  });
  const isNumbered = /\d/.test(mark);
  return element(isNumbered ? "ol" : "ul", { dir: "auto", start: isNumbered ? parseInt(mark, 10) : null }, made);
}

/** A text with marks → [string or element]. */
function inline(text, depth) {
  if (text.length > LONGEST || depth > DEEPEST) return [text];
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    const { escaped, code, bold, bold2, italic, italic2, struck, label, target } = match.groups;
    if (match.index > at) parts.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (escaped !== undefined) parts.push(escaped);
    else if (code !== undefined) parts.push(element("code", {}, code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (bold ?? bold2) parts.push(element("strong", {}, inline(bold ?? bold2, depth + 1)));
    else if (italic ?? italic2) parts.push(element("em", {}, inline(italic ?? italic2, depth + 1)));
    else if (struck !== undefined) parts.push(element("del", {}, inline(struck, depth + 1)));
    else parts.push(element("span", { class: "link" }, inline(label, depth + 1), element("span", { class: "muted" }, ` (${target})`)));
  }
  if (at < text.length) parts.push(text.slice(at));
  return parts;
}
