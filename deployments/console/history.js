// Conversations of this browser. API keys are kept elsewhere, for the tab only: see api.js.

import { inTab } from "./api.js";

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

/** Keeps the conversation as the newest. Returns whether the browser stored it. `saves` counts how often it was stored. */
export function keep(chat) {
  const all = conversations(), before = all.find(({ id }) => id === chat.id);
  if (before && before.saves !== chat.saves) chat.id = newId(); // it went on in another tab, whose turns are kept
  const rest = all.filter((other) => other.id !== chat.id).slice(0, MAX_KEPT - 1), saves = (chat.saves ?? 0) + 1;
  do {
    if (stored([{ ...chat, saves }, ...rest])) { chat.saves = saves; return true; }
  } while (rest.pop()); // the oldest makes room
  return false;
}

export const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
export const has = (id) => conversations().some((chat) => chat.id === id);

/** Returns the conversation that this tab showed last, if it is kept. */
export const last = () => conversations().find((chat) => chat.id === inTab((tab) => tab.getItem(CURRENT)));
export const enter = (id) => inTab((tab) => tab.setItem(CURRENT, id));
export const leave = () => inTab((tab) => tab.removeItem(CURRENT));
export const remove = (id) => stored(conversations().filter((chat) => chat.id !== id));
export const clear = () => stored([]);

function stored(chats) {
  try {
    localStorage.setItem(HISTORY, JSON.stringify(chats));
    return true;
  } catch {
    return false; // no room
  }
}
