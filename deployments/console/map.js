// Draws the adapters as points in named clusters, with the last prompt among them. Near ones have similar samples.

import { post, read, reasonOf } from "./api.js";
import { byId, element, refill, say, shape, soon, whole } from "./dom.js";
import { Labels } from "./labels.js";
import { adapterLink } from "./plan.js";
import * as viewport from "./viewport.js";

const MARGIN = 22;
const MAX_LABELS = 60;
const MAX_LISTED = 50;
const MAX_FOUND = 500; // adapters with the words of a search that are marked
const NUM_ALIKE = 5; // adapters with samples most like them
const MAY_NOT = 403; // a key without the role that asks finds names only
const MAX_STRETCH = 2;
const MANY = 300; // points in view, of which only clusters have labels, and a click goes nearer
const NOTHING = { generation: 0, num_adapters: 0, clusters: [], points: [] };
const NO_HITS = { text: "", total: 0, named: [], alike: [] };
let drawn = NOTHING;
let prompt = null; // {x, y} of the last prompt
let asked = null; // its text and the names of its adapters
let chosen = []; // the adapters that answered it, best first
let spots = []; // every adapter with its place on the whole map, the chosen ones last so that they are on top
let rings = []; // the clusters with theirs
let mark = null; // that of the prompt
let hits = NO_HITS; // of the search: names with its words, how many there are, and candidates of a prompt with them
let found = new Set(); // those of them that are on the map, best first
let near = []; // the adapters in view
let current = null; // the name under the pointer or the arrow keys
let shown = 0; // the generation that is drawn
let loading = null; // the one that is being read
let numLoads = 0;
let numPlacings = 0; // of the prompt
let last = null; // the last search: its text, and a promise that it is done
let hasFailed = false; // it, or a part of it, so that the note says why
let onChoose = () => {};
let onPoints = () => {};

/** Connects the map. `onChoose(name)` opens an adapter; `onPoints(points)` gets the adapters whenever they are read. */
export function start(callbacks) {
  onPoints = callbacks.onPoints;
  onChoose = (name) => { if (document.fullscreenElement) document.exitFullscreen(); callbacks.onChoose(name); };
  const map = byId("map");
  viewport.start(map, look);
  new ResizeObserver(fit).observe(map);
  map.addEventListener("pointermove", (event) => pick(nearest(event)));
  map.addEventListener("pointerleave", () => pick(null));
  map.addEventListener("blur", () => pick(null));
  map.addEventListener("click", click);
  map.addEventListener("keydown", step);
  for (const [id, work] of Object.entries({ "map-in": viewport.zoomIn, "map-out": viewport.zoomOut, "map-whole": viewport.showAll })) byId(id).addEventListener("click", work);
  byId("map-large").hidden = !document.fullscreenEnabled;
  byId("map-large").addEventListener("click", () => (document.fullscreenElement ? document.exitFullscreen() : byId("map-panel").requestFullscreen()));
  byId("map-search").addEventListener("input", soon(search, 300));
  byId("map-form").addEventListener("submit", (event) => { event.preventDefault(); goToFound(); });
}

/** Draws the pool again if an earlier generation than `wanted` is drawn. A load that goes on ends first. */
export function follow(wanted) {
  if (loading === null && wanted > shown) load(wanted);
}

/** Draws the pool at `generation` or later. */
export async function load(generation) {
  const number = ++numLoads;
  loading = generation;
  try {
    const answer = await read(`v1/pool/map?min_generation=${generation}`);
    if (number !== numLoads) return;
    drawn = answer;
    shown = Math.max(generation, answer.generation);
    note("");
    onPoints(drawn.points);
    last = null; // of another generation, or of another key
    search();
    await placePrompt();
  } catch (error) {
    if (number === numLoads) say("map-note", reasonOf(error));
  } finally {
    if (number === numLoads) loading = null;
  }
}

/** Forgets the adapters, but not the last prompt. */
export function forget() {
  drawn = NOTHING;
  shown = 0;
  loading = null;
  numLoads += 1;
  numPlacings += 1;
  hits = NO_HITS;
  prompt = last = null;
  chosen = [];
  say("map-note", "");
  fit();
}

/** Marks the prompt and its adapters; none if `text` is null. Calls `onNewer` if the server has a newer generation. */
export async function place(text, names, onNewer) {
  asked = text === null ? null : { text, names };
  const generation = await placePrompt();
  if (generation > drawn.generation) onNewer(generation);
}

