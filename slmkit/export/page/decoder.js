// The decoder: token ids in, logits out, position by position with a cache of keys and values.
//
//     h = embedding(ids)
//     h = h + attention(norm(h));  h = h + mlp(norm(h))      in every block
//     logits = norm(h) @ head.T
//
// What differs between families is data: a norm, bias or gate that a model has not is not among its tensors.
"use strict";

const AT_ONCE = 64; // positions read at once
const LARGEST_CACHE = 2 ** 30; // bytes of keys and values
const fround = Math.fround;

/** erf(x) = 2/√π e^(-x²) Σ 2^n x^(2n+1) / (1·3·5···(2n+1)): all terms have one sign, so none cancel. */
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return ((2 / Math.sqrt(Math.PI)) * sum) / Math.exp(x * x);
}

const geluTanh = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
const ACTIVATIONS = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_new: geluTanh,
  gelu_pytorch_tanh: geluTanh,
  relu: (x) => Math.max(x, 0),
  relu2: (x) => Math.max(x, 0) ** 2,
};

/** Angles per position of each pair of channels; with dynamic NTK they depend on the text's length. */
function frequenciesAt(rope, length) {
  const { dynamic } = rope;
  if (!dynamic) return rope.frequencies;
  const { factor, original, theta, dim } = dynamic;
  const growth = fround(fround((factor * Math.max(length, original)) / original) - (factor - 1));
  const base = fround(theta * fround(growth ** (dim / (dim - 2))));
  return rope.frequencies.map((_, pair) => fround(1 / fround(base ** fround((2 * pair) / dim))));
}

/** Turns channels i and i + dim / 2 of x, from `at` on, by their angle at a position. */
function rotate(x, at, frequencies, growth, position) {
  const half = frequencies.length;
  for (let i = 0; i < half; i++) {
    const angle = fround(position * frequencies[i]);
    const [cosine, sine] = [fround(Math.cos(angle) * growth), fround(Math.sin(angle) * growth)];
    const [a, b] = [x[at + i], x[at + i + half]];
    x[at + i] = a * cosine - b * sine;
    x[at + i + half] = b * cosine + a * sine;
  }
}

class Decoder {
  /** `model`: the choices of the architecture; `tensors`: name → {kind, rows, columns, at} or {kind: "vector", size, at}. */
  constructor(model, tensors, weightBytes, kernels) {
    this.model = model;
    this.headKey = padded(model.key_dim, 16);
    this.headValue = padded(model.value_dim, 16);
    const perPosition = model.layers.length * model.kv_heads * (this.headKey + this.headValue) * 4;
    this.context = Math.max(1, Math.min(model.max_positions, Math.floor(LARGEST_CACHE / perPosition)));
    this.isDynamic = model.ropes.some((rope) => rope.dynamic); // then all of a prompt is read with one length
    this.atOnce = this.isDynamic ? this.context : Math.min(AT_ONCE, this.context);
    const { latent } = model;
    const widths = {
      x: model.width, normed: model.width, added: model.width, q: model.heads * model.key_dim,
      k: model.kv_heads * model.key_dim, v: model.kv_heads * model.value_dim, heard: model.heads * model.value_dim,
      gate: model.mlp_width, up: model.mlp_width,
      compressed: latent?.query_rank || 1, latent: latent ? latent.kv_rank + latent.rope_dim : 1,
      plainLatent: latent?.kv_rank || 1,
      expanded: latent ? model.heads * (latent.plain_dim + model.value_dim) : 1,
    };
    const columns = Math.max(...Object.values(widths), model.width);
    const floats = Object.values(widths).reduce((sum, width) => sum + this.atOnce * padded(width) + 64, 0)
      + padded(model.vocab_size) + padded(columns) + 4 * this.context + this.headKey + this.headValue + 1024
      + (this.isDynamic ? this.context * this.headKey : 0);
    const cache = this.context * perPosition + model.layers.length * model.kv_heads * 128;
    this.memory = new Memory(weightBytes + floats * 4 + cache, kernels);
    this.weightsAt = this.memory.allocate(weightBytes);
    this.tensors = {};
    for (const [name, tensor] of Object.entries(tensors)) this.tensors[name] = this.#tensor(tensor);
    for (const [name, width] of Object.entries(widths)) {
      this[name] = this.memory.floats(this.atOnce * padded(width));
      this[name].stride = padded(width);
    }
    this.logits = this.memory.floats(padded(model.vocab_size));
    this.scratch = this.memory.floats(padded(columns));
    this.weights = this.memory.floats(this.context);
    this.query = this.memory.floats(this.headKey);
    this.mixed = this.memory.floats(this.headValue);
    this.turned = this.isDynamic ? this.memory.floats(this.context * this.headKey) : null;
    const cached = (size) => model.layers.map(() => Array.from({ length: model.kv_heads }, () => this.memory.floats(this.context * size)));
    this.keys = cached(this.headKey);
    this.values = cached(this.headValue);
    this.past = 0;
  }

