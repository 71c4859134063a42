// Connects the parts of the page.

import * as ask from "./ask.js";
import { byId } from "./dom.js";
import * as key from "./key.js";
import * as map from "./map.js";
import * as pool from "./pool.js";
import * as publish from "./publish.js";
import * as stats from "./stats.js";

let generation = 0; // the newest generation shown

/** Reloads the pool at generation `wanted` or later. */
function follow(wanted) {
  if (wanted === null || wanted <= generation) return;
  generation = wanted;
  map.load(wanted);
  pool.load(wanted);
}

/** Reloads the pool at any generation. */
function showAll() {
  map.load(0);
  pool.load(0);
}

/** Notes that this generation is shown, so that it is not loaded again. */
function seen(shown) {
  generation = Math.max(generation, shown);
}

ask.start({ onPlan: (prompt, plan) => map.place(prompt, plan.adapters.map((adapter) => adapter.name), follow) });
map.start({ onChoose: pool.search });
pool.start({ onAsk: ask.useModel, onChange: follow, onShown: seen });
publish.start({ onChange: follow });
stats.start({ onGeneration: follow });
key.start(() => {
  showAll();
  stats.refresh();
});
showAll();
byId("prompt").focus({ preventScroll: true });
