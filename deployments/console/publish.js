// Folders that are dropped or chosen, published one after the other.

import { read, upload } from "./api.js";
import { byId, bytes, confirmed, element, percent, whole } from "./dom.js";

const CONFIG = "adapter_config.json";
const MAX_DEPTH = 3; // folders of folders of adapters
let onChange = () => {};
let queue = Promise.resolve();

export function start(told) {
  onChange = told.onChange;
  const drop = byId("drop");
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer); });
  byId("folder").addEventListener("change", (event) => {
    const folders = grouped([...event.target.files]);
    event.target.value = "";
    if (folders.length) folders.forEach(enqueue);
    else refuse("the folder", "it has no files");
  });
}

async function take(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean); // gone after this turn
  const folders = (await Promise.all(entries.filter((entry) => entry.isDirectory).map((entry) => walked(entry, 0)))).flat();
  if (folders.length) folders.forEach(enqueue);
  else refuse(entries[0]?.name ?? "what was dropped", "drop the adapter's folder itself: its name becomes the adapter's");
}

/** The adapter folders in a directory: itself, or those below it. */
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

/** The same for a chosen folder, whose files come with their paths. */
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
    const text = "It becomes the live version; the one before stays reachable by its digest.";
    if (!(await confirmed(`Publish a new version of ${folder.name}?`, text, "Publish"))) { row.end("left as it was", ""); return; }
  }
  const form = new FormData();
  form.append("name", folder.name);
  for (const tag of tags) form.append("tags", tag);
  for (const file of folder.files) form.append("files", file, file.name);
  const made = await upload("v1/loras", form, (share) => {
    row.say(share < 1 ? `uploading, ${percent(share)}` : "checking and publishing…", share);
  });
  row.end(outcome(made), "good");
  onChange(made.generation);
}

/** Whether an own adapter has this name; another tenant's is not replaced. */
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
  if (replicas.behind) parts.push("one replica is still behind");
  if (!found_by_auto) parts.push("it has no samples, so only its name reaches it");
  else if (neighbours.length) parts.push(`nearest is ${neighbours[0].name} at ${neighbours[0].score.toFixed(2)}`);
  return parts.join("; ");
}
