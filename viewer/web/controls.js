// Event handlers of the controls, the image, the heads, and the charts.

import { epochAt } from "./charts.js";
import { nearestSnapshot } from "./curves.js";
import { drawSelection } from "./heads.js";
import { copyHead, dragKernel, setKernel } from "./kernel.js";
import { changedGates, find, findAll, gatedLayers, KINDS, numHeads, state } from "./state.js";
import { startTraining, train } from "./train.js";
import { drawQuery, moveQuery, navigate, pinGates, play, setGates, setLocked, showImage, showModel,
  showTab,
  showUpload, step, stop } from "./view.js";

const on = (selector, type, handler) => find(selector).addEventListener(type, handler);

export function bindAll() {
  for (const bind of [bindTabs, bindControls, bindGates, bindImage, bindUploads, bindHeads,
    bindHeatmap, bindCharts,
    bindExports, bindKernel]) bind();
}

function patchAt(event) {
  const [rows, columns] = state.model.grid;
  const box = find(".image").getBoundingClientRect();
  const indexAt = (fraction, count) =>
    Math.max(0, Math.min(count - 1, Math.floor(fraction * count)));
  const column = indexAt((event.clientX - box.left) / box.width, columns);
  return indexAt((event.clientY - box.top) / box.height, rows) * columns + column;
}

function bindImage() {
  const canvas = find(".image");
  canvas.addEventListener("pointermove", (event) => {
    if (!state.locked && event.pointerType !== "touch") moveQuery(patchAt(event));
  });
  canvas.addEventListener("click", (event) => {
    const query = patchAt(event);
    setLocked(!(state.locked && query === state.query));
    moveQuery(query);
  });
  canvas.addEventListener("keydown", (event) => {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = arrows[event.key];
    const isToggle = event.key === "Enter" || event.key === " ";
    if (isToggle) setLocked(!state.locked);
    if (isToggle || move) event.preventDefault();
    if (!move) return;
    const [rows, columns] = state.model.grid;
    const [x, y] = [(state.query % columns) + move[0], Math.floor(state.query / columns) + move[1]];
    if (x < 0 || x >= columns || y < 0 || y >= rows) return;
    moveQuery(y * columns + x);
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
    const button = event.target.closest("button");
    if (button?.dataset.example) showImage(button.dataset.example);
    else if (button) showUpload();
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
    const gates = new Map(state.gates).set(`${state.layer},${headAt(event)}`,
      Number(event.target.value));
    setGates(gates, wait);
  };
  on(".heads", "input", (event) => setGate(event, true)); // mixed maps follow the slider
  on(".heads", "change", (event) => setGate(event, false)); // the model runs when it is released
  find(".kinds").innerHTML = KINDS.map((kind) =>
    `<button type="button" class="${kind}" data-kind="${kind}">${kind}</button>`).join("");
  on(".kinds", "click", (event) => {
    const { kind } = event.target.dataset;
    if (kind) navigate({ kind });
  });
}

function bindHeatmap() {
  on(".gate-heatmap", "click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) navigate({ layer: Number(cell.dataset.layer), head: Number(cell.dataset.cell) });
  });
  on(".gate-heatmap", "keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numHeads(), ArrowDown: numHeads() };
    if (!moves[event.key]) return;
    const cells = findAll(".gate-heatmap .cell");
    event.preventDefault();
    cells[cells.indexOf(event.target) + moves[event.key]]?.focus();
  });
  on(".gate-heatmap", "pointerover", (event) => {
    const cell = event.target.closest(".cell");
    drawSelection(cell && Number(cell.dataset.layer) === state.layer ? Number(cell.dataset.cell)
      : null);
  });
  on(".gate-heatmap", "pointerleave", () => drawSelection());
}

function bindCharts() {
  state.element.addEventListener("click", (event) => {
    const epoch = epochAt(event);
    if (epoch === null) return;
    stop();
    navigate({ snapshot: nearestSnapshot(epoch) });
  });
  state.element.addEventListener("pointerover", (event) => {
    if (event.target.dataset?.curve) drawSelection(Number(event.target.dataset.curve));
    else if (event.target.closest("svg[data-last-epoch]")) drawSelection();
  });
}

