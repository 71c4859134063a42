// The page of one adapter: samples, versions, similar adapters and code; roll back, approve and withdraw.

import { post, read, reasonOf, send } from "./api.js";
import { ago, byId, bytes, confirmed, element, percent, say, sayOrHide, whole } from "./dom.js";
import * as edit from "./edit.js";
import { adapterLink, trialText } from "./plan.js";
import { codeBlocks } from "./snippets.js";
import { readUses } from "./usage.js";

const NUM_SAMPLES = 8; // those that differ most in their words
const MAX_SAMPLES = 200; // that the server shows
let shown = null; // the adapter, as the server describes it
let numLoads = 0;
let numForgotten = 0; // keys before the present one
let handlers = { onAsk: () => {}, onChange: () => {}, onCompare: () => {}, onRename: () => {} };

export function start(callbacks) {
  handlers = callbacks;
  byId("adapter-ask").addEventListener("click", () => handlers.onAsk(shown.id, ""));
  byId("adapter-approve").addEventListener("click", approve);
  byId("adapter-withdraw").addEventListener("click", withdraw);
  byId("adapter-edit").addEventListener("click", openForm);
  edit.start((save) => change(save, async () => { edit.close(); await reload(); byId("adapter-edit").focus(); }));
  byId("trial-form").addEventListener("submit", (event) => { event.preventDefault(); setTrial(Number(byId("trial-percent").value) / 100); });
  byId("trial-stop").addEventListener("click", () => setTrial(0));
  byId("trial-promote").addEventListener("click", () => makeLive(shown.trial.digest));
  byId("adapter-accept-all").addEventListener("click", () => decide("accept"));
}

/** Shows the adapter of this name. */
export async function open(name) {
  const number = ++numLoads;
  if (shown?.id !== name) clear(name);
  try {
    const found = await read(`v1/loras/${encodeURIComponent(name)}?samples=${NUM_SAMPLES}&varied=true&evaluation=true`);
    if (number !== numLoads) return; // another one was opened meanwhile, or with another key
    if (found.id !== name) { // such as TENANT/NAME of its owner, or NAME@VERSION
      say("adapter-title", found.id);
      handlers.onRename(found.id);
    }
    show(found);
    await Promise.all([showRouted(found), showProposed(found), showUses(found)]);
  } catch (error) {
    if (number === numLoads) sayOrHide("adapter-error", reasonOf(error));
  }
}

const reload = () => open(shown.id);

/** Forgets the adapter, which another key may not see, except its name. */
export function forget() {
  numLoads += 1;
  numForgotten += 1;
  clear(byId("adapter-title").textContent);
}

/** Shows the adapter of the same name again. */
export const refresh = () => open(byId("adapter-title").textContent);

function clear(name) {
  shown = null;
  edit.close();
  byId("confirm-dialog").close(); // it asks about what was shown
  say("adapter-title", name);
  sayOrHide("adapter-error", "");
  byId("adapter-body").hidden = true;
  byId("adapter-actions").hidden = true;
}

function show(adapter) {
  shown = adapter;
  const isOwn = adapter.id === adapter.name; // only its own tenant may change an adapter
  sayOrHide("adapter-error", "");
  byId("adapter-body").hidden = byId("adapter-actions").hidden = false;
  byId("adapter-approve").hidden = isOwn || adapter.approved || adapter.visibility !== "public";
  byId("adapter-withdraw").hidden = byId("adapter-edit").hidden = !isOwn;
  byId("adapter-facts").replaceChildren(...factsOf(adapter));
  byId("adapter-evaluation-part").hidden = !adapter.evaluation;
  byId("adapter-evaluation").replaceChildren(...(adapter.evaluation?.adapters ?? []).map(measuredRow));
  byId("adapter-samples").replaceChildren(...adapter.samples.map(sampleRow));
  const none = adapter.num_samples ? "Only its owner sees its samples." : "It has no samples, so auto cannot find it: use it by name.";
  sayOrHide("adapter-samples-note", adapter.samples.length ? "" : none);
  byId("adapter-versions").replaceChildren(...adapter.versions.map((version) => versionRow(version, isOwn)));
  showTrial(adapter, isOwn);
  const prompt = adapter.samples[0]?.input ?? "Hello";
  const request = { model: adapter.id, messages: [{ role: "user", content: prompt }], max_tokens: 128, temperature: 0 };
  byId("adapter-code").replaceChildren(...codeBlocks(request));
}

