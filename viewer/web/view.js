// Changes of the view: which model, image, layer, head, snapshot, query patch, and gates.

import { drawCurves } from "./curves.js";
import { find, findAll, html, render } from "./dom.js";
import { drawHeads, drawHeatmap, drawMaps, drawSelection, mapMarkup } from "./heads.js";
import { drawKernel } from "./kernel.js";
import { allHeads, allLayers, attentionToTarget, centerPatch, changedGates, currentEpoch,
  currentExample, gatedLayers, hasGates, KINDS, lastSnapshot, SESSION, shownKind,
  state } from "./state.js";
import { drawCaption, drawPrediction, drawStory } from "./story.js";
import { formatView, parseView, writeUrl } from "./url.js";

const MAX_MB = 20; // of an image file; the server checks this too

// --- requests

// Call a function of the server; null after an error, which is shown.
export async function ask(name, request, isShown = true) {
  const answer = await state.server[name]({ model: state.key, ...request }).catch(() => null)
    ?? { error: "The server is not responding; please try again." };
  if (isShown) render(".error", answer.error ?? "");
  return answer.error ? null : answer;
}

const latest = { view: 0, model: 0 }; // requests: the latest one wins
let pending = {}; // changes that wait for answers

// Change parts of the view, once the image and the maps that it needs have arrived. `image` may be
// a promise; `query: null` selects the most telling patch.
export async function navigate(changes) {
  const id = ++latest.view;
  render(".error", ""); // of an earlier request
  Object.assign(pending, changes);
  const image = await (pending.image ?? state.image);
  if (id !== latest.view) return; // superseded
  const { example, layer, snapshot } = { ...state, ...pending };
  let { maps, recomputed } = state;
  if (image && (image !== state.image || layer !== state.layer || maps.length <= lastSnapshot())) {
    maps = await loadMaps(image, layer);
  }
  if (id !== latest.view) return;
  if (!image || !maps) { // an error
    pending = {};
    return draw();
  }
  if (state.gates.size && !(recomputed && maps === state.maps && snapshot === state.snapshot)) {
    recomputed = await recompute(image, layer, snapshot);
  }
  if (id !== latest.view) return;
  if (image !== state.image) { // as data URLs, they take milliseconds
    const { style } = find("#watch");
    for (const name of ["display", "input"]) style.setProperty(`--${name}`, `url(${image[name]})`);
  }
  if (example === null) state.upload = image;
  Object.assign(state, pending, { image, maps, recomputed });
  pending = {};
  state.query ??= tellingPatch();
  draw();
}

const decode = (maps) => ({ ...maps, content: Uint8Array.fromBase64(maps.content) });

async function loadMaps({ pixels }, layer) {
  return (await ask("layer_maps", { pixels, layer }))?.map(decode);
}

async function recompute({ pixels }, layer, snapshot) {
  const answer = await ask("recompute", { pixels, layer, snapshot, gates: changedGates() });
  return answer && decode(answer);
}

// The query patch from which the head attends most to the example's target after training.
function tellingPatch() {
  const { queries } = currentExample();
  const found = queries.map((query) => attentionToTarget(query, lastSnapshot()));
  return queries[found.indexOf(Math.max(...found))] ?? centerPatch();
}

export function showExample(example) {
  const { queries } = state.model.examples.find(({ name }) => name === example);
  const query = queries.length && !state.locked ? { query: null } : {};
  navigate({ ...query, example, image: prepareImage({ example }) });
}

export async function showFile(file) {
  const refuse = (reason) => render(".error", `${reason}; please choose another image.`);
  if (file.size > MAX_MB * 2 ** 20) return refuse(`This file is larger than ${MAX_MB} MB`);
  const bytes = await file.bytes().catch(() => null);
  if (!bytes) return refuse("This is not an image file, or it cannot be read"); // a folder
  navigate({ example: null, image: prepareImage({ file: bytes.toBase64() }) });
}

// The answer to { example: name } or { file: base64 }, with its image decoded.
async function prepareImage(request) {
  const image = await ask("prepare_image", request);
  if (!image) return null;
  const element = Object.assign(new Image(), { src: image.display });
  await element.decode();
  return { ...image, element };
}

const left = new Map(); // how models were left, as hashes

// Show a model: what the hash contains, by default as it was left, and the rest as it opens. False
// after an error.
export async function showModel(key, hash) {
  const id = ++latest.model; // a model that is still loading gives way, also to the one on display
  if (key === state.key && state.maps && hash === undefined) return true;
  const description = await ask("describe", { model: key });
  if (id !== latest.model) return true; // superseded
  if (!description) return false;
  stop();
  if (state.maps) left.set(state.key, formatView());
  latest.view++; // pending requests and the maps belong to the previous model
  pending = {};
  Object.assign(state, { model: description, key: description.key, image: null, upload: null,
    maps: null, recomputed: null });
  Object.assign(state, parseView(hash ?? left.get(state.key) ?? ""));
  drawModel();
  showTab(state.tab);
  await navigate({ query: state.query, image: prepareImage({ example: state.example }) });
  return true;
}

