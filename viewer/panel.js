// The interactive panel. Gradio runs this once with `element`, `props`, `watch` and `server`.
// Position maps and mixing are computed here, from three numbers a head; only content maps come from the server.

const run = props.run;
const [rows, columns] = run.grid;
const patches = rows * columns;
const heads = run.kernel[0] * run.kernel[1];
const colours = bytes(run.colours);
const find = (selector) => element.querySelector(selector);

const state = { layer: run.layers.length - 1, checkpoint: 0, query: Math.floor(rows / 2) * columns + Math.floor(columns / 2) };
let layerMaps = null; // what server.read_layer said of the picture and the layer on show, state.layer
let picture = null;
let images = {};
let playing = null;

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// P of one head and query over all keys: softmax of v_pos . (dx, dy, dx^2 + dy^2), offsets key minus query, in patches.
function positionMap(vPos, query) {
  const scores = new Float64Array(patches);
  for (let key = 0; key < patches; key++) {
    const dx = (key % columns) - (query % columns);
    const dy = Math.floor(key / columns) - Math.floor(query / columns);
    scores[key] = vPos[0] * dx + vPos[1] * dy + vPos[2] * (dx * dx + dy * dy);
  }
  const highest = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - highest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

function contentMap(head, query) {
  const start = (head * patches + query) * patches;
  const map = layerMaps.content[state.checkpoint].subarray(start, start + patches);
  return Float64Array.from(map, (value) => (value / 255) * layerMaps.peaks[state.checkpoint][head]);
}

function mapsOf(head, query) {
  const gate = run.gate[state.checkpoint][state.layer][head];
  const position = positionMap(run.v_pos[state.checkpoint][state.layer][head], query);
  const content = contentMap(head, query);
  return { gate, position, content, mixed: content.map((value, key) => (1 - gate) * value + gate * position[key]) };
}

// Mean attended distance of the mix in patches, over all queries (Eq. 8 of the paper).
function meanDistance(head) {
  let total = 0;
  for (let query = 0; query < patches; query++) {
    mapsOf(head, query).mixed.forEach((weight, key) => {
      total += weight * Math.hypot((key % columns) - (query % columns), Math.floor(key / columns) - Math.floor(query / columns));
    });
  }
  return total / patches;
}

const gateColour = (gate) => `color-mix(in oklab, var(--position) ${100 * gate}%, var(--content))`;

function paintMap(canvas, map, scale) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  map.forEach((value, key) => {
    const index = 3 * Math.min(255, Math.round((255 * value) / scale));
    image.data.set([colours[index], colours[index + 1], colours[index + 2], 255], 4 * key);
  });
  context.putImageData(image, 0, 0);
}

