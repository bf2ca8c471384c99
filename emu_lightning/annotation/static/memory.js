// What this device remembers for a person: keys, drafts, answers not yet sent. A browser that refuses to store
// (private windows, a full disk) only forgets at the next visit.

export function remember(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {}
}

export function recall(name, otherwise = null) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function forget(name) {
  try {
    localStorage.removeItem(name);
  } catch {}
}

/** The names that begin with `prefix`, sorted. */
export function names(prefix) {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(prefix)).sort();
  } catch {
    return [];
  }
}
