// What each key does, and the small dialog in which a person changes that. Kept on this device per person.

import { forget, recall, remember } from "./memory.js";

const WRITTEN = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", " ": "Space", Escape: "Esc" };

export const written = (key) => WRITTEN[key] ?? (key.length === 1 ? key.toUpperCase() : key);
const plain = (key) => (key.length === 1 ? key.toLowerCase() : key);

export class Keys {
  #actions = new Map(); // id -> {label, usual, run}
  #changed;

  /** @param name where the person's own keys are kept */
  constructor(name) {
    this.name = name;
    this.#changed = recall(name, {});
    this.dialog = document.querySelector("#keys");
    this.list = this.dialog.querySelector("dl");
    this.hint = this.dialog.querySelector("p");
    this.said = this.hint.textContent;
    this.dialog.querySelector("[value=reset]").addEventListener("click", () => this.#reset());
    this.dialog.addEventListener("close", () => this.#listen(null));
    this.dialog.addEventListener("keydown", (event) => this.#caught(event), true);
    document.addEventListener("keydown", (event) => this.#pressed(event));
  }

  /**
   * An action with its usual keys, the first of which is shown. Every button with `data-action` of this id runs it.
   */
  add(id, label, usual, run) {
    this.#actions.set(id, { label, usual, run });
    for (const button of document.querySelectorAll(`button[data-action="${id}"]`)) {
      button.addEventListener("click", run);
    }
    this.#show();
  }

  open() {
    this.#list();
    this.dialog.showModal();
  }

  /** The keys of an action: the person's own one, or the usual ones. */
  of(id) {
    return this.#changed[id] ? [this.#changed[id]] : this.#actions.get(id).usual;
  }

  #pressed(event) {
    // Held keys would answer again and again; chords belong to the browser; fields and dialogs have keys of their own.
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog:modal") || event.target.closest("input, textarea, select")) return;
    if ((event.key === " " || event.key === "Enter") && event.target.closest("button, a, summary")) return;
    for (const [id, { run }] of this.#actions) {
      if (!this.of(id).includes(plain(event.key))) continue;
      event.preventDefault();
      return run();
    }
  }

  #show() {
    for (const id of this.#actions.keys()) {
      for (const kbd of document.querySelectorAll(`[data-action="${id}"] kbd, kbd[data-action="${id}"]`)) {
        kbd.textContent = written(this.of(id)[0]);
      }
    }
    if (this.dialog.open) this.#list();
  }

  #list() {
    this.list.replaceChildren(
      ...[...this.#actions].flatMap(([id, { label }]) => {
        const [term, description, button] = ["dt", "dd", "button"].map((tag) => document.createElement(tag));
        term.textContent = label;
        button.type = "button";
        button.dataset.id = id;
        button.textContent = written(this.of(id)[0]);
        button.setAttribute("aria-label", `${label}: ${button.textContent}. Press to change.`);
        button.addEventListener("click", () => this.#listen(id));
        description.append(button);
        return [term, description];
      }),
    );
  }

  #listen(id) {
    this.listening = id;
    this.hint.textContent = id ? `Press the new key for “${this.#actions.get(id).label}”. Esc leaves it.` : this.said;
    for (const button of this.list.querySelectorAll("button")) {
      button.classList.toggle("listening", button.dataset.id === id);
    }
  }

  #caught(event) {
    const id = this.listening;
    if (!id || ["Shift", "Control", "Alt", "Meta", "Tab"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    this.#listen(null);
    if (event.key === "Escape") return;
    const key = plain(event.key);
    const other = [...this.#actions.keys()].find((one) => one !== id && this.of(one).includes(key));
    // Exchanged, so that no action is left without a key.
    if (other) this.#changed[other] = this.of(other).find((one) => one !== key) ?? this.of(id)[0];
    this.#changed[id] = key;
    remember(this.name, this.#changed);
    this.#show();
    if (other) this.hint.textContent = `“${this.#actions.get(other).label}” had this key; it now has ${written(this.of(other)[0])}.`;
    this.list.querySelector(`[data-id="${id}"]`).focus();
  }

  #reset() {
    this.#changed = {};
    forget(this.name);
    this.#listen(null);
    this.#show();
  }
}
