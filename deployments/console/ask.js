// The conversation: sends prompts, streams answers, and keeps the turns.

import { ApiError, post, read, reasonOf } from "./api.js";
import { adapterTags, isRouted, messagesOf, newTiming, optionsOf, stream, summary } from "./answers.js";
import { ago, byId, confirmed, element, refill, say, sayOrHide, soon, whole } from "./dom.js";
import { chosenExamples } from "./examples.js";
import * as history from "./history.js";
import { showPlan } from "./plan.js";
import { showCode } from "./snippets.js";

const WHY_NOTE = "Shows which adapters answer, and why.";
const policies = new Set(); // model names that the list showed
let chat = newChat();
let running = null; // the AbortController of the streaming answer
let explained = null; // the turn whose plan is shown
let points = null; // the adapters on the map
let offered = null; // those that the examples were chosen from
let numSuggested = 0;
let onPlan = () => {};

function newChat() {
  return { id: history.newId(), at: Date.now(), system: "", turns: [] };
}

/** Connects the form. `onPlan(prompt, plan)` follows the turn that is explained; both are null if there is none. */
export function start(callbacks) {
  onPlan = callbacks.onPlan;
  byId("ask-form").addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true); // so that it is seen
  byId("ask-form").addEventListener("submit", (event) => { event.preventDefault(); ask(byId("prompt").value); });
  byId("stop-button").addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("ask-form").requestSubmit();
  });
  byId("model").addEventListener("input", updateOptions);
  byId("model").addEventListener("input", soon(suggest));
  byId("new-chat").addEventListener("click", () => { open(newChat()); history.leave(); byId("prompt").focus(); });
  byId("show-code").addEventListener("click", () => showCode(nextRequest()));
  byId("history-clear").addEventListener("click", () => clearHistory("Clear the history?"));
  byId("history-export").addEventListener("click", exportHistory);
  const narrow = matchMedia("(max-width: 600px)");
  narrow.addEventListener("change", () => placeExamples(narrow.matches));
  placeExamples(narrow.matches);
  updateOptions();
  open(history.last() ?? newChat());
}

/** Places the examples below the prompt on a narrow screen, else above it. */
function placeExamples(isNarrow) {
  if (isNarrow) byId("ask-form").after(byId("welcome"));
  else byId("conversation").prepend(byId("welcome"));
}

/** Loads the suggestions, and forgets those of another key and its examples. */
export function refresh() {
  policies.clear();
  points = offered = null;
  for (const id of ["models", "examples"]) byId(id).replaceChildren();
  sayOrHide("examples-note", "");
  suggest();
}

/** Chooses examples from these adapters on the map, now or when a conversation begins. */
export function offer(adapters) {
  points = adapters;
  if (!byId("welcome").hidden) showExamples();
}

/** Sets the model and the prompt. */
export function prepare(model, prompt = "") {
  byId("model").value = model;
  updateOptions();
  if (prompt) byId("prompt").value = prompt;
}

/** Sends the last prompt once more, to this model. */
export function askAgain(model) {
  const turn = explained ?? chat.turns.at(-1);
  prepare(model);
  if (turn) ask(turn.prompt);
}

/** Disables the options of retrieval unless the server chooses, or the model is a name that stands for a policy. */
function updateOptions() {
  const model = byId("model").value.trim(), isAuto = isRouted(model) || policies.has(model);
  for (const id of ["strategy", "k", "abstain", "filter-tags"]) byId(id).disabled = !isAuto;
}

async function suggest() {
  const number = ++numSuggested, typed = byId("model").value.trim();
  try {
    const { data } = await read(`v1/models?limit=20&name=${encodeURIComponent(typed === "auto" ? "" : typed)}`, { quietly: true });
    if (number !== numSuggested) return; // others are asked for, or another key is used
    for (const { id, root } of data) if (root.startsWith(`${id}@`)) policies.add(id);
    const names = new Set(["auto", ...byId("base-model").textContent.split(", "), ...data.map(({ id }) => id)].filter(Boolean));
    byId("models").replaceChildren(...[...names].map((name) => element("option", { value: name })));
    updateOptions();
  } catch {
    // suggestions are optional: the user can type the model
  }
}

/** Offers samples of some adapters as prompts. */
async function showExamples() {
  if (points === offered) return;
  const mine = (offered = points), isLatest = () => offered === mine;
  try {
    const examples = await chosenExamples(mine, isLatest);
    if (!isLatest()) return;
    refill(byId("examples"), examples.map(({ name, input }) => example(name, input)));
    sayOrHide("examples-note", examples.length ? "" : "The pool has no short samples of yours yet. Publish an adapter, or ask the base model.");
  } catch (error) {
    const reason = reasonOf(error);
    if (isLatest()) sayOrHide("examples-note", reason && `No examples: ${reason}`);
  }
}

