// Who used what in the last days: of all tenants for keys with the role admin, else of the own one.

import { read, reasonOf } from "./api.js";
import { byId, element, sayOrHide, shape, whole } from "./dom.js";

const NUMBERS = ["requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens"];
const TIMES = ["mean_s", "p95_s"];
const DAY_MS = 86_400_000;
let numLoads = 0;

export function start() {
  for (const id of ["usage-by", "usage-days"]) byId(id).addEventListener("change", refresh);
}

/** Returns the days up to today as the server names them, oldest first. */
function lastDays(count) {
  const now = Date.now();
  return Array.from({ length: count }, (_, place) => new Date(now - (count - 1 - place) * DAY_MS).toISOString().slice(0, 10));
}

/** Reads the sums of the last `count` days by these dimensions. `more`: further parts of the query. */
async function report(count, by, more = {}) {
  const query = new URLSearchParams({ start: lastDays(count)[0], ...more });
  for (const one of by) query.append("by", one);
  return (await read(`v1/usage?${query}`, { quietly: true })).data;
}

/** Forgets the report. */
export function forget() {
  numLoads += 1;
  byId("usage-rows").replaceChildren();
}

/** Shows the report, or why it cannot be shown. */
export async function refresh() {
  const number = ++numLoads, by = byId("usage-by").value.split(" "), isDaily = by[0] === "day", count = Number(byId("usage-days").value);
  try {
    const data = await report(count, by);
    const daily = isDaily ? [] : await report(count, [...by, "day"]).catch(() => []); // too long a report: no bars
    if (number !== numLoads) return; // a newer load has started
    data.sort((one, other) => (isDaily ? other.day.localeCompare(one.day) : other.requests - one.requests));
    const findDays = (row) => daily.filter((one) => by.every((field) => one[field] === row[field]));
    const nameOf = ({ version, ...row }) => `${row[by[0]] ?? "(none)"}${version ? `@${version.slice(0, 12)}` : ""}`;
    byId("usage-rows").replaceChildren(...data.map((row) => line(nameOf(row), row, isDaily ? [row] : findDays(row), count)));
    sayOrHide("usage-note", data.length ? "" : "No request was recorded.");
  } catch (error) {
    if (number !== numLoads) return;
    byId("usage-rows").replaceChildren();
    sayOrHide("usage-note", reasonOf(error));
  }
}

function line(name, row, daily, count) {
  const texts = [...NUMBERS.map((field) => whole(row[field])), ...TIMES.map((field) => seconds(row[field]))];
  const cells = texts.map((text) => element("td", {}, text));
  return element("tr", {}, element("th", { scope: "row" }, name), ...cells, element("td", {}, daily.length ? bars(daily, count) : "–"));
}

/** Draws the requests of each day as bars. */
function bars(rows, count) {
  const requests = new Map(rows.map((row) => [row.day, row.requests]));
  const most = rows.reduce((found, row) => (row.requests > found.requests ? row : found));
  const drawn = lastDays(count).map((day, place) => {
    const height = (20 * (requests.get(day) ?? 0)) / most.requests;
    return shape("rect", { x: place, y: 20 - height, width: 0.8, height });
  });
  const label = `Requests by day, most on ${most.day}: ${whole(most.requests)}`;
  return shape("svg", { class: "bars", role: "img", "aria-label": label, viewBox: `0 0 ${count} 20`, preserveAspectRatio: "none" }, shape("title", {}, label), ...drawn);
}

const seconds = (value) => (value === null ? "–" : `${value.toFixed(value < 10 ? 2 : 0)} s`);
const tokens = (row) => `${whole(row.prompt_tokens)} prompt tokens, ${whole(row.completion_tokens)} new tokens`;

/** Returns what describes the use of an adapter in the last 30 days, and a text for each version by its digest. Throws ApiError. */
export async function readUses({ tenant, name }) {
  const adapter = `${tenant}/${name}`;
  const rows = await report(30, ["day"], { adapter });
  if (!rows.length) return { uses: ["no request that your key may see"], versions: {} };
  const versions = await report(30, ["version"], { adapter });
  const fields = Object.keys(rows[0]).filter((field) => field !== "day");
  const all = Object.fromEntries(fields.map((field) => [field, rows.reduce((total, row) => total + row[field], 0)]));
  const text = (row) => `${whole(row.requests)} requests, ${whole(row.errors)} errors, ${tokens(row)}`;
  const timed = (row) => `${text(row)}; mean ${seconds(row.mean_s)}, 95 % within ${seconds(row.p95_s)}`;
  return { uses: [`${text(all)} `, bars(rows, 30)], versions: Object.fromEntries(versions.map((row) => [row.version, timed(row)])) };
}
