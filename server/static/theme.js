// Light, dark, or as the system says. Runs before the page is painted, so that it never flashes in the other theme.

import { theme } from "./stored.js";

const root = document.documentElement;
if (theme.get()) root.dataset.theme = theme.get();

/** `select` holds the values "", "light" and "dark". */
export function wireTheme(select) {
  select.value = theme.get();
  select.addEventListener("change", () => {
    theme.set(select.value);
    if (select.value) root.dataset.theme = select.value;
    else delete root.dataset.theme;
  });
}
