// DOM helpers. Text from the server becomes text nodes and attribute values only.

export const byId = (id) => document.getElementById(id);

/** Creates an element with attributes, listeners (`onclick: f`) and children. Strings become text. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Replaces the links and buttons of a list. The keyboard stays on the one with the same text, else on the one in its place. */
export function refill(list, children) {
  const all = () => [...list.querySelectorAll("a, button")];
  const held = document.activeElement, at = all().indexOf(held);
  list.replaceChildren(...children);
  if (at < 0) return;
  const now = all();
  (now.find(({ textContent }) => textContent === held.textContent) ?? now[Math.min(at, now.length - 1)])?.focus({ preventScroll: true });
}

export function say(id, text) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text; // screen readers read changes only
}

/** Sets the text, and hides the element if the text is empty. */
export function sayOrHide(id, text) {
  say(id, text);
  byId(id).hidden = !text;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = count, unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export const whole = (count) => count.toLocaleString("en");
export const percent = (share) => `${Math.round(100 * share)} %`;

export function ago(time, now = Date.now()) {
  const seconds = Math.max(0, (now - new Date(time).getTime()) / 1000);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
  }
  return "just now";
}

/** Debounces `work`: calls it after `ms` without another call. */
export function soon(work, ms = 200) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(work, ms); };
}

let settle = () => {}; // answers the question that the dialog asks

/** Asks for confirmation, if `typed` is given by typing it. Resolves to whether the user confirmed; an earlier question that is open to false. */
export function confirmed(title, text, yes, typed = "") {
  const dialog = byId("confirm-dialog"), field = byId("confirm-typed");
  settle(false);
  say("confirm-title", title);
  say("confirm-text", text);
  say("confirm-yes", yes);
  byId("confirm-typing").hidden = !typed;
  field.value = "";
  field.oninput = () => { byId("confirm-yes").disabled = field.value !== typed; };
  field.oninput();
  byId("confirm-no").onclick = () => dialog.close();
  dialog.onclose = () => { if (!dialog.open) settle(dialog.returnValue === "yes"); }; // else it is open for another question by now
  if (dialog.open) dialog.close();
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => { settle = resolve; });
}
