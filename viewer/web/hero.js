// The large image: where the query patch looks, by one head. A map like those of the cards, but
// with lines, and over the image in color.

import { find, html } from "./dom.js";
import { clamp, massThreshold } from "./maps.js";
import { currentExample, KINDS, numPatches, placeOf, shownKind, state } from "./state.js";

// brighter than in page.css: on images
export const POSITION = [255, 140, 26];
const CONTENT = [74, 144, 255];
const VEIL = [12, 14, 24]; // lifted where the patch looks
// in patches of an 8 x 8 grid
const LINE_WIDTH = 0.45; // of attention weight 1
const [EDGE, DOT] = [0.025, 0.0375]; // around a line, and around its end
const INSET = 0.03; // half of the target frame's line, which else is cut off at the edge
const ANIMATION_MS = 600;

const blend = (from, to, share) => from + (to - from) * share;
const blendAll = (from, to, share) => from.map((value, index) => blend(value, to[index], share));
const sharpen = (share) => clamp(2.5 * share - 0.75, 0, 1); // halves would look gray

// Orange, blue, or in between: which part of the weight comes from the position map.
function hueOf(maps, kind, key) {
  const share = kind === "position" ? 1 : kind === "content" ? 0
    : sharpen((maps.gate * maps.position[key]) / Math.max(maps.mixed[key], 1e-9));
  return blendAll(CONTENT, POSITION, share);
}

const option = (name) => Number(find(`.${name}`).value);

// Weight, color, and strength (0 to 1) of every patch in the map of the shown kind.
export function shade(maps, shared = 0) {
  const kind = shownKind();
  const map = maps[kind];
  const scale = Math.max(...map, shared, 4 / numPatches()); // flat maps must not look bright
  const threshold = massThreshold(map, option("mass"));
  return Array.from(map, (weight, key) => ({ key, weight, color: hueOf(maps, kind, key),
    strength: weight < threshold ? 0 : Math.sqrt(weight / scale) }));
}

// Paint a map, one pixel per patch; `pixelOf` returns red, green, blue, and alpha.
export function paintMap(canvas, patches, pixelOf) {
  const pixels = new ImageData(canvas.width, canvas.height);
  patches.forEach((patch, key) => pixels.data.set(pixelOf(patch), 4 * key));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

const drawn = { view: [] }; // the maps on display, and what they belong to

// Draw the maps of the selected head; other maps of the same head and patch move to them.
export function drawHero(maps) {
  const from = drawn.maps;
  const view = [state.image, state.layer, state.head, state.query];
  const isSame = view.every((part, index) => part === drawn.view[index]);
  drawn.view = view;
  if (!isSame || matchMedia("(prefers-reduced-motion: reduce)").matches) return paint(maps);
  const start = performance.now();
  const frame = () => {
    if (drawn.view !== view || view[0] !== state.image) return; // superseded
    const t = Math.min(1, (performance.now() - start) / ANIMATION_MS);
    const between = KINDS.map((kind) => [kind, blendAll(from[kind], maps[kind], t)]);
    paint({ gate: blend(from.gate, maps.gate, t), ...Object.fromEntries(between) });
    if (t < 1) requestAnimationFrame(frame);
  };
  frame();
}

function paint(maps) {
  drawn.maps = maps;
  const [rows, columns] = state.model.grid;
  const [patches, opacity] = [shade(maps), option("opacity")];
  paintMap(find(".image canvas"), patches, ({ color, strength }) =>
    [...blendAll(VEIL, color, strength), 255 * opacity * (1 - 0.2 * strength)]);
  const looked = patches.filter(({ weight, strength }) => strength && weight > 1.25 / numPatches())
    .sort((a, b) => a.weight - b.weight); // the largest on top
  find(".lines").innerHTML = html`<svg viewBox="0 0 ${columns} ${rows}">${drawTarget()}
    ${looked.map(drawLine)}</svg>`;
}

// A line from the query patch, as wide as the weight; a ring for a patch that looks at itself.
function drawLine({ key, weight, color }) {
  const [[x, y], [toX, toY]] = [state.query, key].map((patch) =>
    placeOf(patch).map((index) => index + 0.5));
  const unit = Math.max(...state.model.grid) / 8;
  const width = unit * Math.max(LINE_WIDTH * weight, 0.0125);
  return [["rgb(0 0 0 / 0.55)", unit * EDGE], [`rgb(${color})`, 0]].map(([tint, edge]) => {
    const stroke = html`stroke="${tint}" stroke-width="${width + 2 * edge}"`;
    return key === state.query ? html`<circle cx="${x}" cy="${y}" r="0.28" fill="none" ${stroke}/>`
      : html`<line x1="${x}" y1="${y}" x2="${toX}" y2="${toY}" ${stroke}/>
      <circle cx="${toX}" cy="${toY}" r="${width / 2 + unit * DOT + edge}" fill="${tint}"/>`;
  });
}

// A frame around the target of the example, a square of patches.
function drawTarget() {
  const { target } = currentExample();
  if (!target.length) return "";
  const [[left, top], [right, bottom]] = [target[0], target.at(-1)].map(placeOf);
  return html`<rect class="target" x="${left + INSET}" y="${top + INSET}"
    width="${right - left + 1 - 2 * INSET}" height="${bottom - top + 1 - 2 * INSET}"/>`;
}
