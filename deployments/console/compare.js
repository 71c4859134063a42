// Sends one prompt in several ways at once, and shows the answers side by side.

import { ApiError } from "./api.js";
import { adapterTags, newTiming, optionsOf, stream, summary } from "./answers.js";
import { byId, element, say } from "./dom.js";

const auto = (lora) => ({ model: "auto", lora });
let running = null;

const AUTO = { label: "auto", note: "the server's default", changes: () => auto({ strategy: undefined }) };
const BASE = { label: "base model", note: "no adapter", changes: () => ({ model: byId("base-model").textContent, lora: {} }) };
let ways = {}; // the ways to answer: their labels, and the model and options of `lora` that they set

/** Offers the default, each strategy (what it composes, by name) and the base model. */
export function offer(strategies) {
  const routed = Object.entries(strategies).map(([name, note]) => [name, { label: name, note, changes: () => auto({ strategy: name }) }]);
  ways = Object.fromEntries([["auto", AUTO], ...routed, ["base", BASE]]);
  byId("ways").replaceChildren(...Object.entries(ways).map(([name, { label }]) =>
    element("label", { class: "tick" }, element("input", { type: "checkbox", name: "way", value: name, checked: true }), label)));
}

export function start() {
  offer({});
  byId("compare-form").addEventListener("submit", (event) => { event.preventDefault(); compare(); });
  byId("compare-stop").addEventListener("click", () => running?.abort());
  byId("compare-prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("compare-form").requestSubmit();
  });
}

async function compare() {
  running?.abort();
  const mine = (running = new AbortController());
  const prompt = byId("compare-prompt").value;
  const names = [...byId("ways").querySelectorAll("input:checked")].map((tick) => tick.value);
  const columns = names.map((name) => ({ ...ways[name], ...column(ways[name]) }));
  byId("compared").replaceChildren(...columns.map(({ node }) => node));
  byId("compare-stop").disabled = false;
  say("compare-status", names.length ? "answering…" : "choose at least one way");
  await Promise.all(columns.map((one) => fillColumn(one, prompt, mine.signal)));
  if (mine !== running) return;
  byId("compare-stop").disabled = true;
  const texts = new Set(columns.map(({ text }) => text.textContent.trim()));
  if (names.length) say("compare-status", `${names.length} ways, ${texts.size} different ${texts.size === 1 ? "answer" : "answers"}`);
}

function column({ label, note }) {
  const by = element("p", { class: "by" }), text = element("p", { class: "text", tabindex: 0, role: "region", "aria-label": `Answer by ${label}` }), end = element("p", { class: "muted note" }, "waiting…");
  const node = element("li", { class: "panel column" }, element("h3", {}, label, " ", element("small", {}, note)), by, text, end);
  return { node, by, text, end };
}

async function fillColumn({ changes, by, text, end }, prompt, signal) {
  const timing = newTiming(), { model, lora } = changes();
  const { lora: shared, ...options } = optionsOf();
  const request = { ...options, model, lora: model === "auto" ? { ...shared, ...lora } : {}, messages: [{ role: "user", content: prompt }] };
  const onPlan = (plan) => by.replaceChildren(...adapterTags(plan));
  try {
    await stream(request, timing, { signal, onPlan, onText: (piece) => text.append(piece) });
    end.textContent = summary(timing);
  } catch (error) {
    const stopped = error.name === "AbortError";
    end.textContent = stopped ? "stopped" : error instanceof ApiError ? error.message : `cannot read the answer: ${error.message}`;
    if (!stopped) end.className = "error";
  }
}
