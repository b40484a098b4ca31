// Runs the model beside the page. Messages in: {id, call, argument}; out: {id, result}, {id, error} or {id, event}.
"use strict";

let header, tokenizer, decoder, read, kept; // read: ids in the cache
const TOP = 8; // alternatives shown of each token
const yielded = new MessageChannel(); // `setTimeout` would wait 4 ms

/** Lets messages in, such as `stop`. */
function breathe() {
  return new Promise((resolve) => {
    yielded.port1.onmessage = resolve;
    yielded.port2.postMessage(null);
  });
}

const isKnown = (id) => tokenizer.bytes[id] !== undefined && !kept.suppressed.has(id);
const vocabulary = () => header.model.vocab_size;

/** Brings the cache to these ids; a beginning that is there already is not read again. Logits are those after the last. */
async function readText(ids, wanted = () => true) {
  if (ids.length > decoder.context) throw new Error(`${ids.length} tokens are more than the context of ${decoder.context}`);
  let same = 0;
  while (!decoder.isDynamic && same < read.length && same < ids.length - 1 && read[same] === ids[same]) same++;
  decoder.rewind(same);
  read = read.slice(0, same);
  while (read.length < ids.length) {
    const part = ids.slice(read.length, read.length + decoder.atOnce);
    decoder.read(part, read.length + part.length === ids.length);
    read = read.concat(part);
    await breathe();
    if (!wanted()) return;
  }
}

function next(id) {
  decoder.read([id]);
  read.push(id);
}

const calls = {
  begin({ header: content, kernels }) {
    header = content;
    tokenizer = new Tokenizer(header.tokenizer);
    const code = kernels ? assembled(kernels) : null;
    decoder = new Decoder(header.model, header.tensors, header.bytes, code);
    kept = { suppressed: new Set(header.suppressed), filled: 0, stopped: new Set() };
    read = [];
    return { webassembly: decoder.memory.kernels !== null, context: decoder.context };
  },

  /** A part of the weights in base64. */
  weights({ text }) {
    const to = new Uint8Array(decoder.memory.buffer, decoder.weightsAt + kept.filled);
    const binary = atob(text);
    for (let i = 0; i < binary.length; i++) to[i] = binary.charCodeAt(i);
    kept.filled += binary.length;
    return kept.filled;
  },

  /** Compares with what slmkit computed for this file. */
  async check() {
    const { text, ids, prompt, top: expected, greedy } = header.golden;
    if (String(tokenizer.encode(text)) !== String(ids)) return { equal: false, what: "token ids differ" };
    await readText(prompt);
    const found = logSoftmax(decoder.logits, vocabulary());
    const differs = Math.max(...expected.map(([id, value]) => Math.abs(found[id] - value)));
    if (!(differs < 5e-3)) return { equal: false, what: `log-probabilities differ by ${differs.toPrecision(2)}` };
    const said = await calls.greedy({ ids: prompt, count: greedy.length });
    return String(said) === String(greedy) ? { equal: true, differs } : { equal: false, what: "the text differs" };
  },

  encode: ({ texts }) => texts.map((text) => tokenizer.encode(text)),

  encodeChat: ({ messages }) => (header.chat ? tokenizer.encodeParts(chatParts(header.chat, messages, tokenizer)) : null),

  /** Natural log-probabilities after ids[:length], for each length. */
  async logProbs({ ids, lengths }) {
    const found = [];
    for (const length of lengths) {
      await readText(ids.slice(0, length));
      found.push(logSoftmax(decoder.logits, vocabulary()));
    }
    return found;
  },

  async greedy({ ids, count }) {
    const said = [];
    await readText(ids);
    while (said.length < count) {
      said.push(likeliest(decoder.logits, vocabulary(), () => true));
      if (said.length < count) next(said.at(-1));
      if (said.length % 8 === 0) await breathe();
    }
    return said;
  },

  /** Each new token is an event {id, text, probability, top}; the result says why it ended. */
  async generate({ messages, text, settings }, id, emit) {
    const ids = messages ? await calls.encodeChat({ messages }) : [...header.beginning, ...tokenizer.encode(text)];
    if (!ids.length) ids.push(header.ends[0]);
    if (ids.length >= decoder.context) {
      throw new Error(`${ids.length} tokens fill the context of ${decoder.context}: begin anew, or shorten the text`);
    }
    const stopped = () => kept.stopped.has(id);
    const random = randomNumbers(settings.seed);
    const stream = new TextStream();
    const ends = new Set(header.ends);
    const start = performance.now();
    await readText(ids, () => !stopped());
    let count = 0;
    let reason = "length";
    while (count < settings.tokens) {
      if (stopped()) {
        reason = "stopped";
        break;
      }
      const token = sample(decoder.logits, vocabulary(), isKnown, settings, random);
      count++;
      const found = logSoftmax(decoder.logits, vocabulary());
      const spelled = (one) => ({ bytes: [...(tokenizer.bytes[one] ?? [])], special: tokenizer.specialIds.has(one) });
      const alternatives = top(found, TOP).map(([one, value]) => ({ ...spelled(one), probability: Math.exp(value) }));
      const isEnd = ends.has(token);
      const said = isEnd || tokenizer.specialIds.has(token) ? "" : stream.add(tokenizer.bytes[token]);
      emit({ token, ...spelled(token), text: said, probability: Math.exp(found[token]), top: alternatives, isEnd });
      if (isEnd) {
        reason = "end";
        break;
      }
      if (read.length === decoder.context) break;
      if (count < settings.tokens) next(token);
      await breathe();
    }
    kept.stopped.delete(id);
    return { reason, rest: stream.end(), count, seconds: (performance.now() - start) / 1000, prompt: ids.length };
  },

  stop: ({ of }) => kept.stopped.add(of) && null,
};

let last = Promise.resolve(); // calls follow each other, since they share the cache; only `stop` does not wait

async function answer({ id, call, argument }) {
  try {
    self.postMessage({ id, result: await calls[call](argument, id, (event) => self.postMessage({ id, event })) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
}

self.onmessage = ({ data }) => {
  if (data.call === "stop") answer(data);
  else last = last.then(() => answer(data));
};
