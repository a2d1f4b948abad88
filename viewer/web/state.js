// The state of the page, and what is derived from it. view.js makes most of the changes.

import { storage } from "./dom.js";
import { clamp, contentMap, positionMap, sum } from "./maps.js";

export const KINDS = ["mixed", "position", "content"];
// Also the key of the model that this session trains. The browser keeps it as long as its tab is
// open, so that a reload finds the model.
export const SESSION = (storage("sessionStorage", {}).session ??=
  crypto.getRandomValues(new Uint32Array(4)).join(""));

export const state = {
  server: null, // functions that answer requests: those of app.py or of static.js
  // the view, which the URL contains
  tab: "watch", key: "", example: null, layer: 0, head: 0, snapshot: 0, query: 0, kind: "mixed",
  locked: false, // the query patch ignores the mouse
  gates: new Map(), // gates that the user has changed: "layer,head" to a number
  // what it shows
  model: null, // its description
  image: null, // display and input as data URLs, display also as a decoded element, and pixels
  maps: null, // content maps, distances, and predictions of this image and layer, per snapshot
  recomputed: null, // those of this snapshot, computed with the changed gates
  upload: null, // the image that the user has uploaded last
  hasOwn: false, // this session has trained a model
  stopped: false, // no training of this session is waiting or in progress
};

const range = (length) => [...Array(length).keys()];
export const allHeads = () => range(state.model.kernel[0] * state.model.kernel[1]);
export const allLayers = () => range(state.model.gate[0].length);
export const allPatches = () => range(numPatches());
export const numPatches = () => state.model.grid[0] * state.model.grid[1];
export const hasGates = (layer = state.layer) => state.model.gate[0][layer] !== null;
export const gatedLayers = () => allLayers().filter(hasGates);
export const lastSnapshot = () => state.model.epochs.length - 1;
export const currentEpoch = () => state.model.epochs[state.snapshot];
export const isOwn = () => state.key === SESSION;
export const isGrowing = () =>
  (state.model.epochs.at(-1) ?? 0) < state.model.last_epoch && !(isOwn() && state.stopped);
// Before training, the heads of this layer look at taps of a kernel: known, and initialized so.
export const startsLocal = () => state.model.epochs[0] === 0
  && state.model.v_pos[0][state.layer].every(([, , curvature]) => curvature < -0.1);
export const shownKind = () => (hasGates() ? state.kind : "content");
export const currentExample = () => state.model.examples.find(({ name }) => name === state.example)
  ?? { label: null, queries: [], target: [] };

// Column and row of a patch.
export const placeOf = (patch) =>
  [patch % state.model.grid[1], Math.floor(patch / state.model.grid[1])];

// The patch nearest to a place, in columns and rows.
export function patchAt(x, y) {
  const [rows, columns] = state.model.grid;
  return clamp(Math.floor(y), 0, rows - 1) * columns + clamp(Math.floor(x), 0, columns - 1);
}

export const centerPatch = () => patchAt(state.model.grid[1] / 2, state.model.grid[0] / 2);

// The gate that the user has set; undefined where it is the trained one.
export const changedGate = (layer, head) => state.gates.get(`${layer},${head}`);
// The user's gate where they have changed it, else the trained one; 0 in layers without gates.
export const gateOf = (layer, head, snapshot = state.snapshot) =>
  changedGate(layer, head) ?? state.model.gate[snapshot][layer]?.[head] ?? 0;
// The changed gates of all layers; null where trained.
export const changedGates = () => state.model.gate[0].map((gates, layer) =>
  gates && gates.map((_, head) => changedGate(layer, head) ?? null));

// Content maps, distances, and predictions of a snapshot.
export const outputOf = (snapshot) =>
  (snapshot === state.snapshot && state.recomputed) || state.maps[snapshot];

// Maps of a head of this layer for one query patch.
export function headMaps(head, query, snapshot = state.snapshot) {
  const { content: bytes, peaks } = outputOf(snapshot);
  const vPos = state.model.v_pos[snapshot][state.layer]?.[head] ?? [0, 0, 0]; // then the gate is 0
  const gate = gateOf(state.layer, head, snapshot);
  const content = contentMap(bytes, peaks[head], head, query, numPatches());
  const position = positionMap(vPos, query, state.model.grid);
  const mixed = content.map((value, key) => (1 - gate) * value + gate * position[key]);
  return { gate, position, content, mixed };
}

// Attention of the selected head from a patch to the target of the example.
export function attentionToTarget(query, snapshot) {
  const { mixed } = headMaps(state.head, query, snapshot);
  return sum(currentExample().target.map((key) => mixed[key]));
}

// Mean attention distance of a head in patches, over all query patches (Eq. 8 of the paper). It is
// linear in the map, so that of the mixed map follows from those of content and position.
export function meanDistance(head, snapshot = state.snapshot) {
  const [content, position] = outputOf(snapshot).distances[head];
  const gate = gateOf(state.layer, head, snapshot);
  return (1 - gate) * content + gate * position;
}
