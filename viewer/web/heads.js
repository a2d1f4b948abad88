// Tab 1: the picture, the heads of a layer, the wall of gates.

const KINDS = { position: "position", content: "content", mixed: "mix" };
const gateColour = (gate) => `color-mix(in oklab, var(--position) ${(100 * gate).toFixed(1)}%, var(--content))`;

// The gate on show: the visitor's where they have moved it, else the trained one.
const gateOf = (layer, head) => state.gates.get(`${layer},${head}`) ?? run.gate[state.checkpoint][layer][head];

function mapsOf(head, query) {
  const asked = state.recomputed ?? { content: maps.content[state.checkpoint], peaks: maps.peaks[state.checkpoint] };
  const gate = gateOf(state.layer, head);
  const position = positionMap(run.v_pos[state.checkpoint][state.layer][head], query, run.grid);
  const content = contentMap(asked.content, asked.peaks[head], head, query, patches);
  return { gate, position, content, mixed: mix(position, content, gate) };
}

// Mean attended distance of a head's mix in patches, over all queries (Eq. 8 of the paper).
function meanDistance(head) {
  let total = 0;
  for (let query = 0; query < patches; query++) {
    const { mixed } = mapsOf(head, query);
    let [reach, sum] = [0, 0]; // in 256 steps, a flat content map does not sum to 1
    for (let key = 0; key < patches; key++) {
      reach += mixed[key] * distances[query * patches + key];
      sum += mixed[key];
    }
    total += reach / sum;
  }
  return total / patches;
}

function paintMap(canvas, map, scale, kept) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(run.grid[1], run.grid[0]);
  map.forEach((value, key) => {
    const index = 3 * Math.min(255, Math.round((255 * value) / scale));
    image.data.set(value < kept ? [128, 128, 128, 70] : [colours[index], colours[index + 1], colours[index + 2], 255], 4 * key);
  });
  context.putImageData(image, 0, 0);
}

// A flat map must not look bright: no map is scaled up beyond four times what uniform attention gives.
const scaleOf = (largest) => Math.max(largest, 4 / patches);

