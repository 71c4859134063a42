// Previews dropped or chosen folders, and publishes those that stay ticked, one by one.

import { post, read, upload } from "./api.js";
import { listed } from "./answers.js";
import { byId, bytes, element, percent, say, sayOrHide, soon, whole } from "./dom.js";
import { chosenFolders, droppedFolders, inspected, samplesFile, suggested } from "./folders.js";
import { adapterLink } from "./plan.js";

const NUM_SHOWN = 3; // samples of a folder
let cards = [];
let isSending = false;
let numForgotten = 0; // keys before the present one
let handlers = { onChange: () => {}, onDrop: () => {}, onTry: () => {} };

export function start(callbacks) {
  handlers = callbacks;
  const drop = byId("drop"), hasFiles = (event) => event.dataTransfer.types.includes("Files"); // else it is text
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { if (hasFiles(event)) { event.preventDefault(); drop.classList.add("over"); } });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    drop.classList.remove("over");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean); // only readable during this event
    handlers.onDrop();
    preview(droppedFolders(entries), "drop the folder of the adapter, not its files");
  });
  byId("folder").addEventListener("change", (event) => {
    preview(chosenFolders([...event.target.files]), "the folder is empty");
    event.target.value = "";
  });
  byId("publish-form").addEventListener("submit", (event) => { event.preventDefault(); sendTicked(false); });
  byId("check-button").addEventListener("click", () => sendTicked(true));
  byId("no-tags").addEventListener("change", (event) => { byId("tags").disabled = event.target.checked; });
  byId("preview-clear").addEventListener("click", () => { cards = []; byId("previews").replaceChildren(); follow(); });
}

/** Stops after the folder that is being sent. Forgets those that are published, and what the server said of the others. */
export function forget() {
  numForgotten += 1;
  cards = cards.filter(({ done }) => !done);
  byId("previews").replaceChildren(...cards.map(({ node }) => node));
  for (const { info, node, notes, state } of cards) {
    node.className = info.problems.length ? "preview bad" : "preview";
    notes.replaceChildren();
    state.textContent = "";
  }
  follow();
}

/** Checks all folders again. */
export function refresh() {
  for (const card of cards) check(card);
}

/** Shows the folders, or promised ones. If there are none, says `whyNone`. */
async function preview(promised, whyNone) {
  try {
    const folders = await promised;
    sayOrHide("publish-error", folders.length ? "" : whyNone);
    const bases = folders.length ? await acceptedBases() : null;
    for (const folder of suggested(folders)) {
      const card = cardOf(folder, await inspected(folder, bases));
      cards.push(card);
      byId("previews").append(card.node);
      check(card);
    }
  } catch (error) {
    sayOrHide("publish-error", `a file cannot be read: ${error.message}`);
  }
  follow();
}

/** Returns the base model names that adapters may have here, or null if the server does not report them now. */
async function acceptedBases() {
  try {
    const { data } = await read("v1/models?limit=100", { quietly: true }); // auto, then the base models, come first
    const names = data.flatMap((card) => card.accepts_base ?? []);
    return names.length ? names.sort() : null;
  } catch {
    return null; // the server checks it again
  }
}

/** Shows the number of ticked folders, and whether there is anything to publish. */
function follow() {
  const count = cards.filter((card) => card.tick.checked && !card.done).length;
  byId("publish-form").hidden = !cards.length;
  byId("publish-button").disabled = byId("check-button").disabled = isSending || !count;
  say("publish-button", count === 1 ? "Publish 1 adapter" : `Publish ${count} adapters`);
}

function cardOf(folder, info) {
  const { size, problems, samples, base, rank, modules } = info;
  const tick = element("input", { type: "checkbox", checked: folder.ticked && !problems.length, disabled: problems.length > 0, onchange: follow, "aria-label": `Publish ${folder.name}` });
  const name = element("input", { value: folder.as, maxlength: 64, autocomplete: "off", spellcheck: "false", required: true });
  const typed = element("textarea", { rows: 2, placeholder: "Turn the sentence into the past tense: she sings" });
  const notes = element("ul", { class: "notes", "aria-label": `Checks of ${folder.name}` });
  const state = element("p", { class: "state", role: "status" });
  const card = { folder, info, tick, name, typed, notes, state, done: false };
  const facts = [base, rank ? `rank ${rank}` : "", Array.isArray(modules) ? `${modules.length} kinds of modules` : "", bytes(size),
    `${folder.files.length} files`, `${whole(samples.length)} ${samples.length === 1 ? "sample" : "samples"}`];
  name.addEventListener("input", soon(() => check(card), 400));
  const body = [
    element("p", { class: "hint" }, facts.filter(Boolean).join(" · ")),
    samples.length
      ? element("ul", { class: "near" }, ...samples.slice(0, NUM_SHOWN).map((sample) => element("li", {}, sample.slice(0, 200))))
      : element("label", { class: "stacked" }, "Sample prompts, one per line, so that auto finds it (optional)", typed),
    notes,
  ];
  card.node = element("li", { class: problems.length ? "preview bad" : "preview" },
    element("div", { class: "preview-head" }, tick, element("label", { class: "grow" }, element("span", { class: "spoken" }, `Name of ${folder.name} `), name)),
    ...body, state);
  return card;
}

