// The dialog that asks for the key.

import { currentKey, setKey } from "./api.js";
import { byId, say } from "./dom.js";

/** `onChange` is called when there is another key. */
export function start(onChange) {
  const dialog = byId("key-dialog");
  byId("key-button").addEventListener("click", () => open(""));
  document.addEventListener("key-wanted", (event) => open(event.detail));
  dialog.addEventListener("close", () => {
    const choice = dialog.returnValue, typed = byId("key").value.trim();
    byId("key").value = "";
    if (choice === "use" || choice === "forget") {
      setKey(choice === "use" ? typed : "");
      onChange();
    }
    mark();
  });
  mark();
}

function open(note) {
  const dialog = byId("key-dialog");
  say("key-note", note || (currentKey() ? "A key is in use." : "No key is in use."));
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
  byId("key").focus();
}

function mark() {
  say("key-button", currentKey() ? "Key ✓" : "Key");
  byId("key-button").setAttribute("aria-label", currentKey() ? "Key: one is in use" : "Key: none is in use");
}