// --- drawing

export function draw() {
  if (!state.maps) return;
  render(".hero-title",
    `Where the framed patch looks: layer ${state.layer + 1}, head ${state.head + 1}`);
  render(".image", html`${mapMarkup()}<div class="lines"></div>`);
  render(".image-hint", state.locked ? "Locked; click this patch again to unlock it."
    : "Hover over the image to choose the query patch; click to lock it.");
  render(".mass-percent", `${Math.round(100 * find(".mass").value)}%`);
  for (const part of [drawModel, drawHeads, drawHeatmap, drawMaps, drawPrediction, drawStory,
    drawCurves, drawKernel, drawSelection, writeUrl]) part();
}

// The controls that depend on the model.
export function drawModel() {
  const { classes, epochs, examples, last_epoch: lastEpoch, models, recipe } = state.model;
  // until the maps arrive, these belong to the previous model
  for (const part of findAll(".heads, .gate-heatmap, .exports")) part.inert = !state.maps;
  const isTimed = epochs.length > 1 || lastEpoch > (epochs[0] ?? 0);
  for (const selector of [".time", ".save-gif"]) find(selector).hidden = !isTimed;
  render(".epoch", currentEpoch() ?? "");
  Object.assign(find(".snapshot"), { max: lastSnapshot(), value: pending.snapshot ?? state.snapshot,
    ariaValueText: `epoch ${currentEpoch()}` });
  const own = state.hasOwn ? [{ key: SESSION, name: "Your tiny model" }] : [];
  render(".models", [...models, ...own].map(({ key, name }) =>
    html`<button data-model="${key}" aria-pressed="${key === state.key}">${name}</button>`));
  render(".kinds", gatedLayers().length === 0 ? "" : KINDS.map((kind) => html`<button
    data-kind="${kind}" aria-pressed="${kind === shownKind()}">${kind}</button>`));
  const images = examples.map(({ name, thumbnail, label }) => [name, thumbnail,
    label ? `its class: ${label}` : name]);
  if (state.upload) images.push(["", state.upload.display, "your image"]);
  render(".examples", images.map(([name, source, title]) => html`<button data-example="${name}"
    title="${title}" aria-pressed="${name === (state.example ?? "")}"
    ><img src="${source}" alt="${title}"></button>`));
  find(".task").hidden = recipe.dataset !== "patterns";
  render(".classes", `Classes: ${classes.slice(0, 12).join(", ")}`
    + (classes.length > 12 ? ` and ${classes.length - 12} more.` : "."));
  render(".layer", allLayers().map((layer) =>
    html`<option value="${layer}">${layer + 1}</option>`));
  find(".layer").value = state.layer;
}

export function moveQuery(query) {
  if (query === state.query || !state.maps) return;
  state.query = query;
  drawMaps();
  drawCaption();
  writeUrl();
}

export function showTab(name) {
  state.tab = name;
  for (const tab of findAll("[data-tab]")) {
    tab.ariaSelected = tab.dataset.tab === name;
    tab.tabIndex = tab.dataset.tab === name ? 0 : -1;
  }
  for (const node of findAll("[data-for]")) node.hidden = !node.dataset.for.includes(name);
  draw();
}

// --- training time

let playTimer = null;

function stop() {
  clearInterval(playTimer);
  playTimer = null;
  render(".play", "▶ Play training");
}

export function showSnapshot(snapshot) {
  stop();
  navigate({ snapshot });
}

export const nextSnapshot = () =>
  Math.min((pending.snapshot ?? state.snapshot) + 1, lastSnapshot());

export function play() {
  if (playTimer) return stop();
  if (state.snapshot === lastSnapshot()) navigate({ snapshot: 0 });
  render(".play", "❚❚ Pause");
  playTimer = setInterval(() => {
    if (pending.snapshot !== undefined) return; // still loading
    navigate({ snapshot: nextSnapshot() });
    if (pending.snapshot === lastSnapshot()) stop();
  }, 1200);
}

// --- changed gates

// Show changed gates at once; the prediction follows when the model has run with them.
export function setGates(gates, wait = false) {
  latest.view++;
  Object.assign(state, { gates, recomputed: null });
  draw();
  if (!wait) navigate({});
}

// Set all gates of some layers to a number, or to the trained ones (null).
export function pinGates(layers, gate) {
  const pinned = layers.filter(hasGates).flatMap((layer) =>
    allHeads().map((head) => [`${layer},${head}`, gate]));
  const gates = new Map([...state.gates, ...pinned]);
  setGates(new Map([...gates].filter(([, value]) => value !== null)));
}
