// The heads of a layer as small multiples, and the heatmap of all gates.

import { hueOf, option } from "./hero.js";
import { massThreshold, scaleOf } from "./maps.js";
import { allHeads, depth, find, findAll, gatedLayers, gateOf, hasGates, meanDistance, numHeads,
  numPatches, shownKind, state } from "./state.js";

export const gateColor = (gate) =>
  `color-mix(in oklab, var(--position) ${(100 * gate).toFixed(1)}%, var(--content))`;

let cards = []; // DOM nodes of the heads
let shownImage = null; // behind their maps

// Everything that depends on the query patch. Runs on every mouse move: it must not cause a page
// layout.
export function drawMaps(allMaps) {
  const { query } = state;
  const kind = shownKind();
  const columns = state.model.grid[1];
  const sameScale = find(".same-scale").checked;
  const peak = Math.max(...allMaps.map((maps) => Math.max(...maps[kind])));
  const place = `translate(${100 * (query % columns)}%, ${100 * Math.floor(query / columns)}%)`;
  allMaps.forEach((maps, head) => {
    const { canvas, frame, maximum } = cards[head];
    const highest = Math.max(...maps[kind]);
    const scale = scaleOf(sameScale ? peak : highest, numPatches());
    const threshold = massThreshold(maps[kind], option("mass"));
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    maps[kind].forEach((value, key) => {
      const alpha = value < threshold ? 0 : 255 * Math.sqrt(Math.min(1, value / scale));
      pixels.data.set([...hueOf(maps, kind, key), alpha], 4 * key);
    });
    context.putImageData(pixels, 0, 0);
    frame.style.transform = place;
    maximum.data = highest.toFixed(2);
  });
}

// Everything that depends on the snapshot, the layer, and the gates.
export function drawHeads() {
  const gated = hasGates();
  if (shownImage !== state.image) { // as a data URL, it takes milliseconds
    shownImage = state.image;
    find(".heads").style.setProperty("--image", `url(${state.image.display})`);
  }
  cards.forEach(({ card, arrow, slider, output, distance }, head) => {
    const gate = gateOf(state.layer, head);
    card.style.setProperty("--gate-color", gated ? gateColor(gate) : "var(--content)");
    card.style.setProperty("--gate", `${100 * gate}%`);
    card.dataset.gate = gate.toFixed(3);
    card.classList.toggle("changed", state.gates.has(`${state.layer},${head}`));
    card.classList.toggle("no-gate", !gated);
    slider.value = gate;
    const side = gate > 0.5 ? "mostly position" : "mostly content";
    slider.setAttribute("aria-valuetext", `${gate.toFixed(2)}, ${side}`);
    output.textContent = gate.toFixed(2);
    distance.textContent = meanDistance(head).toFixed(1);
    const start = gated ? startOf(head) : null;
    arrow.textContent = start ? start.arrow : "";
    arrow.title = start ? `before training, it looks ${start.words}` : "";
  });
  const number = state.layer + 1;
  find(".heads-title").textContent = `The ${numHeads()} heads of layer ${number}`;
  find(".heads-hint").textContent = gated
    ? "Laid out as the taps of a convolution kernel; arrows show where each head starts."
    : `Layer ${number} is plain self-attention: its heads have no gate and no position map.`;
  const name = `layer ${number}, head ${state.head + 1}`;
  find(".hero-title").textContent = `Where the framed patch looks: ${name}`;
}

// Where a head looks before training, from the center of its position map.
function startOf(head) {
  const [x, y, curvature] = state.model.v_pos[0][state.layer][head];
  const [dx, dy] = [x, y].map((slope) => Math.sign(Math.round(slope / (-2 * curvature))) || 0);
  const words = [["up", "", "down"][dy + 1], ["left", "", "right"][dx + 1]]
    .filter(Boolean).join(" and ");
  const arrow = "↖↑↗←•→↙↓↘"[3 * (dy + 1) + dx + 1];
  return { arrow, words: words || "at the patch itself" };
}

export function drawHeatmap() {
  const heatmap = find(".gate-heatmap");
  const layers = gatedLayers();
  if (heatmap.dataset.layers !== `${layers} ${numHeads()}`) {
    heatmap.dataset.layers = `${layers} ${numHeads()}`;
    heatmap.style.gridTemplateColumns = `auto repeat(${numHeads()}, minmax(0, 1fr))`;
    const row = (label, cell) => `<span>${label}</span>${allHeads().map(cell).join("")}`;
    heatmap.innerHTML = row("head", (head) => `<span class="head-number">${head + 1}</span>`)
      + layers.map((layer) => row(`layer ${layer + 1}`, (head) =>
        `<button type="button" class="cell" data-layer="${layer}" data-cell="${head}"
          ></button>`)).join("");
  }
  for (const cell of heatmap.querySelectorAll(".cell")) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.cell)];
    const gate = gateOf(layer, head);
    cell.style.background = gateColor(gate);
    cell.title = `layer ${layer + 1}, head ${head + 1}: gate ${gate.toFixed(2)}`;
    cell.setAttribute("aria-label", cell.title);
    cell.classList.toggle("current-layer", layer === state.layer);
    // arrow keys move between cells
    cell.tabIndex = layer === state.layer && head === state.head ? 0 : -1;
  }
  const turned = layers.flatMap((layer) => allHeads().filter((head) => gateOf(layer, head) < 0.5));
  const plain = depth() - layers.length;
  find(".heatmap-summary").textContent = layers.length === 0
    ? "This model is a plain ViT: no head has a gate or a position map, only content maps."
    : `${turned.length} of ${layers.length * numHeads()} gates are below 0.5.`
      + (plain ? ` Layers ${layers.length + 1} to ${depth()} have no gates.` : "");
}

// Highlight the hovered head, or else the selected one, in the cards, the curves, and the heatmap.
export function drawSelection(hovered = null) {
  const highlighted = hovered ?? state.head;
  cards.forEach(({ card }, head) => {
    card.classList.toggle("selected", head === state.head);
    card.classList.toggle("hovered", head === hovered);
    card.querySelector(".select-head").setAttribute("aria-pressed", head === state.head);
  });
  for (const curve of findAll("[data-curve]")) {
    curve.classList.toggle("selected", Number(curve.dataset.curve) === highlighted);
  }
  for (const cell of findAll(".gate-heatmap .cell")) {
    const isLayer = Number(cell.dataset.layer) === state.layer;
    cell.classList.toggle("selected", isLayer && Number(cell.dataset.cell) === highlighted);
  }
}

// One card per head, laid out like the taps of the kernel: head h in row h % rows, column floor(h
// / rows).
export function resizeCards() {
  const [rows, columns] = state.model.grid;
  const [kernelRows, kernelColumns] = state.model.kernel;
  const container = find(".heads");
  container.style.setProperty("--patch-width", `${100 / columns}%`);
  container.style.setProperty("--patch-height", `${100 / rows}%`);
  container.style.gridTemplateColumns = `repeat(${kernelColumns}, minmax(0, 1fr))`;
  container.innerHTML = allHeads().map((tap) => {
    const head = Math.floor(tap / kernelColumns) + (tap % kernelColumns) * kernelRows;
    return `<div class="head" data-head="${head}">
      <div class="head-line"><button type="button" class="select-head" aria-pressed="false"
        aria-label="select head ${head + 1}">head ${head + 1}</button>
        <span class="arrow" role="img"></span>
        <span class="maximum">max <span>0</span></span></div>
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
      maximum: node(".maximum span").firstChild, slider: node("input"), output: node("output"),
      distance: node(".distance"),
    };
  });
}