// The picture under the map of the chosen head, or under the mean of all heads' mixes.
function paintPicture(all) {
  const canvas = find(".picture");
  const [rows, columns] = run.grid;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(images[find(".as-seen").checked ? "seen" : "display"], 0, 0, canvas.width, canvas.height);
  const [w, h] = [canvas.width / columns, canvas.height / rows];
  const kind = find(".overlay").value;
  const overlay = state.head === null
    ? all[0].mixed.map((_, key) => all.reduce((sum, one) => sum + one[kind][key], 0) / heads)
    : all[state.head][kind];
  const scale = scaleOf(Math.max(...overlay));
  const kept = threshold(overlay, Number(find(".mass").value));
  const opacity = Number(find(".opacity").value);
  overlay.forEach((value, key) => {
    if (value < kept) return;
    const index = 3 * Math.min(255, Math.round((255 * value) / scale));
    context.fillStyle = `rgb(${colours[index]}, ${colours[index + 1]}, ${colours[index + 2]})`;
    context.globalAlpha = opacity * Math.min(1, value / scale) ** 0.5; // dim where there is little, else the picture drowns
    context.fillRect((key % columns) * w, Math.floor(key / columns) * h, w, h);
  });
  context.globalAlpha = 1;
  context.lineWidth = 1;
  context.strokeStyle = "rgba(255, 255, 255, 0.3)";
  for (let x = 1; x < columns; x++) context.strokeRect(x * w, -1, 0, canvas.height + 2);
  for (let y = 1; y < rows; y++) context.strokeRect(-1, y * h, canvas.width + 2, 0);
  for (const [colour, width] of [["black", 7], ["white", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect((state.query % columns) * w, Math.floor(state.query / columns) * h, w, h);
  }
}

// What changes with the query patch, so with every move of the hand: nothing here may cost a layout of the page.
function paintQuery() {
  if (!maps) return;
  const all = Array.from({ length: heads }, (_, head) => mapsOf(head, state.query));
  const share = Number(find(".mass").value);
  const peak = Math.max(...all.flatMap((one) => Object.keys(KINDS).map((kind) => Math.max(...one[kind]))));
  const same = find(".same-scale").checked;
  const place = `translate(${100 * (state.query % run.grid[1])}%, ${100 * Math.floor(state.query / run.grid[1])}%)`;
  all.forEach((one, head) => {
    for (const kind of Object.keys(KINDS)) {
      const largest = Math.max(...one[kind]);
      paintMap(cards[head][kind], one[kind], same ? peak : scaleOf(largest), threshold(one[kind], share));
      cards[head].frame[kind].style.transform = place;
      cards[head].largest[kind].data = largest.toFixed(2);
    }
  });
  find(".ramp-end").textContent = same ? peak.toFixed(2) : "the largest value of each map, printed under it";
  paintPicture(all);
}

// What changes with the checkpoint, the layer or a gate.
function paintHeads() {
  for (let head = 0; head < heads; head++) {
    const gate = gateOf(state.layer, head);
    const { card, slider, output, distance } = cards[head];
    card.style.setProperty("--gate-colour", gateColour(gate));
    card.style.setProperty("--gate", `${100 * gate}%`);
    card.dataset.gate = gate.toFixed(3);
    card.classList.toggle("changed", state.gates.has(`${state.layer},${head}`));
    slider.value = gate;
    slider.setAttribute("aria-valuetext", `${gate.toFixed(2)}, ${gate > 0.5 ? "mostly position" : "mostly content"}`);
    output.textContent = gate.toFixed(2);
    distance.textContent = meanDistance(head).toFixed(1);
  }
  find(".layer-name").textContent = run.layers[state.layer] + 1;
  find(".undo").disabled = find(".recompute").disabled = state.gates.size === 0;
  find(".caption").textContent = caption();
}

// What there is to see, in words.
function caption() {
  const gates = Array.from({ length: heads }, (_, head) => gateOf(state.layer, head));
  const left = gates.flatMap((gate, head) => (gate < 0.5 ? [head + 1] : []));
  const layer = `layer ${run.layers[state.layer] + 1}`;
  const told = left.length === 1 ? `head ${left[0]} of ${layer} looks` : `${left.length} heads of ${layer} (${left.join(", ")}) look`;
  if (state.gates.size) return `With these gates, ${left.length ? told : `no head of ${layer} looks`} more by content than by position.`;
  const timed = run.story !== null; // released weights are all there is of their training
  if (timed && run.epochs[state.checkpoint] === 0) {
    return `Before training. Each head of ${layer} has a place of its own around the patch that asks, and looks a little everywhere. Press “Play training” and see which heads leave.`;
  }
  const when = timed ? `After epoch ${run.epochs[state.checkpoint]}, ` : "After training, ";
  if (!left.length) return `${when}no head of ${layer} looks more by content than by position.`;
  const others = { 0: "", 1: "; the other stays with position" }[heads - left.length] ?? "; the others stay with position";
  return `${when}${told} more by content than by position (gate below 0.5)${others}.`;
}

function paintWall() {
  const wall = find(".wall");
  if (wall.childElementCount !== (run.layers.length + 1) * (heads + 1)) {
    wall.style.gridTemplateColumns = `auto repeat(${heads}, minmax(0, 1fr))`;
    const names = Array.from({ length: heads }, (_, head) => `<span class="name">${head + 1}</span>`).join("");
    wall.innerHTML = `<span>head</span>${names}` + run.layers.map((layer, index) =>
      `<span>layer ${layer + 1}</span>` + Array.from({ length: heads }, (_, head) =>
        `<button type="button" class="cell" tabindex="-1" data-layer="${index}" data-cell="${head}"></button>`).join("")).join("");
  }
  for (const cell of wall.querySelectorAll(".cell")) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.cell)];
    const gate = gateOf(layer, head);
    cell.style.background = gateColour(gate);
    cell.title = `layer ${run.layers[layer] + 1}, head ${head + 1}: gate ${gate.toFixed(2)}`;
    cell.setAttribute("aria-label", cell.title);
    cell.classList.toggle("of-layer", layer === state.layer);
    cell.tabIndex = layer === state.layer && head === (state.head ?? 0) ? 0 : -1; // one stop for the Tab key; arrows go on
    cell.classList.toggle("chosen", layer === state.layer && head === state.head);
  }
}

