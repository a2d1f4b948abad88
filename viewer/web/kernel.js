// Tab 3: one head controlled by hand.

import { find, html, on, onClick, render } from "./dom.js";
import { arrowOf, formatGate, mapMarkup } from "./heads.js";
import { paintMap, POSITION } from "./hero.js";
import { axisAttention, clamp, positionMap } from "./maps.js";
import { centerPatch, currentEpoch, gateOf, hasGates, numPatches, placeOf,
  state } from "./state.js";

const kernel = { right: 1, down: 0, strength: 1 };
const SLIDERS = [["right", "right", -3.5, 3.5], ["down", "down", -3.5, 3.5],
  ["strength", "locality strength α", -1, 4]];

on(".kernel-sliders", "input", ({ target }) =>
  setKernel({ [target.className]: target.valueAsNumber }));
for (const type of ["pointerdown", "pointermove"]) on(".kernel-map", type, drag);
const steps = [-1, 0, 1];
render(".taps", steps.map((down) => steps.map((right) => html`<button data-right="${right}"
  data-down="${down}" aria-label="tap ${right} right, ${down} down"
  >${arrowOf(right, down)}</button>`)));
onClick("[data-right]", ({ right, down }) =>
  setKernel({ right: Number(right), down: Number(down), strength: 4 }));
onClick(".copy-head", copyHead);

function setKernel(values, note = "") {
  Object.assign(kernel, values);
  render(".copied-head", note);
  drawKernel();
}

export function drawKernel() {
  if (state.tab !== "kernel" || !state.image) return;
  const { right, down, strength } = kernel;
  const vPos = [2 * strength * right, 2 * strength * down, -strength];
  render(".kernel-sliders", SLIDERS.map(([name, label, min, max]) => html`<label>${label}
    <b class="${name}-value">${kernel[name].toFixed(2)}</b>
    <input class="${name}" type="range" min="${min}" max="${max}" step="0.05"
      value="${kernel[name]}" aria-label="${label}"></label>`));
  const numbers = vPos.map((value) => value.toFixed(2)).join(", ");
  render(".v-pos", `v_pos = α · (2 Δx, 2 Δy, −1) = (${numbers})`);
  const [rows, columns] = state.model.grid;
  const horizontal = (query) => axisAttention(vPos[0], vPos[2], query, columns);
  const vertical = (query) => axisAttention(vPos[1], vPos[2], query, rows);
  drawMap(vPos, horizontal, vertical);
  drawFiltered(horizontal, vertical);
}

// The map of the center patch, its factors along the edges, and a handle at the attention center.
function drawMap(vPos, horizontal, vertical) {
  const { grid } = state.model;
  const [rows, columns] = grid;
  const [x, y] = placeOf(centerPatch());
  const [left, top] = [(x + kernel.right + 0.5) / columns, (y + kernel.down + 0.5) / rows];
  render(".kernel-map", html`<canvas class="across" width="${columns}" height="1"></canvas>
    <canvas class="down" width="1" height="${rows}"></canvas>
    <div class="map" style="--query: translate(${100 * x}%, ${100 * y}%)">${mapMarkup()}
      <b class="handle" style="left: ${100 * left}%; top: ${100 * top}%"></b></div>`);
  for (const [name, weights] of [["across", horizontal(x)], ["down", vertical(y)],
    ["map canvas", positionMap(vPos, centerPatch(), grid)]]) {
    const scale = Math.max(...weights, 4 / numPatches());
    paintMap(find(`.kernel-map .${name}`), [...weights], (weight) =>
      [...POSITION, 255 * Math.sqrt(weight / scale)]);
  }
}

// Replace every patch by the weighted mean of all patches: first along x, then along y, since a
// position map is the product of its factors.
function drawFiltered(horizontal, vertical) {
  const canvas = find(".filtered");
  const [rows, columns] = state.model.grid;
  const { width, height } = state.image.element; // a whole number of pixels per patch
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(state.image.element, 0, 0);
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

// Move the attention center to the pointer while a button is down.
function drag({ buttons, clientX, clientY, currentTarget, pointerId }) {
  if (!buttons) return;
  currentTarget.setPointerCapture(pointerId);
  const [rows, columns] = state.model.grid;
  const [column, row] = placeOf(centerPatch());
  const { left, top, width, height } = find(".kernel-map .map").getBoundingClientRect();
  setKernel({ right: clamp((columns * (clientX - left)) / width - column - 0.5, -3.5, 3.5),
    down: clamp((rows * (clientY - top)) / height - row - 0.5, -3.5, 3.5) });
}

// Copy the position map of the selected head.
function copyHead() {
  const { head, layer, snapshot, model } = state;
  if (!hasGates()) return setKernel({}, `Layer ${layer + 1} has no position maps.`);
  const [x, y, curvature] = model.v_pos[snapshot][layer][head];
  const epoch = currentEpoch() === null ? "" : ` at epoch ${currentEpoch()}`;
  const name = `Head ${head + 1} of layer ${layer + 1}${epoch}`;
  const gate = gateOf(layer, head);
  const share = Math.round(100 * (1 - gate));
  const [right, down] = [x, y].map((slope) => slope / (-2 * curvature) || 0); // 0/0: uniform
  setKernel({ strength: -curvature, right, down },
    `${name}: its position map. Its gate is ${formatGate(gate)}, so ${share}% of its attention `
    + "comes from content, which this tab does not show.");
}
