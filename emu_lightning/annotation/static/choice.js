// One press is the answer: screening, appeal, faithfulness.

import { work } from "./annotate.js";

const buttons = [...document.querySelectorAll("#controls [data-answer]")];

const desk = work({
  show({ answer }) {
    for (const button of buttons) button.classList.toggle("last", answer?.choice === button.dataset.answer);
  },
});

for (const button of buttons) {
  const { action, label, keys, answer } = button.dataset;
  desk.keys.add(action, label, keys.split(" "), () => {
    button.classList.add("pressed");
    setTimeout(() => button.classList.remove("pressed"), 120);
    desk.submit({ choice: answer });
  });
}
