// Tab 3: one head controlled by hand.

import { find, html, on, onClick, render } from "./dom.js";
import { arrowOf } from "./heads.js";
import { patchSide, POSITION, strokeRect } from "./hero.js";
import { axisAttention, clamp, scaleOf } from "./maps.js";
import { centerPatch, currentEpoch, gateOf, hasGates, numPatches, placeOf,
  state } from "./state.js";

const kernel = { right: 1, down: 0, strength: 1 };
const SLIDERS = [["right", "right", -3.5, 3.5], ["down", "down", -3.5, 3.5],
  ["strength", "locality strength α", 0, 4]];
const MARGIN = 60; // pixels left of the map and above it, for its two factors
const FILTERED_SIZE = 384; // pixels of the longer side of the filtered image

export function bindKernel() {
  on(".kernel-sliders", "input", ({ target }) =>
    setKernel({ [target.className]: target.valueAsNumber }));
  const map = find(".kernel-map");
  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    drag(event);
  });
  map.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  const steps = [-1, 0, 1];
  render(".taps", steps.map((down) => steps.map((right) => html`<button data-right="${right}"
    data-down="${down}" aria-label="tap ${right} right, ${down} down"
    >${arrowOf(right, down)}</button>`)));
  onClick("[data-right]", ({ right, down }) =>
    setKernel({ right: Number(right), down: Number(down), strength: 4 }));
  onClick(".copy-head", copyHead);
}

function setKernel(values, note = "") {
  Object.assign(kernel, values);
  render(".copied-head", note);
  drawKernel();
}

export function drawKernel() {
  if (state.tab !== "kernel" || !state.image) return;
  const { right, down, strength } = kernel;
  const [slopeX, slopeY, curvature] = [2 * strength * right, 2 * strength * down, -strength];
  render(".kernel-sliders", SLIDERS.map(([name, label, min, max]) => html`<label>${label}
    <output class="${name}-value">${kernel[name].toFixed(2)}</output>
    <input class="${name}" type="range" min="${min}" max="${max}" step="0.05"
      value="${kernel[name]}" aria-label="${label}"></label>`));
  const numbers = [slopeX, slopeY, curvature].map((value) => value.toFixed(2)).join(", ");
  render(".v-pos", `v_pos = α · (2 Δx, 2 Δy, −1) = (${numbers})`);
  const [rows, columns] = state.model.grid;
  const horizontal = (query) => axisAttention(slopeX, curvature, query, columns);
  const vertical = (query) => axisAttention(slopeY, curvature, query, rows);
  drawMap(horizontal, vertical);
  drawFiltered(horizontal, vertical);
}

// Pixels per patch of the map.
const mapSide = () => (find(".kernel-map").width - MARGIN) / Math.max(...state.model.grid);

function drawMap(horizontal, vertical) {
  const context = find(".kernel-map").getContext("2d");
  const [column, row] = placeOf(centerPatch());
  const [across, down] = [horizontal(column), vertical(row)];
  const [highest, side] = [Math.max(...down, ...across), mapSide()];
  const scale = scaleOf(Math.max(...down) * Math.max(...across), numPatches());
  context.reset();
  context.translate(MARGIN, MARGIN);
  context.scale(side, side); // one unit is one patch
  down.forEach((weight, y) => across.forEach((other, x) => {
    const percent = 100 * Math.sqrt((weight * other) / scale);
    context.fillStyle = `color-mix(in srgb, rgb(${POSITION}) ${percent}%, #181a22)`;
    context.fillRect(x, y, 0.98, 0.98);
  }));
  context.fillStyle = `rgb(${POSITION})`;
  const length = (weight) => ((MARGIN - 14) / side) * (weight / highest);
  across.forEach((weight, x) => context.fillRect(x + 0.05, -0.14, 0.88, -length(weight)));
  down.forEach((weight, y) => context.fillRect(-0.14, y + 0.05, -length(weight), 0.88));
  strokeRect(context, [column, row, 0.98, 0.98], "black", 0.14);
  strokeRect(context, [column, row, 0.98, 0.98], "white", 0.06);
  context.beginPath(); // handle at the attention center
  context.arc(column + kernel.right + 0.5, row + kernel.down + 0.5, 0.16, 0, 7);
  context.fill();
  context.stroke();
}

// Replace every patch by the weighted mean of all patches: first along x, then along y, since a
// position map is the product of its factors.
function drawFiltered(horizontal, vertical) {
  const canvas = find(".filtered");
  const [rows, columns] = state.model.grid;
  const side = patchSide(FILTERED_SIZE);
  const [width, height] = [columns * side, rows * side];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(state.image.bitmaps.display, 0, 0, width, height);
  const image = context.getImageData(0, 0, width, height);
  const filtered = mixBlocks(image.data, columns, 4 * side, horizontal);
  image.data.set(mixBlocks(filtered, rows, 4 * width * side, vertical));
  context.putImageData(image, 0, 0);
}

// Replace the blocks in every group of `count` blocks by weighted means of the blocks of the group.
function mixBlocks(values, count, size, weightsOf) {
  const mixed = new Float32Array(values.length);
  for (let block = 0; block < count; block++) {
    weightsOf(block).forEach((weight, other) => {
      for (let group = 0; group < values.length; group += count * size) {
        const [to, from] = [group + block * size, group + other * size];
        for (let i = 0; i < size; i++) mixed[to + i] += weight * values[from + i];
      }
    });
  }
  return mixed;
}

// Move the attention center to the pointer.
function drag({ target, offsetX, offsetY }) {
  const [column, row] = placeOf(centerPatch());
  const patchOf = (offset) =>
    ((offset * target.width) / target.clientWidth - MARGIN) / mapSide() - 0.5;
  setKernel({ right: clamp(patchOf(offsetX) - column, -3.5, 3.5),
    down: clamp(patchOf(offsetY) - row, -3.5, 3.5) });
}

// Copy the position map of the selected head.
function copyHead() {
  const { head, layer, snapshot, model } = state;
  if (!hasGates()) return setKernel({}, `Layer ${layer + 1} has no position maps.`);
  const [x, y, curvature] = model.v_pos[snapshot][layer][head];
  const epoch = currentEpoch() === null ? "" : ` at epoch ${currentEpoch()}`;
  const name = `Head ${head + 1} of layer ${layer + 1}${epoch}`;
  if (curvature >= 0) {
    return setKernel({}, `${name} avoids its center (strength ${(-curvature).toFixed(2)}): `
      + "this tab cannot show it.");
  }
  const gate = gateOf(layer, head);
  const share = Math.round(100 * (1 - gate));
  setKernel({ strength: -curvature, right: x / (-2 * curvature), down: y / (-2 * curvature) },
    `${name}: its position map. Its gate is ${gate.toFixed(2)}, so ${share}% of its attention goes `
    + "by content, which this tab does not show.");
}
