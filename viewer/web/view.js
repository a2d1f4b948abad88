// Changes of the view: which model, image, layer, head, snapshot, query patch, and gates.

import { drawCurves } from "./curves.js";
import { drawHeads, drawHeatmap, drawMaps, drawSelection, resizeCards } from "./heads.js";
import { drawHero } from "./hero.js";
import { drawKernel } from "./kernel.js";
import { decodeBase64 } from "./maps.js";
import { allHeads, centerPatch, changedGates, depth, currentExample, escapeHtml, find, findAll,
  gatedLayers, hasGates,
  headMaps, lastSnapshot, numHeads, numPatches, shownKind, state } from "./state.js";
import { drawCaption, drawPrediction, drawStory } from "./story.js";
import { parseUrl, writeUrl } from "./url.js";

const MAX_BYTES = 10 * 2 ** 20; // of an image file; the server checks this too

// --- requests: the latest one wins
// ----------------------------------------------------------------

const latest = { view: 0, image: 0, model: 0 };
let pending = {}; // changes requested meanwhile are merged

// Change parts of the view, once the maps that it needs have arrived; at once if they are here.
export async function navigate(changes) {
  const id = ++latest.view;
  Object.assign(pending, changes);
  const next = { ...state, ...pending };
  if (!next.image) return; // the first image applies the pending changes
  let { maps, recomputed } = next;
  const { key } = state;
  if (!maps || next.image !== state.image || next.layer !== state.layer || pending.reload) {
    maps = await state.source.layerMaps(key, next.image, next.layer);
    if (maps) maps.content = maps.content.map(decodeBase64);
  }
  if (id !== latest.view) return; // superseded
  const snapshot = Math.min(next.snapshot, maps ? maps.content.length - 1 : 0);
  const isSame = maps === state.maps && snapshot === state.snapshot && next.gates === state.gates;
  if (maps && next.gates.size && !(isSame && recomputed)) {
    const gates = changedGates();
    recomputed = await state.source.recompute(key, next.image, next.layer, snapshot, gates);
    if (recomputed) recomputed.content = decodeBase64(recomputed.content);
  }
  if (id !== latest.view) return;
  const applied = pending;
  pending = {};
  delete applied.reload;
  find(".layer").value = maps ? next.layer : state.layer;
  if (!maps) return;
  Object.assign(state, applied,
    { maps, snapshot, recomputed: next.gates.size ? recomputed : null });
  if (applied.query === TELLING) state.query = tellingPatch();
  draw();
}

// Of the example's patches of interest, the one from which the head finds the target best after
// training.
const TELLING = -1;
function tellingPatch() {
  const { queries, target } = currentExample();
  if (!queries.length) return centerPatch();
  const found = queries.map((query) => {
    const { mixed } = headMaps(state.head, query, lastSnapshot());
    return target.reduce((sum, key) => sum + mixed[key], 0);
  });
  return queries[found.indexOf(Math.max(...found))];
}

// Show an example by name, or an image file, with changes to the view.
export async function showImage(name, file = null, changes = {}) {
  const id = ++latest.image;
  if (file?.size > MAX_BYTES) {
    return showError("This file is larger than 10 MB; please choose a smaller image.");
  }
  const request = file ? { file: await encodeBase64(file) } : { example: name };
  const image = await state.source.prepareImage(state.key, request);
  if (!image || id !== latest.image) return;
  await showPrepared(image, { example: file ? null : name, ...changes }, id);
}

async function showPrepared(image, changes, id = ++latest.image) {
  const bitmaps = {};
  for (const kind of ["display", "input"]) {
    bitmaps[kind] = new Image();
    bitmaps[kind].src = image[kind];
    await bitmaps[kind].decode();
  }
  if (id !== latest.image) return;
  if (!changes.example && state.upload !== image) {
    state.upload = image;
    drawExamples();
  }
  const isTelling = state.model.examples.find(({ name }) =>
    name === changes.example)?.queries.length;
  if (!("query" in changes) && isTelling && !state.locked) changes.query = TELLING;
  await navigate({ ...changes, image, bitmaps });
}

export const showUpload = () => showPrepared(state.upload, { example: null });

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
  if (state.model) {
    const { layer, head, snapshot, query, locked, example, gates } = state;
    left.set(state.key, { layer, head, snapshot, query, locked, example, gates });
  }
  latest.view++; // pending requests and the maps belong to the previous model
  latest.image++;
  pending = {};
  Object.assign(state,
    { key: description.key, maps: null, recomputed: null, image: null, upload: null });
  setModel(description);
  Object.assign(state, hash === null ? left.get(state.key) ?? openingView() : openingView(hash));
  state.snapshot = Math.min(state.snapshot, lastSnapshot());
  buildForModel();
  showTab(state.tab);
  await showImage(state.example ?? state.model.examples[0].name, null, { query: state.query });
  return true;
}

