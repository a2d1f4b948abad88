// Tab 3: one head controlled by hand.

import { POSITION } from "./hero.js";
import { axisAttention, scaleOf } from "./maps.js";
import { centerPatch, find, gateOf, hasGates, state } from "./state.js";

const kernel = { right: 1, down: 0, strength: 1 };
const MARGIN = 60; // pixels left of the map and above it, for its two factors

export function drawKernel() {
  if (state.tab !== "kernel") return;
  const [rows, columns] = state.model.grid;
  const vPos = [2 * kernel.strength * kernel.right, 2 * kernel.strength * kernel.down,
    -kernel.strength];
  const [row, column] = [Math.floor(centerPatch() / columns), centerPatch() % columns];
  const down = axisAttention(vPos[1], vPos[2], row, rows);
  const across = axisAttention(vPos[0], vPos[2], column, columns);
  for (const [name, value] of Object.entries(kernel)) {
    find(`.${name}`).value = value;
    find(`.${name}-value`).textContent = value.toFixed(2);
  }
  const numbers = vPos.map((value) => value.toFixed(2)).join(", ");
  find(".v-pos").textContent = `v_pos = α · (2 Δx, 2 Δy, −1) = (${numbers})`;
  drawKernelMap(down, across, row, column);
  drawFiltered(vPos);
}

function drawKernelMap(down, across, row, column) {
  const canvas = find(".kernel-map");
  const context = canvas.getContext("2d");
  const side = (canvas.width - MARGIN) / Math.max(...state.model.grid);
  const scale = scaleOf(Math.max(...down) * Math.max(...across), down.length * across.length);
  context.clearRect(0, 0, canvas.width, canvas.height);
  down.forEach((vertical, y) => across.forEach((horizontal, x) => {
    const opacity = Math.sqrt((vertical * horizontal) / scale);
    context.fillStyle = `color-mix(in srgb, rgb(${POSITION}) ${100 * opacity}%, #181a22)`;
    context.fillRect(MARGIN + x * side, MARGIN + y * side, side - 1, side - 1);
  }));
  context.fillStyle = `rgb(${POSITION})`;
  const unit = (MARGIN - 14) / Math.max(...down, ...across); // pixels per attention weight
  across.forEach((value, x) =>
    context.fillRect(MARGIN + x * side + 2, MARGIN - 6 - value * unit, side - 5, value * unit));
  down.forEach((value, y) =>
    context.fillRect(MARGIN - 6 - value * unit, MARGIN + y * side + 2, value * unit, side - 5));
  for (const [color, lineWidth] of [["black", 6], ["white", 2.5]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.strokeRect(MARGIN + column * side, MARGIN + row * side, side - 1, side - 1);
  }
  context.beginPath(); // handle at the attention center
  context.arc(MARGIN + (column + kernel.right + 0.5) * side, MARGIN
    + (row + kernel.down + 0.5) * side, 7, 0, 7);
  context.fill();
  Object.assign(context, { strokeStyle: "white", lineWidth: 2 });
  context.stroke();
}

// Replace every patch by the weighted mean of all patches: first along x, then along y, since P is
// the product of its factors.
function drawFiltered(vPos) {
  const canvas = find(".filtered");
  const [rows, columns] = state.model.grid;
  const { width, height } = state.bitmaps.display;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width,
    height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(state.bitmaps.display, 0, 0);
  const imageData = context.getImageData(0, 0, width, height);
  const [patchWidth, patchHeight] = [width / columns, height / rows];
  const source = Float32Array.from(imageData.data);
  const filteredX = new Float32Array(source.length);
  const filtered = new Float32Array(source.length);
  for (let x = 0; x < columns; x++) {
    axisAttention(vPos[0], vPos[2], x, columns).forEach((weight, key) => {
      for (let y = 0; y < height; y++) {
        const [to, from] = [4 * (y * width + x * patchWidth), 4 * (y * width + key * patchWidth)];
        for (let offset = 0; offset < 4 * patchWidth; offset++) filteredX[to
          + offset] += weight * source[from + offset];
      }
    });
  }
  const stripe = 4 * patchHeight * width; // values in a row of patches
  for (let y = 0; y < rows; y++) {
    axisAttention(vPos[1], vPos[2], y, rows).forEach((weight, key) => {
      for (let offset = 0; offset < stripe; offset++) filtered[y * stripe
        + offset] += weight * filteredX[key * stripe + offset];
    });
  }
  imageData.data.set(filtered);
  context.putImageData(imageData, 0, 0);
}

export function dragKernel(event) {
  const canvas = find(".kernel-map");
  const box = canvas.getBoundingClientRect();
  const side = (canvas.width - MARGIN) / Math.max(...state.model.grid);
  const clamp = (value) => Math.max(-3.5, Math.min(3.5, value));
  const patch = (pixels) => ((pixels * canvas.width) / box.width - MARGIN) / side - 0.5;
  const [row, column] = [Math.floor(centerPatch() / state.model.grid[1]),
    centerPatch() % state.model.grid[1]];
  setKernel({ right: clamp(patch(event.clientX - box.left) - column),
    down: clamp(patch(event.clientY - box.top) - row) });
}

export function setKernel(values) {
  Object.assign(kernel, values);
  find(".copied-head").textContent = "";
  drawKernel();
}

// Copy the position part of the selected head. One with negative strength avoids its center, which
// this
// tab cannot show.
export function copyHead() {
  const { head, layer, snapshot, model } = state;
  const note = find(".copied-head");
  if (!hasGates()) return void (note.textContent = `Layer ${layer + 1} has no position maps.`);
  const [x, y, curvature] = model.v_pos[snapshot][layer][head];
  const epoch = model.epochs[snapshot] === null ? "" : ` at epoch ${model.epochs[snapshot]}`;
  const name = `Head ${head + 1} of layer ${layer + 1}${epoch}`;
  if (curvature >= 0) {
    const strength = (-curvature).toFixed(2);
    note.textContent = `${name} avoids its center (strength ${strength}): this tab cannot show it.`;
    return;
  }
  setKernel({ strength: -curvature, right: x / (-2 * curvature), down: y / (-2 * curvature) });
  const gate = gateOf(layer, head);
  const share = Math.round(100 * (1 - gate));
  note.textContent = `${name}: its position map. Its gate is ${gate.toFixed(2)}, so ${share}% of `
    + "its attention goes by content, which this tab does not show.";
}
