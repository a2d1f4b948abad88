// State, server calls, URL and drawing. Gradio runs all scripts once, concatenated, with `element` and `server` in scope.

const find = (selector) => element.querySelector(selector);
const findAll = (selector) => element.querySelectorAll(selector);
const SESSION = sessionId();
const MAX_BYTES = 10 * 2 ** 20; // of an image file; the server checks this too

const state = {
  tab: "watch", layer: 0, snapshot: 0, query: 0,
  session: "", // whose model is on display: the server's (""), or the one trained in this session (its id)
  locked: false, // the query patch ignores the mouse
  head: null, // the selected head; null overlays the mean over all heads
  gates: new Map(), // gates that the user has changed: "layer,head" to a number
  recomputed: null, // content maps of this layer, and predictions, computed with these gates
  example: null, // name of the image if it is an example
};
let model = null; // the server's description of the model on display
let numHeads = 0, numPatches = 0;
let colorMap = null; // 256 times red, green, blue
let distances = null; // between all pairs of patches
let cards = []; // DOM nodes of the heads
let layerMaps = null; // content maps and predictions of the current image and layer, for all snapshots
let image = null; // the image as data URLs and pixels, from the server
let bitmaps = {}; // the image, decoded
let playTimer = null;

// --- server -------------------------------------------------------------------------------------------------------------

// Kept as long as the browser tab is open, so that a reload finds the model trained here.
function sessionId() {
  let id = Array.from({ length: 24 }, () => "abcdefghijklmnopqrstuvwxyz"[Math.floor(26 * Math.random())]).join("");
  try {
    id = sessionStorage.getItem("session") ?? id;
    sessionStorage.setItem("session", id);
  } catch { /* storage is disabled */ }
  return id;
}

// The server's answer, or null after an error. Background polling passes showError = false.
async function callServer(name, args = {}, showError = true) {
  let answer = null;
  try {
    answer = await server[name]({ session: state.session, ...args });
  } catch { /* reported below */ }
  if (showError) find(".error").textContent = answer ? answer.error ?? "" : "The server is not responding; please try again.";
  return answer && !answer.error ? answer : null;
}

// Use the server's description of a model: the first one, a different one, or the same one with new snapshots.
function setModel(description) {
  model = description;
  [numHeads, numPatches] = [model.kernel[0] * model.kernel[1], model.grid[0] * model.grid[1]];
  colorMap = decodeBase64(model.colors);
  distances = Float64Array.from({ length: numPatches ** 2 }, (_, pair) => patchDistance(Math.floor(pair / numPatches), pair % numPatches, model.grid[1]));
  state.layer = Math.min(state.layer, model.layers.length - 1);
  state.snapshot = Math.min(state.snapshot, model.epochs.length - 1);
  if (state.query >= numPatches) state.query = centerPatch();
  if (state.head !== null && state.head >= numHeads) state.head = null;
}

const centerPatch = () => Math.floor(model.grid[0] / 2) * model.grid[1] + Math.floor(model.grid[1] / 2);

// Switch image, layer or head once the maps have arrived; changes requested meanwhile are merged.
let latestNavigation = 0;
let pendingChanges = {};
async function navigate(changes) {
  const id = ++latestNavigation;
  Object.assign(pendingChanges, changes);
  const { newImage = image, newBitmaps = bitmaps, ...newState } = pendingChanges;
  if (!newImage) return; // the first image applies the pending changes
  const layer = newState.layer ?? state.layer;
  const answer = await callServer("layer_maps", { pixels: newImage.pixels, layer });
  if (id !== latestNavigation) return; // superseded
  pendingChanges = {};
  find(".layer").value = answer ? layer : state.layer;
  if (!answer) return;
  [image, bitmaps] = [newImage, newBitmaps];
  resizeCanvas(find(".image"), bitmaps.display.width, bitmaps.display.height);
  layerMaps = { ...answer, content: answer.content.map(decodeBase64) };
  Object.assign(state, newState);
  clearRecomputed();
  state.snapshot = Math.min(state.snapshot, layerMaps.content.length - 1);
  draw();
}

// Show an example by name, or an image file.
let latestImage = 0;
async function showImage(name, file = null) {
  const id = ++latestImage;
  if (file?.size > MAX_BYTES) return void (find(".error").textContent = "This file is larger than 10 MB; please choose a smaller image.");
  const newImage = await callServer("prepare_image", file ? { file: await encodeBase64(file) } : { example: name });
  if (!newImage || id !== latestImage) return;
  const newBitmaps = {};
  for (const kind of ["display", "input"]) {
    newBitmaps[kind] = new Image();
    newBitmaps[kind].src = newImage[kind];
    await newBitmaps[kind].decode();
  }
  if (id === latestImage) await navigate({ example: file ? null : name, newImage, newBitmaps });
}

