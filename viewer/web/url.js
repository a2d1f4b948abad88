// The hash of the URL contains the view, so that it can be shared and reloaded.

import { allHeads, changedGate, depth, gatedLayers, isOwn, KINDS, numHeads, patchAt, placeOf,
  state } from "./state.js";

// stands for the key of the session's own model, which is private
export const TRAINED = "trained-here";

export const urlOf = (hash) => new URLSearchParams(hash.slice(1));

// The parts of the view that a hash contains and that fit the model.
export function parseUrl(hash) {
  const url = urlOf(hash);
  const { grid: [rows, columns], epochs, examples } = state.model;
  const isIndex = (index, count) => Number.isInteger(index) && index >= 0 && index < count;
  const view = {};
  for (const [name, index, count] of [
    ["layer", url.get("layer") - 1, depth()],
    ["head", url.get("head") - 1, numHeads()],
    ["snapshot", epochs.indexOf(Number(url.get("epoch"))), epochs.length],
  ]) if (isIndex(index, count)) view[name] = index;
  const [row, column] = (url.get("patch") ?? "").split(",").map((number) => number - 1);
  if (isIndex(row, rows) && isIndex(column, columns)) {
    Object.assign(view, { query: patchAt(column, row), locked: url.has("locked") });
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
    const [first, ...others] = allHeads().map((head) => changedGate(layer, head));
    const isCommon = first !== undefined && others.every((gate) => gate === first);
    return isCommon ? `${layer + 1}:${first}` : [first, ...others].flatMap((gate, head) =>
      (gate === undefined ? [] : `${layer + 1}.${head + 1}:${gate}`));
  }).join(";");
}

let timer = null;

export function writeUrl() {
  clearTimeout(timer); // browsers limit how often a page may change its URL
  timer = setTimeout(() => {
    if (!state.model) return;
    const [column, row] = placeOf(state.query);
    const parts = {
      model: isOwn() ? TRAINED : state.key, tab: state.tab,
      layer: state.layer + 1, head: state.head + 1, epoch: state.model.epochs[state.snapshot],
      patch: `${row + 1},${column + 1}`, map: state.kind, locked: state.locked ? "yes" : null,
      image: state.example, gates: state.gates.size ? formatGates() : null,
    };
    const known = Object.entries(parts).filter(([, value]) => value !== null);
    const url = new URLSearchParams(known).toString();
    history.replaceState(null, "", `#${url.replace(/%2C|%3A|%3B/g, decodeURIComponent)}`);
  }, 300);
}
