// Starts the page, and handles the events of its controls.

import { nearestEpoch } from "./charts.js";
import { find, findAll, on, onClick, render, viewer } from "./dom.js";
import { drawSelection, headOf } from "./heads.js";
import { allHeads, changedGate, changedGates, gatedLayers, headMaps, isGrowing, isOwn, patchAt,
  placeOf, SESSION, state } from "./state.js";
import { bindTour, openTour } from "./tour.js";
import { loadNewSnapshots, train } from "./train.js";
import { TRAINED, urlOf } from "./url.js";
import { ask, draw, moveQuery, navigate, nextSnapshot, pinGates, play, setGates, showExample,
  showFile, showModel, showSnapshot, showTab } from "./view.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Columns and rows that a key moves by; none for shortcuts of the browser.
const arrowOfKey = ({ key, altKey, ctrlKey, metaKey }) =>
  (altKey || ctrlKey || metaKey ? undefined : ARROWS[key]);

// `server` has the functions of app.py; static.js has a substitute for sites without a server.
export async function start(server, isStatic = false) {
  if (!Uint8Array.fromBase64) {
    render(".error", "This page needs Chrome or Edge 140, Firefox 133, Safari 18.2, or newer.");
    return;
  }
  state.server = server;
  viewer.classList.toggle("static", isStatic);
  viewer.classList.toggle("framed", window !== window.top); // as on Hugging Face
  if (!isStatic) bindFiles();
  while (!(await showUrl())) {
    await new Promise((resolve) => { setTimeout(resolve, 2000); }); // the server may be restarting
  }
  viewer.classList.remove("loading");
  bindTour();
  if (!isStatic) train("status");
  setInterval(() => { if (isGrowing() && !isOwn()) loadNewSnapshots(); }, 5000);
  addEventListener("hashchange", showUrl); // the user has pasted the URL of a view
  window.convit = { headMaps, pixels: () => state.image.pixels, state }; // for tests and benchmarks
}

// Show the view that the URL contains, or the first model if that of the URL is gone.
async function showUrl() {
  const { hash } = location;
  const [tab, model] = ["tab", "model"].map((name) => urlOf(hash).get(name) ?? "");
  if (findAll("[data-tab]").some(({ dataset }) => dataset.tab === tab)) state.tab = tab;
  const key = model === TRAINED ? SESSION : model;
  if (!(await showModel(key, hash))) {
    const reason = find(".error").textContent;
    if (key === "" || !(await showModel("", ""))) return false;
    render(".error", reason);
  }
  if (tab === "help") openTour();
  return true;
}

// Models, tabs, training time, and pins.
onClick("[data-model]", ({ model }) => showModel(model));
onClick("[data-tab]", ({ tab }) => showTab(tab));
bindArrows(".tabs", "[data-tab]", () => 0, (tab) => tab.click());
onClick(".play", play);
onClick(".step", () => showSnapshot(nextSnapshot()));
onClick(".reset", () => showSnapshot(0));
on(".snapshot", "input", (event) => showSnapshot(event.target.valueAsNumber));
onClick("[data-last-epoch]", (_, event) => showSnapshot(nearestEpoch(state.model.epochs, event)));
onClick("[data-pin]", ({ scope, pin }) => pinGates(
  scope === "layer" ? [state.layer] : gatedLayers(), pin === "" ? null : Number(pin)));

// Arrow keys move the focus within a group of buttons, which are laid out in rows.
function bindArrows(group, buttons, rowLength, onMove = () => {}) {
  on(group, "keydown", (event) => {
    const [right, down] = arrowOfKey(event) ?? [0, 0];
    const move = right + down * rowLength();
    if (!move) return;
    event.preventDefault();
    const all = findAll(buttons);
    const next = all.at((all.indexOf(event.target) + move) % all.length);
    next.focus();
    onMove(next);
  });
}

// The patch under the pointer.
const pointed = ({ target, offsetX, offsetY }) => {
  const [rows, columns] = state.model.grid;
  const [x, y] = [offsetX / target.clientWidth, offsetY / target.clientHeight];
  return patchAt(columns * x, rows * y);
};
on(".image", "pointermove", (event) => {
  if (!state.locked && event.pointerType !== "touch") moveQuery(pointed(event));
});
on(".image", "click", (event) => {
  const query = pointed(event);
  navigate({ query, locked: !(state.locked && query === state.query) });
});
on(".image", "keydown", (event) => {
  const isToggle = event.key === "Enter" || event.key === " ";
  const arrow = arrowOfKey(event);
  if (!isToggle && !arrow) return;
  event.preventDefault();
  if (isToggle) return navigate({ locked: !state.locked });
  const [x, y] = placeOf(state.query).map((index, axis) => index + arrow[axis]);
  moveQuery(patchAt(x, y));
  const [column, row] = placeOf(state.query);
  render(".screen-reader", `row ${row + 1}, column ${column + 1}`);
});
onClick("[data-kind]", ({ kind }) => navigate({ kind }));
onClick("[data-example]", ({ example }) => (example ? showExample(example)
  : navigate({ example: null, image: state.upload })));

function bindFiles() {
  const show = (files) => { if (files[0]) showFile(files[0]); };
  on(".file", "change", (event) => {
    show(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      event.preventDefault();
      const isOver = type === "dragover" || (type === "dragleave" && event.relatedTarget !== null);
      viewer.classList.toggle("dragging", isOver);
      if (type === "drop") show(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => show(event.clipboardData.files));
}

// Layers, heads, and display options.
on(".layer", "change", (event) => navigate({ layer: Number(event.target.value) }));
onClick("[data-cell]", ({ layer, cell }) => navigate({ layer: Number(layer), head: Number(cell) }));
bindArrows(".gate-heatmap", ".cell", () => allHeads().length);
onClick("[data-head]", ({ head }, event) => {
  if (!event.target.closest(".gate")) navigate({ head: Number(head) });
});
document.addEventListener("mouseover", drawSelection);
for (const type of ["input", "change"]) { // the model runs when the slider is released
  on(".heads", type, ({ target }) => {
    const gate = [`${state.layer},${headOf(target.closest(".head"))}`, target.valueAsNumber];
    setGates(new Map([...state.gates, gate]), type === "input");
  });
}
on(".options", "input", draw);

const download = (name, url) =>
  Object.assign(document.createElement("a"), { download: name, href: url }).click();
onClick("[data-export]", async ({ export: suffix }, { target: button }) => {
  const { image: { display, pixels }, layer, head, snapshot, query } = state;
  const gates = state.gates.size ? changedGates() : null;
  button.disabled = true;
  const answer = await ask("export",
    { animated: suffix === "gif", display, pixels, layer, head, snapshot, query, gates });
  button.disabled = false;
  if (answer) download(`convit-layer-${layer + 1}.${suffix}`, answer.file);
});
// trained gates of all snapshots, and those changed by hand, which apply to every snapshot
onClick(".save-csv", () => {
  const { epochs, gate: snapshots } = state.model;
  const rows = snapshots.flatMap((layers, snapshot) => layers.flatMap((gates, layer) =>
    (gates ?? []).map((gate, head) =>
      [epochs[snapshot], layer + 1, head + 1, gate, changedGate(layer, head)].join())));
  const text = ["epoch,layer,head,gate,changed_gate", ...rows, ""].join("\n");
  download("convit-gates.csv", `data:text/csv,${encodeURIComponent(text)}`);
});
