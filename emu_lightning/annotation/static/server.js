// Talking to the server. Times are seconds since 1970, as the server keeps them.

const PATIENCE = 20_000; // milliseconds until a silent server counts as no connection

export const now = () => Date.now() / 1000;

/** Posts JSON. Resolves to {status, body}; status is 0 where no answer came. */
export async function post(url, body) {
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Emu": "1" },
      body: JSON.stringify(body),
      keepalive: true, // an answer given just before the page closes still arrives
      signal: AbortSignal.timeout(PATIENCE),
    });
    const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
    return { status: response.status, body: isJson ? await response.json() : {} };
  } catch {
    return { status: 0, body: {} };
  }
}

/** No connection, or a server that will be well again: the same request may succeed later. */
export const isPassing = (status) => status === 0 || status === 429 || status >= 500;

/** Waits 1, 2, 4 ... 15 seconds at the given attempt; less where the browser says it is online again. */
export function pause(attempt) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, Math.min(15_000, 1000 * 2 ** attempt));
    addEventListener("online", done);
  });
}

/**
 * Fetches one picture and decodes it, so that it appears at once and whole when it is put into the page.
 * The header X-Seen proves to the server that its bytes arrived.
 * Throws an Error with `status` (0: no connection, -1: these bytes are no picture).
 */
export async function loadPicture({ side, url }) {
  let blob, proof;
  try {
    const response = await fetch(url);
    if (!response.ok) throw Object.assign(new Error(url), { status: response.status });
    proof = response.headers.get("X-Seen");
    blob = await response.blob();
  } catch (error) {
    throw Object.assign(error, { status: error.status ?? 0 });
  }
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  image.draggable = false;
  try {
    await image.decode();
  } catch (error) {
    URL.revokeObjectURL(image.src);
    throw Object.assign(new Error(url), { status: -1 });
  }
  return { side, image, proof, loadedAt: now() };
}
