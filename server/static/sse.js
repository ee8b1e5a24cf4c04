// Server-sent events out of a stream of text, as the HTML standard parses them (section 9.2.6): any of the three
// line ends, comments passed over, several data lines joined, an unfinished event at the end dropped.

export class EventParser {
  #buffer = "";
  #name = "";
  #data = [];
  #started = false;
  #skipLineFeed = false;

  /** Events that `text` completes, as {name, data}. */
  push(text) {
    this.#buffer += text;
    if (!this.#started && this.#buffer) {
      this.#started = true;
      if (this.#buffer.startsWith("\ufeff")) this.#buffer = this.#buffer.slice(1);
    }
    const events = [];
    for (let line = this.#nextLine(); line !== null; line = this.#nextLine()) {
      const event = this.#take(line);
      if (event) events.push(event);
    }
    return events;
  }

  /** The next whole line, or null. A carriage return ends one at once; a line feed right behind it is part of it. */
  #nextLine() {
    if (this.#skipLineFeed && this.#buffer) {
      this.#skipLineFeed = false;
      if (this.#buffer[0] === "\n") this.#buffer = this.#buffer.slice(1);
    }
    const end = this.#buffer.search(/[\r\n]/);
    if (end < 0) return null;
    const line = this.#buffer.slice(0, end);
    this.#skipLineFeed = this.#buffer[end] === "\r";
    this.#buffer = this.#buffer.slice(end + 1);
    return line;
  }

  #take(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#name = value;
    else if (field === "data") this.#data.push(value);
    return null;
  }

  #dispatch() {
    const event = this.#data.length ? { name: this.#name || "message", data: this.#data.join("\n") } : null;
    this.#name = "";
    this.#data = [];
    return event;
  }
}
