// One answer as it arrives: a text for each choice, its tokens shaded, and the figures below it.

import { make, round } from "./dom.js";
import { TokenAligner, probability, shade } from "./tokens.js";

const REASONS = {
  stop: "the model ended it",
  length: "max tokens reached",
  deadline: "the deadline passed",
  abort: "aborted",
};
const FIGURES_PERIOD = 100; // milliseconds

class ChoiceView {
  #aligner = new TokenAligner();
  #tokensOf;
  #ids = [];
  ended = "";

  constructor(index, count, tokensOf) {
    this.#tokensOf = tokensOf;
    this.text = make("div", { className: "text", dir: "auto", lang: "" });
    const label = `Choice ${index + 1}`;
    this.heading = make("h3", { className: "choice-heading", hidden: count === 1 }, label);
    this.element = make("article", { className: "choice", ariaLabel: label }, this.heading, this.text);
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `${count === 1 ? "Generated text" : label}; arrow keys step through its tokens`);
  }

  add({ text, token_ids: ids, logprobs, finish_reason: reason, stop_reason: stop }) {
    // Each token knows its place, for whoever asks about it.
    logprobs?.forEach((token, at) => Object.assign(token, { ids: this.#ids, index: this.#ids.length + at }));
    this.#ids.push(...ids);
    if (reason) this.#end(typeof stop === "string" ? "a stop string came" : (REASONS[reason] ?? reason));
    if (!ids.length && text && !reason) this.#append(make("span", { className: "prompt" }, text));
    else if (logprobs) this.#aligner.push(text, logprobs, Boolean(reason)).forEach((piece) => this.#piece(piece));
    else if (text) this.#plain(text);
  }

  /** Show what waited for more tokens, when none will come. */
  flush() {
    this.#aligner.push("", [], true).forEach((piece) => this.#piece(piece));
  }

  #piece({ text, tokens }) {
    if (!tokens.length) return this.#plain(text);
    const line = /^\n+$/.test(text) ? " line" : "";
    const silent = text === "" ? " silent" : "";
    const span = make("span", { className: `token p${shade(probability(tokens))}${line}${silent}` }, text);
    this.#tokensOf.set(span, tokens);
    this.#append(span);
  }

  #plain(text) {
    const last = this.text.lastChild;
    if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
    else this.#append(text);
  }

  #append(node) {
    this.text.append(node);
  }

  #end(reason) {
    this.ended = reason;
    this.heading.append(make("span", { className: "quiet" }, ` · ${reason}`));
  }
}

export class StreamView {
  #texts;
  #figures;
  #choices = [];
  #lastShown = 0;

  /** `texts` and `figures` are the elements to fill; `tokensOf` maps each token's element to its log-probabilities. */
  constructor(texts, figures, tokensOf) {
    this.#texts = texts;
    this.#figures = figures;
    this.tokensOf = tokensOf;
  }

  start(count) {
    this.#choices = Array.from({ length: count }, (_, index) => new ChoiceView(index, count, this.tokensOf));
    this.#texts.replaceChildren(...this.#choices.map((choice) => choice.element));
    this.#texts.classList.add("running");
    this.#texts.setAttribute("aria-busy", "true");
    this.startedAt = performance.now();
    this.firstAt = 0;
    this.lastAt = 0;
    this.numFirst = 0;
    this.numTokens = 0;
    this.usage = null;
    this.provenance = null;
    this.#showFigures();
  }

  add(event) {
    for (const delta of event.choices) {
      this.#count(delta.token_ids.length);
      this.#choices[delta.index].add(delta);
    }
    if (event.usage) {
      this.usage = event.usage;
      this.provenance = event.provenance;
    }
    if (performance.now() - this.#lastShown > FIGURES_PERIOD) this.#showFigures();
  }

  /** The end, however it came; returns it in one sentence. `how` is empty when the server ended it. */
  finish(how) {
    this.#choices.forEach((choice) => choice.flush());
    this.#texts.classList.remove("running");
    this.#texts.setAttribute("aria-busy", "false");
    this.#showFigures();
    const reasons = [...new Set(this.#choices.map((choice) => choice.ended).filter(Boolean))].join(", ");
    return `${how || "Finished"} after ${this.numTokens} ${this.numTokens === 1 ? "token" : "tokens"}${
      !how && reasons ? `: ${reasons}` : ""
    }.`;
  }

  #count(added) {
    if (!added) return;
    this.lastAt = performance.now();
    if (!this.numTokens) {
      this.firstAt = this.lastAt;
      this.numFirst = added;
    }
    this.numTokens += added;
  }

  /** The rate leaves the first event out: the wait for it is what "first token" tells. */
  #showFigures() {
    this.#lastShown = performance.now();
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const rate = seconds > 0 ? (this.numTokens - this.numFirst) / seconds : 0;
    const values = {
      first: this.firstAt ? `${round(this.firstAt - this.startedAt, 0)} ms` : "–",
      rate: rate ? `${round(rate, rate < 10 ? 1 : 0)} /s` : "–",
      tokens: round(this.numTokens, 0),
      prompt: this.usage ? `${this.usage.prompt_tokens}${cached(this.usage)}` : "–",
    };
    for (const [name, value] of Object.entries(values)) {
      this.#figures.querySelector(`[data-figure=${name}]`).textContent = value;
    }
  }
}

function cached(usage) {
  return usage.cached_tokens ? ` (${usage.cached_tokens} cached)` : "";
}
