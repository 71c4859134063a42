// The dialog for the API key.

import { currentKey, setKey } from "./api.js";
import { byId, say } from "./dom.js";

/** Connects the dialog. Calls `onChange` when the key changes, and before that `onForget` when it is forgotten. */
export function start(onChange, onForget) {
  const dialog = byId("key-dialog");
  byId("key-button").addEventListener("click", () => open(""));
  document.addEventListener("key-wanted", (event) => open(event.detail));
  dialog.addEventListener("close", async () => {
    const choice = dialog.returnValue, typed = byId("key").value.trim();
    byId("key").value = "";
    if (choice === "use" || choice === "forget") {
      setKey(choice === "use" ? typed : "");
      mark();
      if (choice === "forget") await onForget();
      onChange();
    }
  });
  mark();
}

function open(note) {
  const dialog = byId("key-dialog");
  say("key-note", note || (currentKey() ? "A key is set." : "No key is set."));
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
  byId("key").focus();
}

function mark() {
  say("key-button", currentKey() ? "API key ✓" : "API key");
  byId("key-button").setAttribute("aria-label", currentKey() ? "API key: set" : "API key: not set");
}