  #tensor(tensor) {
    const at = this.weightsAt + tensor.at;
    if (tensor.kind === "vector") return new Float32Array(this.memory.buffer, at, tensor.size);
    const { codes, scales } = matrixBytes(tensor);
    return new Matrix(this.memory, tensor, at, scales && at + codes);
  }

  /** Forget all positions from `past` on. */
  rewind(past = 0) {
    this.past = past;
  }

  /** Read ids, which continue the text. With `logits`, those after the last id are computed. */
  read(ids, logits = true) {
    const count = ids.length;
    if (this.past + count > this.context) throw new Error(`more than the context of ${this.context} tokens`);
    const { x, model } = this;
    ids.forEach((id, t) => {
      const row = x.subarray(t * x.stride, (t + 1) * x.stride);
      this.tensors["embedding.weight"].unpack(id, row);
      if (model.embedding_scale !== 1) for (let i = 0; i < model.width; i++) row[i] *= model.embedding_scale;
      const place = this.tensors["place.weight"];
      if (place) {
        place.unpack(this.past + t, this.scratch);
        for (let i = 0; i < model.width; i++) row[i] += this.scratch[i];
      }
    });
    const angles = model.ropes.map((rope) => frequenciesAt(rope, this.past + count));
    model.layers.forEach((layer, index) => this.#block(index, layer, angles[layer.rope], count));
    this.past += count;
    if (logits) this.#head(count - 1);
  }

  #block(index, layer, frequencies, count) {
    const name = `blocks.${index}.`;
    this.#branch(name, "attention", count, () => {
      this.#queriesKeysValues(`${name}attention.`, count);
      this.#attend(index, layer, frequencies, count);
      this.#linear(`${name}attention.out`, this.heard, this.added, count);
    });
    this.#branch(name, "mlp", count, () => {
      const activation = ACTIVATIONS[this.model.activation];
      const { gate, up, normed, model } = this;
      const isGated = this.#linear(`${name}mlp.gate`, normed, gate, count);
      this.#linear(`${name}mlp.up`, normed, up, count);
      for (let t = 0; t < count; t++) {
        for (let i = t * up.stride; i < t * up.stride + model.mlp_width; i++) {
          up[i] = isGated ? fround(activation(gate[i])) * up[i] : activation(up[i]);
        }
      }
      this.#linear(`${name}mlp.down`, up, this.added, count);
    });
  }

  /** x + out_norm(work(in_norm(x))): `work` reads `normed` and writes `added`. */
  #branch(block, which, count, work) {
    const { x, normed, added, model } = this;
    normed.set(x.subarray(0, count * x.stride));
    this.#norm(`${block}${which}_in`, normed, model.width, count);
    work();
    this.#norm(`${block}${which}_out`, added, model.width, count);
    for (let i = 0; i < count * x.stride; i++) x[i] += added[i];
  }

  /** In place, over each run of the weight's size; nothing for a norm that the model has not. */
  #norm(name, x, width, count, eps = this.model.norm_eps) {
    const weight = this.tensors[`${name}.weight`];
    const bias = this.tensors[`${name}.bias`];
    if (!weight) return;
    const size = weight.length;
    for (let t = 0; t < count; t++) {
      for (let at = t * x.stride; at < t * x.stride + width; at += size) {
        let mean = 0;
        if (this.model.norm === "layer") {
          for (let i = 0; i < size; i++) mean += x[at + i];
          mean /= size;
        }
        let squares = 0;
        for (let i = 0; i < size; i++) squares += (x[at + i] - mean) ** 2;
        const factor = 1 / Math.sqrt(squares / size + eps);
        for (let i = 0; i < size; i++) x[at + i] = (x[at + i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
      }
    }
  }

  /** to = from @ weight.T + bias; false where the model has no such matrix. */
  #linear(name, from, to, count) {
    const matrix = this.tensors[`${name}.weight`];
    if (!matrix) return false;
    matrix.multiply(from, from.stride, to, to.stride, count, this.scratch);
    const bias = this.tensors[`${name}.bias`];
    if (bias) {
      for (let t = 0; t < count; t++) for (let i = 0; i < matrix.rows; i++) to[t * to.stride + i] += bias[i];
    }
    return true;
  }

  #queriesKeysValues(name, count) {
    const { normed, q, k, v, compressed, latent, plainLatent, expanded, model } = this;
    if (!model.latent) {
      this.#linear(`${name}query`, normed, q, count);
      this.#linear(`${name}key`, normed, k, count);
      this.#linear(`${name}value`, normed, v, count);
      this.#norm(`${name}query_norm`, q, model.heads * model.key_dim, count);
      this.#norm(`${name}key_norm`, k, model.kv_heads * model.key_dim, count);
      return;
    }
    const { kv_rank, rope_dim, plain_dim, query_rank, eps } = model.latent;
    if (!this.#linear(`${name}query`, normed, q, count)) {
      this.#linear(`${name}query.down`, normed, compressed, count);
      this.#norm(`${name}query.norm`, compressed, query_rank, count, eps);
      this.#linear(`${name}query.up`, compressed, q, count);
    }
    this.#linear(`${name}latent`, normed, latent, count);
    this.#norm(`${name}latent_norm`, latent, kv_rank, count, eps);
    // The product reads all columns of a row, so it gets the latent without the rotary key.
    for (let t = 0; t < count; t++) {
      plainLatent.set(latent.subarray(t * latent.stride, t * latent.stride + kv_rank), t * plainLatent.stride);
    }
    this.#linear(`${name}key_value`, plainLatent, expanded, count);
    for (let t = 0; t < count; t++) {
      for (let head = 0; head < model.heads; head++) {
        const from = t * expanded.stride + head * (plain_dim + model.value_dim);
        const key = t * k.stride + head * model.key_dim;
        k.set(expanded.subarray(from, from + plain_dim), key);
        k.set(latent.subarray(t * latent.stride + kv_rank, t * latent.stride + kv_rank + rope_dim), key + plain_dim);
        v.set(expanded.subarray(from + plain_dim, from + plain_dim + model.value_dim), t * v.stride + head * model.value_dim);
      }
    }
  }

  #attend(index, layer, frequencies, count) {
    const { q, k, v, model, past, query, mixed } = this;
    const rope = model.ropes[layer.rope];
    const first = model.key_dim - (frequencies ? 2 * frequencies.length : 0); // of the rotary channels
    const turn = (x, at, position) => rope && rotate(x, at + first, frequencies, rope.growth, position);
    for (let head = 0; head < model.kv_heads; head++) {
      const [keys, values] = [this.keys[index][head], this.values[index][head]];
      for (let t = 0; t < count; t++) {
        const [key, value] = [t * k.stride + head * model.key_dim, t * v.stride + head * model.value_dim];
        const at = (past + t) * this.headKey;
        keys.set(k.subarray(key, key + model.key_dim), at);
        values.set(v.subarray(value, value + model.value_dim), (past + t) * this.headValue);
        if (!rope?.dynamic) turn(keys, at, past + t);
      }
      let seen = keys;
      if (rope?.dynamic) { // cached keys are not rotated: their angles change with the text's length
        seen = this.turned;
        seen.set(keys.subarray(0, (past + count) * this.headKey));
        for (let j = 0; j < past + count; j++) turn(seen, j * this.headKey, j);
      }
      const group = model.heads / model.kv_heads;
      for (let t = 0; t < count; t++) {
        for (let h = head * group; h < (head + 1) * group; h++) {
          const at = t * q.stride + h * model.key_dim;
          query.set(q.subarray(at, at + model.key_dim));
          turn(query, 0, past + t);
          this.#read(seen, values, past + t, layer.window);
          this.heard.set(mixed.subarray(0, model.value_dim), t * this.heard.stride + h * model.value_dim);
        }
      }
    }
  }

  /** mixed = softmax(scale query · keys) values, over the positions that `position` sees. */
  #read(keys, values, position, window) {
    const { weights, query, mixed, memory, model } = this;
    const start = window ? Math.max(0, position + 1 - window) : 0;
    const seen = position + 1 - start;
    scores(memory, keys, start, query, weights, seen, this.headKey);
    const { attention_scale: scale, attention_cap: cap } = model;
    let most = -Infinity;
    for (let j = 0; j < seen; j++) {
      weights[j] = cap ? cap * Math.tanh((weights[j] * scale) / cap) : weights[j] * scale;
      most = Math.max(most, weights[j]);
    }
    let sum = 0;
    for (let j = 0; j < seen; j++) {
      weights[j] = Math.exp(weights[j] - most);
      sum += weights[j];
    }
    for (let j = 0; j < seen; j++) weights[j] /= sum;
    mix(memory, weights, values, start, mixed, seen, this.headValue);
  }

  /** Logits after position `t` of those read last. */
  #head(t) {
    const { x, normed, model, logits } = this;
    normed.set(x.subarray(t * x.stride, (t + 1) * x.stride));
    this.#norm("norm", normed, model.width, 1);
    const matrix = this.tensors["head.weight"] ?? this.tensors["embedding.weight"];
    matrix.multiply(normed, normed.stride, logits, 0, 1, this.scratch);
    if (model.logit_cap) {
      for (let i = 0; i < model.vocab_size; i++) logits[i] = model.logit_cap * Math.tanh(logits[i] / model.logit_cap);
    }
  }
}

/** Natural log-probabilities of logits [vocab]. */
function logSoftmax(logits, count) {
  let most = -Infinity;
  for (let i = 0; i < count; i++) most = Math.max(most, logits[i]);
  let sum = 0;
  for (let i = 0; i < count; i++) sum += Math.exp(logits[i] - most);
  const norm = most + Math.log(sum);
  return Float32Array.from(logits.subarray(0, count), (value) => value - norm);
}
