// The engine as it runs: what waits, what runs, how full the KV cache is, how many tokens it writes a second.

import { byId, round } from "./dom.js";

const PERIOD = 1000; // milliseconds between looks
const HISTORY = 60; // looks that the curve shows
const STATES = {
  ready: "Ready",
  loading: "Loading the model",
  draining: "Shutting down",
  engine_down: "The engine is down",
};

export class EngineView {
  #api;
  #onReturn;
  #lost = false;
  #last = null;
  #rates = [];
  #refusedKey = null;

  /** `onReturn` is called when the server answers again after it did not: it may serve another model by then. */
  constructor(api, onReturn) {
    this.#api = api;
    this.#onReturn = onReturn;
  }

  /** Look now and every second, while the page can be seen. */
  async run() {
    for (;;) {
      const barred = this.#refusedKey !== null && this.#refusedKey === this.#api.readKey();
      if (document.visibilityState !== "visible") this.#last = null;
      else if (!barred) await this.#look();
      await new Promise((resolve) => setTimeout(resolve, PERIOD));
    }
  }

  async #look() {
    const key = this.#api.readKey();
    try {
      this.#show(await this.#api.stats());
      this.#refusedKey = null;
      if (this.#lost) this.#onReturn();
      this.#lost = false;
    } catch (error) {
      const locked = error.status === 401;
      this.#last = null;
      this.#lost = !locked;
      this.#refusedKey = locked ? key : null;
      showState(locked ? "locked" : "lost", locked ? "API key needed" : "Not reachable");
    }
  }

  #show(stats) {
    showState(stats.state, STATES[stats.state] ?? stats.state);
    const now = performance.now();
    const rate = this.#last ? this.#rate(stats, now) : 0;
    this.#last = { at: now, tokens: stats.generation_tokens };
    this.#rates = [...this.#rates, rate].slice(-HISTORY);
    const used = stats.kv_blocks ? stats.kv_blocks_used / stats.kv_blocks : 0;
    byId("engine-running").textContent = round(stats.running, 0);
    byId("engine-waiting").textContent = round(stats.waiting, 0);
    byId("engine-rate").textContent = round(rate, 0);
    byId("engine-kv").textContent = `${round(used * 100)} %`;
    byId("engine-kv-bar").style.setProperty("--share", used);
    byId("engine-prefix").textContent = hitRate(stats);
    byId("engine-preemptions").textContent = round(stats.preemptions, 0);
    byId("engine-curve").setAttribute("d", curve(this.#rates));
  }

  /** Tokens a second since the last look; a counter that went back means a new engine. */
  #rate(stats, now) {
    return Math.max(0, stats.generation_tokens - this.#last.tokens) / ((now - this.#last.at) / 1000);
  }
}

function showState(state, words) {
  byId("state").dataset.state = state;
  byId("state-words").textContent = words;
}

function hitRate({ prefix_cache_queries: queries, prefix_cache_hits: hits }) {
  return queries ? `${round((hits / queries) * 100, 0)} %` : "–";
}

/** The rates as an SVG path in a box of 60 by 20, the newest at the right edge. */
function curve(rates) {
  const most = Math.max(...rates, 1);
  const left = HISTORY - rates.length;
  const points = rates.map((rate, index) => `${left + index} ${(19 - (rate / most) * 18).toFixed(2)}`);
  return points.length > 1 ? `M${points.join("L")}` : "";
}
