// Tab 3: one head controlled by hand.

import { POSITION, strokeRect } from "./hero.js";
import { axisAttention, scaleOf } from "./maps.js";
import { centerPatch, find, gateOf, hasGates, numPatches, placeOf, state } from "./state.js";

const kernel = { right: 1, down: 0, strength: 1 };
const MARGIN = 60; // pixels left of the map and above it, for its two factors

export function drawKernel() {
  if (state.tab !== "kernel") return;
  const { right, down, strength } = kernel;
  const [slopeX, slopeY, curvature] = [2 * strength * right, 2 * strength * down, -strength];
  for (const [name, value] of Object.entries(kernel)) {
    find(`.${name}`).value = value;
    find(`.${name}-value`).textContent = value.toFixed(2);
  }
  const numbers = [slopeX, slopeY, curvature].map((value) => value.toFixed(2)).join(", ");
  find(".v-pos").textContent = `v_pos = α · (2 Δx, 2 Δy, −1) = (${numbers})`;
  const [rows, columns] = state.model.grid;
  const horizontal = (query) => axisAttention(slopeX, curvature, query, columns);
  const vertical = (query) => axisAttention(slopeY, curvature, query, rows);
  drawKernelMap(horizontal, vertical);
  drawFiltered(horizontal, vertical);
}

// Pixels per patch of the map.
const patchSide = () => (find(".kernel-map").width - MARGIN) / Math.max(...state.model.grid);

function drawKernelMap(horizontal, vertical) {
  const canvas = find(".kernel-map");
  const context = canvas.getContext("2d");
  const [column, row] = placeOf(centerPatch());
  const [across, down] = [horizontal(column), vertical(row)];
  const side = patchSide();
  const left = (index) => MARGIN + index * side;
  const scale = scaleOf(Math.max(...down) * Math.max(...across), numPatches());
  context.clearRect(0, 0, canvas.width, canvas.height);
  down.forEach((weight, y) => across.forEach((other, x) => {
    const opacity = Math.sqrt((weight * other) / scale);
    context.fillStyle = `color-mix(in srgb, rgb(${POSITION}) ${100 * opacity}%, #181a22)`;
    context.fillRect(left(x), left(y), side - 1, side - 1);
  }));
  context.fillStyle = `rgb(${POSITION})`;
  const unit = (MARGIN - 14) / Math.max(...down, ...across); // pixels per attention weight
  across.forEach((weight, x) =>
    context.fillRect(left(x) + 2, MARGIN - 6 - weight * unit, side - 5, weight * unit));
  down.forEach((weight, y) =>
    context.fillRect(MARGIN - 6 - weight * unit, left(y) + 2, weight * unit, side - 5));
  const center = [left(column), left(row), side - 1, side - 1];
  strokeRect(context, center, "black", 6);
  strokeRect(context, center, "white", 2.5);
  context.beginPath(); // handle at the attention center
  context.arc(left(column + kernel.right + 0.5), left(row + kernel.down + 0.5), 7, 0, 7);
  context.fill();
  context.lineWidth = 2;
  context.stroke();
}

// Replace every patch by the weighted mean of all patches: first along x, then along y, since a
// position map is the product of its factors.
function drawFiltered(horizontal, vertical) {
  const canvas = find(".filtered");
  const [rows, columns] = state.model.grid;
  const { width, height } = state.bitmaps.display;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(state.bitmaps.display, 0, 0);
  const image = context.getImageData(0, 0, width, height);
  const filtered = mixBlocks(image.data, columns, (4 * width) / columns, horizontal);
  image.data.set(mixBlocks(filtered, rows, (4 * width * height) / rows, vertical));
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

export function dragKernel(event) {
  const box = event.target.getBoundingClientRect();
  const zoom = event.target.width / box.width;
  const indexAt = (pixels) => (pixels * zoom - MARGIN) / patchSide() - 0.5;
  const clamp = (value) => Math.max(-3.5, Math.min(3.5, value));
  const [column, row] = placeOf(centerPatch());
  setKernel({ right: clamp(indexAt(event.clientX - box.left) - column),
    down: clamp(indexAt(event.clientY - box.top) - row) });
}

export function setKernel(values, note = "") {
  Object.assign(kernel, values);
  find(".copied-head").textContent = note;
  drawKernel();
}

// Copy the position part of the selected head. One with negative strength avoids its center, which
// this tab cannot show.
export function copyHead() {
  const { head, layer, snapshot, model } = state;
  if (!hasGates()) return setKernel({}, `Layer ${layer + 1} has no position maps.`);
  const [x, y, curvature] = model.v_pos[snapshot][layer][head];
  const epoch = model.epochs[snapshot] === null ? "" : ` at epoch ${model.epochs[snapshot]}`;
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
