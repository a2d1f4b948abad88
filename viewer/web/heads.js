// Tab 1: the image, the heads of a layer, the gate heatmap.

const KINDS = ["position", "content", "mixed"];
const gateColor = (gate) => `color-mix(in oklab, var(--position) ${(100 * gate).toFixed(1)}%, var(--content))`;

// The user's gate where they have changed it, else the trained one.
const gateOf = (layer, head) => state.gates.get(`${layer},${head}`) ?? model.gate[state.snapshot][layer][head];

function headMaps(head, query) {
  const { content: bytes, peaks } = state.recomputed ?? { content: layerMaps.content[state.snapshot], peaks: layerMaps.peaks[state.snapshot] };
  const gate = gateOf(state.layer, head);
  const position = positionMap(model.v_pos[state.snapshot][state.layer][head], query, model.grid);
  const content = contentMap(bytes, peaks[head], head, query, numPatches);
  return { gate, position, content, mixed: mixMaps(position, content, gate) };
}

// Mean attention distance of a head in patches, over all queries (Eq. 8 of the paper).
function meanDistance(head) {
  let total = 0;
  for (let query = 0; query < numPatches; query++) {
    const { mixed } = headMaps(head, query);
    let [distance, mass] = [0, 0]; // quantized content maps do not sum to 1
    for (let key = 0; key < numPatches; key++) {
      distance += mixed[key] * distances[query * numPatches + key];
      mass += mixed[key];
    }
    total += distance / mass;
  }
  return total / numPatches;
}

// Flat maps must not look bright: the scale is at least four times uniform attention.
const scaleOf = (maximum) => Math.max(maximum, 4 / numPatches);

// Red, green and blue of a value on a scale.
function colorOf(value, scale) {
  const index = 3 * Math.min(255, Math.round((255 * value) / scale));
  return [colorMap[index], colorMap[index + 1], colorMap[index + 2]];
}

function drawMap(canvas, map, scale, threshold) {
  const context = canvas.getContext("2d");
  const imageData = context.createImageData(canvas.width, canvas.height);
  map.forEach((value, key) => {
    imageData.data.set(value < threshold ? [128, 128, 128, 70] : [...colorOf(value, scale), 255], 4 * key);
  });
  context.putImageData(imageData, 0, 0);
}

// The image, overlaid with the map of the selected head, or with the mean over all heads.
function drawOverlay(allMaps) {
  const canvas = find(".image");
  const [rows, columns] = model.grid;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmaps[find(".show-input").checked ? "input" : "display"], 0, 0, canvas.width, canvas.height);
  const [width, height] = [canvas.width / columns, canvas.height / rows]; // of a patch
  const kind = find(".overlay").value;
  const overlay = state.head === null
    ? allMaps[0][kind].map((_, key) => allMaps.reduce((sum, maps) => sum + maps[kind][key], 0) / numHeads)
    : allMaps[state.head][kind];
  const scale = scaleOf(Math.max(...overlay));
  const threshold = massThreshold(overlay, Number(find(".mass").value));
  const opacity = Number(find(".opacity").value);
  overlay.forEach((value, key) => {
    if (value < threshold) return;
    context.fillStyle = `rgb(${colorOf(value, scale)})`;
    context.globalAlpha = opacity * Math.min(1, value / scale) ** 0.5; // low values are transparent, so the image stays visible
    context.fillRect((key % columns) * width, Math.floor(key / columns) * height, width, height);
  });
  context.globalAlpha = 1;
  context.lineWidth = 1;
  context.strokeStyle = "rgba(255, 255, 255, 0.3)";
  for (let x = 1; x < columns; x++) context.strokeRect(x * width, -1, 0, canvas.height + 2);
  for (let y = 1; y < rows; y++) context.strokeRect(-1, y * height, canvas.width + 2, 0);
  for (const [color, lineWidth] of [["black", 7], ["white", 3]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.strokeRect((state.query % columns) * width, Math.floor(state.query / columns) * height, width, height);
  }
}

