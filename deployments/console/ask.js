// Sends a prompt, shows the chosen adapters, and streams the answer.

import { ApiError, events, read, send } from "./api.js";
import { byId, element, say, sayOrHide, soon, whole } from "./dom.js";

const NUM_EARLIER = 5;
let running = null; // the request's AbortController
let onPlan = () => {};

export function start(callbacks) {
  onPlan = callbacks.onPlan;
  byId("ask-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  byId("stop-button").addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask-form").requestSubmit();
    }
  });
  byId("model").addEventListener("input", updateOptions);
  byId("model").addEventListener("input", soon(suggest));
  updateOptions();
  suggest();
}

/** Selects this adapter for the next prompt. */
export function useModel(name) {
  byId("model").value = name;
  updateOptions();
  byId("prompt").focus();
}

/** Disables the retrieval options unless the model is `auto`. */
function updateOptions() {
  const isAuto = byId("model").value.trim() === "auto";
  byId("strategy").disabled = byId("k").disabled = !isAuto;
}

async function suggest() {
  const typed = byId("model").value.trim();
  const search = typed === "auto" ? "" : typed;
  try {
    const found = await read(`v1/loras?limit=20&search=${encodeURIComponent(search)}`, { quietly: true });
    const names = ["auto", byId("base-model").textContent, ...found.data.map((adapter) => adapter.id)];
    byId("models").replaceChildren(...names.filter(Boolean).map((name) => element("option", { value: name })));
  } catch {
    // suggestions are optional: the user can type the model
  }
}

