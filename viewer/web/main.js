// State, server, address and painting. Gradio runs all these files, one after another, once, with `element`, `server`.

const find = (selector) => element.querySelector(selector);
const findAll = (selector) => element.querySelectorAll(selector);
const VISITOR = visitorName();
const LARGEST = 10 * 2 ** 20; // bytes of a picture; the server checks, too

const state = {
  tab: "watch", run: "", layer: 0, checkpoint: 0, query: 0, held: false,
  head: null, // the chosen one; null shows the mean of all on the picture
  gates: new Map(), // the visitor's: "layer,head" to a number
  recomputed: null, // what the model has made of just these gates: content maps of this layer and classes
  example: null, // the name of the picture, if it is one of the page's
};
let run = null; // what the server told of the model
let heads = 0;
let patches = 0;
let colours = null; // of the maps: 256 times red, green, blue
let distances = null; // between any two patches
let cards = [];
let maps = null; // content maps and classes of the picture in the layer on show, at all checkpoints
let picture = null;
let images = {};
let playing = null;

// --- the server -------------------------------------------------------------------------------------------------------

// The same name for as long as the tab is open, so that what was trained here is found again.
function visitorName() {
  const letters = Array.from({ length: 24 }, () => "abcdefghijklmnopqrstuvwxyz"[Math.floor(26 * Math.random())]).join("");
  try {
    const name = sessionStorage.getItem("visitor") ?? letters;
    sessionStorage.setItem("visitor", name);
    return name;
  } catch {
    return letters; // a browser that keeps nothing
  }
}

// The server's answer, or null after telling what is wrong; what the page asks by itself is told only where it `tells`.
async function ask(name, question = {}, tells = true) {
  let answer = null;
  try {
    answer = await server[name]({ run: state.run, ...question });
  } catch { /* told below */ }
  if (tells) find(".trouble").textContent = answer ? answer.error ?? "" : "The server does not answer; please try again.";
  return answer && !answer.error ? answer : null;
}

// Take over the server's description of a model: at first, for another one, or when new snapshots have come.
function takeRun(answer) {
  run = answer;
  [heads, patches] = [run.kernel[0] * run.kernel[1], run.grid[0] * run.grid[1]];
  colours = bytes(run.colours);
  distances = Float64Array.from({ length: patches * patches }, (_, pair) => distance(Math.floor(pair / patches), pair % patches, run.grid[1]));
  state.layer = Math.min(state.layer, run.layers.length - 1);
  state.checkpoint = Math.min(state.checkpoint, run.epochs.length - 1);
  if (state.query >= patches) state.query = middlePatch();
  if (state.head !== null && state.head >= heads) state.head = null;
}

const middlePatch = () => Math.floor(run.grid[0] / 2) * run.grid[1] + Math.floor(run.grid[1] / 2);

// Go to another picture or layer: all of the page changes at once, when its maps are here. What is asked for while
// something else is still on its way joins it.
let latest = 0;
let wanted = {};
async function go(changes) {
  const wish = ++latest;
  Object.assign(wanted, changes);
  const { chosen = picture, loaded = images, ...others } = wanted;
  if (!chosen) return; // there is no picture yet; the first one will take it along
  const layer = others.layer ?? state.layer;
  const answer = await ask("read_layer", { pixels: chosen.pixels, layer });
  if (wish !== latest) return; // the visitor has gone on
  wanted = {};
  find(".layer").value = answer ? layer : state.layer;
  if (!answer) return;
  [picture, images] = [chosen, loaded];
  const canvas = find(".picture");
  const { width, height } = loaded.display;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  maps = { ...answer, content: answer.content.map(bytes) };
  Object.assign(state, others);
  forgetAnswer();
  state.checkpoint = Math.min(state.checkpoint, maps.content.length - 1);
  paint();
}

// Show a picture of the page by its name, or a file.
let latestPicture = 0;
async function showPicture(name, file = null) {
  const wish = ++latestPicture;
  if (file && file.size > LARGEST) {
    find(".trouble").textContent = "This file is larger than 10 MB; please choose a smaller picture.";
    return;
  }
  const chosen = await ask("choose", file ? { file: await base64(file) } : { example: name });
  if (!chosen || wish !== latestPicture) return;
  const loaded = {};
  for (const kind of ["display", "seen"]) {
    loaded[kind] = new Image();
    loaded[kind].src = chosen[kind];
    await loaded[kind].decode();
  }
  if (wish === latestPicture) await go({ example: file ? null : name, chosen, loaded });
}

