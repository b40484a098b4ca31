// Text to ids and back, as the tokenizers library does it for BPE. The export has checked that each part is known here.
"use strict";

const BYTE_CHARACTERS = (() => {
  const printable = (byte) => (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : 0x100 + others++));
})();
const BYTE_OF = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));
const LONE_SURROGATE = /[\ud800-\udfff]/u;
const LONE_SURROGATES = /([\ud800-\udfff])/u;
const STAND_INS = ["\ufdd0", "\n", "\u2028", "x"]; // put before text; one that does not merge with it is used
const utf8 = new TextEncoder();

/** The UTF-8 form of a character that is half of a surrogate pair, which TextEncoder refuses. */
const surrogateBytes = (code) => [0xe0 | (code >> 12), 0x80 | ((code >> 6) & 63), 0x80 | (code & 63)];

class Tokenizer {
  /** `content`: see `_tokenizer` in html.py. */
  constructor(content) {
    Object.assign(this, content);
    this.ids = new Map(Object.entries(content.vocabulary));
    this.ranks = new Map(content.merges.map(([first, second, made], rank) => [pairKey(first, second), [rank, made]]));
    this.specialIds = new Set(content.special.map((token) => token.id));
    const plain = content.added.filter((token) => !token.normalized);
    const normalized = content.added.filter((token) => token.normalized);
    this.words = finder(plain);
    this.wordsAndSpecial = finder([...content.special.map((token) => ({ ...token, special: true })), ...plain]);
    this.normalizedWords = finder(normalized.map((token) => ({ ...token, content: this.normalize(token.content) })));
    this.known = new Map(); // words and their ids
    this.splits = this.pre_tokenizers.map((one) => (one.pattern ? { ...one, regex: new RegExp(one.pattern, "gu") } : one));
    this.bytes = this.#bytesOfTokens();
  }

