// Sends one prompt, or those of a file, in several ways at once, and shows the answers side by side.

import { ApiError } from "./api.js";
import { adapterTags, listed, newTiming, optionsOf, stream, summary } from "./answers.js";
import { byId, element, say, whole } from "./dom.js";
import { readSamples } from "./samples.js";

const MAX_PROMPTS = 100; // of a file
const PROMPTS_AT_ONCE = 4;
const auto = (lora) => ({ model: "auto", lora });
let running = null;

const AUTO = { label: "auto", note: "the server's default", changes: () => auto({ strategy: undefined }) };
const BASE = { label: "base model", note: "no adapter", changes: () => ({ model: byId("base-model").textContent.split(", ")[0], lora: {} }) };
let offered = {}; // the ways to answer: their labels, and the model and options of `lora` that they set
let isTicked = true; // whether a way that is offered for the first time is ticked

const ticksOf = () => [...byId("ways").querySelectorAll("input")];

/** Offers the default, each strategy (what it composes, by name) and the base model. Ticks stay as they are. */
export function offer(strategies) {
  const before = Object.fromEntries(ticksOf().map(({ value, checked }) => [value, checked]));
  const routed = Object.entries(strategies).map(([name, note]) => [name, { label: name, note, changes: () => auto({ strategy: name }) }]);
  offered = Object.fromEntries([["auto", AUTO], ...routed, ["base", BASE]]);
  byId("ways").replaceChildren(...Object.entries(offered).map(([name, { label }]) =>
    element("label", { class: "tick" }, element("input", { type: "checkbox", name: "way", value: name, checked: before[name] ?? isTicked }), label)));
}

export function start() {
  offer({});
  byId("compare-form").addEventListener("submit", (event) => { event.preventDefault(); compareOne(); });
  byId("compare-file").addEventListener("change", ({ target }) => { compareFile(target.files[0]); target.value = ""; });
  byId("compare-stop").addEventListener("click", () => running?.abort());
  byId("compare-prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("compare-form").requestSubmit();
  });
}

/** Fills the form to compare these adapters or versions only. */
export function prepare(names, prompt = "") {
  byId("compare-models").value = names.join(", ");
  byId("compare-prompt").value = prompt;
  isTicked = false;
  for (const tick of ticksOf()) tick.checked = false;
}

/** Stops a comparison, and forgets its prompts and answers. */
export function forget() {
  running?.abort();
  running = null;
  for (const id of ["compared", "tabled"]) byId(id).replaceChildren();
  byId("tabled").hidden = byId("compare-stop").disabled = true;
  say("compare-status", "");
}

/** Returns the ways that are ticked, and one for each adapter, version or policy that is named. */
function chosenWays() {
  const ticked = ticksOf().filter(({ checked }) => checked).map(({ value }) => offered[value]);
  const named = [...new Set(listed(byId("compare-models").value))];
  return [...ticked, ...named.map((model) => ({ label: model, note: "by name", changes: () => ({ model, lora: {} }) }))];
}

/** Runs `work` with the chosen ways and a signal, unless a later comparison replaces it. Shows the text it resolves to. */
async function compare(work) {
  running?.abort();
  const mine = (running = new AbortController());
  const ways = chosenWays();
  byId("compared").replaceChildren();
  byId("tabled").hidden = true;
  if (!ways.length) { say("compare-status", "choose at least one way, or name an adapter"); return; }
  byId("compare-stop").disabled = false;
  say("compare-status", "answering…");
  const done = await work(ways, mine.signal);
  if (mine !== running) return;
  byId("compare-stop").disabled = true;
  say("compare-status", done);
}

const compareOne = () => compare(async (ways, signal) => {
  const prompt = byId("compare-prompt").value;
  const columns = ways.map((way) => ({ ...way, ...column(way) }));
  byId("compared").replaceChildren(...columns.map(({ node }) => node));
  await Promise.all(columns.map((one) => fillColumn(one, prompt, signal)));
  const failed = columns.filter(({ end }) => end.className === "error");
  const texts = new Set(columns.filter((one) => !failed.includes(one)).map(({ text }) => text.textContent.trim()));
  return `${ways.length} ways, ${texts.size} different ${texts.size === 1 ? "answer" : "answers"}${failed.length ? `, ${failed.length} failed` : ""}`;
});

