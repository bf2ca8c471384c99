// The text field of captions and of their verification: a counter, and a draft that survives closing the page.

import { forget, recall, remember } from "./memory.js";

export const field = document.querySelector("#text");
const counter = document.querySelector("#length");
let draft = "";

/** Begins with the draft kept for this task, or else with `text`. */
export function begin(token, text) {
  draft = `emu.draft.${token}`;
  field.value = recall(draft, text);
  count();
}

export const written = () => field.value.trim();

/** The answer is sent: its draft is not needed any more. */
export const finish = () => forget(draft);

export function onSubmit(run) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.repeat) return;
    event.preventDefault();
    run();
  });
}

function count() {
  const length = [...field.value].length;
  const words = field.value.split(/\s+/).filter(Boolean).length;
  counter.textContent = `${words} word${words === 1 ? "" : "s"} · ${length} of ${field.maxLength} characters`;
}

field.addEventListener("input", () => {
  remember(draft, field.value);
  count();
});
