// Who used what in the last 30 days, for keys with the role admin.

import { read, reasonOf } from "./api.js";
import { byId, element, sayOrHide, whole } from "./dom.js";

const NUMBERS = ["requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens"];

export function start() {
  byId("usage-by").addEventListener("change", refresh);
}

/** Shows the report, or why it cannot be shown. */
export async function refresh() {
  const by = byId("usage-by").value;
  try {
    const { data } = await read(`v1/usage?by=${by}`, { quietly: true });
    data.sort((one, other) => (by === "day" ? other.day.localeCompare(one.day) : other.requests - one.requests));
    byId("usage-rows").replaceChildren(...data.map((row) => line(row[by] ?? "base model", row)));
    sayOrHide("usage-note", data.length ? "" : "No request was recorded.");
  } catch (error) {
    sayOrHide("usage-note", reasonOf(error));
  }
}

function line(name, row) {
  return element("tr", {}, element("th", { scope: "row" }, name), ...NUMBERS.map((field) => element("td", {}, whole(row[field]))));
}
