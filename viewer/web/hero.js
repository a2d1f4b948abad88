// The large image: where the query patch looks, by one head, as lines and an overlay.

import { currentExample, find, KINDS, numPatches, shownKind, state } from "./state.js";
import { massThreshold, scaleOf } from "./maps.js";

// brighter than in page.css: on images
export const POSITION = [255, 140, 26], CONTENT = [74, 144, 255];
const SIZE = 640; // pixels of the longer side
const LINE_WIDTH = 36; // of attention weight 1
const ANIMATION_MS = 600;

const sharpen = (share) => Math.min(1, Math.max(0, 2.5 * share - 0.75)); // halves would look gray

// Orange, blue, or in between: which part of the weight comes from the position map.
export function hueOf(maps, kind, key) {
  const share = kind === "position" ? 1 : kind === "content" ? 0
    : sharpen((maps.gate * maps.position[key]) / Math.max(maps.mixed[key], 1e-9));
  return POSITION.map((value, channel) => value * share + CONTENT[channel] * (1 - share));
}

export const option = (name) => Number(find(`.${name}`).value);

let animation = 0; // id of the one in progress

// Draw the hero, moving from other maps of the same image if there are any.
export function drawHero(maps, from = null) {
  const id = ++animation;
  if (!from || matchMedia("(prefers-reduced-motion: reduce)").matches) return paint(maps);
  const start = performance.now();
  const blend = (a, b, t) => a.map((value, key) => value + (b[key] - value) * t);
  const frame = () => {
    if (id !== animation) return; // superseded
    const t = Math.min(1, (performance.now() - start) / ANIMATION_MS);
    const between = { gate: from.gate + (maps.gate - from.gate) * t };
    for (const kind of KINDS) between[kind] = blend(from[kind], maps[kind], t);
    paint(between);
    if (t < 1) requestAnimationFrame(frame);
  };
  frame();
}

function paint(maps) {
  const canvas = find(".image");
  const context = canvas.getContext("2d");
  const [rows, columns] = state.model.grid;
  const bitmap = state.bitmaps[find(".show-input").checked ? "input" : "display"];
  const side = Math.floor(SIZE / Math.max(rows, columns)) || 1;
  if (canvas.width !== columns * side || canvas.height !== rows * side) {
    [canvas.width, canvas.height] = [columns * side, rows * side];
  }
  const scaled = rescale(bitmap, canvas.width, canvas.height);
  const place = (key) => [(key % columns) * side, Math.floor(key / columns) * side];
  const opacity = option("opacity");
  context.globalAlpha = 1;
  context.drawImage(scaled, 0, 0);
  context.globalAlpha = opacity;
  context.fillStyle = "rgb(12, 14, 24)"; // a veil, lifted where the patch looks
  context.fillRect(0, 0, canvas.width, canvas.height);

  const kind = shownKind();
  const map = maps[kind];
  const maximum = scaleOf(Math.max(...map), numPatches());
  const threshold = massThreshold(map, option("mass"));
  const keys = [...map.keys()].filter((key) => map[key] >= threshold);
  for (const key of keys) {
    const strength = Math.sqrt(Math.min(1, map[key] / maximum));
    const [x, y] = place(key);
    context.globalAlpha = strength;
    context.drawImage(scaled, x, y, side, side, x, y, side, side);
    context.globalAlpha = opacity * strength * 0.8;
    context.fillStyle = `rgb(${hueOf(maps, kind, key)})`;
    context.fillRect(x, y, side, side);
  }
  context.globalAlpha = 1;
  drawTarget(context, place, side);
  keys.sort((a, b) => map[a] - map[b]);
  for (const key of keys.filter((key) => map[key] > 1.25 / numPatches())) {
    drawLine(context, place(state.query), place(key), side, map[key], hueOf(maps, kind, key));
  }
  drawQueryFrame(context, place(state.query), side);
}

// The image at the size of the canvas; scaling it once saves time at every mouse move.
let cache = {};
function rescale(bitmap, width, height) {
  if (cache.bitmap === bitmap && cache.canvas.width === width) return cache.canvas;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = bitmap !== state.bitmaps.input;
  context.drawImage(bitmap, 0, 0, width, height);
  cache = { bitmap, canvas };
  return canvas;
}

// A line with a dark edge from the query patch, as wide as the weight; a ring for a patch that
// looks at itself.
function drawLine(context, [fromX, fromY], [toX, toY], side, weight, hue) {
  const width = Math.max(LINE_WIDTH * weight, 1);
  const half = side / 2;
  for (const [color, extra] of [["rgba(0, 0, 0, 0.55)", 4], [`rgb(${hue})`, 0]]) {
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = width + extra;
    context.lineCap = "round";
    context.beginPath();
    if (fromX === toX && fromY === toY) {
      context.arc(fromX + half, fromY + half, side * 0.28, 0, 7);
    } else {
      context.moveTo(fromX + half, fromY + half);
      context.lineTo(toX + half, toY + half);
    }
    context.stroke();
    context.beginPath();
    context.arc(toX + half, toY + half, width / 2 + 3 + extra / 2, 0, 7);
    if (fromX !== toX || fromY !== toY) context.fill();
  }
}

function drawQueryFrame(context, [x, y], side) {
  for (const [color, lineWidth] of [["black", side / 8], ["white", side / 18]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.strokeRect(x, y, side, side);
  }
}

// A dashed outline around the patches that the query patch has to find, if the example has any.
function drawTarget(context, place, side) {
  const { target } = currentExample();
  context.setLineDash([side / 6, side / 8]);
  Object.assign(context, { strokeStyle: "white", lineWidth: side / 24 });
  context.beginPath();
  for (const key of target) {
    const [x, y] = place(key);
    const columns = state.model.grid[1];
    const edges = [[-1, 0, 0, 0, 1], [1, 1, 0, 1, 1], [-columns, 0, 0, 1, 0],
      [columns, 0, 1, 1, 1]];
    for (const [step, x0, y0, x1, y1] of edges) {
      if (target.includes(key + step)) continue;
      context.moveTo(x + x0 * side, y + y0 * side);
      context.lineTo(x + x1 * side, y + y1 * side);
    }
  }
  context.stroke();
  context.setLineDash([]);
}
