// What the browser remembers: the theme for good, the API key until the tab closes. A browser that stores nothing
// for us (privacy modes throw) keeps both for as long as the page is open.

class Stored {
  #storage;
  #name;
  #value = "";

  constructor(storage, name) {
    this.#storage = storage;
    this.#name = name;
    this.#try((store) => (this.#value = store.getItem(name) ?? ""));
  }

  get() {
    return this.#value;
  }

  set(value) {
    this.#value = value;
    this.#try((store) => (value ? store.setItem(this.#name, value) : store.removeItem(this.#name)));
  }

  #try(use) {
    try {
      use(window[this.#storage]);
    } catch {
      // Not stored, then.
    }
  }
}

export const theme = new Stored("localStorage", "quill-theme");
export const apiKey = new Stored("sessionStorage", "quill-api-key");
