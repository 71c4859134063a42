// The table of adapters: search, paging, roll back, withdraw.

import { post, read, send } from "./api.js";
import { ago, byId, bytes, confirmed, element, say, sayOrHide, soon, whole } from "./dom.js";

const PAGE = 15;
let before = []; // the last id of each previous page
let lastId = null; // of the current page
let generation = 0;
let numLoads = 0;
let handlers = { onAsk: () => {}, onChange: () => {}, onShown: () => {} };

export function start(callbacks) {
  handlers = callbacks;
  byId("search").addEventListener("input", soon(() => { before = []; load(); }));
  byId("page-back").addEventListener("click", () => { before.pop(); load(); });
  byId("page-on").addEventListener("click", () => { before.push(lastId); load(); });
}

/** Searches for adapters with these words in their name or tags. */
export function search(words) {
  byId("search").value = words;
  before = [];
  load();
  byId("search").scrollIntoView({ block: "nearest" });
}

/** Shows the page at generation `wanted` or later. */
export async function load(wanted = 0) {
  generation = Math.max(generation, wanted);
  const number = ++numLoads;
  const query = { limit: PAGE, search: byId("search").value.trim(), after: before.at(-1) ?? "", min_generation: generation };
  try {
    const page = await read(`v1/loras?${new URLSearchParams(query)}`);
    if (number !== numLoads) return; // a newer load has started
    if (!page.data.length && before.length) { before.pop(); load(); return; }
    show(page);
    handlers.onShown(page.generation);
    sayOrHide("pool-error", "");
  } catch (error) {
    if (number === numLoads) sayOrHide("pool-error", error.message);
  }
}

function show({ data, total, last_id, has_more }) {
  byId("pool-rows").replaceChildren(...data.map(row));
  lastId = last_id;
  const first = before.length * PAGE;
  say("pool-count", total ? `${whole(first + 1)}–${whole(first + data.length)} of ${whole(total)}` : "no adapters found");
  byId("page-back").disabled = !before.length;
  byId("page-on").disabled = !has_more;
}

function row(adapter) {
  const number = (text, more = "") => element("td", { class: `number ${more}` }, text);
  const button = (text, title, onclick) =>
    element("button", { type: "button", "aria-label": `${text} ${adapter.id}`, title, onclick }, text);
  const changes = adapter.id !== adapter.name ? [] : [ // only its own tenant may change an adapter
    button("Roll back", "Make the previous version live again", () => rollback(adapter.id)),
    button("Withdraw", "Remove from the pool", () => withdraw(adapter.id)),
  ];
  const note = adapter.found_by_auto ? null : element("span", { class: "tag plain", title: "Without samples, auto cannot find it" }, "by name only");
  return element(
    "tr",
    {},
    element(
      "th",
      { scope: "row", title: `version ${adapter.digest.slice(0, 12)}` },
      element("span", { class: "name" }, adapter.id),
      element("small", { class: "narrow" }, `${bytes(adapter.num_bytes)} `),
      note,
      ...adapter.tags.map((tag) => element("span", { class: "tag" }, tag)),
    ),
    number(adapter.ranks.join(", "), "wide"),
    number(bytes(adapter.num_bytes), "wide"),
    number(whole(adapter.num_samples), "wide"),
    number(whole(adapter.generation), "wide"),
    element("td", { class: "number wide", title: adapter.created_at }, ago(adapter.created_at)),
    element(
      "td",
      { class: "actions" },
      button("Ask", "Use this adapter for the next prompt", () => handlers.onAsk(adapter.id)),
      ...changes,
    ),
  );
}

async function rollback(name) {
  sayOrHide("pool-error", "");
  const path = `v1/loras/${encodeURIComponent(name)}`;
  try {
    const [, older] = (await read(path)).versions;
    if (!older) { sayOrHide("pool-error", `${name} has no older version`); return; }
    const text = `Version ${older.digest.slice(0, 12)}, published ${ago(older.created_at)}, becomes live for the next request. The current version is kept.`;
    if (!(await confirmed(`Roll back ${name}?`, text, "Roll back"))) return;
    handlers.onChange((await post(`${path}/rollback`, { digest: older.digest })).generation);
  } catch (error) {
    sayOrHide("pool-error", error.message);
  }
}

async function withdraw(name) {
  const text = "This removes the adapter and all its versions. Running requests finish unchanged.";
  if (!(await confirmed(`Withdraw ${name}?`, text, "Withdraw"))) return;
  sayOrHide("pool-error", "");
  try {
    const response = await send("DELETE", `v1/loras/${encodeURIComponent(name)}`);
    handlers.onChange((await response.json()).generation);
  } catch (error) {
    sayOrHide("pool-error", error.message);
  }
}
