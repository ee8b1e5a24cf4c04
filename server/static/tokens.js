// Which token wrote which part of the text.
//
// The server sends text and tokens side by side, but not in step: a character may take several tokens (each of which
// reads as U+FFFD alone), text that might begin a stop string is held back, and a tokenizer may drop a space at the
// start. The text is what counts: every piece of it is shown once and in order, whatever its tokens look like.

const BROKEN = "\ufffd";
const MAX_WAITING = 32; // tokens that wait for their text before they are shown as one piece

export class TokenAligner {
  #text = "";
  #tokens = [];

  /** Pieces of text that can be told apart by now, as {text, tokens}; with `done`, all that is left. */
  push(text, tokens, done) {
    this.#text += text;
    this.#tokens.push(...tokens);
    const pieces = [];
    for (let piece = this.#next(done); piece; piece = this.#next(done)) pieces.push(piece);
    return pieces;
  }

  #next(done) {
    const [first] = this.#tokens;
    if (!first) return this.#text ? this.#cut(this.#text.length, 0) : null;
    if (first.text === "") return this.#cut(0, 1);
    if (isWhole(first)) {
      if (this.#text.startsWith(first.text)) return this.#cut(first.text.length, 1);
      if (first.text.startsWith(this.#text)) return done ? this.#all() : null;
    }
    return this.#group() ?? this.#rest(done);
  }

  /** The tokens up to the next one whose text can be found, as one piece. */
  #group() {
    const count = this.#tokens.findIndex((token, index) => index > 0 && isWhole(token));
    if (count < 0) return null;
    const atLeast = isWhole(this.#tokens[0]) ? 0 : 1;
    const end = this.#text.indexOf(this.#tokens[count].text, atLeast);
    return end < 0 ? null : this.#cut(end, count);
  }

  #rest(done) {
    const allBroken = !this.#tokens.some(isWhole);
    const ready = done || this.#tokens.length > MAX_WAITING || (allBroken && this.#text);
    return ready ? this.#all() : null;
  }

  #all() {
    return this.#cut(this.#text.length, this.#tokens.length);
  }

  #cut(length, count) {
    const piece = { text: this.#text.slice(0, length), tokens: this.#tokens.splice(0, count) };
    this.#text = this.#text.slice(length);
    return piece;
  }
}

function isWhole(token) {
  return token.text !== "" && !token.text.includes(BROKEN);
}

/** The probability of all the tokens together, 0 to 1, from their log-probabilities (null is minus infinity). */
export function probability(tokens) {
  return Math.exp(tokens.reduce((sum, token) => sum + (token.logprob ?? -Infinity), 0));
}

const SHADES = [0.9, 0.7, 0.5, 0.3, 0.15, 0.05];

/** 0 for what the model was sure of, up to 6 for what it gave less than 5 %. */
export function shade(share) {
  const index = SHADES.findIndex((least) => share >= least);
  return index < 0 ? SHADES.length : index;
}

/** A token's text with its invisible characters shown. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
}

export function percent(share) {
  const value = share * 100;
  if (value >= 99.95) return value === 100 ? "100 %" : "> 99.9 %";
  if (value >= 9.95) return `${value.toFixed(0)} %`;
  if (value >= 0.095) return `${value.toFixed(1)} %`;
  return value === 0 ? "0 %" : "< 0.1 %";
}
