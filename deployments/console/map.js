// Draws the adapters as points by the similarity of their samples, with the last prompt among them.

import { post, read, reasonOf } from "./api.js";
import { byId, percent, say, shape, whole } from "./dom.js";
import { Labels } from "./labels.js";

const MARGIN = 22;
const MAX_LABELS = 60;
const MAX_STRETCH = 2;
let drawn = { generation: 0, num_adapters: 0, shown_variance: 0, points: [] };
let prompt = null; // {x, y} of the last prompt
let asked = null; // its text and the names of its adapters
let chosen = []; // the adapters that answered it, best first
let current = null; // the name under the pointer or the arrow keys
let numLoads = 0;
let onChoose = () => {};

export function start(callbacks) {
  onChoose = callbacks.onChoose;
  const map = byId("map");
  new ResizeObserver(draw).observe(map);
  map.addEventListener("pointermove", (event) => pick(nearest(event)));
  map.addEventListener("pointerleave", () => pick(null));
  map.addEventListener("blur", () => pick(null));
  map.addEventListener("click", (event) => { const found = nearest(event); if (found) onChoose(found.name); });
  map.addEventListener("keydown", step);
}

/** Draws the pool at `generation` or later. */
export async function load(generation) {
  const number = ++numLoads;
  try {
    const found = await read(`v1/pool/map?min_generation=${generation}`);
    if (number !== numLoads) return;
    drawn = found;
    if (asked) await locatePrompt();
    note("");
    draw();
  } catch (error) {
    if (number === numLoads) say("map-note", reasonOf(error));
  }
}

/** Marks the prompt and its adapters; none if `text` is null. Calls `follow` if the server has a newer generation. */
export async function place(text, names, follow) {
  asked = text === null ? null : { text, names };
  prompt = null;
  chosen = [];
  draw();
  if (!asked) return;
  try {
    const generation = await locatePrompt();
    draw();
    if (generation > drawn.generation) follow(generation);
  } catch (error) {
    note(error.message);
  }
}

/** Locates the prompt. The axes depend on the generation, so this runs again after a change of the pool. */
async function locatePrompt() {
  const mine = asked;
  const body = { prompt: mine.text, adapters: mine.names, min_generation: drawn.generation };
  const found = await post("v1/pool/map", body, { quietly: true });
  if (mine === asked) {
    prompt = found.prompt;
    chosen = found.adapters;
  }
  return found.generation;
}

function note(problem) {
  const { num_adapters, points, shown_variance } = drawn;
  const some = points.length < num_adapters ? `${whole(points.length)} of ${whole(num_adapters)} adapters` : `${whole(num_adapters)} adapters`;
  say("map-note", problem || (num_adapters ? `${some}, ${percent(shown_variance)} of their variance.` : "There are no adapters yet."));
}

/** Returns every adapter to draw, the chosen ones last so that they are on top. */
function spots() {
  const names = new Set(chosen.map((adapter) => adapter.name));
  const others = drawn.points.filter((point) => !names.has(point.name)).map((point) => ({ ...point, rank: -1 }));
  const top = chosen.map((adapter, rank) => ({ ...adapter, rank }));
  return [...others, ...top.reverse()];
}

/** Returns a map from coordinates to pixels. No axis is stretched by more than `MAX_STRETCH` against the other. */
function scale() {
  const { width, height } = byId("map").getBoundingClientRect();
  const all = [...spots(), ...(prompt ? [prompt] : [])];
  const range = (axis) => {
    const values = all.map((point) => point[axis]);
    return values.length ? [Math.min(...values), Math.max(...values)] : [0, 0];
  };
  const [left, right] = range("x"), [bottom, top] = range("y");
  const room = (pixels, length) => (length > 0 ? Math.max(1, pixels - 2 * MARGIN) / length : Infinity);
  const across = room(width, right - left), up = room(height, top - bottom);
  const unit = Math.min(across, up);
  const along = (own) => (Number.isFinite(unit) ? Math.min(own, MAX_STRETCH * unit) : 1);
  return (point) => ({
    px: width / 2 + (point.x - (left + right) / 2) * along(across),
    py: height / 2 - (point.y - (bottom + top) / 2) * along(up),
  });
}

