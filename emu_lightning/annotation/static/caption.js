// Captions: write what the picture shows.

import { work } from "./annotate.js";
import { begin, field, finish, onSubmit, written } from "./writing.js";

const focus = () => field.focus({ preventScroll: true });

const desk = work({
  show({ token, answer }) {
    begin(token, answer?.text ?? "");
    focus();
  },
  focus,
  wants: ({ text }) => (text ? "" : "Not yet: there is no caption."),
  sent: finish,
});

const submit = () => desk.submit({ text: written() });
document.querySelector("#controls .primary").addEventListener("click", submit);
onSubmit(submit);
desk.keys.add("write", "Write", ["e"], focus);
