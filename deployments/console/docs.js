// Shows the OpenAPI document of this server. Its content becomes text, never markup.

import { read } from "./api.js";
import { byId, element, sayOrHide } from "./dom.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const BOUNDS = [
  ["minimum", "at least"], ["exclusiveMinimum", "above"], ["maximum", "at most"], ["exclusiveMaximum", "below"],
  ["minLength", "characters, at least"], ["maxLength", "characters, at most"], ["pattern", "matches"],
  ["minItems", "items, at least"], ["maxItems", "items, at most"], ["maxProperties", "keys, at most"],
];

let schemas = {};

/** Returns the schema behind a reference, and its name. */
function resolved(schema) {
  let name = "";
  while (schema.$ref) {
    name = schema.$ref.split("/").pop();
    schema = schemas[name] ?? {};
  }
  return { name, schema };
}

function typeOf(given) {
  const { name, schema } = resolved(given);
  if (name) return name;
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.format ? `${schema.type} (${schema.format})` : schema.type ?? "anything";
}

/** Returns the object schemas inside a schema, through lists and unions. */
function objectsIn(given) {
  const { schema } = resolved(given);
  if (schema.properties) return [schema];
  return [...(schema.anyOf ?? []), ...(schema.items ? [schema.items] : [])].flatMap(objectsIn);
}

function boundsOf(given) {
  const { schema } = resolved(given);
  const own = BOUNDS.filter(([key]) => schema[key] !== undefined).map(([key, words]) => `${words} ${schema[key]}`);
  const inner = [...(schema.anyOf ?? []), ...(schema.items ? [schema.items] : [])].flatMap(boundsOf);
  return [...new Set([...own, ...inner])];
}

function field(name, schema, isRequired) {
  const notes = [typeOf(schema), isRequired ? "required" : null];
  if (schema.default !== undefined) notes.push(`default ${JSON.stringify(schema.default)}`);
  notes.push(...boundsOf(schema));
  const head = [element("code", {}, name), " ", element("small", {}, notes.filter(Boolean).join(" · "))];
  const objects = objectsIn(schema);
  if (!objects.length) return element("li", {}, ...head);
  const details = element("details", {}, element("summary", {}, ...head));
  // Draw an object when it is opened, because schemas may be recursive.
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...objects.map(fields));
  });
  return element("li", {}, details);
}

function fields(schema) {
  const required = new Set(schema.required ?? []);
  const items = Object.entries(schema.properties).map(([name, inner]) => field(name, inner, required.has(name)));
  return element("ul", { class: "fields" }, ...items);
}

function content(title, media) {
  return Object.entries(media ?? {}).flatMap(([kind, { schema }]) => {
    const label = element("p", {}, title, " ", element("code", {}, kind), " ", element("small", {}, typeOf(schema)));
    return [label, ...objectsIn(schema).map(fields)];
  });
}

function parameters(given) {
  if (!given?.length) return [];
  const items = given.map((one) => field(`${one.name} (${one.in})`, one.schema, one.required));
  return [element("h3", {}, "Parameters"), element("ul", { class: "fields" }, ...items)];
}

function responses(given) {
  const items = Object.entries(given).map(([status, answer]) =>
    element("li", {}, element("code", {}, status), " ", answer.description ?? "", ...content("", answer.content)));
  return [element("h3", {}, "Responses"), element("ul", { class: "fields" }, ...items)];
}

function operation(path, method, given) {
  const key = given.security ? element("small", {}, " · needs an API key if the server has keys") : null;
  const head = element("summary", {}, element("span", { class: "method" }, method.toUpperCase()), element("code", {}, path), key);
  const details = element("details", {}, head, element("p", {}, given.description ?? given.summary ?? ""));
  details.append(...parameters(given.parameters));
  if (given.requestBody) details.append(element("h3", {}, "Body"), ...content("", given.requestBody.content));
  details.append(...responses(given.responses));
  return element("section", { "data-words": `${method} ${path} ${given.description ?? ""}`.toLowerCase() }, details);
}

function filter() {
  const words = byId("docs-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const section of byId("operations").children) {
    section.hidden = !words.every((word) => section.dataset.words.includes(word));
  }
}

async function show() {
  try {
    const document = await read("openapi.json", { quietly: true });
    schemas = document.components?.schemas ?? {};
    const sections = Object.entries(document.paths).flatMap(([path, operations]) =>
      METHODS.filter((method) => operations[method]).map((method) => operation(path, method, operations[method])));
    byId("operations").replaceChildren(...sections);
    sayOrHide("docs-note", "");
  } catch (error) {
    sayOrHide("docs-note", `Cannot read the API description: ${error.message}`);
  }
}

byId("docs-filter").addEventListener("input", filter);
show();
