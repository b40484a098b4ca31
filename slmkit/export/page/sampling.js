// Draws the next token.
"use strict";

/** Uniform numbers from 0 to 1 from a seed (mulberry32). */
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t ^= t + Math.imul(t ^ (t >>> 7), 61 | t);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The id of the largest of logits, the first of equal ones. */
function likeliest(logits, count, known) {
  let best = -1;
  for (let id = 0; id < count; id++) if (known(id) && (best < 0 || logits[id] > logits[best])) best = id;
  return best;
}

/**
 * An id drawn from logits. Top-k keeps the k likeliest tokens, top-p the fewest likeliest of these with that share of
 * their probability, and both what ties with the last one kept. topK 0 and topP 1 keep all.
 */
function sample(logits, count, known, { temperature, topK, topP }, random) {
  const likely = likeliest(logits, count, known);
  if (temperature === 0) return likely;
  const weights = new Float64Array(count);
  for (let id = 0; id < count; id++) if (known(id)) weights[id] = Math.exp((logits[id] - logits[likely]) / temperature);
  const ascending = weights.slice().sort();
  let least = topK > 0 && topK < count ? ascending[count - topK] : 0; // the smallest weight that is kept
  const total = () => weights.reduce((sum, weight) => sum + (weight >= least ? weight : 0), 0);
  if (topP < 1) {
    const wanted = topP * total();
    let at = count - 1;
    for (let sum = ascending[at]; sum < wanted && at > 0; sum += ascending[at]) at--;
    least = Math.max(least, ascending[at]);
  }
  let left = random() * total();
  let last = likely;
  for (let id = 0; id < count; id++) {
    if (weights[id] === 0 || weights[id] < least) continue;
    last = id;
    left -= weights[id];
    if (left < 0) break;
  }
  return last;
}

/** The `size` likeliest ids and their log-probabilities, descending. */
function top(logProbabilities, size) {
  const best = [];
  logProbabilities.forEach((value, id) => {
    if (best.length === size && value <= best.at(-1)[1]) return;
    let at = best.length;
    while (at && best[at - 1][1] < value) at--;
    best.splice(at, 0, [id, value]);
    if (best.length > size) best.pop();
  });
  return best;
}
