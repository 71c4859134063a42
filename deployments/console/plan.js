// Shows why an adapter answers: the decision, the candidates with their thresholds, and the choices that would change it.

import { byId, element, percent, say, sayOrHide } from "./dom.js";

const NO_THRESHOLD = -1;
let onAsk = () => {};

export function start(callbacks) {
  onAsk = callbacks.onAsk;
}

/** Shows the plan, or `note` while there is none. */
export function showPlan(plan, note = "") {
  const used = plan?.adapters ?? [], candidates = plan?.candidates ?? [];
  say("plan-strategy", plan?.strategy ?? "");
  sayOrHide("plan-note", plan ? reasonOf(plan) : note);
  byId("plan-note").classList.toggle("notice", Boolean(plan?.abstained));
  byId("plan").replaceChildren(...used.map(usedRow));
  const names = used.map(({ name }) => name); // digests differ where a version under trial answers
  byId("considered").hidden = !candidates.length;
  byId("considered-list").replaceChildren(...candidates.map((candidate) => candidateRow(candidate, names.indexOf(candidate.name))));
  const changes = plan ? changesOf(plan) : [];
  byId("changes").hidden = !changes.length;
  byId("changes-list").replaceChildren(...changes.map((change) => element("li", {}, ...change)));
}

function reasonOf(plan) {
  if (plan.why) return plan.why;
  if (plan.abstained) return "No adapter fits this prompt, so the base model answers.";
  return plan.adapters.length ? "The request named its adapters, so none was looked for." : "The base model answers, as requested.";
}

function usedRow(adapter, place) {
  const bar = element("i", {});
  bar.style.setProperty("--share", Math.min(1, Math.abs(adapter.weight)));
  return element(
    "li",
    { class: `chosen rank-${Math.min(place, 3)}` },
    element("span", { class: "badge", "aria-hidden": "true" }, String(place + 1)),
    adapterLink(adapter.name, `version ${adapter.digest.slice(0, 12)}`),
    element("span", { class: "value weight" }, element("small", {}, "weight "), adapter.weight.toFixed(2)),
    element("span", { class: "meter", "aria-hidden": "true" }, bar),
  );
}

export const adapterLink = (name, title = null) => element("a", { class: "name", href: `#adapter/${encodeURIComponent(name)}`, title }, name);

/** Returns a candidate with its cosine on a scale from 0 to 1, its threshold as a mark, and its nearest samples. */
function candidateRow(candidate, place) {
  const { name, score, threshold, confidence, samples = [] } = candidate;
  const hasThreshold = threshold > NO_THRESHOLD, fits = score >= threshold;
  const bar = element("i", {}), mark = element("b", { hidden: !hasThreshold });
  bar.style.setProperty("--share", inUnit(score));
  mark.style.setProperty("--share", inUnit(threshold));
  const needs = hasThreshold ? `needs ${threshold.toFixed(3)}` : "has no threshold";
  const fit = `right with ${percent(confidence)} probability`;
  return element(
    "li",
    { class: `candidate ${place < 0 ? "" : `rank-${Math.min(place, 3)}`} ${fits ? "fits" : "below"}` },
    adapterLink(name),
    element("span", { class: "value score" }, element("small", {}, "cosine "), score.toFixed(3)),
    element("span", { class: "scale", "aria-hidden": "true" }, bar, mark),
    element("small", { class: "verdict" }, `${place < 0 ? (fits ? "fits, not used" : "not used") : "used"} · ${needs} · ${fit}`),
    samples.length ? element("ul", { class: "near", "aria-label": `Nearest samples of ${name}` }, ...samples.map(nearSample)) : null,
  );
}

const inUnit = (value) => Math.max(0, Math.min(1, value));
const nearSample = ({ input, score }) => element("li", {}, element("span", { class: "value" }, score.toFixed(3)), " ", element("span", {}, input));

/** Returns sentences, each a list of children, that say what would change the choice. */
function changesOf({ abstained, adapters, candidates = [], reason }) {
  if (!candidates.length) return [];
  if (abstained) {
    const best = candidates.reduce((found, one) => (one.score - one.threshold > found.score - found.threshold ? one : found));
    return [["Abstain ", code("never"), ", or the name of an adapter as the model: ", askButton(best.name)]];
  }
  if (reason !== "fits" || !adapters.length) return [];
  const names = adapters.map(({ name }) => name), first = candidates.find(({ name }) => name === names[0]);
  if (!first) return [];
  const next = candidates.filter(({ name }) => !names.includes(name)).reduce((found, one) => (!found || one.score > found.score ? one : found), null);
  const above = (Math.floor(first.score * 1000) + 1) / 1000;
  const changes = [["A ", code(`lora.min_score`), ` of ${above.toFixed(3)} or more turns ${first.name} away.`]];
  if (next) changes.push([`${next.name} is ${Math.abs(first.score - next.score).toFixed(3)} ${next.score > first.score ? "nearer" : "farther"}: `, askButton(next.name)]);
  return changes;
}

const code = (text) => element("code", {}, text);
const askButton = (name) => element("button", { type: "button", class: "small", onclick: () => onAsk(name) }, `Answer with ${name}`);

const share = (trial) => `${Number((100 * trial.share).toFixed(2))} %`;

/** Names what a version under trial does, in few characters. */
export const trialLabel = (trial) => `${share(trial)} ${trial.shadow ? "shadow" : "to"} ${trial.digest.slice(0, 8)}`;

/** Says what a version under trial does. */
export function trialText(trial) {
  const what = trial.shadow ? `a copy of ${share(trial)} of the requests, which no client sees` : `${share(trial)} of the requests`;
  return `Version ${trial.digest.slice(0, 12)} answers ${what}`;
}
