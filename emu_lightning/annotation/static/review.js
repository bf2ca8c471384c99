// Photography review: a mark 0, 1 or 2 for each criterion, reasons, then accept or reject.
// A mark's key marks the current criterion and moves to the next: five presses and a verdict.

import { work } from "./annotate.js";

const MARK_KEYS = [["j", "0"], ["k", "1"], ["l", "2"]];

const criteria = [...document.querySelectorAll(".criterion")];
const reasons = [...document.querySelectorAll(".tags button")];
const verdicts = [...document.querySelectorAll("#controls [data-answer]")];
const hint = document.querySelector("#hint");
const comment = document.querySelector("#comment");
let current = 0;

const isPressed = (button) => button.getAttribute("aria-pressed") === "true";
const press = (button, is) => button.setAttribute("aria-pressed", is);
const marked = (criterion) => [...criterion.querySelectorAll("button")].find(isPressed)?.value;

/** The criterion the keys mark; none once all have a mark. */
function moveTo(index) {
  current = Math.max(0, Math.min(criteria.length, index));
  criteria.forEach((criterion, i) => criterion.classList.toggle("current", i === current));
  criteria[current]?.scrollIntoView({ block: "nearest" });
  hint.textContent = criteria[current]?.dataset.hint ?? "All five are marked: accept or reject?";
}

function mark(index, value) {
  if (!criteria[index]) return;
  for (const button of criteria[index].querySelectorAll("button")) press(button, button.value === String(value));
  const missing = criteria.findIndex((criterion) => marked(criterion) === undefined);
  moveTo(missing < 0 ? criteria.length : missing); // after mending an earlier mark, back to where it went on
}

const desk = work({
  show({ answer }) {
    for (const criterion of criteria) {
      const value = answer?.[criterion.dataset.name];
      for (const button of criterion.querySelectorAll("button")) press(button, button.value === String(value));
    }
    for (const reason of reasons) press(reason, Boolean(answer?.reasons.includes(reason.value)));
    comment.value = answer?.comment ?? "";
    for (const button of verdicts) {
      button.classList.toggle("last", answer?.accept === (button.dataset.answer === "accept"));
    }
    moveTo(0);
  },
  wants(answer) {
    const index = criteria.findIndex(({ dataset }) => answer[dataset.name] === undefined);
    if (index < 0) return "";
    moveTo(index);
    return `Not yet: ${criteria[index].dataset.label.toLowerCase()} has no mark.`;
  },
});

criteria.forEach((criterion, index) => {
  for (const button of criterion.querySelectorAll("button")) {
    button.addEventListener("click", () => mark(index, button.value));
  }
});
for (const reason of reasons) reason.addEventListener("click", () => press(reason, !isPressed(reason)));
for (const button of verdicts) {
  const { action, label, keys, answer } = button.dataset;
  desk.keys.add(action, label, keys.split(" "), () => {
    const marks = criteria
      .filter((criterion) => marked(criterion) !== undefined)
      .map((criterion) => [criterion.dataset.name, Number(marked(criterion))]);
    desk.submit({
      ...Object.fromEntries(marks),
      accept: answer === "accept",
      reasons: reasons.filter(isPressed).map(({ value }) => value),
      comment: comment.value.trim(),
    });
  });
}
MARK_KEYS.forEach((keys, value) => desk.keys.add(`mark-${value}`, `Mark ${value}`, keys, () => mark(current, value)));
desk.keys.add("above", "Criterion above", ["ArrowUp"], () => moveTo(current - 1));
desk.keys.add("below", "Criterion below", ["ArrowDown"], () => moveTo(current + 1));
desk.keys.add("comment", "Write a comment", ["c"], () => comment.focus());
