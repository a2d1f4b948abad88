// The state of the page, and what derives from it. All other modules read it; view.js changes it.

import { axisAttention, contentMap, positionMap } from "./maps.js";

export const KINDS = ["mixed", "position", "content"];
export const SESSION = sessionId(); // also the key of the model that this session trains

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
export const on = (selector, type, handler) => find(selector).addEventListener(type, handler);
export const numHeads = () => state.model.kernel[0] * state.model.kernel[1];
export const numPatches = () => state.model.grid[0] * state.model.grid[1];
export const allHeads = () => [...Array(numHeads()).keys()];
export const depth = () => state.model.gate[0].length;
export const hasGates = (layer = state.layer) => state.model.gate[0][layer] !== null;
export const gatedLayers = () => [...Array(depth()).keys()].filter(hasGates);
export const lastSnapshot = () => state.model.epochs.length - 1;
export const isOwn = () => state.key === SESSION;
export const isGrowing = () =>
  (state.model.epochs.at(-1) ?? 0) < state.model.last_epoch && !(isOwn() && state.stopped);
export const shownKind = () => (hasGates() ? state.kind : "content");
export const currentExample = () => state.model.examples.find(({ name }) => name === state.example)
  ?? { label: null, queries: [], target: [] };

// Column and row of a patch, and the reverse.
export const placeOf = (patch) =>
  [patch % state.model.grid[1], Math.floor(patch / state.model.grid[1])];
export const patchAt = (column, row) => row * state.model.grid[1] + column;
export const centerPatch = () => patchAt(
  Math.floor(state.model.grid[1] / 2), Math.floor(state.model.grid[0] / 2));

// The gate that the user has set; undefined where it is the trained one.
export const changedGate = (layer, head) => state.gates.get(`${layer},${head}`);
// The user's gate where they have changed it, else the trained one; 0 in layers without gates.
export const gateOf = (layer, head, snapshot = state.snapshot) =>
  changedGate(layer, head) ?? state.model.gate[snapshot][layer]?.[head] ?? 0;
// The changed gates of all layers; null where trained.
export const changedGates = () => state.model.gate[0].map((gates, layer) =>
  gates && gates.map((_, head) => changedGate(layer, head) ?? null));

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
  const mixed = content.map((value, key) => (1 - gate) * value + gate * position[key]);
  return { gate, position, content, mixed };
}

// Attention of the selected head from a patch to the target of the example.
export function attentionToTarget(query, snapshot) {
  const { mixed } = headMaps(state.head, query, snapshot);
  return currentExample().target.reduce((sum, key) => sum + mixed[key], 0);
}

// Mean attention distance of a head in patches, over all query patches (Eq. 8 of the paper).
// Without headMaps, since it is drawn at every change of a gate.
export function meanDistance(head, snapshot = state.snapshot) {
  const { bytes, peak, gate, vPos } = partsOf(head, snapshot);
  const [slopeX, slopeY, curvature] = vPos ?? [0, 0, 0];
  const factors = (slope, length) =>
    Array.from({ length }, (_, query) => axisAttention(slope, curvature, query, length));
  const [rows, columns] = state.model.grid;
  const [across, down] = [factors(slopeX, columns), factors(slopeY, rows)];
  const count = rows * columns;
  let total = 0;
  for (let query = 0; query < count; query++) {
    const [x, y] = placeOf(query);
    let [distance, mass] = [0, 0]; // quantized content maps do not sum to 1
    for (let key = 0; key < count; key++) {
      const [toX, toY] = [key % columns, Math.floor(key / columns)];
      const content = (peak * bytes[(head * count + query) * count + key]) / 255;
      const weight = (1 - gate) * content + gate * across[x][toX] * down[y][toY];
      distance += weight * Math.sqrt((toX - x) ** 2 + (toY - y) ** 2);
      mass += weight;
    }
    total += distance / mass;
  }
  return total / count;
}

// Kept as long as the browser tab is open, so that a reload finds the model trained here.
function sessionId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  let id = Array.from(bytes, (byte) => byte.toString(16)).join("");
  try {
    id = sessionStorage.getItem("session") ?? id;
    sessionStorage.setItem("session", id);
  } catch { /* storage is disabled */ }
  return id;
}

export const escapeHtml = (text) =>
  String(text).replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);

// Mark the buttons for which a condition on their data attributes holds as pressed.
export function press(buttons, isPressed) {
  for (const button of findAll(buttons)) {
    button.setAttribute("aria-pressed", isPressed(button.dataset));
  }
}
