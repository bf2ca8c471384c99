// The lead's pages: copying a link, and deciding by keyboard.

import { written } from "./keys.js";

for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    const field = document.getElementById(button.dataset.copies);
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
    } catch {
      document.execCommand("copy"); // the clipboard is closed to pages that do not come over https
    }
    button.textContent = "Copied";
  });
}

const pressed = new Map();
for (const element of document.querySelectorAll("[data-keys]")) {
  const keys = element.dataset.keys.split(" ");
  element.querySelector("kbd").textContent = written(keys[0]);
  for (const key of keys) pressed.set(key, element);
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select")) return;
  const element = pressed.get(event.key.length === 1 ? event.key.toLowerCase() : event.key);
  if (!element) return;
  event.preventDefault();
  element.click();
});
