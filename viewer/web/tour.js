// A tour in four steps, which explains the page. The browser remembers that it was seen.

import { find, findAll, on, onClick, render, storage } from "./dom.js";
import { showTab } from "./view.js";

const SEEN = { "convit-tour": "seen" };
const steps = findAll("[data-step]");
let current = 0; // index of the step on display

function show(index) {
  current = index;
  steps.forEach((step, position) => {
    step.hidden = position !== index;
    find(step.dataset.step).classList.toggle("tour-target", position === index);
  });
  render(".tour-count", `${index + 1} of ${steps.length}`);
  render(".tour-next", index === steps.length - 1 ? "Done" : "Next");
  if (!find(".tour").hidden) find(".tour-target").scrollIntoView({ block: "nearest" });
}

export function openTour() {
  showTab("watch");
  show(0);
  find(".tour").hidden = false;
  find(".tour-next").focus({ preventScroll: true });
}

function close() {
  find(".tour").hidden = true;
  find(".tour-target").classList.remove("tour-target");
  find(".open-tour").focus({ preventScroll: true });
  Object.assign(storage("localStorage", {}), SEEN); // last: a full storage raises an error
}

export function bindTour() {
  const next = () => (steps[current + 1] ? show(current + 1) : close());
  const back = () => show(Math.max(current - 1, 0));
  const keys = { Escape: close, ArrowLeft: back, ArrowRight: next };
  onClick(".open-tour", openTour);
  onClick("[data-tour]", ({ tour }) => keys[tour]());
  on(".tour", "keydown", ({ key }) => keys[key]?.());
  // where storage is disabled, it must not open at every visit
  if (!storage("localStorage", SEEN)["convit-tour"] && find(".tour").hidden) openTour();
}
