// Event handlers of the controls, the image, the heads, and the charts.

import { epochAt } from "./charts.js";
import { nearestSnapshot } from "./curves.js";
import { arrowOf, drawSelection } from "./heads.js";
import { copyHead, dragKernel, setKernel } from "./kernel.js";
import { changedGate, changedGates, find, findAll, gatedLayers, KINDS, numHeads, on, patchAt,
  placeOf, state } from "./state.js";
import { startTraining, train } from "./train.js";
import { drawQuery, moveQuery, navigate, pinGates, play, setGates, setLocked, showImage, showModel,
  showSnapshot, showTab, showUpload, step, stop } from "./view.js";

export function bindAll() {
  for (const bind of [bindTabs, bindControls, bindImage, bindUploads, bindHeads, bindHeatmap,
    bindCharts, bindExports, bindKernel]) bind();
}

function bindTabs() {
  const tabs = findAll("[role=tab]");
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      const other = tabs.at(target % tabs.length);
      other.focus();
      showTab(other.dataset.tab);
    });
  }
}

function bindControls() {
  on(".models", "click", ({ target: { dataset: { model } } }) => {
    if (model !== undefined && model !== state.key) showModel(model);
  });
  on(".layer", "change", (event) => navigate({ layer: Number(event.target.value) }));
  on(".snapshot", "input", (event) => showSnapshot(event.target.valueAsNumber));
  on(".play", "click", play);
  on(".step", "click", () => {
    stop();
    step();
  });
  on(".reset", "click", () => showSnapshot(0));
  on(".kinds", "click", ({ target: { dataset: { kind } } }) => { if (kind) navigate({ kind }); });
  find(".kinds").innerHTML = KINDS.map((kind) =>
    `<button type="button" class="${kind}" data-kind="${kind}">${kind}</button>`).join("");
  on(".options", "input", () => {
    find(".mass-percent").textContent = `${Math.round(100 * find(".mass").value)}%`;
    drawQuery();
  });
  on(".pins", "click", ({ target: { dataset: { pin, scope } } }) => {
    if (pin === undefined) return;
    pinGates(scope === "layer" ? [state.layer] : gatedLayers(), pin === "" ? null : Number(pin));
  });
  on(".train", "click", startTraining);
  on(".train-stop", "click", () => train("stop"));
}

function bindImage() {
  const pointed = (event) => {
    const [rows, columns] = state.model.grid;
    const box = event.target.getBoundingClientRect();
    const index = (offset, length, count) =>
      Math.max(0, Math.min(count - 1, Math.floor((offset / length) * count)));
    return patchAt(index(event.clientX - box.left, box.width, columns),
      index(event.clientY - box.top, box.height, rows));
  };
  on(".image", "pointermove", (event) => {
    if (!state.locked && event.pointerType !== "touch") moveQuery(pointed(event));
  });
  on(".image", "click", (event) => {
    const query = pointed(event);
    setLocked(!(state.locked && query === state.query));
    moveQuery(query);
  });
  on(".image", "keydown", (event) => {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = arrows[event.key];
    const isToggle = event.key === "Enter" || event.key === " ";
    if (isToggle) setLocked(!state.locked);
    if (isToggle || move) event.preventDefault();
    if (!move) return;
    const [rows, columns] = state.model.grid;
    const [x, y] = placeOf(state.query).map((index, axis) => index + move[axis]);
    if (x < 0 || x >= columns || y < 0 || y >= rows) return;
    moveQuery(patchAt(x, y));
    find(".screen-reader").textContent = `row ${y + 1}, column ${x + 1}`;
  });
}

