// The server's routes as functions. Paths are relative, so that the page also works behind a proxy's prefix.

import { EventParser } from "./sse.js";

/** What the server, or the way to it, answered instead of a result. `status` 0 means that nothing answered. */
export class ApiError extends Error {
  constructor(status, message, { code = "", param = null, requestId = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, param, requestId, retryAfter });
  }
}

export class Api {
  /** `readKey` gives the API key to send, or an empty string. */
  constructor(readKey) {
    this.readKey = readKey;
  }

  info() {
    return this.#json("info");
  }

  stats() {
    return this.#json("stats");
  }

  /** What the filters did to tokens; `body` as POST /explain takes it. */
  explain(body) {
    return this.#json("explain", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  }

  /** The events of POST /generate, parsed, up to the last; `body` is JSON text. Throws ApiError, or AbortError. */
  async *generate(body, signal) {
    const headers = { "content-type": "application/json" };
    const response = await this.#fetch("generate", { method: "POST", headers, body, signal });
    for await (const event of readEvents(response, signal)) {
      if (event.name === "error") throw fromBody(503, event.data, response);
      if (event.data === "[DONE]") return;
      yield JSON.parse(event.data);
    }
    throw new ApiError(0, "The connection ended before the answer was complete.");
  }

  async #json(path, options = {}) {
    return (await this.#fetch(path, options)).json();
  }

  async #fetch(path, { headers = {}, ...options }) {
    const key = this.readKey();
    const authorization = key ? { authorization: `Bearer ${key}` } : {};
    const all = { ...options, headers: { ...headers, ...authorization }, cache: "no-store", credentials: "omit" };
    const response = await fetch(path, all).catch((error) => {
      throw asApiError(error, options.signal);
    });
    if (!response.ok) throw fromBody(response.status, await response.text().catch(() => ""), response);
    return response;
  }
}

async function* readEvents(response, signal) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } catch (error) {
    throw asApiError(error, signal);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function asApiError(error, signal) {
  if (signal?.aborted || error instanceof ApiError) return error;
  return new ApiError(0, "The server cannot be reached.");
}

/** An error in the server's shape, or in none: a proxy may have answered. */
function fromBody(status, text, response) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Not JSON: the status has to do.
  }
  const message = error.message ?? `The server answered with status ${status}.`;
  return new ApiError(status, sentence(String(message)), {
    code: error.code,
    param: error.param,
    requestId: error.request_id,
    retryAfter: Number(response.headers.get("retry-after")) || 0,
  });
}

function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
