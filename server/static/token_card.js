// The card beside a token: what the model gave it and what it might have said instead. A pointer opens it by resting
// on a token, the keyboard by stepping through the text with the arrow keys; Escape closes it.

import { make } from "./dom.js";
import { percent, probability, visible } from "./tokens.js";

const MARGIN = 8; // pixels to the token and to the edge of the window
const LEAST_HEIGHT = 80; // pixels; what is beyond scrolls
const CLOSE_DELAY = 150; // milliseconds, to move from the token onto its card
const MAX_SHOWN = 4; // tokens of one piece of text

export class TokenCard {
  #card;
  #status;
  #tokensOf;
  #explain;
  #current = null;
  #timer = 0;

  /**
   * `texts` holds the tokens, `status` is read out when the keyboard moves, `tokensOf` as in StreamView; `explain` gives
   * what POST /explain says of a token, or throws an ApiError.
   */
  constructor(card, status, texts, tokensOf, explain) {
    this.#card = card;
    this.#explain = explain;
    this.#status = status;
    this.#tokensOf = tokensOf;
    texts.addEventListener("pointerover", (event) => this.#over(event.target));
    texts.addEventListener("pointerleave", () => this.#closeSoon());
    texts.addEventListener("click", (event) => this.#over(event.target));
    texts.addEventListener("keydown", (event) => this.#key(event));
    texts.addEventListener("focusin", (event) => this.#focus(event.target));
    texts.addEventListener("focusout", (event) => card.contains(event.relatedTarget) || this.close());
    card.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    card.addEventListener("pointerleave", () => this.#closeSoon());
    document.addEventListener("keydown", (event) => this.#escape(event));
    document.addEventListener("pointerdown", (event) => {
      if (!card.contains(event.target) && !this.#tokensOf.has(event.target)) this.close();
    });
    const follow = () => this.#current && place(card, this.#current);
    window.addEventListener("scroll", follow, { passive: true });
    window.addEventListener("resize", follow);
  }

  close() {
    clearTimeout(this.#timer);
    this.#current?.classList.remove("current");
    this.#current = null;
    this.#card.hidden = true;
  }

  /** Escape means this card while it is open, and nothing else. */
  #escape(event) {
    if (event.key !== "Escape" || this.#card.hidden) return;
    this.close();
    event.stopImmediatePropagation();
  }

  #closeSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.close(), CLOSE_DELAY);
  }

  #over(target) {
    if (!this.#tokensOf.has(target)) return;
    clearTimeout(this.#timer);
    if (target !== this.#current) this.#show(target);
  }

  #focus(target) {
    if (target.matches(":focus-visible") && target.classList.contains("text")) this.#step(target, "ArrowRight");
  }

  #key(event) {
    const text = event.target.closest(".text");
    if (!text || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") this.#card.querySelector("button")?.click();
    if (this.#step(text, event.key)) event.preventDefault();
  }

  /** Move to another token of that text; false when the key moves nothing. */
  #step(text, key) {
    const tokens = [...text.children].filter((element) => this.#tokensOf.has(element));
    const at = tokens.indexOf(this.#current);
    const moves = { ArrowRight: at + 1, ArrowLeft: at < 0 ? 0 : at - 1, Home: 0, End: tokens.length - 1 };
    if (!(key in moves) || !tokens.length) return false;
    const next = tokens[Math.min(Math.max(moves[key], 0), tokens.length - 1)];
    next.scrollIntoView({ block: "nearest" });
    this.#show(next);
    this.#status.textContent = spoken(this.#tokensOf.get(next), next.textContent);
    return true;
  }

  #show(element) {
    this.#current?.classList.remove("current");
    this.#current = element;
    element.classList.add("current");
    const tokens = this.#tokensOf.get(element);
    const rest = tokens.length - MAX_SHOWN;
    this.#card.replaceChildren(
      ...tokens.slice(0, MAX_SHOWN).map((token) => this.#section(token)),
      ...(rest > 0 ? [make("p", { className: "quiet" }, `and ${rest} more tokens`)] : []),
    );
    this.#card.hidden = false;
    place(this.#card, element);
  }

  /** A token, and a button for what it takes a question to the server to tell. */
  #section(token) {
    const section = describe(token);
    const button = make("button", { type: "button", className: "cuts" }, "What the filters cut");
    button.addEventListener("click", () => this.#showCuts(token, button));
    section.append(button);
    return section;
  }

  async #showCuts(token, button) {
    button.disabled = true;
    const words = await this.#explain(token).then(
      ({ filters }) => filters.map((filter) => effect(filter, token)),
      (error) => [error.message],
    );
    const shown = words.length ? words : ["No filter was on."];
    button.replaceWith(make("ul", { className: "quiet" }, ...shown.map((each) => make("li", {}, each))));
    this.#status.textContent = shown.join("; ");
    if (this.#current) place(this.#card, this.#current);
  }
}

/** What one filter did, in words. */
function effect({ name, removed_tokens: count, removed_mass: mass, moved_mass: moved, cut }, token) {
  if (!count) return `${name} moved ${percent(moved)}`;
  const texts = token.top.filter(({ id }) => cut.includes(id)).map(({ text }) => visible(text));
  return `${name} cut ${count} tokens with ${percent(mass)}${texts.length ? `, among them ${texts.join(" ")}` : ""}`;
}

/** One token: its text, id and probability, and the alternatives with bars. */
function describe(token) {
  const share = probability([token]);
  const title = make(
    "p",
    { className: "card-title" },
    make("code", {}, visible(token.text)),
    make("strong", {}, percent(share)),
    make("span", { className: "quiet" }, `id ${token.id} · log p ${(token.logprob ?? -Infinity).toFixed(2)}`),
  );
  const rows = token.top.map((entry) => alternative(entry, entry.id === token.id));
  const list = make("ol", { className: "alternatives" }, ...rows);
  return make("section", {}, title, ...(rows.length ? [list] : []));
}

function alternative(entry, chosen) {
  const share = probability([entry]);
  const bar = make("span", { className: "bar" });
  bar.style.setProperty("--share", share);
  return make(
    "li",
    { className: chosen ? "chosen" : "" },
    make("code", {}, visible(entry.text)),
    bar,
    make("span", { className: "share" }, percent(share)),
  );
}

function spoken(tokens, text) {
  const [token] = tokens;
  const others = token.top.filter((entry) => entry.id !== token.id).slice(0, 3);
  const instead = others.map((entry) => `${visible(entry.text)} ${percent(probability([entry]))}`).join(", ");
  return `${visible(text)}, ${percent(probability(tokens))}${instead ? `; instead: ${instead}` : ""}`;
}

/** Below the token, or above where there is more room, inside the window and never over the token. */
function place(card, element) {
  const token = element.getClientRects()[0] ?? element.getBoundingClientRect();
  card.style.maxHeight = "none";
  const { width, height } = card.getBoundingClientRect();
  const below = window.innerHeight - token.bottom - 2 * MARGIN;
  const above = token.top - 2 * MARGIN;
  const under = height <= below || below >= above;
  const shown = Math.min(height, Math.max(under ? below : above, LEAST_HEIGHT));
  const left = Math.min(token.left, window.innerWidth - width - MARGIN);
  card.style.maxHeight = `${shown}px`;
  card.style.left = `${Math.max(left, MARGIN)}px`;
  card.style.top = `${under ? token.bottom + MARGIN : token.top - shown - MARGIN}px`;
}