function bindUploads() {
  const show = (files) => { if (files[0]) showImage(null, files[0]); };
  const highlight = (dragging) => find(".viewer").classList.toggle("dragging", dragging);
  on(".file", "change", (event) => {
    show(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  on(".examples", "click", (event) => {
    const name = event.target.closest("button")?.dataset.example;
    if (name) showImage(name);
    else if (name === "") showUpload();
  });
  const page = state.element.ownerDocument;
  page.addEventListener("dragover", (event) => {
    event.preventDefault();
    highlight(true);
  });
  page.addEventListener("dragleave", (event) => { if (!event.relatedTarget) highlight(false); });
  page.addEventListener("drop", (event) => {
    event.preventDefault();
    highlight(false);
    show(event.dataTransfer.files);
  });
  page.addEventListener("paste", (event) => show(event.clipboardData.files));
}

function bindHeads() {
  const headAt = (event) => {
    const card = event.target.closest("[data-head]");
    return card && Number(card.dataset.head);
  };
  on(".heads", "pointerover", (event) => drawSelection(headAt(event)));
  on(".heads", "pointerleave", () => drawSelection());
  on(".heads", "click", (event) => {
    const head = headAt(event);
    if (!event.target.closest(".gate") && head !== null) navigate({ head });
  });
  const setGate = (event, wait) => {
    const gate = [`${state.layer},${headAt(event)}`, event.target.valueAsNumber];
    setGates(new Map([...state.gates, gate]), wait);
  };
  on(".heads", "input", (event) => setGate(event, true)); // mixed maps follow the slider
  on(".heads", "change", (event) => setGate(event, false)); // the model runs when it is released
}

function bindHeatmap() {
  const cellAt = (event) => {
    const { layer, cell } = event.target.dataset;
    return cell && { layer: Number(layer), head: Number(cell) };
  };
  on(".gate-heatmap", "click", (event) => { if (cellAt(event)) navigate(cellAt(event)); });
  on(".gate-heatmap", "keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numHeads(), ArrowDown: numHeads() };
    if (!moves[event.key]) return;
    event.preventDefault();
    const cells = findAll(".cell");
    cells[cells.indexOf(event.target) + moves[event.key]]?.focus();
  });
  on(".gate-heatmap", "pointerover", (event) => {
    const cell = cellAt(event);
    drawSelection(cell?.layer === state.layer ? cell.head : null);
  });
  on(".gate-heatmap", "pointerleave", () => drawSelection());
}

function bindCharts() {
  on(".viewer", "click", (event) => {
    const epoch = epochAt(event);
    if (epoch !== null) showSnapshot(nearestSnapshot(epoch));
  });
  on(".viewer", "pointerover", ({ target }) => {
    if (target.dataset?.curve) drawSelection(Number(target.dataset.curve));
    else if (target.closest("svg[data-last-epoch]")) drawSelection();
  });
}

function bindExports() {
  on(".save-png", "click", (event) => saveFigure(event.target, false));
  on(".save-gif", "click", (event) => saveFigure(event.target, true));
  on(".save-csv", "click", saveGates);
}

const download = (name, url) =>
  Object.assign(document.createElement("a"), { download: name, href: url }).click();

async function saveFigure(button, animated) {
  const { key, image, layer, head, snapshot, query } = state;
  if (!image) return;
  button.disabled = true;
  const gates = state.gates.size ? changedGates() : null;
  const view = { animated, layer, head, snapshot, query, gates };
  const answer = await state.source.exportFigure(key, image, view);
  button.disabled = false;
  if (answer) download(`convit-layer-${layer + 1}.${animated ? "gif" : "png"}`, answer.file);
}

// Trained gates of all snapshots, and those changed by hand, which hold for every snapshot.
function saveGates() {
  const { epochs, gate: snapshots } = state.model;
  const rows = snapshots.flatMap((layers, snapshot) => layers.flatMap((gates, layer) =>
    (gates ?? []).map((gate, head) =>
      [epochs[snapshot], layer + 1, head + 1, gate, changedGate(layer, head)].join(","))));
  const text = ["epoch,layer,head,gate,changed_gate", ...rows, ""].join("\n");
  download("convit-gates.csv", URL.createObjectURL(new Blob([text], { type: "text/csv" })));
}

function bindKernel() {
  for (const name of ["right", "down", "strength"]) {
    on(`.${name}`, "input", (event) => setKernel({ [name]: event.target.valueAsNumber }));
  }
  on(".kernel-map", "pointerdown", (event) => {
    event.target.setPointerCapture(event.pointerId);
    dragKernel(event);
  });
  on(".kernel-map", "pointermove", (event) => { if (event.buttons) dragKernel(event); });
  on(".copy-head", "click", copyHead);
  const steps = [-1, 0, 1];
  find(".taps").innerHTML = steps.flatMap((down) => steps.map((right) =>
    `<button type="button" data-right="${right}" data-down="${down}"
      aria-label="tap ${right} right, ${down} down">${arrowOf(right, down)}</button>`)).join("");
  on(".taps", "click", ({ target: { dataset: { right, down } } }) => {
    if (right) setKernel({ right: Number(right), down: Number(down), strength: 4 });
  });
}
