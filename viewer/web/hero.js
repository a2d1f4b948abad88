// The large image: where the query patch looks, by one head, as lines and an overlay.

import { find } from "./dom.js";
import { clamp, massThreshold, scaleOf } from "./maps.js";
import { currentExample, KINDS, numPatches, placeOf, shownKind, state } from "./state.js";

// brighter than in page.css: on images
export const POSITION = [255, 140, 26];
const CONTENT = [74, 144, 255];
export const SIZE = 640; // pixels of the longer side
const LINE_WIDTH = 36; // of attention weight 1
const ANIMATION_MS = 600;

// Pixels per patch of an image whose longer side has at most this size.
export const patchSide = (size) => Math.floor(size / Math.max(...state.model.grid)) || 1;

const sharpen = (share) => clamp(2.5 * share - 0.75, 0, 1); // halves would look gray

// Orange, blue, or in between: which part of the weight comes from the position map.
export function hueOf(maps, kind, key) {
  const share = kind === "position" ? 1 : kind === "content" ? 0
    : sharpen((maps.gate * maps.position[key]) / Math.max(maps.mixed[key], 1e-9));
  return POSITION.map((value, channel) => value * share + CONTENT[channel] * (1 - share));
}

export const option = (name) => Number(find(`.${name}`).value);

let animation = 0; // id of the one in progress
let drawn = {}; // the maps on display, and what they belong to

// Draw the maps of the selected head; other maps of the same head and patch move to them.
export function drawHero(maps) {
  const id = ++animation;
  const { image, layer, head, query } = state;
  const view = { image, layer, head, query };
  const from = drawn.maps;
  const isSame = Object.keys(view).every((name) => view[name] === drawn[name]);
  drawn = { ...view, maps };
  if (!isSame || matchMedia("(prefers-reduced-motion: reduce)").matches) return paint(maps);
  const start = performance.now();
  const frame = () => {
    if (id !== animation || image !== state.image) return; // superseded
    const t = Math.min(1, (performance.now() - start) / ANIMATION_MS);
    const blend = (a, b) => a + (b - a) * t;
    const between = { gate: blend(from.gate, maps.gate) };
    for (const kind of KINDS) {
      between[kind] = from[kind].map((value, key) => blend(value, maps[kind][key]));
    }
    paint(between);
    if (t < 1) requestAnimationFrame(frame);
  };
  frame();
}

function paint(maps) {
  const bitmap = state.image.bitmaps[find(".show-input").checked ? "input" : "display"];
  const { width, height } = bitmap;
  const canvas = find(".image");
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const side = patchSide(SIZE);
  const cornerOf = (key) => placeOf(key).map((index) => index * side);
  const opacity = option("opacity");
  context.drawImage(bitmap, 0, 0);
  context.globalAlpha = opacity;
  context.fillStyle = "rgb(12, 14, 24)"; // a veil, lifted where the patch looks
  context.fillRect(0, 0, width, height);

  const kind = shownKind();
  const map = maps[kind];
  const maximum = scaleOf(Math.max(...map), numPatches());
  const threshold = massThreshold(map, option("mass"));
  const keys = [...map.keys()].filter((key) => map[key] >= threshold)
    .sort((a, b) => map[a] - map[b]); // the largest on top
  const colorOf = (key) => `rgb(${hueOf(maps, kind, key)})`;
  for (const key of keys) {
    const strength = Math.sqrt(Math.min(1, map[key] / maximum));
    const patch = [...cornerOf(key), side, side];
    context.globalAlpha = strength;
    context.drawImage(bitmap, ...patch, ...patch);
    context.globalAlpha = opacity * strength * 0.8;
    context.fillStyle = colorOf(key);
    context.fillRect(...patch);
  }
  context.globalAlpha = 1;
  const { target } = currentExample(); // a square of patches
  if (target.length) {
    const [[left, top], [right, bottom]] = [cornerOf(target[0]), cornerOf(target.at(-1))];
    const inset = side / 48; // half of the line, which else is cut off at the edge of the image
    const lengths = [right - left, bottom - top].map((length) => length + side - 2 * inset);
    context.setLineDash([side / 6, side / 8]);
    strokeRect(context, [left + inset, top + inset, ...lengths], "white", 2 * inset);
    context.setLineDash([]);
  }
  for (const key of keys.filter((key) => map[key] > 1.25 / numPatches())) {
    drawLine(context, cornerOf(state.query), cornerOf(key), side, map[key], colorOf(key));
  }
  const frame = [...cornerOf(state.query), side, side];
  strokeRect(context, frame, "black", side / 8);
  strokeRect(context, frame, "white", side / 18);
}

export function strokeRect(context, box, strokeStyle, lineWidth) {
  Object.assign(context, { strokeStyle, lineWidth });
  context.strokeRect(...box);
}

// A line from the query patch, as wide as the weight; a ring for a patch that looks at itself.
function drawLine(context, from, to, side, weight, color) {
  const [start, end] = [from, to].map((corner) => corner.map((value) => value + side / 2));
  const isRing = String(from) === String(to);
  const width = Math.max(LINE_WIDTH * weight, 1);
  context.lineCap = "round";
  for (const [style, edge] of [["rgba(0, 0, 0, 0.55)", 2], [color, 0]]) {
    Object.assign(context, { strokeStyle: style, fillStyle: style, lineWidth: width + 2 * edge });
    context.beginPath();
    if (isRing) context.arc(...end, side * 0.28, 0, 7);
    else {
      context.moveTo(...start);
      context.lineTo(...end);
    }
    context.stroke();
    context.beginPath();
    if (!isRing) context.arc(...end, width / 2 + 3 + edge, 0, 7);
    context.fill();
  }
}
