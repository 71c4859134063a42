// Shows a request as code to copy. A key becomes an environment variable, never text.

import { currentKey } from "./api.js";
import { byId, element } from "./dom.js";

const VARIABLE = "LORARETRIEVER_KEY";
const base = () => new URL("v1", document.baseURI).href;

/** Shows the request in a dialog. */
export function showCode(request) {
  byId("code-blocks").replaceChildren(...codeBlocks(request));
  byId("code-dialog").showModal();
}

/** Returns the request for curl and for Python, each with a button that copies it. */
export const codeBlocks = (request) => [codeBlock("curl", asCurl(request)), codeBlock("Python", asPython(request))];

function codeBlock(title, code) {
  const text = element("pre", { tabindex: 0, role: "region", "aria-label": `${title} code` }, code);
  const button = element("button", { type: "button", class: "small" }, `Copy ${title}`);
  button.addEventListener("click", () => copy(code, text, button));
  return element("div", { class: "code" }, element("div", { class: "code-head" }, element("h3", {}, title), button), text);
}

async function copy(code, text, button) {
  const title = button.textContent;
  try {
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
  } catch { // the browser offers no clipboard on this address
    getSelection().selectAllChildren(text);
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = title; }, 2000);
}

/** Returns the request without its unset fields. */
function plain({ lora, ...request }) {
  const { lora: options, ...rest } = JSON.parse(JSON.stringify({ ...request, lora }));
  return Object.keys(options ?? {}).length ? { ...rest, lora: options } : rest;
}

export function asCurl(request) {
  const body = JSON.stringify(plain(request), null, 2).replaceAll("'", "'\\''");
  const key = currentKey() ? [`  -H "Authorization: Bearer $${VARIABLE}" \\`] : [];
  return [`curl ${base()}/chat/completions \\`, ...key, "  -H 'Content-Type: application/json' \\", `  -d '${body}'`].join("\n");
}

export function asPython(request) {
  const { lora, ...fields } = plain(request);
  if (lora) fields.extra_body = { lora };
  const key = currentKey() ? `os.environ["${VARIABLE}"]` : '"none"';
  const lines = Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  return [
    ...(currentKey() ? ["import os", ""] : []),
    "from openai import OpenAI", "",
    `client = OpenAI(base_url="${base()}", api_key=${key})`,
    "answer = client.chat.completions.create(", ...lines, ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

/** Returns the value as Python writes it. */
function literal(value, indent) {
  if (typeof value === "string") return JSON.stringify(value);
  const inner = `${indent}    `;
  const lines = (parts, [open, close]) => (parts.length ? `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${indent}${close}` : open + close);
  if (Array.isArray(value)) return lines(value.map((item) => literal(item, inner)), "[]");
  if (value && typeof value === "object") return lines(Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item, inner)}`), "{}");
  return { true: "True", false: "False", null: "None" }[value] ?? JSON.stringify(value);
}
