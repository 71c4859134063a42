// Conversations of this browser. API keys are kept elsewhere, for the tab only: see api.js.

const HISTORY = "loraretriever-history";
const CURRENT = "loraretriever-conversation"; // of this tab
const MAX_KEPT = 30;

const isTurn = (turn) => typeof turn?.prompt === "string" && typeof turn.answer === "string" && (!turn.plan || Array.isArray(turn.plan.adapters));
const isChat = (chat) => typeof chat?.id === "string" && typeof chat.system === "string" && Array.isArray(chat.turns) && chat.turns.every(isTurn);

/** Returns the conversations, newest first. Data of another form, such as that of another release, is left out. */
export function conversations() {
  try {
    return [JSON.parse(localStorage.getItem(HISTORY) ?? "[]")].flat().filter(isChat);
  } catch {
    return []; // the browser stores nothing, or not what this page wrote
  }
}

/** Keeps the conversation as the newest. Returns whether the browser stored it. */
export function keep(chat) {
  const rest = conversations().filter((other) => other.id !== chat.id).slice(0, MAX_KEPT - 1);
  do {
    if (stored([chat, ...rest])) return true;
  } while (rest.pop()); // the oldest makes room
  return false;
}

/** Returns the conversation that this tab showed last, if it is kept. */
export const last = () => conversations().find((chat) => chat.id === sessionStorage.getItem(CURRENT));
export const enter = (id) => sessionStorage.setItem(CURRENT, id);
export const leave = () => sessionStorage.removeItem(CURRENT);
export const remove = (id) => stored(conversations().filter((chat) => chat.id !== id));
export const clear = () => localStorage.removeItem(HISTORY);

function stored(chats) {
  try {
    localStorage.setItem(HISTORY, JSON.stringify(chats));
    return true;
  } catch {
    return false; // no room
  }
}
