// Tab 3: one head by hand.

const kernel = { right: 1, down: 0, strength: 1 };
const MARGIN = 60; // pixels at the left and the top of the map, for its two factors

const kernelNumbers = () => [2 * kernel.strength * kernel.right, 2 * kernel.strength * kernel.down, -kernel.strength];

function paintKernel() {
  if (state.tab !== "kernel") return;
  const [rows, columns] = run.grid;
  const numbers = kernelNumbers();
  const [row, column] = [Math.floor(middlePatch() / columns), middlePatch() % columns];
  const down = axisAttention(numbers[1], numbers[2], row, rows);
  const across = axisAttention(numbers[0], numbers[2], column, columns);
  for (const [name, value] of [["right", kernel.right], ["down", kernel.down], ["strength", kernel.strength]]) {
    find(`.${name}`).value = value;
    find(`.${name}-of`).textContent = value.toFixed(2);
  }
  find(".v-pos").textContent = `v_pos = α · (2 Δx, 2 Δy, −1) = (${numbers.map((value) => value.toFixed(2)).join(", ")})`;
  paintKernelMap(down, across, row, column);
  paintFiltered(numbers);
}

function paintKernelMap(down, across, row, column) {
  const canvas = find(".kernel-map");
  const context = canvas.getContext("2d");
  const side = (canvas.width - MARGIN) / Math.max(...run.grid);
  const largest = Math.max(...down) * Math.max(...across);
  context.clearRect(0, 0, canvas.width, canvas.height);
  down.forEach((vertical, y) => across.forEach((horizontal, x) => {
    const index = 3 * Math.min(255, Math.round((255 * vertical * horizontal) / scaleOf(largest)));
    context.fillStyle = `rgb(${colours[index]}, ${colours[index + 1]}, ${colours[index + 2]})`;
    context.fillRect(MARGIN + x * side, MARGIN + y * side, side - 1, side - 1);
  }));
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--position");
  const tallest = Math.max(...down, ...across);
  across.forEach((value, x) => { const height = (value / tallest) * (MARGIN - 14); context.fillRect(MARGIN + x * side + 2, MARGIN - 6 - height, side - 5, height); });
  down.forEach((value, y) => { const width = (value / tallest) * (MARGIN - 14); context.fillRect(MARGIN - 6 - width, MARGIN + y * side + 2, width, side - 5); });
  const frame = (x, y, size, colour, width) => {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(MARGIN + x * side, MARGIN + y * side, size - 1, size - 1);
  };
  frame(column, row, side, "black", 6);
  frame(column, row, side, "white", 2.5);
  context.beginPath(); // the centre that can be dragged
  context.arc(MARGIN + (column + kernel.right + 0.5) * side, MARGIN + (row + kernel.down + 0.5) * side, 7, 0, 7);
  context.fill();
  context.lineWidth = 2;
  context.strokeStyle = "white";
  context.stroke();
}

// Every patch as the weighted mean of all, first along rows, then along columns: P is the product of its factors.
function paintFiltered(numbers) {
  const canvas = find(".filtered");
  const [rows, columns] = run.grid;
  const [width, height] = [images.display.width, images.display.height];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(images.display, 0, 0);
  const image = context.getImageData(0, 0, width, height);
  const [w, h] = [width / columns, height / rows];
  const source = Float32Array.from(image.data);
  const between = new Float32Array(source.length);
  const target = new Float32Array(source.length);
  for (let x = 0; x < columns; x++) {
    axisAttention(numbers[0], numbers[2], x, columns).forEach((weight, from) => {
      for (let y = 0; y < height; y++) {
        for (let offset = 0; offset < 4 * w; offset++) between[4 * (y * width + x * w) + offset] += weight * source[4 * (y * width + from * w) + offset];
      }
    });
  }
  for (let y = 0; y < rows; y++) {
    axisAttention(numbers[1], numbers[2], y, rows).forEach((weight, from) => {
      const [to, start, count] = [4 * y * h * width, 4 * from * h * width, 4 * h * width];
      for (let offset = 0; offset < count; offset++) target[to + offset] += weight * between[start + offset];
    });
  }
  image.data.set(target);
  context.putImageData(image, 0, 0);
}

function dragKernel(event) {
  const box = find(".kernel-map").getBoundingClientRect();
  const scale = find(".kernel-map").width / box.width;
  const side = (find(".kernel-map").width - MARGIN) / Math.max(...run.grid);
  const place = (client, edge) => ((client - edge) * scale - MARGIN) / side - 0.5;
  const within = (value) => Math.max(-3.5, Math.min(3.5, value));
  const [right, down] = [place(event.clientX, box.left) - (middlePatch() % run.grid[1]), place(event.clientY, box.top) - Math.floor(middlePatch() / run.grid[1])];
  setKernel({ right: within(right), down: within(down) });
}

function setKernel(numbers) {
  Object.assign(kernel, numbers);
  find(".taken").textContent = "";
  paintKernel();
}

// The numbers of the head chosen in tab 1; one with a strength below 0 avoids its centre, which this tab cannot show.
function takeHead() {
  const { head } = state;
  if (head === null) {
    find(".taken").textContent = "None is chosen there yet: click a head’s card first.";
    return;
  }
  const [x, y, curvature] = run.v_pos[state.checkpoint][state.layer][head];
  const named = `Head ${head + 1} of layer ${run.layers[state.layer] + 1} at epoch ${run.epochs[state.checkpoint]}`;
  if (curvature >= 0) {
    find(".taken").textContent = `${named} has come to avoid its centre (strength ${(-curvature).toFixed(2)}), so it has no place in this picture.`;
    return;
  }
  setKernel({ strength: -curvature, right: x / (-2 * curvature), down: y / (-2 * curvature) });
  find(".taken").textContent = `${named}.`;
}