// The chosen head, or the one that is pointed at, stands out in the cards, the curves and the wall.
function paintChoice(pointed = null) {
  const shown = pointed ?? state.head;
  cards.forEach(({ card }, head) => {
    card.classList.toggle("chosen", head === state.head);
    card.classList.toggle("pointed", head === pointed);
    card.querySelector(".choose").setAttribute("aria-pressed", head === state.head);
  });
  for (const curve of findAll("[data-curve]")) curve.classList.toggle("chosen", Number(curve.dataset.curve) === shown);
  for (const side of findAll(".layer-chart svg, .gate-charts svg, .distance-charts svg")) side.classList.toggle("one-chosen", shown !== null);
  for (const cell of findAll(".wall .cell")) {
    cell.classList.toggle("chosen", Number(cell.dataset.layer) === state.layer && Number(cell.dataset.cell) === shown);
  }
}

function paintGuess() {
  find(".stale").classList.toggle("absent", state.gates.size === 0 || state.recomputed !== null);
  const guess = state.recomputed?.classes ?? maps.classes[state.checkpoint];
  const both = Boolean(state.recomputed);
  find(".guess").replaceChildren(...guess.map(([name, before, after]) => {
    const row = document.createElement("div");
    const bar = (share, what) => `<div class="track ${what}"><div class="fill" style="width: ${100 * share}%"></div></div><span>${(100 * share).toFixed(share < 0.095 ? 1 : 0)}%</span>`;
    row.innerHTML = `<span class="name"></span>${bar(both ? after : before, "now")}${both ? `<span class="was">was</span>${bar(before, "before")}` : ""}`;
    row.querySelector(".name").textContent = name; // class names are folder names: text, never markup
    return row;
  }), known());
}

function known() {
  const note = document.createElement("p");
  note.className = "hint";
  const more = run.classes.length > 12 ? ` and ${run.classes.length - 12} more` : "";
  note.textContent = `It knows nothing but: ${run.classes.slice(0, 12).join(", ")}${more}.`;
  return note;
}

// One card a head, in the order of the kernel's taps: head h in row h % rows, column h // rows.
function buildCards() {
  const [kernelRows, kernelColumns] = run.kernel;
  const side = find(".heads");
  side.style.setProperty("--patch-width", `${100 / run.grid[1]}%`);
  side.style.setProperty("--patch-height", `${100 / run.grid[0]}%`);
  side.style.gridTemplateColumns = `repeat(${kernelColumns}, minmax(0, 1fr))`;
  side.innerHTML = Array.from({ length: heads }, (_, place) => {
    const head = Math.floor(place / kernelColumns) + (place % kernelColumns) * kernelRows;
    const figures = Object.entries(KINDS).map(([kind, word]) =>
      `<figure class="${kind}"><div class="map"><canvas width="${run.grid[1]}" height="${run.grid[0]}"></canvas><i></i></div><figcaption><em>${word}</em> <span>0</span></figcaption></figure>`).join("");
    return `<div class="head" data-head="${head}">
      <button type="button" class="choose" aria-pressed="false" title="choose this head">head ${head + 1}</button>
      <div class="maps">${figures}</div>
      <label class="gate"><span>gate</span><input type="range" min="0" max="1" step="0.01" aria-label="gate of head ${head + 1}"><output></output></label>
      <div class="numbers">mean distance <span class="distance"></span></div></div>`;
  }).join("");
  cards = Array.from({ length: heads }, (_, head) => {
    const card = side.querySelector(`[data-head="${head}"]`);
    const part = (selector) => card.querySelector(selector);
    const ofKinds = (selector) => Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, part(`.${kind} ${selector}`)]));
    const largest = Object.fromEntries(Object.entries(ofKinds("figcaption span")).map(([kind, span]) => [kind, span.firstChild]));
    return { card, ...ofKinds("canvas"), frame: ofKinds("i"), largest, slider: part("input"), output: part("output"), distance: part(".distance") };
  });
}