// Everything that depends on the query patch. Runs on every mouse move, so it must not trigger a page layout.
function drawQuery() {
  if (!layerMaps) return;
  const allMaps = Array.from({ length: numHeads }, (_, head) => headMaps(head, state.query));
  const mass = Number(find(".mass").value);
  const sameScale = find(".same-scale").checked;
  const peak = Math.max(...allMaps.flatMap((maps) => KINDS.map((kind) => Math.max(...maps[kind]))));
  const translation = `translate(${100 * (state.query % model.grid[1])}%, ${100 * Math.floor(state.query / model.grid[1])}%)`;
  allMaps.forEach((maps, head) => {
    for (const kind of KINDS) {
      const maximum = Math.max(...maps[kind]);
      drawMap(cards[head].canvas[kind], maps[kind], sameScale ? peak : scaleOf(maximum), massThreshold(maps[kind], mass));
      cards[head].frame[kind].style.transform = translation;
      cards[head].maximum[kind].data = maximum.toFixed(2);
    }
  });
  find(".ramp-end").textContent = sameScale ? peak.toFixed(2) : "maximum of each map, printed below it";
  drawOverlay(allMaps);
}

// Everything that depends on the snapshot, the layer and the gates.
function drawHeads() {
  cards.forEach(({ card, slider, output, distance }, head) => {
    const gate = gateOf(state.layer, head);
    card.style.setProperty("--gate-color", gateColor(gate));
    card.style.setProperty("--gate", `${100 * gate}%`);
    card.dataset.gate = gate.toFixed(3);
    card.classList.toggle("changed", state.gates.has(`${state.layer},${head}`));
    slider.value = gate;
    slider.setAttribute("aria-valuetext", `${gate.toFixed(2)}, ${gate > 0.5 ? "mostly position" : "mostly content"}`);
    output.textContent = gate.toFixed(2);
    distance.textContent = meanDistance(head).toFixed(1);
  });
  find(".layer-number").textContent = model.layers[state.layer] + 1;
  find(".reset-gates").disabled = find(".recompute").disabled = state.gates.size === 0;
  find(".caption").textContent = caption();
}

// One sentence about the heads of the layer.
function caption() {
  const layer = `layer ${model.layers[state.layer] + 1}`;
  const hasTime = model.curves !== null; // released weights are a single snapshot without an epoch
  if (hasTime && !state.gates.size && model.epochs[state.snapshot] === 0) {
    return `Before training, each head of ${layer} looks mostly at one place near the query patch, and slightly at every other patch. Press “Play training” to see which heads escape.`;
  }
  const contentHeads = cards.flatMap((_, head) => (gateOf(state.layer, head) < 0.5 ? [head + 1] : []));
  const trained = hasTime ? `After epoch ${model.epochs[state.snapshot]}` : "After training";
  const verb = contentHeads.length > 1 ? "rely" : "relies";
  return `${state.gates.size ? "With these gates" : trained}, ${contentHeads.length || "none"} of the ${numHeads} heads of ${layer} ${verb} `
    + `more on content than on position (gate below 0.5)${contentHeads.length ? `: ${contentHeads.join(", ")}` : ""}.`;
}

function drawHeatmap() {
  const heatmap = find(".gate-heatmap");
  if (heatmap.childElementCount !== (model.layers.length + 1) * (numHeads + 1)) {
    heatmap.style.gridTemplateColumns = `auto repeat(${numHeads}, minmax(0, 1fr))`;
    const row = (label, cell) => `<span>${label}</span>${Array.from({ length: numHeads }, (_, head) => cell(head)).join("")}`;
    heatmap.innerHTML = row("head", (head) => `<span class="head-number">${head + 1}</span>`)
      + model.layers.map((layer, index) => row(`layer ${layer + 1}`, (head) =>
        `<button type="button" class="cell" data-layer="${index}" data-cell="${head}"></button>`)).join("");
  }
  for (const cell of heatmap.querySelectorAll(".cell")) {
    const [layer, head] = [Number(cell.dataset.layer), Number(cell.dataset.cell)];
    const gate = gateOf(layer, head);
    cell.style.background = gateColor(gate);
    cell.title = `layer ${model.layers[layer] + 1}, head ${head + 1}: gate ${gate.toFixed(2)}`;
    cell.setAttribute("aria-label", cell.title);
    cell.classList.toggle("current-layer", layer === state.layer);
    cell.tabIndex = layer === state.layer && head === (state.head ?? 0) ? 0 : -1; // one Tab stop; arrow keys move between cells
  }
}