/** Draws the map, then the last prompt, whose place depends on the generation. Returns the generation of its place, or 0. */
async function placePrompt() {
  const number = ++numPlacings;
  prompt = null;
  chosen = [];
  fit();
  if (!asked) return 0;
  const body = { prompt: asked.text, adapters: asked.names, min_generation: drawn.generation };
  try {
    const answer = await post("v1/pool/map", body, { quietly: true });
    if (number !== numPlacings) return 0; // it is placed again
    ({ prompt, adapters: chosen } = answer);
    fit();
    return answer.generation;
  } catch (error) {
    if (number === numPlacings) note(error.message);
    return 0;
  }
}

function note(problem) {
  const { num_adapters, points, clusters } = drawn;
  const some = points.length < num_adapters ? `${whole(points.length)} of ${whole(num_adapters)}` : whole(num_adapters);
  const text = `${some} ${num_adapters === 1 ? "adapter" : "adapters"}${clusters.length > 1 ? ` in ${clusters.length} clusters` : ""}.`;
  say("map-note", problem || (num_adapters ? text : "There are no adapters yet."));
}

/** Finds the place of everything on the whole map, and draws it. No axis is stretched by more than `MAX_STRETCH` against the other. */
function fit() {
  const { width, height } = viewport.size();
  const discs = drawn.clusters.length > 1 ? drawn.clusters : [];
  const edges = discs.flatMap(({ x, y, radius }) => [{ x: x - radius, y: y - radius }, { x: x + radius, y: y + radius }]);
  const all = [...drawn.points, ...chosen, ...edges, ...(prompt ? [prompt] : [])];
  const range = (axis) => all.reduce(([low, high], point) => [Math.min(low, point[axis]), Math.max(high, point[axis])], all.length ? [Infinity, -Infinity] : [0, 0]);
  const [left, right] = range("x"), [bottom, top] = range("y");
  const room = (pixels, length) => (length > 0 ? Math.max(1, pixels - 2 * MARGIN) / length : Infinity);
  const unit = Math.min(room(width, right - left), room(height, top - bottom));
  const along = (own) => (Number.isFinite(unit) ? Math.min(own, MAX_STRETCH * unit) : 1);
  const across = along(room(width, right - left)), up = along(room(height, top - bottom));
  const at = ({ x, y }) => ({ px: width / 2 + (x - (left + right) / 2) * across, py: height / 2 - (y - (bottom + top) / 2) * up });
  const names = new Set(chosen.map(({ name }) => name));
  const others = drawn.points.filter(({ name }) => !names.has(name)).map((point) => ({ ...point, rank: -1, ...at(point) }));
  spots = [...others, ...chosen.map((point, rank) => ({ ...point, rank, ...at(point) })).reverse()];
  rings = discs.map((disc) => ({ ...disc, ...at(disc), rx: disc.radius * across, ry: disc.radius * up }));
  mark = prompt && at(prompt);
  byId("map-rings").replaceChildren(...rings.map(({ px, py, rx, ry }) => shape("ellipse", { cx: px, cy: py, rx, ry })));
  byId("map-dots").setAttribute("d", dots(others));
  byId("map").classList.toggle("many", spots.length > MANY);
  markFound();
}

/** Returns the path of these points: one shape for thousands, which zooming does not change. */
const dots = (points) => points.map(({ px, py }) => `M${px.toFixed(2)} ${py.toFixed(2)}h0`).join("");

/** Asks the server for adapters with the words of the search field in name or tag, and for those that a prompt with them would find. */
function search() {
  const text = byId("map-search").value.trim();
  if (text !== last?.text) last = { text, done: find(text) };
  return last.done;
}

async function find(text) {
  let problem = "";
  const named = text && read(`v1/loras?${new URLSearchParams({ search: text, limit: MAX_FOUND })}`);
  const routed = text && post("v1/route", { prompt: [text], lora: { k: NUM_ALIKE, fallback: "base", explain: true } }, { quietly: true })
    .catch((error) => { problem = error.status === MAY_NOT ? "" : reasonOf(error); return ""; });
  try {
    const [{ data = [], total = 0 }, { data: [plan] = [] }] = await Promise.all([named, routed]);
    if (text !== last?.text) return;
    const names = data.map(({ id }) => id), isOther = ({ name }) => !names.includes(name);
    hits = { text, total, named: names.map((name) => ({ name })), alike: (plan?.candidates ?? []).filter(isOther) };
    if (text && !byId("map").classList.contains("searched")) byId("map-count").parentElement.open = true;
    markFound();
    if (text) say("map-spoken", countFound());
    noteSearch(problem);
  } catch (error) {
    if (text === last?.text) { noteSearch(reasonOf(error)); last = null; }
  }
}

