// Tab 3: one head controlled by hand.

const kernel = { right: 1, down: 0, strength: 1 };
const MARGIN = 60; // pixels left of the map and above it, for its two factors

function drawKernel() {
  if (state.tab !== "kernel") return;
  const [rows, columns] = model.grid;
  const vPos = [2 * kernel.strength * kernel.right, 2 * kernel.strength * kernel.down, -kernel.strength];
  const [row, column] = [Math.floor(centerPatch() / columns), centerPatch() % columns];
  const down = axisAttention(vPos[1], vPos[2], row, rows);
  const across = axisAttention(vPos[0], vPos[2], column, columns);
  for (const [name, value] of Object.entries(kernel)) {
    find(`.${name}`).value = value;
    find(`.${name}-value`).textContent = value.toFixed(2);
  }
  find(".v-pos").textContent = `v_pos = α · (2 Δx, 2 Δy, −1) = (${vPos.map((value) => value.toFixed(2)).join(", ")})`;
  drawKernelMap(down, across, row, column);
  drawFiltered(vPos);
}

function drawKernelMap(down, across, row, column) {
  const canvas = find(".kernel-map");
  const context = canvas.getContext("2d");
  const side = (canvas.width - MARGIN) / Math.max(...model.grid);
  const scale = scaleOf(Math.max(...down) * Math.max(...across));
  context.clearRect(0, 0, canvas.width, canvas.height);
  down.forEach((vertical, y) => across.forEach((horizontal, x) => {
    context.fillStyle = `rgb(${colorOf(vertical * horizontal, scale)})`;
    context.fillRect(MARGIN + x * side, MARGIN + y * side, side - 1, side - 1);
  }));
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--position");
  const unit = (MARGIN - 14) / Math.max(...down, ...across); // pixels per attention weight
  across.forEach((value, x) => context.fillRect(MARGIN + x * side + 2, MARGIN - 6 - value * unit, side - 5, value * unit));
  down.forEach((value, y) => context.fillRect(MARGIN - 6 - value * unit, MARGIN + y * side + 2, value * unit, side - 5));
  for (const [color, lineWidth] of [["black", 6], ["white", 2.5]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.strokeRect(MARGIN + column * side, MARGIN + row * side, side - 1, side - 1);
  }
  context.beginPath(); // handle at the attention center
  context.arc(MARGIN + (column + kernel.right + 0.5) * side, MARGIN + (row + kernel.down + 0.5) * side, 7, 0, 7);
  context.fill();
  Object.assign(context, { strokeStyle: "white", lineWidth: 2 });
  context.stroke();
}

// Replace every patch by the weighted mean of all patches: first along x, then along y, since P is the product of its factors.
function drawFiltered(vPos) {
  const canvas = find(".filtered");
  const [rows, columns] = model.grid;
  const { width, height } = bitmaps.display;
  resizeCanvas(canvas, width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmaps.display, 0, 0);
  const imageData = context.getImageData(0, 0, width, height);
  const [patchWidth, patchHeight] = [width / columns, height / rows];
  const source = Float32Array.from(imageData.data);
  const filteredX = new Float32Array(source.length);
  const filtered = new Float32Array(source.length);
  for (let x = 0; x < columns; x++) {
    axisAttention(vPos[0], vPos[2], x, columns).forEach((weight, key) => {
      for (let y = 0; y < height; y++) {
        const [to, from] = [4 * (y * width + x * patchWidth), 4 * (y * width + key * patchWidth)];
        for (let offset = 0; offset < 4 * patchWidth; offset++) filteredX[to + offset] += weight * source[from + offset];
      }
    });
  }
  const stripe = 4 * patchHeight * width; // values in a row of patches
  for (let y = 0; y < rows; y++) {
    axisAttention(vPos[1], vPos[2], y, rows).forEach((weight, key) => {
      for (let offset = 0; offset < stripe; offset++) filtered[y * stripe + offset] += weight * filteredX[key * stripe + offset];
    });
  }
  imageData.data.set(filtered);
  context.putImageData(imageData, 0, 0);
}

function dragKernel(event) {
  const canvas = find(".kernel-map");
  const box = canvas.getBoundingClientRect();
  const side = (canvas.width - MARGIN) / Math.max(...model.grid);
  const clamp = (value) => Math.max(-3.5, Math.min(3.5, value));
  const patch = (pixels) => ((pixels * canvas.width) / box.width - MARGIN) / side - 0.5;
  const [row, column] = [Math.floor(centerPatch() / model.grid[1]), centerPatch() % model.grid[1]];
  setKernel({ right: clamp(patch(event.clientX - box.left) - column), down: clamp(patch(event.clientY - box.top) - row) });
}

function setKernel(values) {
  Object.assign(kernel, values);
  find(".copied-head").textContent = "";
  drawKernel();
}

// Copy the head selected in tab 1. A head with negative strength avoids its center, which this tab cannot show.
function copyHead() {
  const { head } = state;
  const note = find(".copied-head");
  if (head === null) return void (note.textContent = "No head is selected; click a head’s card first.");
  const [x, y, curvature] = model.v_pos[state.snapshot][state.layer][head];
  const name = `Head ${head + 1} of layer ${model.layers[state.layer] + 1} at epoch ${model.epochs[state.snapshot]}`;
  if (curvature < 0) setKernel({ strength: -curvature, right: x / (-2 * curvature), down: y / (-2 * curvature) });
  note.textContent = curvature < 0 ? `${name}.`
    : `${name} avoids its center (strength ${(-curvature).toFixed(2)}), so this tab cannot show it.`;
}