  #bytesOfTokens() {
    const table = [];
    for (const [token, id] of this.ids) table[id] = this.#bytesOf(token);
    for (const { content, id } of [...this.special, ...this.added]) table[id] = utf8.encode(content);
    return table;
  }

  #bytesOf(token) {
    const characters = [...token];
    if (this.byte_level) {
      return characters.every((one) => BYTE_OF.has(one)) ? Uint8Array.from(characters, (one) => BYTE_OF.get(one)) : utf8.encode(token);
    }
    const byte = /^<0x([0-9A-F]{2})>$/.exec(token);
    return byte ? Uint8Array.of(parseInt(byte[1], 16)) : utf8.encode(token.replaceAll("▁", " "));
  }

  /** Ids of text in which special tokens are ordinary characters. */
  encode(text) {
    return this.encodeParts([{ text, special: false }]);
  }

  /** Ids of parts of one text; special tokens are recognised in the parts marked so, if they lie in one wholly. */
  encodeParts(parts) {
    const text = parts.map((part) => part.text).join("");
    let at = 0;
    const ranges = parts.map((part) => [at, (at += part.text.length), part.special]);
    const isOwn = (start, end) => ranges.some(([first, last, special]) => special && first <= start && end <= last);
    const allowed = parts.some((part) => part.special) ? isOwn : null;
    if (!LONE_SURROGATE.test(text)) return this.#encodeText(text, allowed);
    const [begin, ...rest] = text.split(LONE_SURROGATES); // text, surrogate, text, …
    const ids = begin ? this.#encodeText(begin) : [];
    for (let i = 0; i < rest.length; i += 2) {
      for (const byte of surrogateBytes(rest[i].charCodeAt(0))) {
        const id = this.ids.get(this.byte_level ? BYTE_CHARACTERS[byte] : byteToken(byte));
        if (id === undefined) throw new Error("the vocabulary has no tokens for half a surrogate pair");
        ids.push(id);
      }
      if (rest[i + 1]) ids.push(...this.encodeContinuation(rest[i + 1]));
    }
    return ids;
  }

  /** Ids of text that continues other text: no space is put before it. */
  encodeContinuation(text) {
    for (const before of STAND_INS) {
      const ids = this.#encodeText(before + text);
      const wanted = new TextDecoder().decode(utf8.encode(before));
      let said = [];
      for (let count = 0; count < ids.length && count < 8; count++) {
        said.push(...this.bytes[ids[count]]);
        if (new TextDecoder().decode(Uint8Array.from(said)).replace(/^ /, "") === wanted) return ids.slice(count + 1);
      }
    }
    return this.encode(text);
  }

  /** `allowed`: whether a special token may be at (start, end); without it none is recognised. */
  #encodeText(text, allowed) {
    const raw = cut([{ text, start: 0 }], allowed ? this.wordsAndSpecial : this.words, allowed);
    const parts = raw.map((part) => (part.id === undefined ? { ...part, text: this.normalize(part.text) } : part));
    return cut(parts, this.normalizedWords).flatMap((part) => (
      part.id === undefined ? this.#encodePart(part.text, part.start === 0) : [part.id]
    ));
  }

  normalize(text) {
    for (const one of this.normalizers) {
      if (one.form) text = this.#inForm(text, one.form);
      else if (one.prepend !== undefined) text = text && one.prepend + text;
      else text = text.replaceAll(one.from, one.to);
    }
    return text;
  }

  /** In a normal form; characters of which the tokenizer's Unicode knows nothing stay, and nothing moves across them. */
  #inForm(text, form) {
    this.unknownCharacters ??= new RegExp(`([${this.unknown_characters}])`, "u");
    return text.split(this.unknownCharacters).map((part, number) => (number % 2 ? part : part.normalize(form))).join("");
  }

  #encodePart(text, isFirst) {
    if (!text) return [];
    let pieces = [text];
    this.splits.forEach((one) => {
      pieces = pieces.flatMap((piece, number) => this.#split(piece, one, isFirst && number === 0)).filter(Boolean);
    });
    return pieces.flatMap((piece) => this.#word(piece));
  }

  /** The pieces of a piece, by one pre-tokenizer. */
  #split(piece, one, isFirst) {
    if (one.prefix_space && !piece.startsWith(" ")) piece = ` ${piece}`;
    if (one.metaspace) {
      piece = piece.replaceAll(" ", one.metaspace);
      const prepends = one.scheme === "always" || (one.scheme === "first" && isFirst);
      if (prepends && !piece.startsWith(one.metaspace)) piece = one.metaspace + piece;
    }
    let pieces = [piece];
    if (one.regex) {
      const parts = []; // [text, whether it is a match]
      let done = 0;
      for (const match of piece.matchAll(one.regex)) {
        parts.push([piece.slice(done, match.index), false], [match[0], true]);
        done = match.index + match[0].length;
      }
      parts.push([piece.slice(done), false]);
      const isMatch = (matched) => matched !== one.invert;
      pieces = BEHAVIORS[one.behavior](parts.filter(([text]) => text).map(([text, matched]) => [text, isMatch(matched)]));
    }
    if (one.bytes) pieces = pieces.map((part) => Array.from(utf8.encode(part), (byte) => BYTE_CHARACTERS[byte]).join(""));
    return pieces;
  }

  /** Ids of a word: its characters, merged in the order of the merges. */
  #word(word) {
    const known = this.known.get(word);
    if (known) return known;
    const whole = this.ignore_merges ? this.ids.get(word) : undefined;
    const ids = whole === undefined ? merged(this.#symbols(word), this.ranks) : [whole];
    if (word.length < 64) this.known.set(word, ids);
    return ids;
  }

  #symbols(word) {
    const symbols = [];
    let wasUnknown = false;
    for (const character of word) {
      const id = this.ids.get(character);
      const bytes = id === undefined && this.byte_fallback ? Array.from(utf8.encode(character), (byte) => this.ids.get(byteToken(byte))) : null;
      const isUnknown = id === undefined && (!bytes || bytes.includes(undefined));
      if (id !== undefined) symbols.push(id);
      else if (!isUnknown) symbols.push(...bytes);
      else if (this.unknown !== null && !(this.fuse_unk && wasUnknown)) symbols.push(this.unknown);
      wasUnknown = isUnknown;
    }
    return symbols;
  }
}

const pairKey = (first, second) => first * 2 ** 24 + second;

/** Added tokens, and a pattern that finds the leftmost of them, of several the longest. */
function finder(tokens) {
  const longest = [...tokens].sort((a, b) => b.content.length - a.content.length);
  const byContent = new Map(longest.map((token) => [token.content, token]));
  return { byContent, pattern: tokens.length ? new RegExp(longest.map((token) => escaped(token.content)).join("|"), "gu") : null };
}

