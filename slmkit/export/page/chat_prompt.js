// A conversation as a prompt, of the pieces that the export found in the chat template.
"use strict";

/** What a template leaves of a message's text. */
function shown(role, text, { drops_thinking: dropsThinking, trimmed, spaces }) {
  let start = 0;
  let end = text.length;
  if (dropsThinking && role === "assistant" && text.includes("</think>")) {
    start = text.lastIndexOf("</think>") + "</think>".length;
    while (text[start] === "\n") start++;
  }
  if (trimmed.includes(role)) {
    while (start < end && spaces.includes(text[start])) start++;
    while (end > start && spaces.includes(text[end - 1])) end--;
  }
  return text.slice(start, end);
}

/** Parts of the prompt, for `Tokenizer.encodeParts`; special tokens in messages are ordinary text. */
function chatParts(pieces, messages, tokenizer) {
  const spells = messages.some(({ content }) => tokenizer.special.some((token) => content.includes(token.content)));
  const parts = [];
  const own = (text) => parts.push({ text, special: true });
  messages.forEach(({ role, content }, index) => {
    const between = pieces.between[`${index ? messages[index - 1].role : ""}>${role}`];
    if (between === undefined) throw new Error(`the chat template has no place for message ${index + 1}, of the role ${role}`);
    own(between);
    const text = shown(role, content, pieces).replace(/[\ud800-\udfff]/gu, "\ufffd");
    parts.push({ text, special: !spells });
  });
  own(pieces.between[`${messages.at(-1).role}>`]);
  return spells ? parts : [{ text: parts.map((part) => part.text).join(""), special: true }];
}
