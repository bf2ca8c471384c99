// Verification: a written caption is accepted as it is, mended, or rejected.

import { work } from "./annotate.js";
import { begin, field, finish, onSubmit, written } from "./writing.js";

const [accept, edit, reject] = ["accept", "edit", "reject"].map((id) => document.querySelector(`[data-action=${id}]`));
let given = "";

const isChanged = () => written() !== given;

function showChange() {
  accept.classList.toggle("primary", !isChanged());
  edit.classList.toggle("primary", isChanged());
  edit.querySelector("span").textContent = isChanged() ? "Save the edit" : "Edit";
}

const desk = work({
  show({ token, caption, answer }) {
    given = (caption ?? "").trim();
    begin(token, answer?.text ?? given);
    for (const button of [accept, edit, reject]) {
      button.classList.toggle("last", answer?.verdict === button.dataset.answer);
    }
    showChange();
  },
  wants({ verdict, text }) {
    if (verdict === "edit" && !text) return "Not yet: the caption is empty. Reject it where nothing can be kept.";
    if (verdict === "accept" && isChanged()) return "The caption was changed: save the edit, or put the text back.";
    return "";
  },
  sent: finish,
});

function save() {
  if (isChanged()) desk.submit({ verdict: "edit", text: written() });
  else field.focus();
}

field.addEventListener("input", showChange);
onSubmit(() => (isChanged() ? save() : desk.submit({ verdict: "accept" })));
const actions = { accept: () => desk.submit({ verdict: "accept" }), edit: save, reject: () => desk.submit({ verdict: "reject" }) };
for (const button of [accept, edit, reject]) {
  const { action, label, keys } = button.dataset;
  desk.keys.add(action, label, keys.split(" "), actions[action]);
}
