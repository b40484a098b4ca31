// A conversation as a prompt, of the pieces that the export found in the chat template.
"use strict";

/** What a template leaves of a message's text: what is behind a marker, and without some characters at its ends. */
function shown(text, { behind, behind_left: after, left, right }) {
  let start = 0;
  let end = text.length;
  if (behind && text.includes(behind)) {
    start = text.lastIndexOf(behind) + behind.length;
    while (start < end && after.includes(text[start])) start++;
  }
  while (start < end && left.includes(text[start])) start++;
  while (end > start && right.includes(text[end - 1])) end--;
  return text.slice(start, end);
}

/** Parts of the prompt, for `Tokenizer.encodeParts`; special tokens in messages are ordinary text. */
function chatParts(pieces, messages, tokenizer) {
  const spells = messages.some(({ content }) => tokenizer.special.some((token) => content.includes(token.content)));
  const parts = [];
  const own = (text) => parts.push({ text, special: true });
  messages.forEach(({ role, content }, index) => {
    const between = pieces[`${index ? messages[index - 1].role : "begin"}_${role}`];
    if (between === undefined) throw new Error(`the chat template has no place for message ${index + 1}, of the role ${role}`);
    own(between);
    const text = shown(content, pieces.edges[role]).replace(/[\ud800-\udfff]/gu, "\ufffd");
    parts.push({ text, special: !spells });
  });
  own(pieces[`${messages.at(-1).role}_end`]);
  return spells ? parts : [{ text: parts.map((part) => part.text).join(""), special: true }];
}
