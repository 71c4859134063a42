// The form that changes the tags, template, visibility, samples and contract of an adapter, without an upload.

import { send } from "./api.js";
import { listed } from "./answers.js";
import { byId } from "./dom.js";
import { readSamples, writeSamples } from "./samples.js";

let edited = null; // the adapter as it was when the form was opened
let before = {}; // the fields of the form as they were then

const FIELDS = ["tags", "template", "visibility", "samples", "contract"];
const fields = () => Object.fromEntries(FIELDS.map((name) => [name, byId(`edit-${name}`).value]));

/** Connects the form. `onSave(work)` runs `work`, which resolves to the generation, closes the form, and shows its error. */
export function start(onSave) {
  byId("edit-cancel").addEventListener("click", () => { close(); byId("adapter-edit").focus(); });
  byId("edit-form").addEventListener("submit", (event) => { event.preventDefault(); onSave(save); });
}

/** Fills the form with the adapter and all its samples, and shows it. */
export function open(adapter) {
  edited = adapter;
  byId("edit-tags").value = adapter.tags.join(", ");
  byId("edit-template").value = adapter.template ?? "server";
  byId("edit-visibility").value = adapter.visibility;
  byId("edit-samples").value = writeSamples(adapter.samples);
  byId("edit-samples").disabled = adapter.samples.length < adapter.num_samples; // saving would drop the others
  byId("edit-contract").value = adapter.contract ? JSON.stringify(adapter.contract, null, 2) : "";
  before = fields();
  shown(true);
  byId("edit-tags").focus();
}

export const close = () => shown(false);

function shown(isShown) {
  byId("edit-form").hidden = !isShown;
  byId("adapter-edit").setAttribute("aria-expanded", String(isShown));
}

/** Sends what was changed. Throws Error if it cannot be read, and ApiError. */
async function save() {
  const now = fields(), body = {};
  if (now.tags !== before.tags) body.tags = listed(now.tags);
  if (now.samples !== before.samples) {
    const { rows, problem } = readSamples(now.samples, "the samples");
    if (problem) throw new Error(problem);
    body.samples = rows.map(({ input, output }) => ({ input, output }));
  }
  if (now.contract !== before.contract) body.contract = parsed(now.contract.trim() || "{}");
  for (const name of ["template", "visibility"]) if (now[name] !== before[name]) body[name] = now[name];
  let generation = null;
  if (Object.keys(body).length) {
    if (Object.keys(body).some((name) => name !== "visibility")) body.digest = edited.digest; // refused if another version is live by now
    ({ generation } = await (await send("PATCH", `v1/loras/${encodeURIComponent(edited.id)}`, { body })).json());
  }
  return generation;
}

/** Returns the contract that the text describes. Throws Error. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`the contract is not JSON: ${error.message}`);
  }
}
