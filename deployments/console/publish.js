// Publishes dropped or chosen folders one by one.

import { read, upload } from "./api.js";
import { byId, bytes, confirmed, element, percent, whole } from "./dom.js";

const CONFIG = "adapter_config.json";
const MAX_DEPTH = 3; // folders of folders of adapters
let onChange = () => {};
let queue = Promise.resolve();

export function start(callbacks) {
  onChange = callbacks.onChange;
  const drop = byId("drop");
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); publishDropped(event.dataTransfer); });
  byId("folder").addEventListener("change", (event) => {
    const folders = grouped([...event.target.files]);
    event.target.value = "";
    if (folders.length) folders.forEach(enqueue);
    else refuse("the folder", "the folder is empty");
  });
}

async function publishDropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean); // only readable during this event
  const folders = (await Promise.all(entries.filter((entry) => entry.isDirectory).map((entry) => walked(entry, 0)))).flat();
  if (folders.length) folders.forEach(enqueue);
  else refuse(entries[0]?.name ?? "dropped item", "drop the folder of the adapter; its name becomes the name of the adapter");
}

/** Returns the adapter folders in a directory: itself or those below it. */
async function walked(directory, depth) {
  const entries = await allEntries(directory);
  const files = entries.filter((entry) => entry.isFile && !entry.name.startsWith("."));
  const below = entries.filter((entry) => entry.isDirectory && !entry.name.startsWith("."));
  const isAdapter = files.some((entry) => entry.name === CONFIG);
  if (!isAdapter && below.length && depth < MAX_DEPTH) {
    const found = (await Promise.all(below.map((entry) => walked(entry, depth + 1)))).flat();
    if (found.length) return found;
  }
  if (!isAdapter && depth > 0) return [];
  const contents = await Promise.all(files.map((entry) => new Promise((resolve, reject) => entry.file(resolve, reject))));
  return [{ name: directory.name, files: contents }];
}

async function allEntries(directory) {
  const reader = directory.createReader(), entries = [];
  while (true) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return entries;
    entries.push(...some);
  }
}

/** Returns the adapter folders of a chosen folder, whose files have relative paths. */
function grouped(files) {
  const folders = new Map();
  for (const file of files.filter((candidate) => !candidate.webkitRelativePath.split("/").some((part) => part.startsWith(".")))) {
    const path = file.webkitRelativePath.split("/").slice(0, -1);
    const key = path.join("/");
    if (!folders.has(key)) folders.set(key, { name: path.at(-1), files: [], depth: path.length });
    folders.get(key).files.push(file);
  }
  const all = [...folders.values()];
  const adapters = all.filter((folder) => folder.files.some((file) => file.name === CONFIG));
  return adapters.length ? adapters : all.filter((folder) => folder.depth === 1);
}

function enqueue(folder) {
  const tags = byId("tags").value.split(",").map((tag) => tag.trim()).filter(Boolean);
  const size = folder.files.reduce((sum, file) => sum + file.size, 0);
  const row = listed(folder.name, `${folder.files.length} files, ${bytes(size)}: waiting`);
  queue = queue.then(() => publish(folder, tags, row)).catch((error) => row.end(error.message, "bad"));
}

function refuse(name, why) {
  listed(name, "").end(why, "bad");
}

function listed(name, note) {
  const state = element("span", { class: "state", role: "status" }, note);
  const progress = element("progress", { max: 1, value: 0, "aria-label": `Upload of ${name}` });
  const node = element("li", {}, element("span", { class: "name" }, name), progress, state);
  byId("uploads").prepend(node);
  return {
    say: (text, share) => { state.textContent = text; if (share !== undefined) progress.value = share; },
    end: (text, mood) => { state.textContent = text; progress.remove(); node.className = mood; },
  };
}

async function publish(folder, tags, row) {
  if (await isLive(folder.name)) {
    const text = "The new version becomes live. The previous version is kept.";
    if (!(await confirmed(`Publish a new version of ${folder.name}?`, text, "Publish"))) { row.end("not published", ""); return; }
  }
  const form = new FormData();
  form.append("name", folder.name);
  for (const tag of tags) form.append("tags", tag);
  for (const file of folder.files) form.append("files", file, file.name);
  const made = await upload("v1/loras", form, (share) => {
    row.say(share < 1 ? `uploading, ${percent(share)}` : "validating and publishing…", share);
  });
  row.end(outcome(made), "good");
  onChange(made.generation);
}

/** Returns whether the caller's tenant has an adapter of this name. */
async function isLive(name) {
  try {
    return (await read(`v1/loras/${encodeURIComponent(name)}`)).id === name;
  } catch (error) {
    if (error.status === 404) return false;
    throw error;
  }
}

function outcome({ generation, replicas, found_by_auto, neighbours }) {
  const parts = [`live at generation ${whole(generation)}`];
  if (replicas.behind) parts.push("some replicas are not up to date yet");
  if (!found_by_auto) parts.push("without samples it is used by name only");
  else if (neighbours.length) parts.push(`most similar: ${neighbours[0].name} (${neighbours[0].score.toFixed(2)})`);
  return parts.join("; ");
}
