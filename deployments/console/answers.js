// Builds chat requests from the options on the page, and streams their answers.

import { events, send } from "./api.js";
import { byId, element, whole } from "./dom.js";

const text = (id) => byId(id).value.trim() || undefined;
const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));

/** Returns the text as a list of the parts between commas. */
export const listed = (words) => words.split(",").map((word) => word.trim()).filter(Boolean);

/** Returns whether the server chooses the adapters: of all base models, or of one as in `base:auto`. */
export const isRouted = (model) => model === "auto" || model.endsWith(":auto");

/** Returns the fields of a request that the options determine. Those of retrieval are left out while the page disables them. */
export function optionsOf() {
  const model = byId("model").value.trim();
  const tags = listed(byId("filter-tags").value);
  const filter = tags.length ? { tags } : undefined;
  const lora = !byId("strategy").disabled ? { strategy: text("strategy"), k: number("k"), abstain: text("abstain"), filter } : {};
  return { model, lora, max_tokens: number("max-tokens"), temperature: number("temperature"), top_p: number("top-p"), seed: number("seed") };
}

/** Returns the messages of a request: the system prompt, the answered turns, and the new prompt. */
export function messagesOf(turns, prompt) {
  const message = (role, content) => ({ role, content });
  const system = byId("system").value.trim();
  const earlier = turns.filter((turn) => turn.answer && !turn.error);
  return [
    ...(system ? [message("system", system)] : []),
    ...earlier.flatMap((turn) => [message("user", turn.prompt), message("assistant", turn.answer)]),
    message("user", prompt),
  ];
}

export const newTiming = () => ({ began: performance.now(), first: 0, last: 0, usage: null, reason: "" });

/** Streams the answer to a request into the callbacks, and fills `timing`. Returns the request's id. Throws ApiError. */
export async function stream(request, timing, { signal, onPlan, onText }) {
  const body = { ...request, lora: { ...request.lora, explain: true }, stream: true, stream_options: { include_usage: true } };
  const response = await send("POST", "v1/chat/completions", { body, signal });
  for await (const event of events(response)) {
    if (event.lora) onPlan(event.lora);
    if (event.usage) timing.usage = event.usage;
    const [choice] = event.choices;
    if (!choice) continue;
    if (choice.finish_reason) timing.reason = choice.finish_reason;
    if (!choice.delta.content && !choice.finish_reason) continue;
    timing.last = performance.now();
    timing.first ||= timing.last;
    onText(choice.delta.content ?? "");
  }
  return response.headers.get("x-request-id");
}

/** Returns the times and numbers of tokens of an answer in words. */
export function summary({ began, first, last, usage, reason }) {
  const parts = first ? [`first token after ${whole(Math.round(first - began))} ms`] : [];
  if (usage) {
    const later = usage.completion_tokens - 1;
    if (later > 0 && last > first) parts.push(`${((1000 * later) / (last - first)).toFixed(1)} tokens/s`);
    parts.push(`${whole(usage.completion_tokens)} tokens`, `prompt ${whole(usage.prompt_tokens)}`);
  }
  if (reason === "length") parts.push("stopped at the token limit");
  return parts.join(" · ");
}

/** Returns labels of the adapters that answered, with their weights. */
export function adapterTags({ adapters }) {
  if (!adapters.length) return [element("span", { class: "tag plain" }, "base model")];
  return adapters.map(({ name, weight }) =>
    element("span", { class: "tag" }, element("span", { class: "name" }, name), adapters.length > 1 ? ` × ${weight.toFixed(2)}` : ""));
}
