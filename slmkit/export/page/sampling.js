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
 * An id drawn from logits. topK 0 and topP 1 keep all; ties with the last one kept are kept. The fewest likeliest tokens
 * whose share of what top-k keeps is topP or more remain.
 */
function sample(logits, count, known, { temperature, topK, topP }, random) {
  if (temperature === 0) return likeliest(logits, count, known);
  const order = [];
  for (let id = 0; id < count; id++) if (known(id)) order.push(id);
  order.sort((a, b) => logits[b] - logits[a]);
  const most = logits[order[0]];
  const weights = order.map((id) => Math.exp((logits[id] - most) / temperature));
  let kept = order.length;
  const withTies = (size) => {
    while (size < kept && weights[size] === weights[size - 1]) size++;
    return Math.min(size, kept);
  };
  if (topK > 0) kept = withTies(topK);
  if (topP < 1) {
    const whole = weights.slice(0, kept).reduce((sum, weight) => sum + weight, 0);
    let [sum, size] = [0, 0];
    while (size < kept && (size === 0 || sum < topP * whole)) sum += weights[size++];
    kept = withTies(size);
  }
  let left = random() * weights.slice(0, kept).reduce((sum, weight) => sum + weight, 0);
  for (let i = 0; i < kept; i++) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[kept - 1];
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