function bindTabs() {
  const tabs = findAll("[role=tab]");
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
      if (target === undefined) return;
      const other = tabs.at(target % tabs.length);
      event.preventDefault();
      other.focus();
      showTab(other.dataset.tab);
    });
  }
}

function bindControls() {
  on(".models", "click", (event) => {
    const { model } = event.target.dataset;
    if (model !== undefined && model !== state.key) showModel(model);
  });
  on(".layer", "change", (event) => navigate({ layer: Number(event.target.value) }));
  on(".snapshot", "input", (event) => {
    stop();
    navigate({ snapshot: Number(event.target.value) });
  });
  on(".play", "click", play);
  on(".step", "click", () => {
    stop();
    step();
  });
  on(".reset", "click", () => {
    stop();
    navigate({ snapshot: 0 });
  });
  for (const selector of [".same-scale", ".show-input", ".opacity"]) on(selector, "input",
    drawQuery);
  on(".mass", "input", (event) => {
    find(".mass-percent").textContent = `${Math.round(100 * event.target.value)}%`;
    drawQuery();
  });
  on(".train", "click", startTraining);
  on(".train-stop", "click", () => train("stop"));
}

function bindGates() {
  on(".pins", "click", (event) => {
    const { pin, scope } = event.target.dataset;
    if (pin === undefined) return;
    pinGates(scope === "layer" ? [state.layer] : gatedLayers(), pin === "" ? null : Number(pin));
  });
}

function bindExports() {
  on(".save-png", "click", () => saveFigure(false));
  on(".save-gif", "click", () => saveFigure(true));
  on(".save-csv", "click", saveGates);
}

function download(name, url) {
  const link = document.createElement("a");
  [link.download, link.href] = [name, url];
  link.click();
}

async function saveFigure(animated) {
  const { key, image, layer, head, snapshot, query } = state;
  if (!image) return;
  const button = find(animated ? ".save-gif" : ".save-png");
  button.disabled = true;
  const view = { animated, layer, head, snapshot, query, gates: state.gates.size ? changedGates()
    : null };
  const answer = await state.source.exportFigure(key, image, view);
  button.disabled = false;
  if (answer) download(`convit-layer-${layer + 1}.${animated ? "gif" : "png"}`, answer.file);
}

// Trained gates of all snapshots, and those changed by hand, which hold for every snapshot.
function saveGates() {
  const rows = state.model.gate.flatMap((layers, snapshot) => layers.flatMap((gates, layer) =>
    (gates ?? []).map((gate, head) =>
      [state.model.epochs[snapshot] ?? "", layer + 1, head + 1, gate,
      state.gates.get(`${layer},${head}`) ?? ""].join(","))));
  const text = ["epoch,layer,head,gate,changed_gate", ...rows].join("\n") + "\n";
  download("convit-gates.csv", URL.createObjectURL(new Blob([text], { type: "text/csv" })));
}

function bindKernel() {
  for (const name of ["right", "down", "strength"]) {
    on(`.${name}`, "input", (event) => setKernel({ [name]: Number(event.target.value) }));
  }
  on(".kernel-map", "pointerdown", (event) => {
    event.target.setPointerCapture(event.pointerId);
    dragKernel(event);
  });
  on(".kernel-map", "pointermove", (event) => { if (event.buttons) dragKernel(event); });
  on(".copy-head", "click", copyHead);
  const steps = [-1, 0, 1];
  find(".taps").innerHTML = steps.flatMap((down) => steps.map((right) => `<button type="button"
    data-right="${right}" data-down="${down}" aria-label="tap ${right} right, ${down} down">${
    "↖↑↗←•→↙↓↘"[3 * (down + 1) + right + 1]}</button>`)).join("");
  on(".taps", "click", (event) => {
    const { right, down } = event.target.dataset;
    if (right !== undefined) setKernel({ right: Number(right), down: Number(down), strength: 4 });
  });
}