function openingView(hash = "") {
  const { opening } = state.model;
  const view = { ...opening, query: TELLING, snapshot: 0, locked: false, gates: new Map() };
  return { ...view, example: opening.image, image: null, ...parseUrl(hash) };
}

// Use the description of a model: another one, or the same one with new snapshots.
export function setModel(description) {
  state.model = description;
  state.models = [...description.models, ...state.models.filter(({ session }) => session)];
  for (const kind of ["layer", "head"]) {
    state[kind] = Math.min(state[kind], (kind === "layer" ? depth() : numHeads()) - 1);
  }
  if (state.query >= numPatches()) state.query = centerPatch();
  find(".snapshot").max = lastSnapshot();
  const untimed = description.epochs.length === 1
    && description.last_epoch <= (description.epochs[0] ?? 0);
  for (const selector of [".time", ".save-gif"]) find(selector).classList.toggle("unavailable",
    untimed);
}

export function showError(message) {
  find(".error").textContent = message;
}

// --- drawing
// --------------------------------------------------------------------------------------

function buildForModel() {
  const { model } = state;
  drawModels();
  drawExamples();
  find(".layer").innerHTML = model.gate[0]
    .map((_, layer) => `<option value="${layer}">${layer + 1}</option>`).join("");
  find(".classes").textContent = `Classes: ${model.classes.slice(0, 12).join(", ")}`
    + (model.classes.length > 12 ? ` and ${model.classes.length - 12} more.` : ".");
  find(".task").textContent = model.recipe.dataset === "patterns"
    ? "The task: name the texture of the square whose color matches the plain square." : "";
  const isPlain = gatedLayers().length === 0;
  find(".viewer").classList.toggle("plain-vit", isPlain);
  resizeCards();
}

export function drawModels() {
  find(".models").innerHTML = state.models.map(({ key, name }) => `<button type="button"
    data-model="${escapeHtml(key)}" aria-pressed="${key === state.key}"
    >${escapeHtml(name)}</button>`).join("");
}

export function drawExamples() {
  const images = state.model.examples.map(({ name, thumbnail, label }) => ({
    name, thumbnail, title: label ? `its class: ${label}`
      : `${name}: not one of the model’s classes`,
  }));
  if (state.upload) images.push({ name: "", thumbnail: state.upload.display, title: "your image" });
  find(".examples").innerHTML = images.map(({ name, thumbnail, title }) => `<button type="button"
    data-example="${escapeHtml(name)}" title="${escapeHtml(title)}"
    ><img src="${thumbnail}" alt="${escapeHtml(title)}" width="48" height="48"></button>`).join("");
}

export function draw() {
  if (!state.maps) return;
  if (findAll(".examples button").length !== state.model.examples.length
    + Boolean(state.upload)) drawExamples();
  for (const button of findAll(".examples button")) {
    button.setAttribute("aria-pressed", button.dataset.example === (state.example ?? ""));
  }
  const epoch = state.model.epochs[state.snapshot];
  find(".epoch").textContent = epoch ?? "";
  find(".snapshot").value = state.snapshot;
  find(".snapshot").setAttribute("aria-valuetext", `epoch ${epoch}`);
  find(".step").disabled = state.snapshot === lastSnapshot();
  find(".layer").value = state.layer;
  for (const button of findAll(".kinds button")) button.setAttribute("aria-pressed",
    button.dataset.kind === shownKind());
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
  const { image, layer, head, query } = state;
  const isSame = drawn.image === image && drawn.layer === layer && drawn.head === head
    && drawn.query === query;
  drawHero(maps[head], isSame ? drawn.maps : null);
  drawn = { image, layer, head, query, maps: maps[head] };
}
let drawn = {}; // on the large image

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
    tab.setAttribute("aria-selected", tab.dataset.tab === name);
    tab.tabIndex = tab.dataset.tab === name ? 0 : -1;
    find(`#${tab.dataset.tab}`).hidden = tab.dataset.tab !== name;
  }
  for (const node of findAll("[data-for]")) {
    node.classList.toggle("hidden", !node.dataset.for.split(" ").includes(name));
  }
  draw();
}

// --- training time
// --------------------------------------------------------------------------------

let playTimer = null;

export function stop() {
  clearInterval(playTimer);
  playTimer = null;
  find(".play").textContent = "▶ Play training";
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
// --------------------------------------------------------------------------------

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
  for (const layer of layers.filter((layer) => hasGates(layer))) {
    for (const head of allHeads()) {
      if (gate === null) gates.delete(`${layer},${head}`);
      else gates.set(`${layer},${head}`, gate);
    }
  }
  setGates(gates);
}
