// Calls the server with the user's API key. URLs are relative, because the page may be served below any prefix.

const KEY = "loraretriever-key";
let typed = ""; // for a browser that keeps no data of this site

export const currentKey = () => inTab((tab) => tab.getItem(KEY)) ?? typed;

export function setKey(key) {
  typed = key;
  inTab((tab) => (key ? tab.setItem(KEY, key) : tab.removeItem(KEY)));
}

/** Returns what `use` does with the storage of the tab, or null in a browser that keeps no data of this site. */
export function inTab(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null;
  }
}

/** An unsuccessful response, with the message of the server. */
export class ApiError extends Error {
  constructor(status, message, param) {
    super(param && !message.includes(param) ? `${param}: ${message}` : message);
    this.status = status;
  }
}

const headers = () => (currentKey() ? { Authorization: `Bearer ${currentKey()}` } : {});

/** Returns why a part of the page cannot be loaded. The dialog for the key says it if the key is the reason. */
export const reasonOf = (error) => (error.status === 401 ? "" : error.message);

/** Returns a successful response. `quietly`: do not ask for a missing key. Throws ApiError. */
export async function send(method, path, { body, signal, quietly = false } = {}) {
  const key = currentKey();
  const json = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method, signal, headers: { ...headers(), ...json }, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not respond");
  }
  if (!response.ok) throw refused(response.status, await response.text(), key, quietly);
  accepted(key);
  return response;
}

export const read = async (path, options) => (await send("GET", path, options)).json();
export const post = async (path, body, options) => (await send("POST", path, { ...options, body })).json();

/** Yields the JSON objects of server-sent events. Throws ApiError for an error event or a broken stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", isDone = false;
  while (true) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice("data: ".length);
      if (data === "[DONE]") { isDone = true; continue; }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(200, event.error.message, event.error.param);
      yield event;
    }
  }
  if (!isDone) throw new ApiError(0, "the connection was lost before the answer ended");
}

/** Sends a form. `onProgress` gets the share that was sent, 0 to 1. Throws ApiError. */
export function upload(path, form, onProgress) {
  const key = currentKey();
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not report upload progress
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.lengthComputable ? event.loaded / event.total : 0);
    request.onerror = () => reject(new ApiError(0, "the connection was lost during the upload"));
    request.onload = () => {
      if (request.status < 200 || request.status >= 300) {
        reject(refused(request.status, request.responseText, key, false));
        return;
      }
      accepted(key);
      try {
        resolve(JSON.parse(request.responseText));
      } catch {
        reject(new ApiError(request.status, "the answer is not JSON; look under Adapters whether the adapter is published"));
      }
    };
    request.send(form);
  });
}

/** Reports to the page that the server has answered a request with this key. */
const accepted = (key) => document.dispatchEvent(new CustomEvent("key-accepted", { detail: { key } }));

function refused(status, text, key, quietly) {
  if (status === 401) {
    const message = key ? "This server does not accept your key. Ask its operator." : "This server needs a key. Ask its operator.";
    document.dispatchEvent(new CustomEvent("key-refused", { detail: { message, quietly } }));
    return new ApiError(status, message);
  }
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // not JSON, such as an error page of a proxy: report the status
  }
  const message = typeof error.message === "string" ? error.message : `the server answered with status ${status}`;
  return new ApiError(status, message, typeof error.param === "string" ? error.param : "");
}