function body(prompt) {
  const model = byId("model").value.trim();
  const lora = { explain: true };
  if (model === "auto" && byId("strategy").value) lora.strategy = byId("strategy").value;
  if (model === "auto" && byId("k").value) lora.k = Number(byId("k").value);
  return {
    model,
    lora,
    messages: [{ role: "user", content: prompt }],
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function ask() {
  running?.abort();
  const mine = (running = new AbortController());
  const prompt = byId("prompt").value;
  const text = document.createTextNode("");
  byId("answer").replaceChildren(text);
  byId("answer").setAttribute("aria-busy", "true");
  byId("stop-button").disabled = false;
  sayOrHide("answer-error", "");
  say("answer-metrics", "choosing adapters…");
  showPlan(null, "Choosing…");
  const timing = { began: performance.now(), first: 0, last: 0, usage: null, reason: "" };
  try {
    const response = await send("POST", "v1/chat/completions", { body: body(prompt), signal: mine.signal });
    for await (const event of events(response)) {
      if (mine !== running) return;
      showEvent(event, text, timing, prompt);
    }
    say("answer-metrics", summary(timing));
  } catch (error) {
    if (mine === running) fail(error, timing);
  } finally {
    if (mine === running) {
      byId("stop-button").disabled = true;
      byId("answer").setAttribute("aria-busy", "false");
      running = null;
    }
  }
}

function showEvent(event, text, timing, prompt) {
  if (event.lora) {
    showPlan(event.lora);
    remember(prompt, event.lora);
    say("answer-metrics", "waiting for the first token…");
    onPlan(prompt, event.lora);
  }
  if (event.usage) timing.usage = event.usage;
  const [choice] = event.choices;
  if (!choice) return;
  if (choice.finish_reason) timing.reason = choice.finish_reason;
  if (!choice.delta.content && !choice.finish_reason) return;
  timing.last = performance.now();
  if (!timing.first) {
    timing.first = timing.last;
    say("answer-metrics", `first token after ${Math.round(timing.first - timing.began)} ms`);
  }
  const box = byId("answer");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 20; // unless the user has scrolled back
  text.appendData(choice.delta.content ?? "");
  if (follows) box.scrollTop = box.scrollHeight;
}

function fail(error, timing) {
  if (!byId("plan-strategy").textContent) showPlan(null);
  if (error.name === "AbortError") {
    say("answer-metrics", [...summaryParts(timing), "stopped"].join(" · "));
    return;
  }
  say("answer-metrics", "");
  sayOrHide("answer-error", error instanceof ApiError ? error.message : `cannot read the answer: ${error.message}`);
}

function summaryParts({ began, first, last, usage }) {
  const parts = first ? [`first token after ${whole(Math.round(first - began))} ms`] : [];
  if (!usage) return parts;
  const later = usage.completion_tokens - 1;
  if (later > 0 && last > first) parts.push(`${((1000 * later) / (last - first)).toFixed(1)} tokens/s`);
  return [...parts, `${whole(usage.completion_tokens)} tokens`, `prompt ${whole(usage.prompt_tokens)}`];
}

function summary(timing) {
  const end = timing.reason === "length" ? ["stopped at the token limit"] : [];
  const nothing = byId("answer").textContent ? [] : ["the model generated no text"];
  return [...summaryParts(timing), ...end, ...nothing].join(" · ");
}

/** Adds the prompt to the list of earlier prompts, newest first. */
function remember(prompt, plan) {
  const list = byId("earlier-list");
  for (const item of [...list.children]) {
    if (item.firstChild.title === prompt) item.remove();
  }
  const again = () => { byId("prompt").value = prompt; byId("prompt").focus(); };
  const button = element("button", { type: "button", title: prompt, onclick: again }, prompt);
  list.prepend(element("li", {}, button, element("small", {}, plan.adapters[0]?.name ?? "base model")));
  while (list.children.length > NUM_EARLIER) list.lastChild.remove();
  byId("earlier").hidden = false;
}

/** Shows the plan, or `note` while there is none. */
function showPlan(plan, note = "") {
  const used = plan ? plan.adapters : [];
  say("plan-strategy", plan ? plan.strategy : "");
  byId("plan").replaceChildren(...used.map(planRow));
  sayOrHide("plan-note", plan ? planNote(plan) : note);
  byId("plan-note").classList.toggle("notice", Boolean(plan?.abstained));
  const names = new Set(used.map((adapter) => adapter.digest));
  const rest = (plan?.candidates ?? []).filter((candidate) => !names.has(candidate.digest));
  byId("considered").hidden = rest.length === 0;
  byId("considered-list").replaceChildren(
    ...rest.map((candidate) => element("li", {}, element("span", { class: "name" }, candidate.name), `${candidate.score.toFixed(3)} of ${candidate.threshold.toFixed(3)}`)),
  );
  showNearest(plan?.candidates ?? []);
}

/** Shows the samples that the prompt is nearest to, of the key's own adapters. */
function showNearest(candidates) {
  const rows = candidates.flatMap(({ name, samples = [] }) => samples.map((sample) => ({ name, ...sample })));
  byId("nearest").hidden = rows.length === 0;
  byId("nearest-list").replaceChildren(
    ...rows.map(({ name, input, score }) => element("li", {}, element("span", { class: "name" }, name), `${score.toFixed(3)} ${input}`)),
  );
}

function planNote(plan) {
  if (plan.abstained) {
    return plan.why ?? "No adapter fits this prompt, so the base model answers.";
  }
  return plan.why ?? (plan.adapters.length ? "" : "The base model answers, as requested.");
}

function planRow(adapter, place) {
  const bar = element("i", {});
  bar.style.setProperty("--share", Math.min(1, Math.abs(adapter.weight)));
  const score = adapter.score === null ? "named" : adapter.score.toFixed(3);
  return element(
    "li",
    { class: `chosen rank-${Math.min(place, 3)}` },
    element("span", { class: "badge", "aria-hidden": "true" }, String(place + 1)),
    element("span", { class: "name", title: adapter.digest.slice(0, 12) }, adapter.name),
    element("span", { class: "value score" }, element("small", {}, "score "), score),
    element("span", { class: "value weight" }, element("small", {}, "weight "), adapter.weight.toFixed(2)),
    element("span", { class: "meter", "aria-hidden": "true" }, bar),
  );
}