function placed() {
  const at = scale();
  return { all: spots().map((spot) => ({ ...spot, ...at(spot) })), mark: prompt && at(prompt) };
}

function draw() {
  const map = byId("map");
  const { width, height } = map.getBoundingClientRect();
  const { all, mark } = placed();
  const top = all.filter((spot) => spot.rank >= 0);
  const lines = mark ? top.map((spot) => shape("line", { class: `link rank-${Math.min(spot.rank, 3)}`, x1: mark.px, y1: mark.py, x2: spot.px, y2: spot.py })) : [];
  map.replaceChildren(...lines, ...all.map(dot), ...(mark ? [star(mark)] : []), ...labels(all, mark, width, height));
}

function dot(spot) {
  const isTop = spot.rank >= 0, isCurrent = spot.name === current;
  const kind = `${isTop ? `chosen rank-${Math.min(spot.rank, 3)}` : "other"}${isCurrent ? " current" : ""}`;
  const radius = (isTop ? 8 : drawn.points.length > 300 ? 2.5 : 4) + (isCurrent ? 2 : 0);
  const circle = shape("circle", { cx: spot.px, cy: spot.py, r: radius });
  if (!isTop) return shape("g", { class: `spot ${kind}` }, circle);
  const number = shape("text", { class: "number", x: spot.px, y: spot.py, dy: "0.35em" }, String(spot.rank + 1));
  return shape("g", { class: `spot ${kind}` }, circle, number);
}

function star({ px, py }) {
  const corners = Array.from({ length: 8 }, (_, i) => {
    const angle = (i * Math.PI) / 4, radius = i % 2 ? 3.5 : 10;
    return `${px + radius * Math.sin(angle)},${py - radius * Math.cos(angle)}`;
  });
  return shape("polygon", { class: "prompt", points: corners.join(" ") });
}

/** Places labels where there is room: the current adapter, the prompt, the chosen adapters, then the others. */
function labels(all, mark, width, height) {
  const taken = new Labels(width, height, all.map((spot) => ({ x: spot.px, y: spot.py, r: spot.rank >= 0 ? 8 : 3 })));
  const isCurrent = (spot) => spot.name === current;
  const order = [...all].sort((a, b) => isCurrent(b) - isCurrent(a) || (b.rank >= 0) - (a.rank >= 0) || a.rank - b.rank);
  const made = [];
  if (mark) made.push(taken.put("prompt", mark.px, mark.py, 11, { always: true, kind: "label prompt-label" }));
  for (const spot of order.slice(0, MAX_LABELS)) {
    const always = isCurrent(spot) || spot.rank >= 0;
    const kind = `label ${isCurrent(spot) ? "current" : spot.rank >= 0 ? "chosen" : "other"}`;
    made.push(taken.put(spot.name, spot.px, spot.py, spot.rank >= 0 ? 9 : 5, { always, kind }));
  }
  return made.filter(Boolean);
}

function nearest(event) {
  const box = byId("map").getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  const far = (spot) => Math.hypot(spot.px - x, spot.py - y);
  const best = placed().all.reduce((found, spot) => (!found || far(spot) < far(found) ? spot : found), null);
  return best && far(best) < 24 ? best : null;
}

function pick(spot) {
  const name = spot?.name ?? null;
  if (name === current) return;
  current = name;
  draw();
}

function step(event) {
  const names = spots().map((spot) => spot.name).sort();
  if (event.key === "Enter" && current) { onChoose(current); return; }
  if (event.key === "Escape") { pick(null); return; }
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const ends = { Home: 0, End: names.length - 1 };
  if (!names.length || !(event.key in steps || event.key in ends)) return;
  event.preventDefault();
  const at = names.indexOf(current);
  const start = at < 0 && steps[event.key] < 0 ? 0 : at;
  const next = event.key in ends ? ends[event.key] : (start + steps[event.key] + names.length) % names.length;
  pick({ name: names[next] });
  const rank = chosen.findIndex((adapter) => adapter.name === names[next]);
  say("map-spoken", rank >= 0 ? `${names[next]}, chosen, rank ${rank + 1}` : names[next]);
}