function example(name, input) {
  const send = () => { prepare("auto"); ask(input); };
  return element("li", {}, element("button", { type: "button", class: "example", onclick: send }, element("span", {}, input), element("small", {}, name)));
}

/** Returns the request that the form would send. */
function nextRequest() {
  const typed = byId("prompt").value.trim();
  const turns = typed ? chat.turns : chat.turns.slice(0, -1);
  return { ...optionsOf(), messages: messagesOf(turns, typed || chat.turns.at(-1)?.prompt || "Hello") };
}

async function ask(prompt) {
  if (!prompt.trim()) return;
  running?.abort();
  const mine = (running = new AbortController());
  const request = { ...optionsOf(), messages: messagesOf(chat.turns, prompt) };
  const turn = { prompt, model: request.model, answer: "", plan: null, note: "", error: "" };
  const own = chat;
  own.system = byId("system").value.trim();
  own.turns.push(turn);
  keep(own);
  byId("prompt").value = "";
  const view = show(turn);
  explain(turn, "Choosing…");
  byId("stop-button").disabled = false;
  byId("ask-status").classList.remove("spoken");
  say("ask-status", "choosing adapters…");
  await answer(request, turn, view, mine);
  if (!keep(own)) {
    byId("ask-status").classList.remove("spoken");
    say("ask-status", "this browser has no room to keep the conversation");
  }
}

/** Keeps the conversation unless it was deleted meanwhile. Returns whether there was room. */
function keep(own) {
  const hasRoom = (own !== chat && !history.has(own.id)) || history.keep(own);
  if (own === chat) history.enter(own.id);
  showHistory();
  return hasRoom;
}

async function answer(request, turn, view, mine) {
  const timing = newTiming();
  const isCurrent = () => mine === running;
  const onText = (piece) => {
    turn.answer += piece;
    view.append(piece);
    if (isCurrent()) say("ask-status", "answering…");
  };
  const planned = (plan) => {
    turn.plan = plan;
    view.showTags();
    if (isCurrent()) explain(turn);
  };
  try {
    turn.request = await stream(request, timing, { signal: mine.signal, onPlan: planned, onText });
    turn.note = [summary(timing), turn.answer ? "" : "the model generated no text"].filter(Boolean).join(" · ");
  } catch (error) {
    fail(error, turn, timing);
  }
  view.finish();
  if (!isCurrent()) return;
  if (!turn.plan) explain(turn);
  running = null;
  byId("stop-button").disabled = true;
  byId("ask-status").classList.add("spoken"); // the turn shows how it ended
  say("ask-status", turn.error ? "" : "the answer is complete");
}

function fail(error, turn, timing) {
  if (error.name === "AbortError") {
    turn.note = [summary(timing), "stopped"].filter(Boolean).join(" · ");
    return;
  }
  turn.error = error instanceof ApiError ? error.message : `cannot read the answer: ${error.message}`;
  if (!byId("prompt").value) byId("prompt").value = turn.prompt; // to be corrected and sent again
}

/** Shows why these adapters answer the turn, on the panel and on the map; `note` while there is no plan. */
function explain(turn, note = "") {
  explained = turn;
  for (const node of byId("turns").children) node.classList.toggle("explained", node.turn === turn);
  const text = note || (turn?.error ? "The request failed, so no adapter was chosen." : turn ? "" : WHY_NOTE);
  showPlan(turn?.plan ?? null, text);
  onPlan(turn?.plan ? turn.prompt : null, turn?.plan ?? null);
}

/** Adds the turn to the page. Returns functions that update it. */
function show(turn) {
  byId("welcome").hidden = true;
  const text = element("p", { class: "text" }, turn.answer);
  const by = element("p", { class: "by" });
  const end = element("div", { class: "turn-end" });
  const node = element("li", { class: "turn" },
    element("p", { class: "asked" }, element("span", { class: "spoken" }, "You: "), turn.prompt),
    element("div", { class: "answer" }, by, text, end));
  node.turn = turn;
  byId("turns").append(node);
  const box = byId("conversation");
  box.scrollTop = box.scrollHeight;
  return {
    append(piece) {
      const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40; // unless the user has scrolled back
      text.append(piece);
      if (follows) box.scrollTop = box.scrollHeight;
    },
    showTags: () => by.replaceChildren(...adapterTags(turn.plan), element("small", {}, turn.plan.strategy)),
    finish: () => {
      end.replaceChildren(...endOf(turn));
      box.scrollTop = box.scrollHeight;
    },
  };
}