// Highlight the hovered head, or else the selected one, in the cards, the curves and the heatmap.
function drawSelection(hovered = null) {
  const highlighted = hovered ?? state.head;
  cards.forEach(({ card }, head) => {
    card.classList.toggle("selected", head === state.head);
    card.classList.toggle("hovered", head === hovered);
    card.querySelector(".select-head").setAttribute("aria-pressed", head === state.head);
  });
  for (const curve of findAll("[data-curve]")) curve.classList.toggle("selected", Number(curve.dataset.curve) === highlighted);
  for (const svg of findAll(".layer-chart svg, .gate-charts svg, .distance-charts svg")) svg.classList.toggle("has-selection", highlighted !== null);
  for (const cell of findAll(".gate-heatmap .cell")) {
    cell.classList.toggle("selected", Number(cell.dataset.layer) === state.layer && Number(cell.dataset.cell) === highlighted);
  }
}

function drawPrediction() {
  find(".stale").classList.toggle("hidden", state.gates.size === 0 || state.recomputed !== null);
  const bar = (probability, kind) => `<div class="track ${kind}"><div class="fill" style="width: ${100 * probability}%"></div></div>
    <span>${(100 * probability).toFixed(probability < 0.095 ? 1 : 0)}%</span>`;
  const predictions = state.recomputed?.predictions ?? layerMaps.predictions[state.snapshot];
  find(".prediction").replaceChildren(...predictions.map(([name, before, after]) => {
    const row = document.createElement("div");
    const beforeRow = state.recomputed ? `<span class="before-label">before</span>${bar(before, "before")}` : "";
    row.innerHTML = `<span class="class-name"></span>${bar(after, "after")}${beforeRow}`;
    row.querySelector(".class-name").textContent = name; // class names are folder names: text, never HTML
    return row;
  }));
}

// One card per head, laid out like the kernel's taps: head h in row h % rows, column floor(h / rows).
function buildCards() {
  const [kernelRows, kernelColumns] = model.kernel;
  const container = find(".heads");
  container.style.setProperty("--patch-width", `${100 / model.grid[1]}%`);
  container.style.setProperty("--patch-height", `${100 / model.grid[0]}%`);
  container.style.gridTemplateColumns = `repeat(${kernelColumns}, minmax(0, 1fr))`;
  const figure = (kind) => `<figure class="${kind}">
    <div class="map"><canvas width="${model.grid[1]}" height="${model.grid[0]}"></canvas><i></i></div>
    <figcaption><em>${kind}</em> <span>0</span></figcaption></figure>`;
  container.innerHTML = Array.from({ length: numHeads }, (_, tap) => {
    const head = Math.floor(tap / kernelColumns) + (tap % kernelColumns) * kernelRows;
    return `<div class="head" data-head="${head}">
      <button type="button" class="select-head" aria-pressed="false" title="select this head">head ${head + 1}</button>
      <div class="maps">${KINDS.map(figure).join("")}</div>
      <label class="gate"><span>gate</span><input type="range" min="0" max="1" step="0.01" aria-label="gate of head ${head + 1}"><output></output></label>
      <div class="head-distance">mean distance <span class="distance"></span></div></div>`;
  }).join("");
  cards = Array.from({ length: numHeads }, (_, head) => {
    const card = container.querySelector(`[data-head="${head}"]`);
    const byKind = (read) => Object.fromEntries(KINDS.map((kind) => [kind, read(card.querySelector(`.${kind}`))]));
    return {
      card,
      canvas: byKind((figure) => figure.querySelector("canvas")),
      frame: byKind((figure) => figure.querySelector("i")),
      maximum: byKind((figure) => figure.querySelector("figcaption span").firstChild),
      slider: card.querySelector("input"),
      output: card.querySelector("output"),
      distance: card.querySelector(".distance"),
    };
  });
}
