// The table of adapters: search, filters, order and paging. The address keeps them. Arrow keys move between the rows, which are one tab stop.

import { listed } from "./answers.js";
import { read, reasonOf } from "./api.js";
import { ago, byId, bytes, element, refill, say, sayOrHide, soon, whole } from "./dom.js";
import { adapterLink, trialLabel, trialText } from "./plan.js";

const PAGE = 15;
const FIELDS = { search: "search", tag: "pool-tag", owner: "pool-owner", base: "pool-base", sort: "pool-sort" };
const seen = { "pool-tags": new Set(), "pool-owners": new Set(), "pool-bases": new Set() }; // what the filters suggest
let before = []; // the last id of each page before the shown one
let lastId = null; // of the shown page
let shown = 0; // the generation of the rows
let loading = null; // the one that is being read
let numLoads = 0;

export function start() {
  const choose = soon(() => {
    if (!byId("view-adapters").hidden) history.replaceState(null, "", `#adapters?${chosen()}`);
    loadFirst();
  });
  for (const id of Object.values(FIELDS)) byId(id).addEventListener("input", choose);
  byId("pool-filters").addEventListener("submit", (event) => event.preventDefault());
  byId("page-back").addEventListener("click", () => load(0, before.slice(0, -1)));
  byId("page-on").addEventListener("click", () => load(0, [...before, lastId]));
  byId("pool-rows").addEventListener("keydown", step);
  byId("pool-rows").addEventListener("focusin", ({ target }) => { for (const link of links()) link.tabIndex = link === target ? 0 : -1; });
}

/** Returns what the fields choose. */
function chosen() {
  const query = new URLSearchParams();
  for (const [name, id] of Object.entries(FIELDS)) {
    const value = byId(id).value.trim();
    for (const one of name === "tag" ? listed(value) : [value]) if (one) query.append(name, one);
  }
  return query;
}

/** Fills the fields from the address, such as `tag=fun&sort=newest`. */
export function enter(address) {
  const query = new URLSearchParams(address);
  if (query.toString() === chosen().toString()) return;
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = query.getAll(name).join(", ");
  loadFirst();
}

/** Shows the first page of what the fields choose. Until it is shown no other page can be opened: the rows are of another choice. */
function loadFirst() {
  before = [];
  byId("page-back").disabled = byId("page-on").disabled = true;
  load();
}

/** Forgets the adapters and what the filters suggest. */
export function forget() {
  for (const values of Object.values(seen)) values.clear();
  before = [];
  shown = 0;
  loading = null;
  numLoads += 1;
  show({ data: [], total: 0, last_id: null, has_more: false });
  say("pool-count", "");
}

/** Shows the page again if its rows are of an earlier generation than `wanted`. A load that goes on ends first. */
export function follow(wanted) {
  if (loading === null && wanted > shown) load(wanted);
}

/** Shows the page that follows the pages with these last ids, at generation `wanted` or later. */
export async function load(wanted = 0, pages = before) {
  const number = ++numLoads;
  const generation = loading = Math.max(shown, loading, wanted);
  const query = chosen();
  byId("adapter-back").href = `#adapters?${query}`;
  for (const [name, value] of Object.entries({ limit: PAGE, after: pages.at(-1) ?? "", min_generation: generation })) query.set(name, value);
  try {
    const page = await read(`v1/loras?${query}`);
    if (number !== numLoads) return; // a newer load has started
    if (!page.data.length && pages.length) { load(0, pages.slice(0, -1)); return; }
    before = pages;
    show(page);
    shown = Math.max(generation, page.generation);
    sayOrHide("pool-error", page.unserved.map(({ text }) => `${text}.`).join(" "));
  } catch (error) {
    if (number === numLoads) sayOrHide("pool-error", reasonOf(error));
  } finally {
    if (number === numLoads) loading = null;
  }
}

/** Suggests the tags, owners and base models of these adapters in the filters. */
function suggest(adapters) {
  for (const { tags, tenant, base_model } of adapters) {
    for (const tag of tags) seen["pool-tags"].add(tag);
    seen["pool-owners"].add(tenant);
    seen["pool-bases"].add(base_model);
  }
  for (const [id, values] of Object.entries(seen)) byId(id).replaceChildren(...[...values].sort().map((value) => element("option", { value })));
}

function show({ data, total, last_id, has_more }) {
  suggest(data);
  refill(byId("pool-rows"), data.map(row));
  lastId = last_id;
  const first = before.length * PAGE;
  say("pool-count", total ? `${whole(first + 1)}–${whole(first + data.length)} of ${whole(total)}` : `no adapters found${byId("search").value ? "; under Ask, Find on the map also searches samples" : ""}`);
  byId("page-back").disabled = !before.length;
  byId("page-on").disabled = !has_more;
}

function row(adapter, place) {
  const number = (text) => element("td", { class: "number wide" }, text);
  const link = adapterLink(adapter.id, `version ${adapter.digest.slice(0, 12)}`);
  link.tabIndex = place ? -1 : 0;
  const why = adapter.num_samples ? "Another encoder embedded it: auto finds it after a reindex" : "Without samples, auto cannot find it";
  const note = adapter.found_by_auto ? null : element("span", { class: "tag plain", title: why }, "by name only");
  const trial = adapter.trial && element("span", { class: "tag plain", title: trialText(adapter.trial) }, trialLabel(adapter.trial));
  return element(
    "tr",
    {},
    element(
      "th",
      { scope: "row" },
      link,
      element("small", { class: "narrow" }, `${bytes(adapter.num_bytes)}, ${whole(adapter.num_samples)} samples`),
      note,
      trial,
      ...adapter.tags.map((tag) => element("span", { class: "tag" }, tag)),
    ),
    number(adapter.ranks.join(", ")),
    number(bytes(adapter.num_bytes)),
    number(whole(adapter.num_samples)),
    element("td", { class: "number wide", title: adapter.created_at }, ago(adapter.created_at)),
  );
}

const links = () => [...byId("pool-rows").querySelectorAll("th a")];

function step(event) {
  const all = links(), at = all.indexOf(event.target);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "/") byId("search").focus();
  else if (to !== undefined) all[Math.max(0, Math.min(all.length - 1, to))]?.focus();
  else return;
  event.preventDefault();
}