function endOf(turn) {
  const button = (label, title, onclick) => element("button", { type: "button", class: "small", title, onclick }, label);
  return [
    turn.error ? element("p", { class: "error", role: "alert" }, turn.error) : null,
    turn.note ? element("p", { class: "muted note" }, turn.note) : null,
    element("span", { class: "buttons" },
      turn.plan ? button("Why", "Show why these adapters answered", () => explain(turn)) : null,
      turn.answer ? button("Copy", "Copy the answer", () => navigator.clipboard?.writeText(turn.answer)) : null,
      ...(turn.request && turn.plan && isRouted(turn.model) && turn === chat.turns[0] ? outcomeButtons(turn) : []),
      button("Again", "Remove this turn and those after it, and send its prompt again with the present options", () => again(turn))),
  ].filter(Boolean);
}

/**
 * Returns buttons that tell the server how well its choice answered, of which it keeps the first turn only. A server
 * that does not learn hides them.
 */
function outcomeButtons(turn) {
  const name = turn.plan.adapters[0]?.name ?? null;
  const buttons = [["Good", 1], ["Bad", -1]].map(([label, score]) =>
    element("button", {
      type: "button", class: "small outcome", title: `The answer of ${name ?? "the base model"} was ${label.toLowerCase()}`,
      "aria-pressed": String(turn.score === score), onclick: () => judge(score),
    }, label));
  const own = chat;
  async function judge(score) {
    try {
      await post("v1/outcomes", { request_id: turn.request, adapter: name, score });
      turn.score = score;
      keep(own);
      for (const [place, node] of buttons.entries()) node.setAttribute("aria-pressed", String((place ? -1 : 1) === score));
      say("ask-status", "thank you");
    } catch (error) {
      say("ask-status", reasonOf(error));
    }
  }
  return buttons;
}

/** Takes the turn and those after it out, and sends its prompt again. */
function again(turn) {
  const place = chat.turns.indexOf(turn);
  chat.turns.splice(place);
  for (const node of [...byId("turns").children].slice(place)) node.remove();
  ask(turn.prompt);
  byId("prompt").focus();
}

/** Shows a kept or new conversation. */
function open(other) {
  running?.abort();
  running = null;
  byId("stop-button").disabled = true;
  chat = other;
  byId("turns").replaceChildren();
  byId("system").value = chat.system;
  byId("welcome").hidden = chat.turns.length > 0;
  if (!chat.turns.length) showExamples();
  for (const turn of chat.turns) {
    const view = show(turn);
    if (turn.plan) view.showTags();
    view.finish();
  }
  explain(chat.turns.at(-1) ?? null);
  showHistory();
}

function showHistory() {
  const kept = history.conversations();
  byId("history").hidden = !kept.length;
  say("history-count", `${whole(kept.length)} kept in this browser`);
  byId("history-list").replaceChildren(...kept.map(historyRow));
}

function historyRow(other, place) {
  const [first] = other.turns;
  const again = () => { history.enter(other.id); open(history.last() ?? other); byId("prompt").focus(); };
  const remove = () => {
    history.remove(other.id);
    if (other.id === chat.id) open(newChat());
    else showHistory();
    const rest = byId("history-list").querySelectorAll("button.small");
    (rest[Math.min(place, rest.length - 1)] ?? byId("prompt")).focus();
  };
  return element("li", {},
    element("button", { type: "button", class: "earlier", title: first?.prompt, onclick: again, "aria-current": other.id === chat.id ? "true" : null }, first?.prompt ?? "empty"),
    element("small", {}, `${other.turns.length} ${other.turns.length === 1 ? "turn" : "turns"}, ${ago(other.at)}`),
    element("button", { type: "button", class: "small", "aria-label": `Delete the conversation: ${first?.prompt ?? "empty"}`, onclick: remove }, "Delete"));
}

/** Offers to delete the conversations of a key that was forgotten. */
export async function offerToClear() {
  if (history.conversations().length) await clearHistory("The key is forgotten. Clear the history too?");
}

async function clearHistory(title) {
  if (!(await confirmed(title, "This deletes every conversation that this browser keeps.", "Clear"))) return;
  history.clear();
  open(newChat());
}

function exportHistory() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(history.conversations(), null, 2)], { type: "application/json" }));
  element("a", { href: url, download: "conversations.json" }).click();
  URL.revokeObjectURL(url);
}