function noteSearch(problem) {
  if (problem || hasFailed) note(problem);
  hasFailed = Boolean(problem);
}

const countFound = () => `Found: ${whole(hits.total)} by name or tag, ${whole(hits.alike.length)} by samples`;

/** Marks what the search found. */
function markFound() {
  const bySpot = new Map(spots.map((spot) => [spot.name, spot]));
  found = new Set([...hits.named, ...hits.alike].map(({ name }) => bySpot.get(name)).filter(Boolean));
  byId("map-found").setAttribute("d", dots([...found].filter(({ rank }) => rank < 0)));
  byId("map").classList.toggle("searched", Boolean(hits.text));
  look();
}

/** Shows everything that was found, and selects the first. Then the arrow keys go on to the others. */
async function goToFound() {
  await search();
  if (!found.size || hits.text !== byId("map-search").value.trim()) return; // another search goes on, or this one failed
  const [first] = found;
  byId("map").focus();
  viewport.showThese([...found]);
  select(first);
}

/** Draws and lists what is in view now. */
function look() {
  near = spots.filter(viewport.sight());
  draw();
  list();
}

/** Lists the adapters that the search finds, else what is in view: the clusters, or the adapters if they are few. */
function list() {
  const isInView = viewport.sight(), searched = Boolean(hits.text);
  const rows = searched ? [...hits.named.slice(0, MAX_LISTED - hits.alike.length), ...hits.alike] : [...near].sort(byName);
  say("map-count", searched ? countFound() : `In view: ${whole(near.length)} of ${whole(drawn.num_adapters)}`);
  const hasClusters = !searched && rings.length > 0 && near.length > MAX_LISTED;
  const nearer = (ring) => element("button", { type: "button", class: "small", onclick: () => goTo(ring) }, ring.name);
  const clusters = () => rings.filter(isInView).map((ring) => element("li", {}, nearer(ring), " ", element("small", {}, `${whole(ring.num_adapters)} adapters`)));
  const adapters = () => rows.slice(0, MAX_LISTED).map(({ name, samples }) => element("li", {}, adapterLink(name), samples?.length ? element("small", {}, ` ${samples[0].input}`) : null));
  const numMore = (searched ? hits.total + hits.alike.length : rows.length) - MAX_LISTED;
  const rest = hasClusters || numMore <= 0 ? [] : [element("li", { class: "muted" }, `and ${whole(numMore)} more: ${searched ? "search for more words" : "zoom in, or search"}`)];
  refill(byId("map-list"), [...(hasClusters ? clusters() : adapters()), ...rest]);
}

/** Shows the disc of a cluster as large as it fits. */
function goTo({ px, py, rx, ry, name }) {
  viewport.showThese([{ px: px - rx, py: py - ry }, { px: px + rx, py: py + ry }]);
  say("map-spoken", `${name}: ${whole(near.length)} adapters in view`);
}

/** Draws what keeps its size while the map is zoomed: the chosen adapters, the current one, the prompt, and labels. */
function draw() {
  byId("map-moved").setAttribute("transform", viewport.transform());
  const moved = (spot) => { const { x, y } = viewport.shown(spot); return { ...spot, px: x, py: y }; };
  const isMarked = ({ name, rank }) => name === current || rank >= 0, isFew = near.length <= MANY;
  const move = (test) => near.filter(test).map(moved), star = mark && moved(mark);
  const marked = move(isMarked), searched = move((spot) => found.has(spot) && !isMarked(spot)), plain = isFew ? move((spot) => !found.has(spot) && !isMarked(spot)) : [];
  const top = spots.filter(({ rank }) => rank >= 0).map(moved);
  const lines = star ? top.map((spot) => shape("line", { class: `link rank-${Math.min(spot.rank, 3)}`, x1: star.px, y1: star.py, x2: spot.px, y2: spot.py })) : [];
  const seen = [...marked.filter(({ rank }) => rank < 0), ...top];
  byId("map-over").replaceChildren(...lines, ...seen.map(dot), ...(star ? [starAt(star)] : []), ...labels(marked, searched, plain, rings.filter(viewport.sight()).map(moved), star));
}

