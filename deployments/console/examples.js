// Chooses the prompts that a visitor sees first: short samples of adapters far apart on the map of the pool.

import { read } from "./api.js";

const NUM_EXAMPLES = 6;
const NUM_TRIED = 18; // adapters
const NUM_READ = 8; // samples of each
const MAX_LINES = 3, MAX_CHARS = 100; // what a button shows whole

/**
 * Returns examples {name, input} of adapters on the map, long ones last. Only the caller's own adapters show samples.
 * Asks for no more once `isWanted()` is false.
 */
export async function chosenExamples(points, isWanted) {
  const tried = farApart(points.filter(({ name }) => !name.includes("/")), NUM_TRIED);
  const short = [], long = [];
  while (isWanted() && tried.length && short.length < NUM_EXAMPLES) {
    const some = tried.splice(0, NUM_EXAMPLES);
    const shown = await Promise.all(some.map(({ name }) => read(`v1/loras/${encodeURIComponent(name)}?samples=${NUM_READ}`, { quietly: true })));
    for (const { id, samples } of shown.filter((adapter) => adapter.samples.length)) {
      const inputs = samples.map((sample) => sample.input), first = inputs.find(isShort);
      (first ? short : long).push({ name: id, input: first ?? inputs[0] });
    }
  }
  return [...short, ...long].slice(0, NUM_EXAMPLES);
}

const isShort = (text) => text.length <= MAX_CHARS && text.trim().split("\n").length <= MAX_LINES;

/** Returns up to `count` points: the one nearest to the middle, then each time the one farthest from those before. */
function farApart(points, count) {
  const middle = { x: mean(points.map(({ x }) => x)), y: mean(points.map(({ y }) => y)) };
  const sorted = [...points].sort((a, b) => (a.name < b.name ? -1 : 1)); // decides between equal distances
  let far = sorted.map((point) => -distance(point, middle)); // from the nearest one chosen
  const chosen = [];
  while (chosen.length < Math.min(count, points.length)) {
    const most = Math.max(...far);
    if (chosen.length && most === 0) break; // the others have the samples of those before
    const next = sorted[far.indexOf(most)];
    far = sorted.map((point, i) => Math.min(chosen.length ? far[i] : Infinity, distance(point, next)));
    chosen.push(next);
  }
  return chosen;
}

const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
