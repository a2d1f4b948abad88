// Changes of the view: which model, image, layer, head, snapshot, query patch, and gates.

import { drawCurves } from "./curves.js";
import { buildHeads, drawHeads, drawHeatmap, drawMaps, drawSelection } from "./heads.js";
import { drawHero } from "./hero.js";
import { drawKernel } from "./kernel.js";
import { decodeBase64 } from "./maps.js";
import { allHeads, attentionToTarget, centerPatch, changedGates, currentExample, escapeHtml, find,
  findAll, gatedLayers, hasGates, headMaps, lastSnapshot, press, SESSION, shownKind,
  state } from "./state.js";
import { drawCaption, drawPrediction, drawStory } from "./story.js";
import { parseUrl, writeUrl } from "./url.js";

const MAX_MB = 20; // of an image file; the server checks this too
const TELLING = -1; // as query patch: the one that tellingPatch finds once the maps are here

// --- requests: the latest one wins

const latest = { view: 0, image: 0, model: 0 };
let pending = {}; // changes requested meanwhile are merged

// Change parts of the view, once the maps that it needs have arrived; at once if they are here.
export async function navigate(changes, reload = false) {
  const id = ++latest.view;
  Object.assign(pending, changes);
  const { image, layer, ...next } = { ...state, ...pending };
  if (!image) return; // the first image applies the pending changes
  const { key, gates } = state;
  let { maps, recomputed } = state;
  if (!maps || image !== state.image || layer !== state.layer || reload) {
    maps = await state.source.layerMaps(key, image, layer);
    if (maps) maps.content = maps.content.map(decodeBase64);
  }
  if (id !== latest.view) return; // superseded
  if (!maps) {
    pending = {};
    find(".layer").value = state.layer;
    return;
  }
  const snapshot = Math.min(next.snapshot, maps.content.length - 1);
  if (gates.size && !(maps === state.maps && snapshot === state.snapshot && recomputed)) {
    recomputed = await state.source.recompute(key, image, layer, snapshot, changedGates());
    if (recomputed) recomputed.content = decodeBase64(recomputed.content);
  }
  if (id !== latest.view) return;
  Object.assign(state, pending, { maps, snapshot, recomputed });
  pending = {};
  if (state.query === TELLING) state.query = tellingPatch();
  draw();
}

// Of the example's patches of interest, the one from which the head finds the target best after
// training.
function tellingPatch() {
  const { queries } = currentExample();
  const found = queries.map((query) => attentionToTarget(query, lastSnapshot()));
  return queries[found.indexOf(Math.max(...found))] ?? centerPatch();
}

// Show an example by name, or an image file, with changes to the view.
export async function showImage(name, file = null, changes = {}) {
  const id = ++latest.image;
  if (file?.size > MAX_MB * 2 ** 20) {
    return showError(`This file is larger than ${MAX_MB} MB; please choose a smaller image.`);
  }
  const request = file ? { file: await encodeBase64(file) } : { example: name };
  const image = await state.source.prepareImage(state.key, request);
  if (!image || id !== latest.image) return;
  await showPrepared(image, { example: file ? null : name, ...changes }, id);
}

export const showUpload = () => showPrepared(state.upload, { example: null });

async function showPrepared(image, changes, id = ++latest.image) {
  const bitmaps = {};
  for (const kind of ["display", "input"]) {
    bitmaps[kind] = Object.assign(new Image(), { src: image[kind] });
    await bitmaps[kind].decode();
  }
  if (id !== latest.image) return;
  if (changes.example === null && state.upload !== image) {
    state.upload = image;
    drawExamples();
  }
  const example = state.model.examples.find(({ name }) => name === changes.example);
  const query = example?.queries.length && !state.locked ? { query: TELLING } : {};
  await navigate({ ...query, ...changes, image, bitmaps });
}

async function encodeBase64(file) {
  const reader = new FileReader();
  await new Promise((resolve) => { reader.onloadend = resolve; reader.readAsDataURL(file); });
  return reader.result.split(",")[1] ?? "";
}

// Show a model: as in the URL, as it was left, or from its most telling view.
const left = new Map(); // views of other models, by key
export async function showModel(key, hash = null) {
  stop();
  const id = ++latest.model;
  const description = await state.source.describe(key);
  if (id !== latest.model || !description) return false;
  const { layer, head, snapshot, query, locked, example, gates } = state;
  left.set(state.key, { layer, head, snapshot, query, locked, example, gates });
  latest.view++; // pending requests and the maps belong to the previous model
  latest.image++;
  pending = {};
  const none = { maps: null, recomputed: null, image: null, upload: null };
  Object.assign(state, none, { key: description.key });
  setModel(description);
  Object.assign(state, (hash === null && left.get(state.key)) || openingView(hash ?? ""));
  state.snapshot = Math.min(state.snapshot, lastSnapshot());
  buildForModel();
  showTab(state.tab);
  await showImage(state.example ?? state.model.examples[0].name, null, { query: state.query });
  return true;
}