function dot(spot) {
  const isTop = spot.rank >= 0, isCurrent = spot.name === current;
  const kind = `${isTop ? `chosen rank-${Math.min(spot.rank, 3)}` : "other"}${isCurrent ? " current" : ""}`;
  const circle = shape("circle", { cx: spot.px, cy: spot.py, r: (isTop ? 8 : 4) + (isCurrent ? 2 : 0) });
  if (!isTop) return shape("g", { class: `spot ${kind}` }, circle);
  const number = shape("text", { class: "number", x: spot.px, y: spot.py, dy: "0.35em" }, String(spot.rank + 1));
  return shape("g", { class: `spot ${kind}` }, circle, number);
}

function starAt({ px, py }) {
  const corners = Array.from({ length: 8 }, (_, i) => {
    const angle = (i * Math.PI) / 4, radius = i % 2 ? 3.5 : 10;
    return `${px + radius * Math.sin(angle)},${py - radius * Math.cos(angle)}`;
  });
  return shape("polygon", { class: "prompt", points: corners.join(" ") });
}

/** Places labels where there is room: the prompt, the current and chosen adapters, clusters, what was found, then others. */
function labels(marked, searched, plain, clusters, star) {
  const { width, height } = viewport.size();
  const taken = new Labels(width, height), isCurrent = (spot) => spot.name === current;
  const put = (spot) => {
    const kind = isCurrent(spot) ? "current" : spot.rank >= 0 ? "chosen" : "other";
    return taken.put(spot.name, spot.px, spot.py, spot.rank >= 0 ? 9 : 5, { always: kind !== "other", kind: `label ${kind}` });
  };
  const made = star ? [taken.put("prompt", star.px, star.py, 11, { always: true, kind: "label prompt-label" })] : [];
  made.push(...marked.sort((a, b) => isCurrent(b) - isCurrent(a) || a.rank - b.rank).map(put));
  for (const ring of clusters) made.push(taken.put(ring.name, ring.px, ring.py, 10, { isOver: true, kind: "label cluster" }));
  made.push(...searched.slice(0, MAX_LABELS).map(put));
  taken.avoid([...marked, ...searched, ...plain].slice(0, MANY).map((spot) => ({ x: spot.px, y: spot.py, r: spot.rank >= 0 ? 8 : 3 })));
  return [...made, ...plain.slice(0, MAX_LABELS).map(put)].filter(Boolean);
}

function nearest(event) {
  const { px, py, pixel } = viewport.findPlace(event);
  let best = null, least = 24 * pixel;
  for (const spot of near) {
    const far = Math.hypot(spot.px - px, spot.py - py);
    if (far < least) [best, least] = [spot, far];
  }
  return best;
}

/** Opens the adapter at the pointer. Where there are many, shows their cluster instead. */
function click(event) {
  if (viewport.isDragged()) return;
  const spot = nearest(event), isDense = near.length > MANY && rings.length > 0;
  if (isDense && spot?.cluster !== undefined) goTo(rings[spot.cluster]);
  else if (spot) onChoose(spot.name);
}

function pick(spot) {
  const name = spot?.name ?? null;
  if (name === current) return;
  current = name;
  draw();
}

function step(event) {
  if (viewport.press(event)) { event.preventDefault(); say("map-spoken", `${whole(near.length)} adapters in view`); return; }
  const offered = found.size ? [...found] : [...near].sort(byName);
  if (event.key === "Enter" && current) { onChoose(current); return; }
  if (event.key === "Escape") { pick(null); return; }
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const ends = { Home: 0, End: offered.length - 1 };
  if (!offered.length || !(event.key in steps || event.key in ends)) return;
  event.preventDefault();
  const at = offered.findIndex(({ name }) => name === current);
  const from = at < 0 && steps[event.key] < 0 ? 0 : at;
  const next = offered[event.key in ends ? ends[event.key] : (from + steps[event.key] + offered.length) % offered.length];
  if (!near.includes(next)) viewport.showThese([next]);
  select(next);
}

function select(spot) {
  pick(spot);
  say("map-spoken", spot.rank >= 0 ? `${spot.name}, chosen, rank ${spot.rank + 1}` : spot.name);
}

const byName = (a, b) => (a.name < b.name ? -1 : 1);
