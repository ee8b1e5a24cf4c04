// Elements from names, properties and children. Text enters the page through textContent alone.

export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/** An element; strings among the children become text nodes. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** A list of terms and values as <dt>/<dd> pairs; pairs without a value are left out. */
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return shown.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value)));
}

/** Copy text where the browser lets us (secure origins); the button says what came of it. */
export function wireCopy(button, read) {
  button.hidden = !navigator.clipboard;
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const done = await navigator.clipboard.writeText(read()).then(
      () => true,
      () => false,
    );
    button.textContent = done ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = label), 1500);
  });
}

export function round(value, digits = 1) {
  return Number(value).toLocaleString("en", { maximumFractionDigits: digits });
}
