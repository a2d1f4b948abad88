// The heads of a layer as small multiples, and the heatmap of all gates.

import { hueOf, option } from "./hero.js";
import { massThreshold, scaleOf } from "./maps.js";
import { allHeads, changedGate, depth, find, findAll, gatedLayers, gateOf, hasGates, meanDistance,
  numHeads, numPatches, placeOf, press, shownKind, state } from "./state.js";

export const gateColor = (gate) =>
  `color-mix(in oklab, var(--position) ${(100 * gate).toFixed(1)}%, var(--content))`;
export const arrowOf = (right, down) => "↖↑↗←•→↙↓↘"[3 * (down + 1) + right + 1];

let cards = []; // DOM nodes of the heads
let shownImage = null; // behind their maps

// Everything that depends on the query patch. Runs on every mouse move: it must not cause a page
// layout.
export function drawMaps(allMaps) {
  const kind = shownKind();
  const highest = allMaps.map((maps) => Math.max(...maps[kind]));
  const sameScale = find(".same-scale").checked;
  const place = placeOf(state.query).map((index) => `${100 * index}%`);
  allMaps.forEach((maps, head) => {
    const { canvas, frame, maximum } = cards[head];
    const scale = scaleOf(sameScale ? Math.max(...highest) : highest[head], numPatches());
    const threshold = massThreshold(maps[kind], option("mass"));
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    maps[kind].forEach((value, key) => {
      const alpha = value < threshold ? 0 : 255 * Math.sqrt(Math.min(1, value / scale));
      pixels.data.set([...hueOf(maps, kind, key), alpha], 4 * key);
    });
    context.putImageData(pixels, 0, 0);
    frame.style.transform = `translate(${place})`;
    maximum.data = highest[head].toFixed(2);
  });
}

// Everything that depends on the snapshot, the layer, and the gates.
export function drawHeads() {
  const gated = hasGates();
  if (shownImage !== state.image) { // as a data URL, it takes milliseconds
    shownImage = state.image;
    find(".heads").style.setProperty("--image", `url(${state.image.display})`);
  }
  cards.forEach(({ card, arrow, gateLine, slider, output, distance }, head) => {
    const gate = gateOf(state.layer, head);
    card.style.setProperty("--gate-color", gateColor(gate));
    card.style.setProperty("--gate", `${100 * gate}%`);
    card.dataset.gate = gate.toFixed(3);
    card.classList.toggle("changed", changedGate(state.layer, head) !== undefined);
    gateLine.hidden = !gated;
    slider.value = gate;
    const side = gate > 0.5 ? "mostly position" : "mostly content";
    slider.setAttribute("aria-valuetext", `${gate.toFixed(2)}, ${side}`);
    output.textContent = gate.toFixed(2);
    distance.textContent = meanDistance(head).toFixed(1);
    [arrow.textContent, arrow.title] = gated ? startOf(head) : ["", ""];
  });
  const number = state.layer + 1;
  find(".heads-title").textContent = `The ${numHeads()} heads of layer ${number}`;
  find(".heads-hint").textContent = gated
    ? "Laid out as the taps of a convolution kernel; arrows show where each head starts."
    : `Layer ${number} is plain self-attention: its heads have no gate and no position map.`;
  find(".hero-title").textContent =
    `Where the framed patch looks: layer ${number}, head ${state.head + 1}`;
}

// Where a head looks before training, as an arrow and in words: the center of its position map.
function startOf(head) {
  const [x, y, curvature] = state.model.v_pos[0][state.layer][head];
  const [right, down] = [x, y].map((slope) => Math.sign(Math.round(slope / (-2 * curvature))) || 0);
  const words = [["up", "", "down"][down + 1], ["left", "", "right"][right + 1]].filter(Boolean);
  const place = words.join(" and ") || "at the patch itself";
  return [arrowOf(right, down), `before training, it looks ${place}`];
}