async function encodeBase64(file) {
  const reader = new FileReader();
  await new Promise((resolve) => { reader.onloadend = resolve; reader.readAsDataURL(file); });
  return reader.result.split(",")[1] ?? "";
}

let latestRun = 0;
async function showRun(session) {
  stop();
  const id = ++latestRun;
  const answer = await callServer("describe", { session });
  if (id !== latestRun) return;
  find(".models").value = answer ? session : state.session;
  if (!answer) return;
  latestNavigation++; // pending requests and the maps belong to the previous model
  latestImage++;
  clearRecomputed();
  [pendingChanges, layerMaps, image] = [{}, null, null];
  state.session = session;
  setModel(answer);
  Object.assign(state, { snapshot: session ? model.epochs.length - 1 : 0, gates: new Map(), head: null });
  buildForModel();
  await showImage(model.examples[0].name);
}

// --- URL: contains the view, so that it can be shared -------------------------------------------------------------------

function readUrl() {
  const url = new URLSearchParams(location.hash.slice(1));
  const indexIn = (choices, name) => { const index = choices.indexOf(Number(url.get(name))); return url.has(name) && index >= 0 ? index : null; };
  state.layer = indexIn(model.layers.map((layer) => layer + 1), "layer") ?? model.layers.length - 1;
  state.snapshot = indexIn(model.epochs, "epoch") ?? 0;
  state.head = indexIn(Array.from({ length: numHeads }, (_, head) => head + 1), "head");
  const [row, column] = (url.get("patch") ?? "").split(",").map(Number);
  const isInside = row >= 1 && row <= model.grid[0] && column >= 1 && column <= model.grid[1];
  state.query = isInside ? (Math.round(row) - 1) * model.grid[1] + Math.round(column) - 1 : centerPatch();
  state.locked = isInside && url.has("locked");
  if (["watch", "curves", "kernel", "help"].includes(url.get("tab"))) state.tab = url.get("tab");
  const names = model.examples.map(({ name }) => name);
  return names.includes(url.get("image")) ? url.get("image") : names[0];
}

let urlTimer = null;
function writeUrl() {
  clearTimeout(urlTimer); // browsers limit how often a page may change its URL
  urlTimer = setTimeout(() => {
    const url = new URLSearchParams({
      tab: state.tab, layer: model.layers[state.layer] + 1, epoch: model.epochs[state.snapshot],
      patch: `${Math.floor(state.query / model.grid[1]) + 1},${(state.query % model.grid[1]) + 1}`,
    });
    if (state.locked) url.set("locked", "yes");
    if (state.head !== null) url.set("head", state.head + 1);
    if (state.example) url.set("image", state.example);
    if (!state.session) history.replaceState(null, "", `#${url}`.replaceAll("%2C", ","));
  }, 300);
}

// --- drawing ------------------------------------------------------------------------------------------------------------

function draw() {
  if (!layerMaps) return;
  for (const button of findAll(".examples button")) button.setAttribute("aria-pressed", button.dataset.example === state.example);
  const epoch = model.epochs[state.snapshot];
  find(".epoch").textContent = epoch;
  find(".snapshot").value = state.snapshot;
  find(".snapshot").setAttribute("aria-valuetext", `epoch ${epoch}`);
  const accuracy = model.curves?.test_accuracy[model.curves.epochs.indexOf(epoch)];
  const note = state.gates.size ? " (trained gates)" : "";
  find(".accuracy").textContent = accuracy === undefined ? "" : `test accuracy ${accuracy.toFixed(1)}%${note}`;
  find(".step").disabled = state.snapshot === model.epochs.length - 1;
  drawQuery();
  drawHeads();
  drawHeatmap();
  drawPrediction();
  drawCurves();
  drawKernel();
  drawSelection();
  writeUrl();
}

function resizeCanvas(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
}

function moveQuery(query) {
  if (query === state.query || !layerMaps) return;
  state.query = query;
  drawQuery();
  writeUrl();
}

function showSnapshot(snapshot) {
  state.snapshot = snapshot;
  clearRecomputed();
  draw();
}

