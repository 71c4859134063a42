// Live metrics, polled while the page is visible.

import { read } from "./api.js";
import { byId, bytes, element, percent, say, shape, whole } from "./dom.js";

const EVERY_MS = 2000;
const NUM_RATES = 40;
const rates = [];
let before = null; // the previous sample
let timer = 0;
let numForgotten = 0; // keys before the present one
let onGeneration = () => {};

export function start(callbacks) {
  ({ onGeneration } = callbacks);
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    before = null; // a rate over hidden time would be misleading
    if (!document.hidden) refresh();
  });
  refresh();
}

/** Forgets the metrics. */
export function forget() {
  numForgotten += 1;
  before = null;
  rates.length = 0;
  drawSpark();
  for (const node of document.querySelectorAll("#metrics dd[id]")) node.textContent = "–";
  for (const node of document.querySelectorAll("#metrics i[id]")) fill(node.id, 0);
}

export async function refresh() {
  clearTimeout(timer);
  const number = numForgotten;
  try {
    const stats = await read("v1/stats", { quietly: true });
    if (number !== numForgotten) return; // of another key
    show(stats);
    const silent = (stats.workers ? stats.workers.replicas.silent : 0) + stats.pool.replicas.silent;
    connection(silent ? `${silent} replica${silent > 1 ? "s" : ""} not responding` : "live", silent ? "slow" : "good");
  } catch (error) {
    before = null;
    connection(error.status === 401 ? "key needed" : error.message, "bad");
  }
  clearTimeout(timer); // two refreshes may have run at once
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

function connection(text, state) {
  say("connection", text);
  byId("connection").className = `connection ${state}`;
}

function show({ pool, tenant, workers, models, read_at, base_model, defaults }) {
  say("base-model", models ? Object.keys(models).join(", ") : base_model);
  byId("k").placeholder = defaults.k;
  document.documentElement.classList.toggle("learns", (defaults.learning ?? "off") !== "off");
  byId("strategy").options[0].text = `server default (${defaults.strategy})`;
  if (workers) showWorkers(workers);
  else say("metric-running", whole(tenant.num_running)); // without the role admin the server reports this tenant's metrics only
  showRate((workers ?? tenant).new_tokens, read_at);
  const lag = pool.generation !== null && pool.oldest_generation < pool.generation;
  say("metric-generation", pool.generation === null ? "–" : `${whole(pool.generation)}${lag ? " (some replicas behind)" : ""}`);
  say("metric-adapters", pool.num_adapters === null ? "–" : whole(pool.num_adapters));
  onGeneration(pool.generation);
}

function showWorkers(workers) {
  sayPart("metric-running", whole(workers.num_running), whole(workers.max_running));
  say("metric-waiting", whole(workers.num_waiting));
  sayPart("metric-bank", whole(workers.bank_rows_occupied), whole(workers.bank_rows));
  fill("meter-bank", workers.bank_rows_occupied / workers.bank_rows);
  sayPart("metric-host", bytes(workers.host_cache_bytes), bytes(workers.host_cache_max_bytes));
  fill("meter-host", workers.host_cache_bytes / workers.host_cache_max_bytes);
  showHits(workers);
}

function showHits({ bank_hits, host_hits, fetches }) {
  const all = bank_hits + host_hits + fetches;
  const share = (part) => (all ? part / all : 0);
  const parts = { device: bank_hits, memory: host_hits, store: fetches };
  const texts = Object.entries(parts).flatMap(([place, count]) => [element("span", { class: "part" }, `${place} ${percent(share(count))}`), " "]);
  byId("metric-hits").replaceChildren(...(all ? texts : ["no requests yet"]));
  fill("part-bank", share(bank_hits));
  fill("part-host", share(host_hits));
  fill("part-fetched", share(fetches));
}

function showRate(tokens, readAt) {
  const elapsed = before ? readAt - before.readAt : 0;
  const isNew = !before || elapsed > 0;
  if (elapsed > 0 && tokens >= before.tokens) { // else a replica was replaced and counts from 0
    rates.push((tokens - before.tokens) / elapsed);
    if (rates.length > NUM_RATES) rates.shift();
    say("metric-rate", rates.at(-1).toFixed(1));
    drawSpark();
  }
  if (isNew) before = { tokens, readAt };
}

function drawSpark() {
  const top = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${(i + NUM_RATES - rates.length) * (100 / (NUM_RATES - 1))},${22 - (20 * rate) / top}`);
  byId("spark").setAttribute("viewBox", "0 0 100 24");
  byId("spark").setAttribute("preserveAspectRatio", "none");
  byId("spark").replaceChildren(shape("polyline", { points: points.join(" ") }));
}

function sayPart(id, part, all) {
  byId(id).replaceChildren(part, element("small", {}, ` of ${all}`));
}

function fill(id, share) {
  byId(id).style.setProperty("--share", Number.isFinite(share) ? Math.min(1, share) : 0);
}