export function drawHeatmap() {
  for (const cell of findAll(".cell")) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.cell)];
    const gate = gateOf(layer, head);
    cell.style.background = gateColor(gate);
    cell.title = `layer ${layer + 1}, head ${head + 1}: gate ${gate.toFixed(2)}`;
    cell.setAttribute("aria-label", cell.title);
    cell.classList.toggle("current-layer", layer === state.layer);
    // arrow keys move between cells
    cell.tabIndex = layer === state.layer && head === state.head ? 0 : -1;
  }
  const gates = gatedLayers().flatMap((layer) => allHeads().map((head) => gateOf(layer, head)));
  const first = gatedLayers().length + 1;
  find(".heatmap-summary").textContent = gates.length === 0
    ? "This model is a plain ViT: no head has a gate or a position map, only content maps."
    : `${gates.filter((gate) => gate < 0.5).length} of ${gates.length} gates are below 0.5.`
      + (first > depth() ? "" : ` Layers ${first} to ${depth()} have no gates.`);
}

// Highlight the hovered head, or else the selected one, in the cards, the curves, and the heatmap.
export function drawSelection(hovered = null) {
  const highlighted = hovered ?? state.head;
  cards.forEach(({ card }, head) => {
    card.classList.toggle("selected", head === state.head || head === hovered);
  });
  press(".select-head", ({ select }) => Number(select) === state.head);
  for (const curve of findAll("[data-curve]")) {
    curve.classList.toggle("selected", Number(curve.dataset.curve) === highlighted);
  }
  for (const cell of findAll(".cell")) {
    const isLayer = Number(cell.dataset.layer) === state.layer;
    cell.classList.toggle("selected", isLayer && Number(cell.dataset.cell) === highlighted);
  }
}

// One card per head, laid out like the taps of the kernel: head h in row h % rows, column
// floor(h / rows); and a row of cells per layer, for its gates.
export function buildHeads() {
  const [rows, columns] = state.model.grid;
  const [kernelRows, kernelColumns] = state.model.kernel;
  const container = find(".heads");
  container.style.cssText = `--patch-width: ${100 / columns}%; --patch-height: ${100 / rows}%;
    grid-template-columns: repeat(${kernelColumns}, minmax(0, 1fr))`;
  container.innerHTML = allHeads().map((tap) => {
    const head = Math.floor(tap / kernelColumns) + (tap % kernelColumns) * kernelRows;
    return `<div class="head" data-head="${head}">
      <div class="head-line"><button type="button" class="select-head" data-select="${head}"
        aria-label="select head ${head + 1}">head ${head + 1}</button>
        <span class="arrow" role="img"></span> <span class="maximum">max <span>0</span></span></div>
      <div class="map"><canvas width="${columns}" height="${rows}"></canvas><i></i></div>
      <label class="gate"><input type="range" min="0" max="1" step="0.01"
        aria-label="gate of head ${head + 1}"><output></output></label>
      <div class="head-distance">looks <span class="distance"></span> patches far</div></div>`;
  }).join("");
  cards = allHeads().map((head) => {
    const card = container.querySelector(`[data-head="${head}"]`);
    const node = (selector) => card.querySelector(selector);
    return {
      card, canvas: node("canvas"), frame: node("i"), arrow: node(".arrow"),
      maximum: node(".maximum span").firstChild, gateLine: node(".gate"), slider: node("input"),
      output: node("output"), distance: node(".distance"),
    };
  });

  const row = (label, cell) => `<span>${label}</span>${allHeads().map(cell).join("")}`;
  const heatmap = find(".gate-heatmap");
  heatmap.style.gridTemplateColumns = `auto repeat(${numHeads()}, minmax(0, 1fr))`;
  heatmap.innerHTML = row("head", (head) => `<span class="head-number">${head + 1}</span>`)
    + gatedLayers().map((layer) => row(`layer ${layer + 1}`, (head) => `<button type="button"
      class="cell" data-layer="${layer}" data-cell="${head}"></button>`)).join("");
}
