// The working page: fetches tasks ahead, shows one, sends the answer and moves on. What the answer looks like is
// the business of the question's own module (choice.js, review.js, caption.js, verification.js), which calls `work`.

import { Keys } from "./keys.js";
import { recall, remember } from "./memory.js";
import { Outbox } from "./outbox.js";
import { isPassing, loadPicture, now, pause, post } from "./server.js";
import { Viewer } from "./viewer.js";

const AHEAD = 6; // tasks held, the shown one included
const MOST = 20; // that the server lends one person
const LABELS = { left: "Left picture", right: "Right picture", only: "Picture" };

const PANS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const $ = (selector) => document.querySelector(selector);

/**
 * Begins to work.
 * @param form {show(task): fill the controls for this task; wants(answer): a line on what is missing, or "";
 *   sent(): the answer is on its way}
 * @returns {keys, submit(answer), say(line)}
 */
export function work(form) {
  const { batch, person, question, uiVersion } = document.body.dataset;
  const place = `emu.${person}.${batch}`;
  const keys = new Keys(`emu.${person}.keys.${question}`);
  const queue = []; // {task, pictures}; the first is the one shown
  const answered = new Set(); // tokens
  const skipped = new Set(); // tokens of tasks whose pictures cannot be shown
  let guidelineVersion = Number(document.body.dataset.guidelineVersion);
  let previous = null; // the task answered last, kept for an undo
  let times = null; // of the shown task; null until its pictures are on the screen
  let isUndoing = false;
  let isFilling = false;
  let isLoading = false;
  let isSignedOut = false;
  let remark = "";
  let trouble = "";

  const viewer = new Viewer($("#stage"), (isStacked) => document.body.classList.toggle("stacked", isStacked));
  const outbox = new Outbox(`${place}.answer`, {
    accepted(entry, body) {
      setTrouble("");
      showProgress(body.progress);
      settled();
    },
    refused(entry, status, message) {
      setTrouble("");
      say(`Your last answer was not taken: ${message ?? `the server said ${status}`}.`);
      settled();
    },
    waiting(number) {
      isUndoing = false;
      setTrouble(`No connection. ${kept(number)} on this device and will be sent when it is back.`);
    },
    signedOut: askToSignIn,
  });

  function settled() {
    if (isUndoing && !outbox.size) takeBack();
    fill();
  }

  // --- what is said ------------------------------------------------------------------------------------

  function kept(number) {
    return number === 1 ? "Your answer is kept" : `${number} answers are kept`;
  }

  function say(line) {
    remark = line;
    showNote();
  }

  function setTrouble(line) {
    trouble = line;
    showNote();
  }

  function showNote() {
    $("#note").classList.toggle("warn", Boolean(trouble));
    $("#note").replaceChildren(...[trouble || remark].flat());
  }

  function askToSignIn() {
    isSignedOut = true;
    isUndoing = false;
    const number = outbox.size;
    const link = document.createElement("a");
    link.href = `/login?next=${encodeURIComponent(location.pathname)}`;
    link.textContent = "Sign in";
    link.target = "_blank";
    setTrouble(["You are signed out. ", link, number ? ` again; ${kept(number).toLowerCase()}.` : " again."]);
  }

  /** Back from signing in in another window. */
  function resume() {
    if (!isSignedOut) return;
    isSignedOut = false;
    setTrouble("");
    outbox.flush();
    fill();
    loadAll();
  }

  function showProgress(progress) {
    if (!progress) return;
    const { done, total, mine, seconds_left: seconds } = progress;
    $("#done").max = Math.max(total, 1);
    $("#done").value = done;
    $("#amount").textContent = [
      `${mine.toLocaleString("en")} by you`,
      `${Math.floor((100 * done) / Math.max(total, 1))}\u00a0% of all`,
      ...(seconds === null || seconds === undefined || done >= total ? [] : [`${duration(seconds)} left`]),
    ].join(" · ");
  }

  // --- tasks and their pictures ------------------------------------------------------------------------

  const isKnown = (token) =>
    queue.some(({ task }) => task.token === token) ||
    answered.has(token) ||
    skipped.has(token) ||
    outbox.has(token); // of an earlier visit

  /** Asks for more tasks where few are left, and loads their pictures in order. */
  async function fill() {
    if (isFilling || queue.length > AHEAD / 2) return;
    isFilling = true;
    // The server counts what it lent and has not back: answers on their way and skipped tasks are among these.
    const wanted = Math.min(MOST, AHEAD + outbox.size + skipped.size);
    let reply;
    for (let attempt = 0; isPassing((reply = await post(`/api/${batch}/next`, { num: wanted })).status); ) {
      if (!outbox.isWaiting) setTrouble("No connection. Trying again by itself.");
      await pause(attempt++);
    }
    isFilling = false;
    if (reply.status === 401) return askToSignIn();
    if (reply.status !== 200) return finish(reply.body.error ?? `The server said ${reply.status}.`);
    if (!outbox.isWaiting) setTrouble("");
    showProgress(reply.body.progress);
    renewGuideline(reply.body.guideline_version);
    const wasEmpty = !queue.length;
    for (const task of reply.body.tasks) if (!isKnown(task.token)) queue.push({ task, pictures: null });
    if (wasEmpty && queue.length) show();
    if (!queue.length && !outbox.size) finish();
    loadAll();
  }

  /** One task after the other, so that the shown one never waits for a later one. */
  async function loadAll() {
    if (isLoading) return;
    isLoading = true;
    for (let item; !isSignedOut && (item = queue.find(({ pictures }) => !pictures)); ) await load(item);
    isLoading = false;
  }

  async function load(item) {
    for (let attempt = 0; queue.includes(item); ) {
      try {
        item.pictures = await Promise.all(item.task.pictures.map(loadPicture));
        if (item === queue[0]) {
          if (!outbox.isWaiting) setTrouble("");
          showPictures();
        }
        return;
      } catch ({ status }) {
        if (status === 401) return askToSignIn();
        if (!isPassing(status)) return drop(item);
        if (item === queue[0]) setTrouble("No connection. The pictures will be fetched again by themselves.");
        await pause(attempt++);
      }
    }
  }

  function drop(item) {
    const isShown = item === queue[0];
    queue.splice(queue.indexOf(item), 1);
    skipped.add(item.task.token);
    if (isShown) show();
    say("A picture could not be shown and was left out.");
    fill();
  }

  function show() {
    times = null;
    remark = "";
    document.body.classList.add("waits");
    const [item] = queue;
    for (const part of ["#ask", "#stage", "#controls"]) $(part).hidden = !item;
    if (!item) return viewer.reserve([]);
    $("#finished").hidden = true;
    $("#prompt").hidden = item.task.prompt === null;
    $("#prompt-text").textContent = item.task.prompt ?? "";
    form.show(item.task);
    viewer.reserve(item.task.pictures);
    if (item.task.answer) say("Your last answer is marked. Answer again to change it.");
    if (item.pictures) showPictures();
    else if (!item.task.answer) say(item.task.pictures.length > 1 ? "Loading the pictures…" : "Loading the picture…");
    showNote();
  }

  function showPictures() {
    const [item] = queue;
    viewer.fill(item.pictures, item.task.pictures.map(({ side }) => LABELS[side]));
    // Two frames later the pictures have been painted; only now can a person have seen them.
    requestAnimationFrame(() =>
      requestAnimationFrame(() => {
        if (item !== queue[0]) return;
        times = { shown_at: now(), first_input_at: null };
        document.body.classList.remove("waits");
        if (!item.task.answer) say("");
        $("#spoken").textContent = `${item.pictures.length > 1 ? "Both pictures are" : "The picture is"} shown.`;
      }),
    );
  }

  function finish(message = null) {
    queue.length = 0;
    $("#stage").hidden = $("#ask").hidden = $("#controls").hidden = true;
    $("#finished").hidden = false;
    if (message) $("#finished-line").textContent = message;
    $("#finished a").focus();
    say("");
  }

  // --- answering ---------------------------------------------------------------------------------------

  function submit(answer) {
    const [item] = queue;
    if (!item) return;
    if (isUndoing) return say("One moment: your last answer is being taken back.");
    if (!times) {
      return say(
        item.task.pictures.length > 1
          ? "One moment: an answer counts once both pictures are shown."
          : "One moment: an answer counts once the picture is shown.",
      );
    }
    const missing = form.wants?.(answer);
    if (missing) return say(missing);
    const entry = {
      token: item.task.token,
      nonce: [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join(""),
      answer,
      seen: Object.fromEntries(item.pictures.map(({ side, proof }) => [side, proof])),
      times: {
        ...times,
        loaded_at: Object.fromEntries(item.pictures.map(({ side, loadedAt }) => [side, loadedAt])),
        submitted_at: now(),
      },
      viewport: [innerWidth, innerHeight],
      ui_version: uiVersion,
    };
    queue.shift();
    answered.add(entry.token);
    form.sent?.();
    for (const { image } of previous?.pictures ?? []) URL.revokeObjectURL(image.src);
    previous = item;
    $("#stage").focus({ preventScroll: true }); // off the button, which Space would press again
    show();
    outbox.add(entry);
    fill();
  }

  /** What is still on its way arrives first: it is the answer to be taken back. */
  function undo() {
    if (outbox.isWaiting) return say("Undo works again when the connection is back.");
    if (isUndoing) return;
    isUndoing = true;
    if (!outbox.size) takeBack();
  }

  async function takeBack() {
    const { status, body } = await post(`/api/${batch}/undo`, {});
    isUndoing = false;
    if (status === 401) return askToSignIn();
    if (status === 0) return say("No connection: nothing was taken back.");
    if (status !== 200) return say(`Nothing was taken back: ${body.error ?? `the server said ${status}`}.`);
    answered.delete(body.task.token);
    const isLast = previous?.task.token === body.task.token;
    queue.unshift({ task: body.task, pictures: isLast ? previous.pictures : null });
    if (isLast) previous = null;
    show();
    loadAll();
  }

  for (const kind of ["keydown", "pointerdown"]) {
    document.addEventListener(kind, () => times && (times.first_input_at ??= now()), true);
  }

  // --- the guideline -----------------------------------------------------------------------------------

  const guideline = $("#guideline");

  function toggleGuideline() {
    if (guideline.open) return guideline.close();
    guideline.show();
    guideline.focus(); // not its button: the keys go on answering
    document.body.classList.add("guided");
  }

  async function renewGuideline(version) {
    if (!version || version === guidelineVersion) return;
    const response = await fetch(`/guideline/${batch}`);
    if (!response.ok) return;
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    $("#guideline-text").replaceChildren(...page.querySelector("#guideline-text").childNodes);
    guidelineVersion = version;
    firstReading("The guideline has changed");
  }

  /** A guideline, and every new version of it, is read before the first answer. */
  function firstReading(title) {
    if (recall(`${place}.guideline`, 0) >= guidelineVersion) return;
    $("#guideline-title").textContent = title;
    if (guideline.open) guideline.close();
    guideline.showModal();
    $("#begin").focus();
  }

  guideline.addEventListener("close", () => {
    const isFirst = recall(`${place}.guideline`, 0) < guidelineVersion;
    remember(`${place}.guideline`, guidelineVersion);
    document.body.classList.remove("guided");
    $("#guideline-title").textContent = "Guideline";
    if (!isFirst) return;
    if (times) times = { shown_at: now(), first_input_at: null }; // reading took its own time
    form.focus?.();
  });
  $("#begin").addEventListener("click", () => guideline.close());

  /** Shift and an arrow move what is shown of the enlarged pictures; the arrow alone may be an answer. */
  function pan(event) {
    if (!event.shiftKey || !(event.key in PANS) || event.target.closest("input, textarea, select")) return;
    event.preventDefault();
    viewer.pan(...PANS[event.key].map((step) => step / 4));
  }

  // --- begin -------------------------------------------------------------------------------------------

  const begin = () => {
    keys.add("undo", "Undo", ["z"], undo);
    keys.add("zoom", "Full size", [" ", "Enter"], () => viewer.toggle());
    keys.add("nearer", "Zoom in", ["+"], () => viewer.zoomBy(1.5));
    keys.add("farther", "Zoom out", ["-"], () => viewer.zoomBy(1 / 1.5));
    keys.add("guideline", "Guideline", ["g"], toggleGuideline);
    keys.add("keys", "These keys", ["?"], () => keys.open());
    document.addEventListener("keydown", pan, true);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog:modal")) return;
      if (event.target.closest("input, textarea")) event.target.blur();
      else if (guideline.open) guideline.close();
      else if (viewer.isZoomed) viewer.toggle();
    });
    $("#again").addEventListener("click", () => fill());
    addEventListener("focus", resume);
    firstReading("Before you begin");
    outbox.flush();
    fill();
  };
  queueMicrotask(begin);

  return { keys, submit, say };
}

/** 1500 -> "about 25 min". */
function duration(seconds) {
  if (seconds < 90) return "about a minute";
  if (seconds < 90 * 60) return `about ${Math.round(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `about ${Math.round(seconds / 3600)} h`;
  return `about ${Math.round(seconds / 86400)} days`;
}