async function base64(file) {
  const reader = new FileReader();
  await new Promise((done) => { reader.onloadend = done; reader.readAsDataURL(file); });
  return reader.result.split(",")[1] ?? "";
}

let latestRun = 0;
async function showRun(name) {
  stop();
  const wish = ++latestRun;
  const answer = await ask("describe", { run: name });
  if (wish !== latestRun) return;
  find(".runs").value = answer ? name : state.run;
  if (!answer) return;
  latest++; // what is on its way is of the other model, as are the maps
  latestPicture++;
  forgetAnswer();
  [wanted, maps, picture] = [{}, null, null];
  state.run = name;
  takeRun(answer);
  Object.assign(state, { checkpoint: name ? run.epochs.length - 1 : 0, gates: new Map(), head: null });
  buildForRun();
  await showPicture(run.examples[0].name);
}

// --- the address: what is on show, so that a view can be shared ---------------------------------------------------------

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const chosen = (name, choices) => { const index = choices.indexOf(Number(address.get(name))); return address.has(name) && index >= 0 ? index : null; };
  state.layer = chosen("layer", run.layers.map((layer) => layer + 1)) ?? run.layers.length - 1;
  state.checkpoint = chosen("epoch", run.epochs) ?? 0;
  state.head = chosen("head", Array.from({ length: heads }, (_, head) => head + 1));
  const [row, column] = (address.get("patch") ?? "").split(",").map(Number);
  const inside = row >= 1 && row <= run.grid[0] && column >= 1 && column <= run.grid[1];
  state.query = inside ? (Math.round(row) - 1) * run.grid[1] + Math.round(column) - 1 : middlePatch();
  state.held = inside && address.has("held");
  if (["watch", "story", "kernel", "help"].includes(address.get("tab"))) state.tab = address.get("tab");
  const names = run.examples.map((one) => one.name);
  return names.includes(address.get("picture")) ? address.get("picture") : names[0];
}

let writing = null;
function writeAddress() {
  clearTimeout(writing); // browsers refuse more than some hundred changes of the address in half a minute
  writing = setTimeout(() => {
    const address = new URLSearchParams({
      tab: state.tab, layer: run.layers[state.layer] + 1, epoch: run.epochs[state.checkpoint],
      patch: `${Math.floor(state.query / run.grid[1]) + 1},${(state.query % run.grid[1]) + 1}`,
    });
    if (state.held) address.set("held", "yes");
    if (state.head !== null) address.set("head", state.head + 1);
    if (state.example) address.set("picture", state.example);
    if (!state.run) history.replaceState(null, "", `#${address}`.replaceAll("%2C", ","));
  }, 300);
}

// --- painting -----------------------------------------------------------------------------------------------------------

function paint() {
  if (!maps) return;
  for (const button of findAll(".examples button")) button.setAttribute("aria-pressed", button.dataset.example === state.example);
  find(".epoch").textContent = run.epochs[state.checkpoint];
  find(".checkpoint").value = state.checkpoint;
  find(".checkpoint").setAttribute("aria-valuetext", `epoch ${run.epochs[state.checkpoint]}`);
  const accuracy = run.story?.test_accuracy[run.story.epochs.indexOf(run.epochs[state.checkpoint])];
  const trained = state.gates.size ? ", with trained gates" : "";
  find(".accuracy").textContent = accuracy === undefined ? "" : `test accuracy ${accuracy.toFixed(1)}%${trained}`;
  find(".step").disabled = state.checkpoint === run.epochs.length - 1;
  paintQuery();
  paintHeads();
  paintWall();
  paintGuess();
  paintStory();
  paintKernel();
  paintChoice();
  writeAddress();
}

function moveQuery(query) {
  if (query === state.query || !maps) return;
  state.query = query;
  paintQuery();
  writeAddress();
}

function showCheckpoint(checkpoint) {
  state.checkpoint = checkpoint;
  forgetAnswer();
  paint();
}