function factsOf(adapter) {
  const { tags, visibility, found_by_auto, ranks, num_bytes, num_samples, target_modules, base_model, template, created_at, live_since, digest, trial, versions, contract } = adapter;
  const rows = {
    Tags: tags.join(", ") || "none",
    Visibility: visibility,
    "Found by auto": found_by_auto ? `yes, by ${whole(num_samples)} samples` : num_samples ? "after a reindex: another encoder embedded it" : "no, by name only",
    Rank: ranks.join(", "),
    Size: bytes(num_bytes),
    Modules: target_modules.join(", "),
    "Base model": base_model,
    Template: template ?? "the server's",
    Contract: contract ? Object.keys(contract).join(", ") : "none",
    Published: [ago(created_at), versions[0].actor].filter(Boolean).join(" by "),
    "Live since": ago(live_since),
    Version: digest.slice(0, 12),
    Trial: trial ? trialText(trial) : "none",
  };
  return Object.entries(rows).map(([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text)));
}

function measuredRow({ name, score, num_examples, is_beaten }) {
  const note = is_beaten ? element("small", {}, " clearly worse") : null;
  return element("li", {}, element("span", {}, adapterLink(name), note), element("span", { class: "value" }, `${percent(score)} of ${whole(num_examples)}`));
}

function sampleRow({ input, output }) {
  const ask = () => handlers.onAsk("auto", input);
  return element("li", {}, element("button", { type: "button", class: "example", title: "Ask this", onclick: ask },
    element("span", {}, input), output === null ? null : element("small", {}, `→ ${output}`)));
}

/** Shows the form that tries a kept version, for the owner. */
function showTrial({ versions, trial }, isOwn) {
  const kept = versions.filter(({ state }) => state !== "live");
  byId("trial-form").hidden = !isOwn || !kept.length;
  byId("trial-promote").hidden = byId("trial-stop").hidden = !trial;
  const isTried = (digest) => digest === trial?.digest;
  byId("trial-version").replaceChildren(...kept.map(({ digest }) => element("option", { value: digest, selected: isTried(digest) }, digest.slice(0, 12))));
  byId("trial-percent").value = trial ? Number((100 * trial.share).toFixed(6)) : 10; // without what floats add
  byId("trial-shadow").checked = trial?.shadow ?? false;
}

/** Lets the chosen version answer this share of the requests; 0 ends the trial. */
async function setTrial(share) {
  const body = share ? { digest: byId("trial-version").value, share, shadow: byId("trial-shadow").checked } : { share };
  await change(async () => (await post(`${path()}/share`, body)).generation, reload);
}

/** Says what a version has instead of the live one's. */
function differences({ differs, tags, template, num_samples }) {
  const texts = {
    weights: "weights",
    samples: num_samples === shown.num_samples ? "samples" : `${whole(num_samples)} samples (live: ${whole(shown.num_samples)})`,
    tags: `tags: ${tags.join(", ") || "none"}`,
    template: `template: ${template ?? "the server's"}`,
    contract: "contract",
  };
  return differs.map((field) => texts[field]).join("; ");
}

function versionRow(version, isOwn) {
  const { digest, state, created_at, actor, source } = version;
  const isKept = state !== "live";
  const button = isKept && isOwn
    ? element("button", { type: "button", class: "small", "aria-label": `Make live: version ${digest.slice(0, 12)}`, onclick: () => makeLive(digest) }, "Make live")
    : null;
  const short = digest.slice(0, 12), id = shown.id;
  const compare = isKept
    ? element("button", { type: "button", class: "small", "aria-label": `Compare version ${short} with the live one`, onclick: () => handlers.onCompare([id, `${id}@${short}`], shown.samples[0]?.input) }, "Compare")
    : null;
  const note = state === "kept" ? null : state;
  return element("tr", {},
    element("th", { scope: "row" }, element("code", {}, digest.slice(0, 12))),
    element("td", { title: created_at }, ago(created_at)),
    element("td", { class: "wide" }, [actor, source].filter(Boolean).join(", ")),
    element("td", {}, isKept ? differences(version) || "nothing" : ""),
    element("td", { class: "wide", "data-uses": digest }, ""),
    element("td", { class: "actions" }, note, " ", compare, " ", button));
}

/** Shows which adapters `auto` answers the shown samples with, and those that are nearest to the first one. */
async function showRouted(adapter) {
  byId("adapter-similar").replaceChildren();
  sayOrHide("adapter-routed", "");
  byId("adapter-similar-part").hidden = !adapter.samples.length;
  if (!adapter.samples.length) return;
  const prompt = adapter.samples.map(({ input }) => input);
  const { data: plans } = await post("v1/route", { prompt, lora: { k: 6, fallback: "base" } }, { quietly: true });
  const first = plans.map(({ adapters }) => adapters[0]?.name ?? "the base model"), others = new Set(first.filter((name) => name !== adapter.id));
  const count = (name) => whole(first.filter((one) => one === name).length);
  const rivals = [...others].map((name) => `${name}: ${count(name)}`).join(", ");
  if (shown !== adapter) return;
  sayOrHide("adapter-routed", `auto answers ${count(adapter.id)} of these ${whole(plans.length)} with it${rivals && `; ${rivals}`}.`);
  showSimilar(adapter, plans[0]);
}