const isWord = (character) => /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(character);
const characterAt = (text, i) => (i < text.length ? String.fromCodePoint(text.codePointAt(i)) : "");
const characterBefore = (text, i) => characterAt(text, i > 1 && text.codePointAt(i - 2) > 0xffff ? i - 2 : i ? i - 1 : text.length);

/** Cuts parts {text, start} at added tokens, which become {id}. */
function cut(parts, { byContent, pattern }, allowed) {
  if (!pattern) return parts;
  return parts.flatMap((part) => {
    if (part.id !== undefined) return [part];
    const { text } = part;
    const isSpace = (i) => i < text.length && /\p{White_Space}/u.test(text[i]);
    const found = [];
    let done = 0;
    const addText = (end) => end > done && found.push({ text: text.slice(done, end), start: part.start + done });
    pattern.lastIndex = 0;
    for (let match; (match = pattern.exec(text)); ) {
      const token = byContent.get(match[0]);
      let start = match.index;
      let end = start + match[0].length;
      if (token.special && !allowed(part.start + start, part.start + end)) {
        pattern.lastIndex = start + 1;
        continue;
      }
      if (token.single_word && (isWord(characterBefore(text, start)) || isWord(characterAt(text, end)))) continue;
      while (token.lstrip && start > done && isSpace(start - 1)) start--;
      while (token.rstrip && isSpace(end)) end++;
      addText(start);
      found.push({ id: token.id });
      done = pattern.lastIndex = end;
    }
    addText(text.length);
    return found;
  });
}

// What becomes of parts [text, whether it is a match] of a piece.
const BEHAVIORS = {
  Isolated: (parts) => parts.map(([text]) => text),
  Removed: (parts) => parts.filter(([, matched]) => !matched).map(([text]) => text),
  MergedWithPrevious: (parts) => joined(parts, (before, text) => before + text),
  MergedWithNext: (parts) => joined([...parts].reverse(), (before, text) => text + before).reverse(),
};

/** Each match joins what comes before it, unless that is a match too. */
function joined(parts, join) {
  const pieces = [];
  parts.forEach(([text, matched], index) => {
    if (matched && index && !parts[index - 1][1]) pieces.push(join(pieces.pop(), text));
    else pieces.push(text);
  });
  return pieces;
}

const byteToken = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");

/** Merges pairs of neighbours, always the one of lowest rank, of several the leftmost. Long texts need a heap. */
function merged(symbols, ranks) {
  const count = symbols.length;
  const next = Int32Array.from({ length: count }, (_, i) => i + 1);
  const before = Int32Array.from({ length: count }, (_, i) => i - 1);
  const heap = [];
  const isLess = (a, b) => a[0] < b[0] || (a[0] === b[0] && a[1] < b[1]);

  function push(entry) {
    let at = heap.push(entry) - 1;
    while (at && isLess(entry, heap[(at - 1) >> 1])) {
      heap[at] = heap[(at - 1) >> 1];
      at = (at - 1) >> 1;
    }
    heap[at] = entry;
  }
  function pop() {
    const [top, last] = [heap[0], heap.pop()];
    if (!heap.length) return top;
    let at = 0;
    for (let child = 1; child < heap.length; child = 2 * at + 1) {
      if (child + 1 < heap.length && isLess(heap[child + 1], heap[child])) child++;
      if (!isLess(heap[child], last)) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = last;
    return top;
  }
  function consider(i) {
    const j = i < 0 ? count : next[i];
    const found = j < count ? ranks.get(pairKey(symbols[i], symbols[j])) : undefined;
    if (found) push([found[0], i, symbols[i], symbols[j], found[1]]);
  }

  for (let i = 0; i + 1 < count; i++) consider(i);
  while (heap.length) {
    const [, i, left, right, made] = pop();
    const j = next[i];
    if (symbols[i] !== left || j >= count || symbols[j] !== right) continue; // merged otherwise since
    symbols[i] = made;
    symbols[j] = -1;
    next[i] = next[j];
    if (next[j] < count) before[next[j]] = i;
    consider(before[i]);
    consider(i);
  }
  return symbols.filter((symbol) => symbol >= 0);
}

/** Text of the bytes of tokens as they come: characters are held back until they are whole. */
class TextStream {
  constructor() {
    this.decoder = new TextDecoder("utf-8");
  }

  add(bytes) {
    return this.decoder.decode(bytes, { stream: true });
  }

  end() {
    return this.decoder.decode();
  }
}
