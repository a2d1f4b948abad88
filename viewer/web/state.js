// The state of the page, and what derives from it. All other modules read it; view.js changes it.

import { axisAttention, contentMap, mixMaps, positionMap } from "./maps.js";

export const KINDS = ["mixed", "position", "content"];

export const state = {
  element: null, // the page's root
  source: null, // where models and maps come from: see source.js
  // the view, which the URL contains
  tab: "watch", key: "", example: null, layer: 0, head: 0, snapshot: 0, query: 0, kind: "mixed",
  locked: false, // the query patch ignores the mouse
  gates: new Map(), // gates that the user has changed: "layer,head" to a number
  // what it shows
  models: [], // { key, name } of all models
  model: null, // the description of the one on display
  image: null, // display and input as data URLs, and pixels
  bitmaps: {}, // its display and input, decoded
  maps: null, // content maps and predictions of this image and layer, for all snapshots
  recomputed: null, // those of this snapshot, computed with the changed gates
  stopped: false, // the training of the session's own model has ended
  upload: null, // the image that the user has uploaded last, for its thumbnail
};

export const find = (selector) => state.element.querySelector(selector);
export const findAll = (selector) => [...state.element.querySelectorAll(selector)];
export const numHeads = () => state.model.kernel[0] * state.model.kernel[1];
export const numPatches = () => state.model.grid[0] * state.model.grid[1];
export const allHeads = () => Array.from({ length: numHeads() }, (_, head) => head);
export const depth = () => state.model.gate[0].length;
export const hasGates = (layer = state.layer) => state.model.gate[0][layer] !== null;
export const gatedLayers = () => state.model.gate[0]
  .flatMap((gates, layer) => (gates ? [layer] : []));
export const lastSnapshot = () => state.model.epochs.length - 1;
export const isOwn = () => Boolean(state.models.find(({ key }) => key === state.key)?.session);
export const isGrowing = () => (state.model.epochs.at(-1) ?? 0) < state.model.last_epoch
  && !(isOwn() && state.stopped);
export const shownKind = () => (hasGates() ? state.kind : "content");
export const currentExample = () =>
  state.model.examples.find(({ name }) => name === state.example)
    ?? { label: null, queries: [], target: [] };

export const centerPatch = () => {
  const [rows, columns] = state.model.grid;
  return Math.floor(rows / 2) * columns + Math.floor(columns / 2);
};

// The user's gate where they have changed it, else the trained one; 0 in layers without gates.
export function gateOf(layer, head, snapshot = state.snapshot) {
  const trained = state.model.gate[snapshot][layer];
  return trained ? state.gates.get(`${layer},${head}`) ?? trained[head] : 0;
}

// The changed gates of all layers; null where trained.
export const changedGates = () => state.model.gate[0].map((gates, layer) =>
  gates && gates.map((_, head) => state.gates.get(`${layer},${head}`) ?? null));

function partsOf(head, snapshot) {
  const { content, peaks } = (snapshot === state.snapshot && state.recomputed)
    || { content: state.maps.content[snapshot], peaks: state.maps.peaks[snapshot] };
  const vPos = state.model.v_pos[snapshot][state.layer]?.[head];
  return { bytes: content, peak: peaks[head], vPos, gate: gateOf(state.layer, head, snapshot) };
}

// Maps of a head of this layer for one query patch.
export function headMaps(head, query, snapshot = state.snapshot) {
  const { bytes, peak, gate, vPos } = partsOf(head, snapshot);
  const content = contentMap(bytes, peak, head, query, numPatches());
  const position = vPos ? positionMap(vPos, query, state.model.grid) : content.map(() => 0);
  return { gate, position, content, mixed: mixMaps(position, content, gate) };
}

// Mean attention distance of a head in patches, over all query patches (Eq. 8 of the paper).
let distances = { of: [], values: new Map() }; // of these maps and gates
export function meanDistance(head, snapshot = state.snapshot) {
  const of = [state.maps, state.recomputed, state.gates];
  if (of.some((part, index) => part !== distances.of[index])) distances = { of, values: new Map() };
  const key = `${snapshot},${head}`;
  if (!distances.values.has(key)) distances.values.set(key, computeDistance(head, snapshot));
  return distances.values.get(key);
}

function computeDistance(head, snapshot) {
  const [rows, columns] = state.model.grid;
  const { bytes, peak, gate, vPos } = partsOf(head, snapshot);
  const position = (slope, length) => Array.from({ length },
    (_, query) => axisAttention(vPos?.[slope] ?? 0, vPos?.[2] ?? 0, query, length));
  const [across, down] = [position(0, columns), position(1, rows)];
  const scale = ((1 - gate) * peak) / 255;
  const count = numPatches();
  let total = 0;
  for (let query = 0; query < count; query++) {
    const [x, y] = [query % columns, Math.floor(query / columns)];
    const start = (head * count + query) * count;
    let [distance, mass] = [0, 0]; // quantized content maps do not sum to 1
    for (let key = 0; key < count; key++) {
      const [toX, toY] = [key % columns, Math.floor(key / columns)];
      const weight = scale * bytes[start + key] + gate * across[x][toX] * down[y][toY];
      distance += weight * Math.sqrt((toX - x) ** 2 + (toY - y) ** 2);
      mass += weight;
    }
    total += distance / mass;
  }
  return total / count;
}

// "head 7" or "heads 1, 7, and 9", from indices.
export function listHeads(heads) {
  const numbers = heads.map((head) => head + 1);
  if (numbers.length < 2) return `head ${numbers[0]}`;
  if (numbers.length === 2) return `heads ${numbers[0]} and ${numbers[1]}`;
  return `heads ${numbers.slice(0, -1).join(", ")}, and ${numbers[numbers.length - 1]}`;
}

export function escapeHtml(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span.innerHTML.replaceAll('"', "&quot;");
}
