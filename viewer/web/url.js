// The hash of the URL contains the view, so that it can be shared and reloaded.

import { allHeads, depth, gatedLayers, isOwn, KINDS, numHeads, state } from "./state.js";

// stands for the key of the session's own model, which is private
export const TRAINED = "trained-here";

let timer = null;

export const urlOf = (hash) => new URLSearchParams(hash.slice(1));

// The parts of the view that a hash contains and that fit the model.
export function parseUrl(hash) {
  const url = urlOf(hash);
  const { grid: [rows, columns], epochs, examples } = state.model;
  const view = {};
  const number = (name, count, find) => {
    const index = url.has(name) ? find(Number(url.get(name))) : -1;
    if (index >= 0 && index < count) view[name === "epoch" ? "snapshot" : name] = index;
  };
  number("layer", depth(), (layer) => layer - 1);
  number("head", numHeads(), (head) => head - 1);
  number("epoch", epochs.length, (epoch) => epochs.indexOf(epoch));
  for (const name of ["layer", "head"]) if (!Number.isInteger(view[name])) delete view[name];
  const [row, column] = (url.get("patch") ?? "").split(",").map(Number);
  if (row >= 1 && row <= rows && column >= 1 && column <= columns) {
    view.query = (Math.round(row) - 1) * columns + Math.round(column) - 1;
    view.locked = url.has("locked");
  }
  if (KINDS.includes(url.get("map"))) view.kind = url.get("map");
  if (examples.some(({ name }) => name === url.get("image"))) view.example = url.get("image");
  if (url.has("gates")) view.gates = parseGates(url.get("gates"));
  return view;
}

// "2:1" is all heads of layer 2 at 1, "4.5:0.3" head 5 of layer 4 at 0.3.
function parseGates(text) {
  const gates = new Map();
  for (const [, layer, head, value] of text.matchAll(/(\d+)(?:\.(\d+))?:([\d.]+)/g)) {
    if (!gatedLayers().includes(layer - 1) || !(value >= 0 && value <= 1)) continue;
    const heads = allHeads().filter((other) => head === undefined || other === head - 1);
    for (const other of heads) gates.set(`${layer - 1},${other}`, Number(value));
  }
  return gates;
}

function formatGates() {
  return gatedLayers().flatMap((layer) => {
    const values = allHeads().map((head) => state.gates.get(`${layer},${head}`));
    if (values.every((value) => value !== undefined
      && value === values[0])) return `${layer + 1}:${values[0]}`;
    return values.flatMap((value, head) =>
      (value === undefined ? [] : `${layer + 1}.${head + 1}:${value}`));
  }).join(";");
}

export function writeUrl() {
  clearTimeout(timer); // browsers limit how often a page may change its URL
  timer = setTimeout(() => {
    if (!state.model) return;
    const { columns = state.model.grid[1], query } = state;
    const url = new URLSearchParams({ model: isOwn() ? TRAINED : state.key, tab: state.tab });
    url.set("layer", state.layer + 1);
    url.set("head", state.head + 1);
    if (state.model.epochs[state.snapshot] !== null) url.set("epoch",
      state.model.epochs[state.snapshot]);
    url.set("patch", `${Math.floor(query / columns) + 1},${(query % columns) + 1}`);
    if (state.kind !== "mixed") url.set("map", state.kind);
    if (state.locked) url.set("locked", "yes");
    if (state.example) url.set("image", state.example);
    if (state.gates.size) url.set("gates", formatGates());
    history.replaceState(null, "",
      `#${url}`.replace(/%2C/g, ",").replace(/%3A/g, ":").replace(/%3B/g, ";"));
  }, 300);
}
