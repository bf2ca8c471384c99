// Answers on their way. Each lies in the browser's storage under its own name until the server has it, and goes
// out again with the same nonce, so that it is counted once however often it is sent.

import { forget, names, recall, remember } from "./memory.js";
import { isPassing, pause, post } from "./server.js";

export class Outbox {
  #entries;
  #sending = null;

  /**
   * @param name where the answers are kept; one name per person and batch
   * @param told {accepted(entry, body), refused(entry, status, message), waiting(number), signedOut(number)}
   */
  constructor(name, told) {
    this.name = name;
    this.told = told;
    this.isWaiting = false;
    this.#entries = names(`${name}.`).map((key) => recall(key)).filter(Boolean);
  }

  get size() {
    return this.#entries.length;
  }

  has(token) {
    return this.#entries.some((entry) => entry.token === token);
  }

  add(entry) {
    this.#entries.push(entry);
    remember(`${this.name}.${entry.nonce}`, entry);
    return this.flush();
  }

  /** Sends what there is, one after the other; resolves when nothing is left or nobody is signed in. */
  flush() {
    this.#sending ??= this.#send().finally(() => (this.#sending = null));
    return this.#sending;
  }

  async #send() {
    for (let attempt = 0; this.size; ) {
      const entry = this.#entries[0];
      const { status, body } = await post("/api/answer", entry);
      if (isPassing(status)) {
        this.isWaiting = true;
        this.told.waiting(this.size);
        await pause(attempt++);
        continue;
      }
      if (status === 401) return this.told.signedOut(this.size);
      attempt = 0;
      this.isWaiting = false;
      this.#entries.shift();
      forget(`${this.name}.${entry.nonce}`);
      if (status === 200) this.told.accepted(entry, body);
      else this.told.refused(entry, status, body.error);
    }
  }
}
