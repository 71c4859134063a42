// The live figures, asked for while the page is looked at.

import { read } from "./api.js";
import { byId, bytes, element, percent, say, shape, whole } from "./dom.js";

const EVERY_MS = 2000;
const NUM_RATES = 40;
const rates = [];
let before = null; // the reading before
let timer = 0;
let onGeneration = () => {};

export function start(told) {
  onGeneration = told.onGeneration;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    before = null; // a rate over the time nobody looked would mislead
    if (!document.hidden) refresh();
  });
  refresh();
}

export async function refresh() {
  clearTimeout(timer);
  try {
    const stats = await read("v1/stats", { quietly: true });
    show(stats);
    const silent = (stats.workers ? stats.workers.replicas.silent : 0) + stats.pool.replicas.silent;
    connection(silent ? `${silent} replica${silent > 1 ? "s" : ""} silent` : "live", silent ? "slow" : "good");
  } catch (error) {
    before = null;
    connection(error.status === 401 ? "a key is needed" : error.message, "bad");
  }
  clearTimeout(timer); // two may have been under way
  if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

function connection(text, state) {
  say("connection", text);
  byId("connection").className = `connection ${state}`;
}

function show({ pool, tenant, workers, read_at, base_model, defaults }) {
  say("base-model", base_model);
  byId("k").placeholder = defaults.k;
  byId("strategy").options[0].text = `server's (${defaults.strategy})`;
  if (workers) showWorkers(workers);
  else say("figure-running", whole(tenant.num_running)); // without the role admin the server reports this tenant's figures only
  showRate((workers ?? tenant).new_tokens, read_at);
  const lag = pool.generation !== null && pool.oldest_generation < pool.generation;
  say("figure-generation", pool.generation === null ? "–" : `${whole(pool.generation)}${lag ? " (one behind)" : ""}`);
  say("figure-adapters", pool.num_adapters === null ? "–" : whole(pool.num_adapters));
  onGeneration(pool.generation);
}

function showWorkers(workers) {
  sayPart("figure-running", whole(workers.num_running), whole(workers.max_running));
  say("figure-waiting", whole(workers.num_waiting));
  sayPart("figure-bank", whole(workers.bank_rows_occupied), whole(workers.bank_rows));
  fill("meter-bank", workers.bank_rows_occupied / workers.bank_rows);
  sayPart("figure-host", bytes(workers.host_cache_bytes), bytes(workers.host_cache_max_bytes));
  fill("meter-host", workers.host_cache_bytes / workers.host_cache_max_bytes);
  showHits(workers);
}

function showHits({ bank_hits, host_hits, fetches }) {
  const all = bank_hits + host_hits + fetches;
  const share = (part) => (all ? part / all : 0);
  say("figure-hits", all ? `bank ${percent(share(bank_hits))} · host ${percent(share(host_hits))} · fetched ${percent(share(fetches))}` : "none asked yet");
  fill("part-bank", share(bank_hits));
  fill("part-host", share(host_hits));
  fill("part-fetched", share(fetches));
}

function showRate(tokens, readAt) {
  const elapsed = before ? readAt - before.readAt : 0;
  const isNew = !before || elapsed > 0;
  if (elapsed > 0 && tokens >= before.tokens) { // else a replica was replaced, and counts anew
    rates.push((tokens - before.tokens) / elapsed);
    if (rates.length > NUM_RATES) rates.shift();
    say("figure-rate", rates.at(-1).toFixed(1));
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
