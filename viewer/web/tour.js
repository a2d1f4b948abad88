// A tour in four steps, which explains how to read the page. The browser remembers that it was
// seen.

import { find, findAll } from "./state.js";
import { showTab } from "./view.js";

const steps = () => findAll(".tour [data-step]");
let current = 0;

const remember = (seen) => {
  try {
    if (seen) localStorage.setItem("convit-tour", "seen");
    return localStorage.getItem("convit-tour") === "seen";
  } catch {
    return true; // storage is disabled: do not open at every visit
  }
};

function show(index, scroll = true) {
  current = index;
  const all = steps();
  for (const [position, step] of all.entries()) step.hidden = position !== index;
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
  remember(true);
  find(".tour").hidden = true;
  for (const node of findAll(".tour-target")) node.classList.remove("tour-target");
  find(".open-tour").focus({ preventScroll: true });
}

export function bindTour(isRequested) {
  find(".open-tour").addEventListener("click", () => {
    open();
    find(".tour-next").focus();
  });
  find(".tour-next").addEventListener("click",
    () => (current === steps().length - 1 ? close() : show(current + 1)));
  find(".tour-back").addEventListener("click", () => show(current - 1));
  find(".tour-skip").addEventListener("click", close);
  find(".tour").addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "ArrowRight" && current < steps().length - 1) show(current + 1);
    if (event.key === "ArrowLeft" && current > 0) show(current - 1);
  });
  if (isRequested || !remember(false)) open();
}