function openingView(hash) {
  const { image: example, layer, head } = state.model.opening;
  const view = { example, layer, head, snapshot: 0, query: TELLING, locked: false };
  return { ...view, gates: new Map(), ...parseUrl(hash) };
}

// Use the description of a model: another one, or the same one with new snapshots.
export function setModel(description) {
  state.model = description;
  const { models, epochs, last_epoch: lastEpoch } = description;
  state.models = [...models, ...state.models.filter(({ key }) => key === SESSION)];
  find(".snapshot").max = lastSnapshot();
  const isUntimed = epochs.length === 1 && lastEpoch <= (epochs[0] ?? 0);
  for (const selector of [".time", ".save-gif"]) find(selector).hidden = isUntimed;
}

export function showError(message) {
  find(".error").textContent = message;
}

// --- drawing

function buildForModel() {
  const { classes, gate, recipe } = state.model;
  drawModels();
  drawExamples();
  find(".layer").innerHTML =
    gate[0].map((_, layer) => `<option value="${layer}">${layer + 1}</option>`).join("");
  find(".classes").textContent = `Classes: ${classes.slice(0, 12).join(", ")}`
    + (classes.length > 12 ? ` and ${classes.length - 12} more.` : ".");
  find(".task").hidden = recipe.dataset !== "patterns";
  find(".kinds").hidden = gatedLayers().length === 0;
  buildHeads();
}

export function drawModels() {
  find(".models").innerHTML = state.models.map(({ key, name }) =>
    `<button type="button" data-model="${escapeHtml(key)}">${escapeHtml(name)}</button>`).join("");
  press(".models button", ({ model }) => model === state.key);
}

function drawExamples() {
  const images = state.model.examples.map(({ name, thumbnail, label }) => [name, thumbnail,
    label ? `its class: ${label}` : `${name}: not one of the model’s classes`]);
  if (state.upload) images.push(["", state.upload.display, "your image"]);
  find(".examples").innerHTML = images.map(([name, source, title]) => `<button type="button"
    data-example="${escapeHtml(name)}" title="${escapeHtml(title)}"
    ><img src="${source}" alt="${escapeHtml(title)}" width="48" height="48"></button>`).join("");
}

export function draw() {
  if (!state.maps) return;
  press(".examples button", ({ example }) => example === (state.example ?? ""));
  press(".kinds button", ({ kind }) => kind === shownKind());
  const epoch = state.model.epochs[state.snapshot];
  find(".epoch").textContent = epoch ?? "";
  find(".snapshot").value = state.snapshot;
  find(".snapshot").setAttribute("aria-valuetext", `epoch ${epoch}`);
  find(".step").disabled = state.snapshot === lastSnapshot();
  find(".layer").value = state.layer;
  drawQuery();
  drawHeads();
  drawHeatmap();
  drawPrediction();
  drawStory();
  drawCurves();
  drawKernel();
  drawSelection();
  writeUrl();
}

// Everything that depends on the query patch. Runs on every mouse move: it must not cause a page
// layout.
export function drawQuery() {
  if (!state.maps) return;
  const maps = allHeads().map((head) => headMaps(head, state.query));
  drawMaps(maps);
  drawHero(maps[state.head]);
}

export function moveQuery(query) {
  if (query === state.query || !state.maps) return;
  state.query = query;
  drawQuery();
  drawCaption();
  writeUrl();
}

export function setLocked(locked) {
  state.locked = locked;
  find(".image-hint").textContent = locked ? "Locked; click this patch again to unlock it."
    : "Move over the image to choose the query patch; click to lock it.";
  find(".image").classList.toggle("locked", locked);
  writeUrl();
}

export function showTab(name) {
  state.tab = name;
  for (const tab of findAll("[role=tab]")) {
    const isShown = tab.dataset.tab === name;
    tab.setAttribute("aria-selected", isShown);
    tab.tabIndex = isShown ? 0 : -1;
    find(`#${tab.dataset.tab}`).hidden = !isShown;
  }
  for (const node of findAll("[data-for]")) node.hidden = !node.dataset.for.includes(name);
  draw();
}

// --- training time

let playTimer = null;

export function stop() {
  clearInterval(playTimer);
  playTimer = null;
  find(".play").textContent = "▶ Play training";
}

export function showSnapshot(snapshot) {
  stop();
  navigate({ snapshot });
}

export function step() {
  const snapshot = Math.min((pending.snapshot ?? state.snapshot) + 1, lastSnapshot());
  navigate({ snapshot });
  if (snapshot === lastSnapshot()) stop();
}

export function play() {
  if (playTimer) return stop();
  if (state.snapshot === lastSnapshot()) navigate({ snapshot: 0 });
  find(".play").textContent = "❚❚ Pause";
  playTimer = setInterval(step, 1200);
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
  const gates = new Map(state.gates);
  for (const layer of layers.filter(hasGates)) {
    for (const head of allHeads()) {
      if (gate === null) gates.delete(`${layer},${head}`);
      else gates.set(`${layer},${head}`, gate);
    }
  }
  setGates(gates);
}