function paintPicture() {
  const canvas = find(".picture");
  const image = images[find(".as-seen").checked ? "seen" : "display"];
  canvas.width = images.display.width;
  canvas.height = images.display.height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const [w, h] = [canvas.width / columns, canvas.height / rows];
  context.strokeStyle = "rgba(255, 255, 255, 0.35)";
  for (let x = 1; x < columns; x++) context.strokeRect(x * w, -1, 0, canvas.height + 2);
  for (let y = 1; y < rows; y++) context.strokeRect(-1, y * h, canvas.width + 2, 0);
  for (const [colour, width] of [["black", 7], ["white", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect((state.query % columns) * w, Math.floor(state.query / columns) * h, w, h);
  }
}

function paintHeads(withDistances) {
  find(".heads").style.setProperty("--query-left", `${(100 * (state.query % columns)) / columns}%`);
  find(".heads").style.setProperty("--query-top", `${(100 * Math.floor(state.query / columns)) / rows}%`);
  const all = Array.from({ length: heads }, (_, head) => mapsOf(head, state.query));
  const peak = Math.max(...all.flatMap(({ position, content, mixed }) => [...position, ...content, ...mixed]));
  const same = find(".same-scale").checked;
  find(".ramp-end").textContent = same ? peak.toFixed(2) : `the largest of each map, printed under it, and at least ${(4 / patches).toFixed(2)}`;
  all.forEach((maps, head) => {
    const card = find(`[data-head="${head}"]`);
    card.style.borderColor = gateColour(maps.gate);
    card.dataset.gate = maps.gate.toFixed(3);
    card.querySelector(".fill").style.width = `${100 * maps.gate}%`;
    card.querySelector(".gate").textContent = maps.gate.toFixed(2);
    if (withDistances) card.querySelector(".distance").textContent = meanDistance(head).toFixed(1);
    for (const name of ["position", "content", "mixed"]) {
      const largest = Math.max(...maps[name]);
      // A flat map must not look bright: no map is scaled up beyond four times what uniform attention gives.
      paintMap(card.querySelector(`canvas.${name}`), maps[name], same ? peak : Math.max(largest, 4 / patches));
      card.querySelector(`figure:has(.${name}) span`).textContent = largest.toFixed(2);
    }
  });
}

function paintCurves() {
  const { epochs, gates } = run.gate_curves;
  const last = Math.max(epochs[epochs.length - 1], 1);
  const [x, y] = [(epoch) => 30 + (220 * epoch) / last, (gate) => 180 - 170 * gate];
  const line = (values, style) => `<polyline fill="none" ${style} points="${values.map((gate, i) => `${x(epochs[i])},${y(gate)}`).join(" ")}"/>`;
  const ofHead = (head) => gates.map((layers) => layers[state.layer][head]);
  const mean = gates.map((layers) => layers[state.layer].reduce((sum, gate) => sum + gate, 0) / heads);
  const now = x(run.epochs[state.checkpoint]);
  find(".curves").innerHTML =
    [0, 0.5, 1].map((gate) => `<line class="axis" x1="30" x2="250" y1="${y(gate)}" y2="${y(gate)}"/><text x="24" y="${y(gate) + 3}" text-anchor="end">${gate}</text>`).join("") +
    Array.from({ length: heads }, (_, head) => {
      const values = ofHead(head);
      return line(values, `style="stroke: ${gateColour(values[values.length - 1])}" stroke-width="1.5"`);
    }).join("") +
    line(mean, 'class="mean" stroke-width="2.5"') +
    `<line class="mean" stroke-dasharray="3 3" x1="${now}" x2="${now}" y1="10" y2="180"/>` +
    `<text x="30" y="195">0</text><text x="250" y="195" text-anchor="end">epoch ${last}</text>`;
}

function paintWall() {
  const gates = run.gate[state.checkpoint];
  find(".wall").style.gridTemplateColumns = `auto repeat(${heads}, minmax(0, 1fr))`;
  const names = Array.from({ length: heads }, (_, head) => `<span class="name">${head + 1}</span>`).join("");
  find(".wall").innerHTML = `<span>head</span>${names}` + gates
    .map((layer, index) => `<span>layer ${run.layers[index] + 1}</span>` + layer.map((gate, head) =>
      `<div class="cell" style="background: ${gateColour(gate)}" title="layer ${run.layers[index] + 1}, head ${head + 1}: gate ${gate.toFixed(2)}"></div>`).join(""))
    .join("");
}

function paintGuess() {
  const accuracy = run.accuracy[state.checkpoint];
  find(".epoch").textContent = run.epochs[state.checkpoint];
  find(".status").textContent = accuracy === null ? "" : `test accuracy ${accuracy.toFixed(1)}%`;
  const rowsOf = layerMaps.classes[state.checkpoint].map(([name, share]) => {
    const row = document.createElement("div");
    row.innerHTML = `<span class="name"></span><div class="track"><div class="fill" style="width: ${100 * share}%"></div></div><span>${(100 * share).toFixed(0)}%</span>`;
    row.querySelector(".name").textContent = name; // class names are folder names: text, never markup
    return row;
  });
  const more = run.classes.length > 20 ? ` and ${run.classes.length - 20} more` : "";
  const known = `It knows nothing but these: ${run.classes.slice(0, 20).join(", ")}${more}.`;
  find(".guess").replaceChildren("The model's guess at this epoch:", ...rowsOf, known);
}

function paint(withDistances = true) {
  if (!layerMaps || !images.display) return;
  paintPicture();
  paintHeads(withDistances);
  if (!withDistances) return; // only the query moved
  paintCurves();
  paintWall();
  paintGuess();
}

async function readLayer(layer) {
  const asked = picture;
  find(".heads").classList.add("waiting");
  let maps;
  try {
    maps = await server.read_layer({ pixels: asked.pixels, layer });
  } catch {
    find(".status").textContent = "the server does not answer; please try again";
    find(".layer").value = state.layer;
    return;
  } finally {
    find(".heads").classList.remove("waiting");
  }
  if (asked !== picture || layer !== Number(find(".layer").value)) return; // the visitor has gone on meanwhile
  state.layer = layer;
  layerMaps = { ...maps, content: maps.content.map(bytes) };
  paint();
}

async function showPicture() {
  if (!props.value) return;
  const chosen = JSON.parse(props.value);
  const loaded = {};
  for (const name of ["display", "seen"]) {
    loaded[name] = new Image();
    loaded[name].src = chosen[name];
    await loaded[name].decode();
  }
  [picture, images] = [chosen, loaded];
  await readLayer(Number(find(".layer").value));
}

function moveQuery(query) {
  state.query = query;
  paint(false);
}

function showCheckpoint(checkpoint) {
  state.checkpoint = checkpoint;
  find(".checkpoint").value = checkpoint;
  find(".checkpoint").setAttribute("aria-valuetext", `epoch ${run.epochs[checkpoint]}`);
  paint();
}

function stop() {
  clearInterval(playing);
  playing = null;
  find(".play").textContent = "▶ play";
  find(".play").setAttribute("aria-label", "play training");
}

function play() {
  if (playing) return stop();
  find(".play").textContent = "❚❚ pause";
  find(".play").setAttribute("aria-label", "pause training");
  if (state.checkpoint === run.epochs.length - 1) showCheckpoint(0);
  playing = setInterval(() => {
    if (state.checkpoint === run.epochs.length - 1) return stop();
    showCheckpoint(state.checkpoint + 1);
  }, 900);
}

find(".layer").innerHTML = run.layers.map((layer, index) => `<option value="${index}">${layer + 1}</option>`).join("");
find(".layer").value = state.layer;
find(".checkpoint").max = run.epochs.length - 1;
find(".checkpoint").value = state.checkpoint;
find(".heads").style.setProperty("--patch-width", `${100 / columns}%`);
find(".heads").style.setProperty("--patch-height", `${100 / rows}%`);
find(".heads").style.gridTemplateColumns = `repeat(${run.kernel[1]}, minmax(0, 1fr))`;
find(".heads").innerHTML = Array.from({ length: heads }, (_, index) => {
  const head = Math.floor(index / run.kernel[1]) + (index % run.kernel[1]) * run.kernel[0]; // released order: down the columns
  const figure = (name, word) => `<figure><div class="map"><canvas class="${name}"></canvas><i></i></div><figcaption><em>${word}</em> <span></span></figcaption></figure>`;
  return `<div class="head" data-head="${head}"><div class="maps">${figure("position", "position")}${figure("content", "content")}${figure("mixed", "mix")}</div>
    <div class="track" title="gate: orange is position, blue content"><div class="fill"></div></div>
    <div class="numbers">head ${head + 1} <em>· gate</em> <b class="gate"></b> <em>· distance</em> <span class="distance"></span></div></div>`;
}).join("");
const ramp = find(".ramp").getContext("2d");
const rampImage = ramp.createImageData(256, 1);
for (let i = 0; i < 256; i++) rampImage.data.set([...colours.subarray(3 * i, 3 * i + 3), 255], 4 * i);
ramp.putImageData(rampImage, 0, 0);

find(".layer").addEventListener("change", (event) => readLayer(Number(event.target.value)));
find(".checkpoint").addEventListener("input", (event) => { stop(); showCheckpoint(Number(event.target.value)); });
find(".play").addEventListener("click", play);
find(".same-scale").addEventListener("change", () => paint(false));
find(".as-seen").addEventListener("change", paintPicture);
find(".picture").addEventListener("click", (event) => {
  const box = event.target.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  moveQuery(Math.min(rows - 1, Math.floor(y * rows)) * columns + Math.min(columns - 1, Math.floor(x * columns)));
});
find(".picture").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [x, y] = [(state.query % columns) + step[0], Math.floor(state.query / columns) + step[1]];
  if (x >= 0 && x < columns && y >= 0 && y < rows) moveQuery(y * columns + x);
});

window.convit = { mapsOf, pixels: () => picture.pixels }; // to check the maps against the model, from outside
watch("value", showPicture);
showPicture();
