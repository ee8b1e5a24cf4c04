// The form: its controls as a request body, as the fragment of a replay link, and the mistakes in them.

import { byId, make } from "./dom.js";
import { FieldError, READERS, readIds, readSeed } from "./fields.js";

export class RequestForm {
  #form;
  #controls;

  constructor(form) {
    this.#form = form;
    this.#controls = [...form.querySelectorAll("[name]")];
    for (const control of this.#controls) control.addEventListener("input", () => this.#clear(control));
    for (const slider of form.querySelectorAll("input[data-for]")) wireSlider(slider, byId(slider.dataset.for));
  }

  /** The request as {body: JSON text, state, shaded}, or null after showing what is wrong. */
  read() {
    this.clearErrors();
    try {
      const { values, seed } = this.#values();
      const json = JSON.stringify(values);
      const state = new Map([...this.state(), ["seed", seed]]);
      return { body: `${json.slice(0, -1)},"seed":${seed}}`, state, seed, count: values.n ?? 1 };
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      this.showError(error.control.name, error.message);
      return null;
    }
  }

  #values() {
    const values = { prompt: this.#at("prompt", () => this.#prompt()), stream: true };
    for (const control of this.#controls.filter((each) => each.dataset.kind)) {
      const value = this.#at(control.name, () => READERS[control.dataset.kind](control));
      if (value !== undefined) values[control.name] = value;
    }
    return { values, seed: this.#at("seed", () => readSeed(this.#named("seed").value)) };
  }

  #prompt() {
    const text = this.#named("prompt").value;
    if (this.#named("prompt_kind").value === "text") return text;
    const ids = readIds(text);
    if (!ids.length) throw new FieldError("Write at least one token id.");
    return ids;
  }

  /** Run `read`; what it throws is about that control. */
  #at(name, read) {
    try {
      return read();
    } catch (error) {
      error.control = this.#named(name);
      throw error;
    }
  }

  #named(name) {
    return this.#controls.find((control) => control.name === name);
  }

  /** What differs from the page as it opens, by control; the prompt always. */
  state() {
    const changed = this.#controls.filter((each) => each.name === "prompt" || textOf(each) !== defaultOf(each));
    return new Map(changed.map((control) => [control.name, textOf(control)]));
  }

  /** Set every control: to its entry where there is one, else to how the page opens. */
  fill(state) {
    for (const control of this.#controls) {
      setText(control, state.get(control.name) ?? defaultOf(control));
      control.dispatchEvent(new Event("input"));
    }
    for (const details of this.#form.querySelectorAll("details")) {
      details.open = [...state.keys()].some((name) => details.contains(this.#named(name) ?? null));
    }
    this.clearErrors();
  }

  /** Show a message at a field and take the user there. False when there is no such field. */
  showError(name, message) {
    const control = this.#named(name);
    if (!control) return false;
    const id = `${control.id}-error`;
    this.#clear(control);
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", id);
    control.closest(".field").append(make("p", { id, className: "field-error" }, message));
    const details = control.closest("details");
    if (details) details.open = true;
    control.focus();
    return true;
  }

  clearErrors() {
    this.#controls.forEach((control) => this.#clear(control));
  }

  #clear(control) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-errormessage");
    document.getElementById(`${control.id}-error`)?.remove();
  }

  /** Bounds that the served model sets. */
  setLimits({ context, vocabulary }) {
    this.#named("max_tokens").max = context;
    this.#named("top_k").max = vocabulary;
  }
}

function textOf(control) {
  return control.type === "checkbox" ? String(control.checked) : control.value;
}

function defaultOf(control) {
  if (control.type === "checkbox") return String(control.defaultChecked);
  if (control.tagName !== "SELECT") return control.defaultValue;
  return ([...control.options].find((option) => option.defaultSelected) ?? control.options[0])?.value ?? "";
}

function setText(control, text) {
  if (control.type === "checkbox") control.checked = text === "true";
  else if (accepts(control, text)) control.value = text;
}

/** Whether a control can hold that text: links come from anywhere. */
function accepts(control, text) {
  if (control.tagName === "SELECT") return [...control.options].some((option) => option.value === text);
  return control.type !== "number" || !Number.isNaN(Number(text));
}

/** A slider moves its number field and follows it; the field is what counts and what assistive tools see. */
function wireSlider(slider, field) {
  const follow = () => (slider.value = field.value === "" ? field.placeholder : field.value);
  slider.addEventListener("input", () => {
    field.value = slider.value;
    field.dispatchEvent(new Event("input"));
  });
  field.addEventListener("input", follow);
  follow();
}
