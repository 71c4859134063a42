// Finds adapter folders in what was dropped or chosen, and reads their small files, without a request.

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";
const MLX_WEIGHTS = "adapters.safetensors";
const PICKLE = "adapter_model.bin"; // refused
const SAMPLES = "lora_samples.jsonl";
const DESCRIPTION = "description.txt";
/** The files of an adapter. Others, such as those of its training, are not sent. */
export const ADAPTER_FILES = [CONFIG, WEIGHTS, MLX_WEIGHTS, SAMPLES, DESCRIPTION, "chat_template.jinja", "adapter_io.yaml", "io.yaml", PICKLE];
const isOfAdapter = ({ name }) => ADAPTER_FILES.includes(name);
const SAMPLE_KEYS = ["input", "prompt", "instruction", "text", "question"]; // as the server reads them
const MAX_DEPTH = 3; // folders of folders of adapters
const MAX_READ_BYTES = 4_000_000; // of one small file

/** Returns the adapter folders among the dropped entries. */
export async function droppedFolders(entries) {
  const directories = entries.filter((entry) => entry.isDirectory);
  return (await Promise.all(directories.map((entry) => walked(entry, 0, "")))).flat();
}

/** Returns the adapter folders in a directory: itself or those below it. `parent`: the name of the folder above. */
async function walked(directory, depth, parent) {
  const entries = await allEntries(directory);
  const files = entries.filter((entry) => entry.isFile && isOfAdapter(entry));
  const below = entries.filter((entry) => entry.isDirectory && !entry.name.startsWith("."));
  const isAdapter = files.some((entry) => entry.name === CONFIG);
  if (!isAdapter && below.length && depth < MAX_DEPTH) {
    const found = (await Promise.all(below.map((entry) => walked(entry, depth + 1, directory.name)))).flat();
    if (found.length) return found;
  }
  if (!isAdapter && depth > 0) return [];
  const contents = await Promise.all(files.map((entry) => new Promise((resolve, reject) => entry.file(resolve, reject))));
  return [{ name: directory.name, parent, files: contents }];
}

async function allEntries(directory) {
  const reader = directory.createReader(), entries = [];
  while (true) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return entries;
    entries.push(...some);
  }
}

/** Returns the adapter folders of a chosen folder, whose files have relative paths. Those in another adapter's, its checkpoints, are left out. */
export function chosenFolders(files) {
  const folders = new Map();
  for (const file of files.filter((candidate) => !candidate.webkitRelativePath.split("/").some((part) => part.startsWith(".")))) {
    const path = file.webkitRelativePath.split("/").slice(0, -1);
    const key = path.join("/");
    if (!folders.has(key)) folders.set(key, { name: path.at(-1), parent: path.at(-2) ?? "", files: [], key });
    if (isOfAdapter(file)) folders.get(key).files.push(file);
  }
  const all = [...folders.values()];
  const adapters = all.filter((folder) => folder.files.some((file) => file.name === CONFIG));
  const outer = adapters.filter(({ key }) => !adapters.some((other) => key.startsWith(`${other.key}/`)));
  return outer.length ? outer : all.filter(({ key }) => !key.includes("/"));
}

/** Returns the folders with the name and the tick that they start with. Of the checkpoints of one run the last is ticked. */
export function suggested(folders) {
  const step = (folder) => Number(/^checkpoint-(\d+)$/.exec(folder.name)?.[1] ?? NaN);
  const last = (folder) => Math.max(...folders.filter((other) => other.parent === folder.parent).map(step).filter((number) => number >= 0));
  const named = folders.map((folder) => {
    if (!(step(folder) >= 0) || !folder.parent) return { ...folder, own: folder.name, as: nearestName(folder.name), ticked: true };
    const isLast = step(folder) === last(folder), end = isLast ? "" : `-${step(folder)}`;
    return { ...folder, own: folder.parent + end, as: nearestName(folder.parent) + end, ticked: isLast };
  });
  const isTaken = ({ as }) => named.filter((other) => other.as === as).length > 1;
  return named.map((folder) => (isTaken(folder) ? { ...folder, as: folder.own } : folder));
}

/** Returns the valid name that is nearest to `text`, as the command line has it. */
export function nearestName(text) {
  if (/^[\w.-]{1,64}$/.test(text)) return text;
  const letters = text.normalize("NFKD").replace(/[^\0-\x7f]/g, "");
  return letters.replace(/[^\w.]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 64) || text;
}

/** Reads the configuration and the samples of a folder. `problems` prevent a publish, as the server would refuse it.
 * `bases`: the base model names that the server accepts; null if unknown. */
export async function inspected(folder, bases) {
  const file = (name) => folder.files.find((one) => one.name === name);
  const size = folder.files.reduce((sum, one) => sum + one.size, 0);
  const problems = [];
  const config = await configOf(file(CONFIG), problems);
  const base = String(config.base_model_name_or_path ?? config.model ?? "").replace(/\/+$/, ""); // the second names are MLX's
  const rank = config.r ?? config.lora_parameters?.rank;
  if (!problems.length && bases) problems.push(...baseProblems(base, bases));
  if (!file(WEIGHTS) && !file(MLX_WEIGHTS)) problems.push(`${WEIGHTS} is missing${file(PICKLE) ? "; pickle files are never opened, so save the adapter as safetensors" : ""}`);
  const samples = await samplesOf(file(SAMPLES), file(DESCRIPTION));
  return { size, problems, samples, base, rank, modules: config.target_modules };
}

function baseProblems(base, accepted) {
  if (accepted.includes(base)) return [];
  const given = base ? `its base model is ${base}` : `${CONFIG} names no base model`;
  return [`${given}; this server accepts ${accepted.join(", ")}. If they are the same weights, publish with \`loraretriever publish --base-name\`, or set base_model_name_or_path in ${CONFIG} to one of these names`];
}

async function configOf(file, problems) {
  if (!file) {
    problems.push(`${CONFIG} is missing`);
    return {};
  }
  try {
    const config = JSON.parse(await readText(file));
    if (config && typeof config === "object" && !Array.isArray(config)) return config;
    problems.push(`${CONFIG} is not a JSON object`);
  } catch (error) {
    problems.push(`${CONFIG} cannot be read: ${error.message}`);
  }
  return {};
}

/** Returns the texts that `auto` would find the adapter by, as far as the browser can read them. */
async function samplesOf(lines, description) {
  if (lines) return (await readText(lines)).split("\n").map(inputOf).filter(Boolean);
  return description ? [(await readText(description)).trim()].filter(Boolean) : [];
}

function inputOf(line) {
  try {
    const sample = JSON.parse(line);
    return String(sample[SAMPLE_KEYS.find((key) => sample[key])] ?? "");
  } catch {
    return ""; // the server names the line that it cannot read
  }
}

const readText = (file) => file.slice(0, MAX_READ_BYTES).text();

/** Returns the file that samples typed on the page are sent as. */
export function samplesFile(text) {
  const inputs = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return inputs.length ? new File([inputs.map((input) => `${JSON.stringify({ input })}\n`).join("")], SAMPLES) : null;
}
