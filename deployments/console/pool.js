// The table of the pool: search, pages, withdraw.

import { read, send } from "./api.js";
import { ago, byId, bytes, confirmed, element, say, sayOrHide, soon, whole } from "./dom.js";

const PAGE = 15;
let offset = 0;
let generation = 0;
let numLoads = 0;
let told = { onAsk: () => {}, onChange: () => {}, onShown: () => {} };

export function start(callbacks) {
  told = callbacks;
  byId("search").addEventListener("input", soon(() => { offset = 0; load(); }));
  byId("page-back").addEventListener("click", () => turn(-PAGE));
  byId("page-on").addEventListener("click", () => turn(PAGE));
}

/** Shows the adapters with these words in their name or tags. */
export function search(words) {
  byId("search").value = words;
  offset = 0;
  load();
  byId("search").scrollIntoView({ block: "nearest" });
}

/** Shows the page as of `wanted`, or a later generation. */
export async function load(wanted = 0) {
  generation = Math.max(generation, wanted);
  const number = ++numLoads;
  const words = encodeURIComponent(byId("search").value.trim());
  try {
    const page = await read(`v1/loras?limit=${PAGE}&offset=${offset}&search=${words}&min_generation=${generation}`);
    if (number !== numLoads) return; // a later one is under way
    if (page.total && offset >= page.total) { turn(-PAGE); return; }
    show(page);
    told.onShown(page.generation);
    sayOrHide("pool-error", "");
  } catch (error) {
    if (number === numLoads) sayOrHide("pool-error", error.message);
  }
}

function turn(step) {
  offset = Math.max(0, offset + step);
  load();
}

function show({ data, total }) {
  byId("pool-rows").replaceChildren(...data.map(row));
  const last = offset + data.length;
  say("pool-count", total ? `${whole(offset + 1)}–${whole(last)} of ${whole(total)}` : "no adapters found");
  byId("page-back").disabled = offset === 0;
  byId("page-on").disabled = last >= total;
}

function row(adapter) {
  const number = (text, more = "") => element("td", { class: `number ${more}` }, text);
  const label = { "aria-label": `Ask ${adapter.name}`, title: "The next prompt goes to this adapter", type: "button" };
  const note = adapter.found_by_auto ? null : element("span", { class: "tag plain", title: "It has no samples" }, "by name only");
  return element(
    "tr",
    {},
    element(
      "th",
      { scope: "row", title: `version ${adapter.digest.slice(0, 12)}` },
      element("span", { class: "name" }, adapter.name),
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
      element("button", { ...label, onclick: () => told.onAsk(adapter.name) }, "Ask"),
      element("button", { type: "button", "aria-label": `Withdraw ${adapter.name}`, onclick: () => withdraw(adapter.name) }, "Withdraw"),
    ),
  );
}

async function withdraw(name) {
  const text = "It is gone for the next request, with all its versions. Requests that run now end as they began.";
  if (!(await confirmed(`Withdraw ${name}?`, text, "Withdraw"))) return;
  sayOrHide("pool-error", "");
  try {
    const response = await send("DELETE", `v1/loras/${encodeURIComponent(name)}`);
    told.onChange((await response.json()).generation);
  } catch (error) {
    sayOrHide("pool-error", error.message);
  }
}