/** Shows what publishing the card would do. Nothing is sent but its samples, which are routed as prompts. */
async function check(card) {
  const { info, notes, name } = card;
  const wanted = name.value.trim(), number = numForgotten;
  const lines = info.problems.map((problem) => element("li", { class: "problem" }, problem));
  if (!info.problems.length) {
    try {
      const live = await liveVersion(wanted);
      if (!info.samples.length) lines.push(element("li", {}, live?.num_samples ? `its ${whole(live.num_samples)} samples stay` : "without samples it is used by name only"));
      lines.push(element("li", {}, live ? `new version of ${wanted}; the present one is kept for a rollback` : "a new name in the pool"));
      if (live) lines.push(element("li", {}, `what you do not give stays: tags ${shown("tags", live.tags)}, template ${shown("template", live.template)}, ${live.visibility}`));
      if (info.samples.length) lines.push(...(await neighbours(card, Boolean(live))));
    } catch (error) {
      lines.push(element("li", {}, `not compared with the pool: ${error.message}`));
    }
  }
  if (number === numForgotten && wanted === name.value.trim()) notes.replaceChildren(...lines);
}

/** Returns the caller's own live adapter of this name, or null. */
async function liveVersion(name) {
  try {
    const found = await read(`v1/loras/${encodeURIComponent(name)}`);
    return found.id === name ? found : null;
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** Returns a line about the adapter that answers its first samples today. */
async function neighbours({ info, name }, isVersion) {
  const prompts = info.samples.slice(0, NUM_SHOWN);
  const { data } = await post("v1/route", { prompt: prompts, lora: { fallback: "base" } }, { quietly: true });
  const firsts = data.map((plan) => plan.adapters[0]?.name).filter(Boolean);
  if (!firsts.length) return [element("li", {}, "auto answers its samples with the base model now")];
  const [most] = firsts;
  const share = firsts.filter((first) => first === most).length;
  const line = element("li", {}, `auto answers ${share} of ${prompts.length} of its samples with `, adapterLink(most), " now");
  if (!isVersion && share === prompts.length && !most.includes("/")) {
    const use = () => { name.value = most; name.dispatchEvent(new Event("input")); };
    line.append(" ", element("button", { type: "button", class: "small", onclick: use }, `Publish as a new version of ${most}`));
  }
  return [line];
}

/** Publishes the cards one by one that are ticked when their turn comes; if `isDry` the server checks them and publishes nothing. Stops when the key changes. */
async function sendTicked(isDry) {
  const number = numForgotten;
  isSending = true;
  follow();
  for (const card of [...cards]) {
    if (number !== numForgotten) break;
    if (!cards.includes(card) || !card.tick.checked) continue;
    try {
      await send(card, isDry);
    } catch (error) {
      card.state.textContent = error.message;
      card.node.className = "preview bad";
    }
  }
  isSending = false;
  cards = cards.filter((card) => !card.done);
  follow();
  byId("publish-form").hidden = !byId("previews").children.length;
}

async function send(card, isDry) {
  const { folder, info, node, name, typed, state } = card, number = numForgotten;
  const progress = element("progress", { max: 1, value: 0, "aria-label": `Upload of ${name.value}` });
  state.before(progress);
  node.className = "preview";
  try {
    const path = isDry ? "v1/loras?dry_run=true" : "v1/loras";
    const made = await upload(path, formOf(folder, name.value.trim(), typed.value), (share) => {
      progress.value = share;
      state.textContent = share < 1 ? `uploading, ${percent(share)} of ${bytes(info.size)}` : "the server checks it…";
    });
    node.className = "preview good";
    if (!isDry) {
      card.done = true;
      for (const part of node.querySelectorAll("input, textarea, button")) part.disabled = true;
    }
    if (number !== numForgotten) { // the answer names what another key may not see
      state.textContent = `${isDry ? "fit to publish" : "published"} with the key before`;
      return;
    }
    if (isDry) {
      state.textContent = outcome(made, "fit to publish");
      return;
    }
    state.replaceChildren(outcome(made, `live at generation ${whole(made.generation)}`), " ", ...next(made, info.samples[0]));
    handlers.onChange(made.generation);
  } finally {
    progress.remove();
  }
}

function formOf(folder, name, typedSamples) {
  const form = new FormData();
  form.append("name", name);
  const tags = byId("no-tags").checked ? [""] : listed(byId("tags").value); // "": none; nothing: as before
  for (const tag of tags) form.append("tags", tag);
  for (const field of ["template", "visibility"]) {
    if (byId(`publish-${field}`).value) form.append(field, byId(`publish-${field}`).value);
  }
  const typed = samplesFile(typedSamples);
  for (const file of [...folder.files, ...(typed ? [typed] : [])]) form.append("files", file, file.name);
  return form;
}

function outcome({ replicas, found_by_auto, neighbours: near, kept = {}, changed = {}, warnings = [] }, state) {
  const parts = [state];
  if (replicas.behind) parts.push("some replicas are not up to date yet");
  if (!found_by_auto) parts.push("auto does not find it: it is used by name");
  else if (near.length) parts.push(`most similar: ${near[0].name} (${near[0].score.toFixed(2)})`);
  for (const field of ["tags", "template", "visibility", "samples"]) {
    if (field in changed) parts.push(`${field}: ${shown(field, changed[field].to)} (was ${shown(field, changed[field].from)})`);
    else if (kept[field]?.length || kept[field] > 0) parts.push(`${field}: ${shown(field, kept[field])} (kept)`);
  }
  return [...parts, ...warnings.map((warning) => `warning: ${warning}`)].join("; ");
}

/** Returns the value of a field of a published adapter as text. */
function shown(field, value) {
  if (Array.isArray(value) ? !value.length : !value) return field === "template" ? "server default" : "none";
  return Array.isArray(value) ? value.join(", ") : String(value);
}

/** Returns links to the adapter, and to a first prompt for it. */
function next({ name, found_by_auto }, sample) {
  const tryIt = () => handlers.onTry(found_by_auto ? "auto" : name, sample ?? "");
  return [element("button", { type: "button", class: "small", onclick: tryIt }, "Try it"), " ", adapterLink(name)];
}