function showSimilar(adapter, plan) {
  const others = (plan.candidates ?? []).filter((candidate) => candidate.name !== adapter.id);
  const rows = others.map(({ name, score }) => element("li", {}, adapterLink(name), element("span", { class: "value" }, score.toFixed(3))));
  byId("adapter-similar").replaceChildren(...(rows.length ? rows : [element("li", { class: "muted" }, "no other adapter")]));
}

/** Shows how often it answered, and each of its versions. */
async function showUses(adapter) {
  byId("adapter-uses").replaceChildren();
  const { uses, versions } = await readUses(adapter).catch((error) => ({ uses: [reasonOf(error)], versions: {} }));
  if (shown !== adapter) return;
  byId("adapter-uses").replaceChildren(...uses);
  for (const cell of byId("adapter-versions").querySelectorAll("[data-uses]")) cell.textContent = versions[cell.dataset.uses] ?? "";
}

/** Shows the prompts that its owner may accept as samples. */
async function showProposed(adapter) {
  byId("adapter-proposed-part").hidden = true;
  if (adapter.id !== adapter.name) return;
  try {
    const { proposed } = await read(`v1/loras/${encodeURIComponent(adapter.id)}?proposed=true`, { quietly: true });
    if (shown !== adapter) return;
    byId("adapter-proposed").replaceChildren(...proposed.map(proposedRow));
    byId("adapter-proposed-part").hidden = !proposed.length;
  } catch {
    // a key without the role publish does not see them
  }
}

function proposedRow({ id, input, key_id }) {
  const button = (label, action) =>
    element("button", { type: "button", class: "small", "aria-label": `${label}: ${input}`, onclick: () => decide(action, [id]) }, label);
  return element("li", {}, element("span", {}, input), " ", element("small", {}, key_id), " ", button("Accept", "accept"), " ", button("Reject", "reject"));
}

/** Accepts or rejects these prompts, or all. */
async function decide(action, ids) {
  await change(async () => (await post(`${path()}/samples`, { action, ids })).generation ?? null, async () => {
    await reload();
    byId("adapter-proposed").querySelector("button")?.focus();
  });
}

const path = () => `v1/loras/${encodeURIComponent(shown.id)}`;

/** Opens the form that edits the adapter, with all its samples. */
async function openForm() {
  let found;
  await change(async () => { found = await read(`${path()}?samples=${MAX_SAMPLES}`); return null; }, () => edit.open(found));
}

async function makeLive(digest) {
  const url = `${path()}/rollback`;
  const createdAt = shown.versions.find((version) => version.digest === digest)?.created_at;
  const published = createdAt ? `, published ${ago(createdAt)},` : "";
  const text = `Version ${digest.slice(0, 12)}${published} becomes live for the next request. The current version is kept.`;
  if (!(await confirmed(`Make another version of ${shown.id} live?`, text, "Make live"))) return;
  await change(async () => (await post(url, { digest })).generation, reload);
}

async function approve() {
  const url = `${path()}/approve`, { id, digest } = shown;
  await change(async () => {
    const { draws, generation } = await post(`${url}?dry_run=true`, { digest });
    if (shown?.id !== id || byId("view-adapter").hidden) return generation; // the dialog may ask about something else by now
    const text = `Then auto may choose version ${digest.slice(0, 12)} for every tenant. ${draws.text}`;
    const yes = draws.needs_confirmation ? "Approve it all the same" : "Approve";
    if (!(await confirmed(`Approve ${id}?`, text, yes))) return generation;
    return (await post(url, { digest, confirmed: draws.needs_confirmation })).generation;
  }, reload);
}

async function withdraw() {
  const url = path();
  const text = "This removes the adapter and all its versions. To publish it again you need its folder. Running requests finish unchanged.";
  if (!(await confirmed(`Withdraw ${shown.id}?`, text, "Withdraw", shown.id))) return;
  await change(async () => (await (await send("DELETE", url)).json()).generation, () => { if (!byId("view-adapter").hidden) location.hash = "adapters"; });
}

/** Changes the adapter by `work`, then calls `then`, unless another one is shown or another key is used by now. */
async function change(work, then) {
  const name = byId("adapter-title").textContent, number = numForgotten;
  const isOfKey = () => number === numForgotten, isShown = () => isOfKey() && shown?.id === name;
  sayOrHide("adapter-error", "");
  try {
    const generation = await work();
    if (isOfKey()) handlers.onChange(generation); // each tenant has its own
    if (!isShown()) return;
    await then();
    if (document.activeElement === document.body) byId("adapter-title").focus(); // its button is gone
  } catch (error) {
    if (isShown()) sayOrHide("adapter-error", error.message);
  }
}
