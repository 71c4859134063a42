// Connects the parts of the page, and shows the view that the address names.

import * as adapter from "./adapter.js";
import { read } from "./api.js";
import * as ask from "./ask.js";
import * as compare from "./compare.js";
import { byId, element } from "./dom.js";
import * as key from "./key.js";
import * as map from "./map.js";
import * as plan from "./plan.js";
import * as pool from "./pool.js";
import * as publish from "./publish.js";
import * as stats from "./stats.js";
import * as usage from "./usage.js";

const VIEWS = ["ask", "compare", "adapters", "adapter", "publish", "status"];
let newest = 0; // the newest generation heard of

/** Reloads what is in view and shows an earlier generation than `wanted`: each load counts against the key's rate. */
function follow(wanted) {
  newest = Math.max(newest, wanted ?? 0);
  if (!byId("view-ask").hidden) map.follow(newest);
  if (!byId("view-adapters").hidden) pool.follow(newest);
}

/** Reloads the pool at any generation. */
function showAll() {
  map.load(0);
  pool.load(0);
  ask.refresh();
}

/** Offers the strategies that the server lists, in Ask and in Compare. The choice stays, and everything if the server lists none now. */
async function offerStrategies() {
  const { strategies } = await read("v1/models/auto", { quietly: true }).catch(() => ({}));
  if (!strategies) return;
  const select = byId("strategy"), chosen = select.value;
  select.replaceChildren(select.options[0], ...Object.keys(strategies).map((name) => element("option", { selected: name === chosen }, name)));
  compare.offer(strategies);
}

/** Follows the server's metrics. Asks for the strategies again if it has listed none yet. */
function followServer(generation) {
  follow(generation);
  if (byId("strategy").options.length === 1) offerStrategies();
}

/** Shows the view of the address, such as `#compare`, `#adapters?tag=fun` or `#adapter/NAME`. */
function show() {
  const [place, query = ""] = location.hash.slice(1).split("?"), [view, ...rest] = place.split("/");
  if (view && !VIEWS.includes(view)) return; // a place on the page
  const current = view || "ask";
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== current;
  for (const link of document.querySelectorAll("nav a")) {
    const isCurrent = link.hash === `#${current === "adapter" ? "adapters" : current}`;
    if (isCurrent) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = current === "adapter" ? decoded(rest.join("/")) : byId(`view-${current}`).querySelector("h2").textContent;
  entitle(title);
  follow(newest);
  if (current === "adapters") pool.enter(query);
  if (current === "adapter") adapter.open(title);
  if (current === "status") usage.refresh();
}

const entitle = (text) => { document.title = `${text} · LoraRetriever`; };

/** Names the adapter that is shown by its id, in the address and the title of the page. */
function rename(id) {
  if (!location.hash.startsWith("#adapter/")) return; // the user has left it
  history.replaceState(null, "", `#adapter/${encodeURIComponent(id)}`);
  entitle(id);
}

/** Returns the text of a part of the address. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // typed by hand: no adapter has this name
  }
}

/** Shows the view `ask` with this model and prompt. */
function use(model, prompt) {
  ask.prepare(model, prompt);
  location.hash = "ask";
  byId("view-ask").hidden = false; // the address changes later
  byId("prompt").focus();
}

plan.start({ onAsk: ask.askAgain });
map.start({ onChoose: (name) => { location.hash = `adapter/${encodeURIComponent(name)}`; }, onPoints: ask.offer });
ask.start({ onPlan: (prompt, chosen) => map.place(prompt, chosen?.adapters.map((one) => one.name) ?? [], follow) });
compare.start();
offerStrategies();
pool.start();
adapter.start({ onAsk: use, onChange: follow, onCompare: (names, prompt) => { compare.prepare(names, prompt); location.hash = "compare"; }, onRename: rename });
publish.start({ onChange: follow, onTry: use, onDrop: () => { location.hash = "publish"; } });
usage.start();
stats.start({ onGeneration: followServer });
key.start({
  onForget: () => {
    for (const part of [adapter, compare, map, pool, publish, stats, usage]) part.forget(); // what another key may not see
    newest = 0; // each tenant has its own
  },
  onClear: ask.offerToClear,
  onChange: () => {
    offerStrategies();
    showAll();
    publish.refresh();
    stats.refresh();
    if (!byId("view-adapter").hidden) adapter.refresh();
    if (!byId("view-status").hidden) usage.refresh();
  },
});
addEventListener("hashchange", () => {
  show();
  const heading = document.querySelector(".view:not([hidden]) h2");
  if (location.hash === "#ask") byId("prompt").focus();
  else if (location.hash !== "#main") heading?.focus(); // so that the keyboard goes on from the new view
});
show();
showAll();
if (!byId("view-ask").hidden) byId("prompt").focus({ preventScroll: true });
