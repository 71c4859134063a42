// The button and the dialog for the API key. A server that needs no key has neither.

import { currentKey, setKey } from "./api.js";
import { byId, say } from "./dom.js";

let isNeeded = false; // the server has refused a request for want of a key
let acceptedKey = "";

/**
 * Connects the dialog. When the key changes, calls `onForget`, then `onClear` if no key replaces it, and in the end
 * `onChange`, which may load with the new key.
 */
export function start({ onForget, onClear, onChange }) {
  const dialog = byId("key-dialog");
  byId("key-button").addEventListener("click", () => open(""));
  document.addEventListener("key-accepted", ({ detail }) => { acceptedKey = detail.key; mark(); });
  document.addEventListener("key-refused", ({ detail }) => {
    isNeeded = true;
    acceptedKey = "";
    mark();
    if (!detail.quietly) open(detail.message);
  });
  dialog.addEventListener("close", async () => {
    const choice = dialog.returnValue, typed = byId("key").value.trim();
    byId("key").value = "";
    if ((choice === "use" && typed) || choice === "forget") {
      setKey(choice === "use" ? typed : "");
      mark();
      onForget();
      if (choice === "forget") await onClear();
      onChange();
    }
  });
  mark();
}

/** Returns whether the server has answered a request with the present key. */
const isAccepted = () => Boolean(currentKey()) && currentKey() === acceptedKey;

function open(note) {
  const dialog = byId("key-dialog");
  say("key-note", note || (isAccepted() ? "The server accepts your key." : currentKey() ? "The server has not accepted your key." : "No key is set."));
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
  byId("key").focus();
}

function mark() {
  byId("key-button").hidden = !isNeeded && !currentKey();
  say("key-button", isAccepted() ? "API key ✓" : "API key");
  byId("key-button").setAttribute("aria-label", `API key: ${isAccepted() ? "accepted" : currentKey() ? "not accepted" : "not set"}`);
}