function showTab(name) {
  state.tab = name;
  for (const tab of findAll("[role=tab]")) {
    tab.setAttribute("aria-selected", tab.dataset.tab === name);
    tab.tabIndex = tab.dataset.tab === name ? 0 : -1;
    find(`#${tab.dataset.tab}`).hidden = tab.dataset.tab !== name;
  }
  for (const part of findAll("[data-for]")) part.classList.toggle("absent", !part.dataset.for.split(" ").includes(name));
  find(".caption").classList.toggle("absent", name !== "watch");
  paint();
}

// --- training time ------------------------------------------------------------------------------------------------------

function stop() {
  clearInterval(playing);
  playing = null;
  find(".play").textContent = "▶ Play training";
}

function step() {
  if (state.checkpoint < run.epochs.length - 1) showCheckpoint(state.checkpoint + 1);
  if (state.checkpoint === run.epochs.length - 1) stop();
}

function play() {
  if (playing) return stop();
  if (state.checkpoint === run.epochs.length - 1) showCheckpoint(0);
  find(".play").textContent = "❚❚ Pause";
  playing = setInterval(step, 900);
}

// --- other gates --------------------------------------------------------------------------------------------------------

let question = 0; // which answer of the model is waited for

// What the model has said, or is about to say, of other gates, or of another view, holds no longer.
function forgetAnswer() {
  question++;
  state.recomputed = null;
}

function setGate(layer, head, gate) {
  state.gates.set(`${layer},${head}`, gate);
  forgetAnswer();
}

function setAllGates(gate) {
  const layers = find(".scope").value === "model" ? run.layers.map((_, layer) => layer) : [state.layer];
  for (const layer of layers) for (let head = 0; head < heads; head++) setGate(layer, head, gate);
  paint();
}

const wantedGates = () => run.layers.map((_, layer) => Array.from({ length: heads }, (_, head) => gateOf(layer, head)));

async function recompute() {
  if (!picture) return;
  const asked = ++question;
  const { checkpoint, layer } = state;
  const answer = await ask("what_if", { pixels: picture.pixels, layer, checkpoint, gates: wantedGates() });
  if (!answer || asked !== question) return; // the visitor has gone on
  state.recomputed = { ...answer, content: bytes(answer.content) };
  paint();
}

// --- files to keep ------------------------------------------------------------------------------------------------------

function save(name, address) {
  const link = document.createElement("a");
  [link.download, link.href] = [name, address];
  link.click();
}

async function saveFigure(moving) {
  if (!picture) return;
  const button = find(moving ? ".save-moving" : ".save-view");
  button.disabled = true;
  const { layer, checkpoint, query } = state;
  const other = { gates: state.gates.size ? wantedGates() : null, recomputed: Boolean(state.recomputed) };
  const answer = await ask("export", { moving, layer, checkpoint, query, ...other, pixels: picture.pixels, display: picture.display });
  button.disabled = false;
  if (answer) save(`convit-layer-${run.layers[layer] + 1}.${moving ? "gif" : "png"}`, answer.file);
}

function saveGates() {
  const lines = run.gate.flatMap((layers, checkpoint) => layers.flatMap((gates, layer) => gates.map((gate, head) =>
    [run.epochs[checkpoint], run.layers[layer] + 1, head + 1, gate].join(","))));
  save("convit-gates.csv", URL.createObjectURL(new Blob([["epoch,layer,head,gate", ...lines].join("\n") + "\n"], { type: "text/csv" })));
}

// --- the start ----------------------------------------------------------------------------------------------------------

function paintRamp() {
  const context = find(".ramp").getContext("2d");
  const image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...colours.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

async function start() {
  const answer = await ask("describe");
  if (!answer) return void setTimeout(start, 2000); // the server may be coming back
  takeRun(answer);
  const name = readAddress();
  find(".runs").add(new Option(run.name, ""));
  find(".of-run").classList.add("absent-always");
  buildForRun();
  paintRamp();
  onTabs();
  onControls();
  onPicture();
  onFiles();
  onHeads();
  onCharts();
  hold(state.held);
  showTab(state.tab);
  await showPicture(name);
  find(".panel").classList.remove("loading");
  train("look");
  setInterval(() => { if (!run.finished && !state.run) follow(); }, 5000);
}

addEventListener("hashchange", () => location.reload()); // a view's address, pasted into the open page
window.convit = { mapsOf: (head, query) => mapsOf(head, query), pixels: () => picture.pixels, state }; // to check the page from outside
start();