function column({ label, note }) {
  const by = element("p", { class: "by" }), text = element("p", { class: "text", tabindex: 0, role: "region", "aria-label": `Answer by ${label}` }), end = element("p", { class: "muted note" }, "waiting…");
  const node = element("li", { class: "panel column" }, element("h3", {}, label, " ", element("small", {}, note)), by, text, end);
  return { node, by, text, end };
}

async function fillColumn({ changes, by, text, end }, prompt, signal) {
  const timing = newTiming();
  const onPlan = (plan) => by.replaceChildren(...adapterTags(plan));
  try {
    await stream(requestOf(changes, prompt), timing, { signal, onPlan, onText: (piece) => text.append(piece) });
    end.textContent = summary(timing);
  } catch (error) {
    end.textContent = whyNot(error);
    if (error.name !== "AbortError") end.className = "error";
  }
}

function requestOf(changes, prompt) {
  const { model, lora } = changes(), { lora: shared, ...options } = optionsOf();
  return { ...options, model, lora: model === "auto" ? { ...shared, ...lora } : {}, messages: [{ role: "user", content: prompt }] };
}

function whyNot(error) {
  if (error.name === "AbortError") return "stopped";
  return error instanceof ApiError ? error.message : `cannot read the answer: ${error.message}`;
}

/** Answers the prompts of a file in every way, in a table with the share of right answers where the file has outputs. */
const compareFile = (file) => compare(async (ways, signal) => {
  const { rows, problem } = await file.text().then(promptsOf, () => ({ problem: "the browser cannot read the file" }));
  if (problem) return problem;
  if (signal.aborted) return "stopped";
  const right = ways.map(() => 0), waiting = rows.map((row) => ({ row, cells: ways.map(() => element("td", {}, "…")) }));
  const sums = ways.map(() => element("td", {}));
  const outputs = rows.filter(({ output }) => output !== undefined).length;
  const head = ["Prompt", "Output", ...ways.map(({ label }) => label)].map((text) => element("th", { scope: "col" }, text));
  const body = waiting.map(({ row, cells }) => element("tr", {}, element("th", { scope: "row" }, row.input), element("td", {}, row.output ?? ""), ...cells));
  const foot = outputs ? element("tfoot", {}, element("tr", {}, element("th", { scope: "row" }, "Right"), element("td", {}), ...sums)) : null;
  byId("tabled").replaceChildren(element("table", {}, element("caption", { class: "spoken" }, `Answers to ${file.name}`), element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body), foot));
  byId("tabled").hidden = false;
  let done = 0;
  const answerNext = async () => {
    for (let next = waiting.shift(); next && !signal.aborted; next = waiting.shift()) {
      await Promise.all(ways.map(async (way, place) => {
        const isRight = await fillCell(next.cells[place], way, next.row, signal);
        right[place] += Number(isRight);
        sums[place].textContent = `${whole(right[place])} of ${whole(outputs)}`;
      }));
      if (signal.aborted) return; // the prompts that were stopped do not count
      done += 1;
      say("compare-status", `${whole(done)} of ${whole(rows.length)} prompts`);
    }
  };
  await Promise.all(Array.from({ length: PROMPTS_AT_ONCE }, answerNext));
  const best = Math.max(...right), leaders = ways.filter((_, place) => right[place] === best).map(({ label }) => label);
  const text = `${whole(done)} of ${whole(rows.length)} prompts, ${ways.length} ways`;
  return outputs && best ? `${text}; most right: ${leaders.join(", ")} (${whole(best)} of ${whole(outputs)})` : text;
});

/** Fills one cell of the table. Resolves to whether the answer is the output of the row. */
async function fillCell(cell, { changes }, { input, output }, signal) {
  let text = "";
  try {
    await stream(requestOf(changes, input), newTiming(), { signal, onPlan: () => {}, onText: (piece) => { text += piece; } });
  } catch (error) {
    cell.textContent = whyNot(error);
    return false;
  }
  const isRight = output !== undefined && text.trim() === output.trim();
  cell.textContent = isRight ? `✓ ${text}` : text;
  if (isRight) cell.className = "right";
  return isRight;
}

/** Returns the prompts of a file as rows, or the problem in words. */
function promptsOf(text) {
  const { rows, problem } = readSamples(text, "the file");
  if (problem) return { problem };
  if (!rows.length) return { problem: "the file has no prompts" };
  return rows.length > MAX_PROMPTS ? { problem: `the file has ${whole(rows.length)} prompts; at most ${MAX_PROMPTS} are compared here` } : { rows };
}
