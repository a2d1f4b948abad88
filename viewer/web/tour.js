// A tour in four steps, which explains the page. The browser remembers that it was seen.

import { find, findAll, on } from "./state.js";
import { showTab } from "./view.js";

const steps = () => findAll(".tour [data-step]");
let current = 0;

function show(index, scroll = true) {
  const all = steps();
  if (!all[index]) return;
  current = index;
  all.forEach((step, position) => { step.hidden = position !== index; });
  for (const node of findAll(".tour-target")) node.classList.remove("tour-target");
  const target = find(all[index].dataset.step);
  target.classList.add("tour-target");
  if (scroll) target.scrollIntoView({ block: "nearest" });
  find(".tour-count").textContent = `${index + 1} of ${all.length}`;
  find(".tour-back").disabled = index === 0;
  find(".tour-next").textContent = index === all.length - 1 ? "Done" : "Next";
}

function open() {
  showTab("watch");
  find(".tour").hidden = false;
  show(0, false);
}

function close() {
  try {
    localStorage.setItem("convit-tour", "seen");
  } catch { /* storage is disabled */ }
  find(".tour").hidden = true;
  find(".tour-target").classList.remove("tour-target");
  find(".open-tour").focus({ preventScroll: true });
}

export function bindTour(isRequested) {
  on(".open-tour", "click", () => {
    open();
    find(".tour-next").focus();
  });
  on(".tour-next", "click", () => (current === steps().length - 1 ? close() : show(current + 1)));
  on(".tour-back", "click", () => show(current - 1));
  on(".tour-skip", "click", close);
  on(".tour", "keydown", ({ key }) => {
    if (key === "Escape") close();
    if (key === "ArrowRight") show(current + 1);
    if (key === "ArrowLeft") show(current - 1);
  });
  let isSeen = true; // storage may be disabled: do not open at every visit
  try {
    isSeen = localStorage.getItem("convit-tour") === "seen";
  } catch { /* see above */ }
  if (isRequested || !isSeen) open();
}