function showTab(name) {
  state.tab = name;
  for (const tab of findAll("[role=tab]")) {
    tab.setAttribute("aria-selected", tab.dataset.tab === name);
    tab.tabIndex = tab.dataset.tab === name ? 0 : -1;
    find(`#${tab.dataset.tab}`).hidden = tab.dataset.tab !== name;
  }
  for (const node of findAll("[data-for]")) node.classList.toggle("hidden", !node.dataset.for.split(" ").includes(name));
  find(".caption").classList.toggle("hidden", name !== "watch");
  draw();
}

// --- training time ------------------------------------------------------------------------------------------------------

function stop() {
  clearInterval(playTimer);
  playTimer = null;
  find(".play").textContent = "▶ Play training";
}

function step() {
  if (state.snapshot < model.epochs.length - 1) showSnapshot(state.snapshot + 1);
  if (state.snapshot === model.epochs.length - 1) stop();
}

function play() {
  if (playTimer) return stop();
  if (state.snapshot === model.epochs.length - 1) showSnapshot(0);
  find(".play").textContent = "❚❚ Pause";
  playTimer = setInterval(step, 900);
}

// --- changed gates ------------------------------------------------------------------------------------------------------

let latestRecompute = 0;

// Discard the result of a recomputation, also of one in progress: the gates or the view have changed.
function clearRecomputed() {
  latestRecompute++;
  state.recomputed = null;
}

function setGate(layer, head, gate) {
  state.gates.set(`${layer},${head}`, gate);
  clearRecomputed();
}

function setAllGates(gate) {
  const layers = find(".scope").value === "model" ? model.layers.map((_, layer) => layer) : [state.layer];
  for (const layer of layers) for (let head = 0; head < numHeads; head++) setGate(layer, head, gate);
  draw();
}

function resetGates() {
  state.gates.clear();
  clearRecomputed();
  draw();
  const slider = find(".all-gates");
  slider.value = slider.defaultValue;
  slider.focus(); // the button that had the focus is now disabled
}

const allGates = () => model.layers.map((_, layer) => Array.from({ length: numHeads }, (_, head) => gateOf(layer, head)));

async function recompute() {
  if (!image) return;
  const id = ++latestRecompute;
  const { snapshot, layer } = state;
  const answer = await callServer("recompute", { pixels: image.pixels, layer, snapshot, gates: allGates() });
  if (!answer || id !== latestRecompute) return; // superseded
  state.recomputed = { ...answer, content: decodeBase64(answer.content) };
  draw();
}

// --- downloads ----------------------------------------------------------------------------------------------------------

function download(name, url) {
  const link = document.createElement("a");
  [link.download, link.href] = [name, url];
  link.click();
}

async function saveFigure(animated) {
  if (!image) return;
  const button = find(animated ? ".save-gif" : ".save-png");
  button.disabled = true;
  const { layer, snapshot, query } = state;
  const gates = { gates: state.gates.size ? allGates() : null, recomputed: Boolean(state.recomputed) };
  const answer = await callServer("export", { animated, layer, snapshot, query, ...gates, pixels: image.pixels, display: image.display });
  button.disabled = false;
  if (answer) download(`convit-layer-${model.layers[layer] + 1}.${animated ? "gif" : "png"}`, answer.file);
}

function saveGates() {
  const rows = model.gate.flatMap((layers, snapshot) => layers.flatMap((gates, layer) => gates.map((gate, head) =>
    [model.epochs[snapshot], model.layers[layer] + 1, head + 1, gate].join(","))));
  download("convit-gates.csv", URL.createObjectURL(new Blob([["epoch,layer,head,gate", ...rows].join("\n") + "\n"], { type: "text/csv" })));
}

// --- start --------------------------------------------------------------------------------------------------------------

async function start() {
  const answer = await callServer("describe");
  if (!answer) return void setTimeout(start, 2000); // the server may be restarting
  setModel(answer);
  const example = readUrl();
  find(".models").add(new Option(model.name, ""));
  find(".model-choice").classList.add("unavailable");
  buildForModel();
  drawMap(find(".ramp"), Array.from({ length: 256 }, (_, value) => value), 255, 0);
  for (const bind of [bindTabs, bindControls, bindImage, bindUploads, bindHeads, bindHeatmap, bindCharts]) bind();
  setLocked(state.locked);
  showTab(state.tab);
  await showImage(example);
  find(".viewer").classList.remove("loading");
  train("status");
  setInterval(() => { if (!model.finished && !state.session) loadNewSnapshots(); }, 5000);
}

addEventListener("hashchange", () => location.reload()); // the user pasted the URL of a view into the open page
window.convit = { headMaps, pixels: () => image.pixels, state }; // for tests and benchmarks
start();
