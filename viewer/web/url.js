// The hash of the URL contains the view, so that it can be shared and reloaded.

import { allHeads, allLayers, allPatches, currentEpoch, gatedLayers, isOwn, KINDS, placeOf,
  state } from "./state.js";

// stands for the key of the session's own model, which is private
export const TRAINED = "trained-here";

export const urlOf = (hash) => new URLSearchParams(hash.slice(1));

// "2,5" is row 2, column 5.
const formatPatch = (patch) => placeOf(patch).map((index) => index + 1).reverse().join();

// The view that a hash contains. Whatever is missing or does not fit the model is taken from the
// model's opening view; the kind of map is kept.
export function parseView(hash) {
  const url = urlOf(hash);
  const { epochs, examples, opening } = state.model;
  return {
    layer: allLayers()[url.get("layer") - 1] ?? opening.layer,
    head: allHeads()[url.get("head") - 1] ?? opening.head,
    snapshot: Math.max(epochs.indexOf(Number(url.get("epoch"))), 0),
    query: allPatches().find((patch) => formatPatch(patch) === url.get("patch")) ?? null,
    locked: url.has("locked"),
    kind: KINDS.find((kind) => kind === url.get("map")) ?? state.kind,
    example: examples.find(({ name }) => name === url.get("image"))?.name ?? opening.image,
    gates: parseGates(url.get("gates") ?? ""),
  };
}

// "4.5:0.3;4.6:1" is head 5 of layer 4 at 0.3, and head 6 at 1.
function parseGates(text) {
  const parts = [...text.matchAll(/(\d+)\.(\d+):([\d.]+)/g)];
  return new Map(parts.map((part) => part.slice(1).map(Number))
    .filter(([layer, head, gate]) => gatedLayers().includes(layer - 1)
      && allHeads().includes(head - 1) && gate <= 1)
    .map(([layer, head, gate]) => [`${layer - 1},${head - 1}`, gate]));
}

const formatGates = () => [...state.gates].map(([key, gate]) =>
  `${key.split(",").map((index) => Number(index) + 1).join(".")}:${gate}`).join(";");

// The hash of the current view.
export function formatView() {
  const parts = {
    model: isOwn() ? TRAINED : state.key, tab: state.tab, layer: state.layer + 1,
    head: state.head + 1, epoch: currentEpoch(), patch: formatPatch(state.query), map: state.kind,
    locked: state.locked ? "yes" : null, image: state.example, gates: formatGates() || null,
  };
  const known = Object.entries(parts).filter(([, value]) => value !== null);
  const url = new URLSearchParams(known).toString();
  return `#${url.replace(/%2C|%3A|%3B/g, decodeURIComponent)}`;
}

let timer = null;

export function writeUrl() {
  clearTimeout(timer); // browsers limit how often a page may change its URL
  timer = setTimeout(() => { if (state.maps) history.replaceState(null, "", formatView()); }, 300);
}
