// Event handlers of the controls, the image, the heads and the charts.

function buildForModel() {
  find(".layer").innerHTML = model.layers.map((layer, index) => `<option value="${index}">${layer + 1}</option>`).join("");
  find(".layer").value = state.layer;
  find(".snapshot").max = model.epochs.length - 1;
  for (const selector of [".time", ".save-gif"]) find(selector).classList.toggle("unavailable", model.finished && model.epochs.length === 1);
  find(".examples").innerHTML = model.examples.map(({ name, thumbnail }) =>
    `<button type="button" data-example="${escapeHtml(name)}"><img src="${thumbnail}" alt="${escapeHtml(name)}" width="48" height="48"></button>`).join("");
  const more = model.classes.length > 12 ? ` and ${model.classes.length - 12} more` : "";
  find(".classes").textContent = `Classes: ${model.classes.slice(0, 12).join(", ")}${more}.`;
  find(".model-summary").textContent = `Model: ${model.name}, ${model.layers.length} layers with gates, ${numHeads} heads per layer, ${model.grid[0]} × ${model.grid[1]} patches, ${model.classes.length} classes.`;
  if (cards.length !== numHeads || find(".heads canvas").width !== model.grid[1]) buildCards();
}

function patchAt(event) {
  const [rows, columns] = model.grid;
  const box = find(".image").getBoundingClientRect();
  const indexAt = (fraction, count) => Math.max(0, Math.min(count - 1, Math.floor(fraction * count)));
  return indexAt((event.clientY - box.top) / box.height, rows) * columns + indexAt((event.clientX - box.left) / box.width, columns);
}

function setLocked(locked) {
  state.locked = locked;
  find(".image-hint").textContent = locked ? "Locked; click this patch again to unlock it." : "Hover or tap to move the query patch; click to lock it.";
  find(".image").classList.toggle("locked", locked);
  writeUrl();
}

function bindImage() {
  const canvas = find(".image");
  canvas.addEventListener("pointermove", (event) => {
    if (!state.locked && event.pointerType !== "touch") moveQuery(patchAt(event));
  });
  canvas.addEventListener("click", (event) => {
    const query = patchAt(event);
    setLocked(!(state.locked && query === state.query));
    moveQuery(query);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const isToggle = event.key === "Enter" || event.key === " ";
    if (isToggle) setLocked(!state.locked);
    if (isToggle || move) event.preventDefault();
    if (!move) return;
    const [x, y] = [(state.query % model.grid[1]) + move[0], Math.floor(state.query / model.grid[1]) + move[1]];
    if (x < 0 || x >= model.grid[1] || y < 0 || y >= model.grid[0]) return;
    moveQuery(y * model.grid[1] + x);
    find(".screen-reader").textContent = `row ${y + 1}, column ${x + 1}`;
  });
}

function bindUploads() {
  const show = (files) => { if (files[0]) showImage(null, files[0]); };
  const highlight = (dragging) => find(".viewer").classList.toggle("dragging", dragging);
  find(".file").addEventListener("change", (event) => {
    show(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  find(".examples").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) showImage(button.dataset.example);
  });
  const page = element.ownerDocument;
  page.addEventListener("dragover", (event) => { event.preventDefault(); highlight(true); });
  page.addEventListener("dragleave", (event) => { if (!event.relatedTarget) highlight(false); });
  page.addEventListener("drop", (event) => { event.preventDefault(); highlight(false); show(event.dataTransfer.files); });
  page.addEventListener("paste", (event) => show(event.clipboardData.files));
}

function bindHeads() {
  const headAt = (event) => { const card = event.target.closest("[data-head]"); return card && Number(card.dataset.head); };
  const heads = find(".heads");
  heads.addEventListener("pointerover", (event) => drawSelection(headAt(event)));
  heads.addEventListener("pointerleave", () => drawSelection());
  heads.addEventListener("click", (event) => {
    const head = headAt(event);
    if (event.target.closest(".gate") || head === null) return;
    state.head = state.head === head ? null : head;
    draw();
  });
  heads.addEventListener("input", (event) => {
    setGate(state.layer, headAt(event), Number(event.target.value));
    draw();
  });
  find(".kinds").innerHTML = KINDS.map((kind) => `<button type="button" data-kind="${kind}" aria-pressed="${kind === "mixed"}">${kind}</button>`).join("");
  find(".kinds").addEventListener("click", (event) => {
    const { kind } = event.target.dataset;
    if (!kind) return;
    heads.dataset.kind = kind;
    for (const button of findAll(".kinds button")) button.setAttribute("aria-pressed", button.dataset.kind === kind);
  });
}

function bindHeatmap() {
  const heatmap = find(".gate-heatmap");
  heatmap.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) navigate({ layer: Number(cell.dataset.layer), head: Number(cell.dataset.cell) });
  });
  heatmap.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numHeads, ArrowDown: numHeads }[event.key];
    if (!move) return;
    const cells = [...findAll(".gate-heatmap .cell")];
    event.preventDefault();
    cells[cells.indexOf(event.target) + move]?.focus();
  });
  heatmap.addEventListener("pointerover", (event) => {
    const cell = event.target.closest(".cell");
    drawSelection(cell && Number(cell.dataset.layer) === state.layer ? Number(cell.dataset.cell) : null);
  });
  heatmap.addEventListener("pointerleave", () => drawSelection());
}

function bindCharts() {
  element.addEventListener("click", (event) => {
    const epoch = epochAt(event);
    if (epoch !== null) { stop(); showSnapshot(nearestSnapshot(epoch)); }
  });
  element.addEventListener("pointerover", (event) => {
    if (event.target.dataset?.curve) drawSelection(Number(event.target.dataset.curve));
    else if (event.target.closest("svg[data-last-epoch]")) drawSelection();
  });
}

function bindTabs() {
  const tabs = [...findAll("[role=tab]")];
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
      if (target === undefined) return;
      const other = tabs[(target + tabs.length) % tabs.length];
      event.preventDefault();
      other.focus();
      showTab(other.dataset.tab);
    });
  }
}

function bindControls() {
  const on = (selector, type, handler) => find(selector).addEventListener(type, handler);
  on(".layer", "change", (event) => navigate({ layer: Number(event.target.value) }));
  on(".models", "change", (event) => showRun(event.target.value));
  on(".snapshot", "input", (event) => { stop(); showSnapshot(Number(event.target.value)); });
  on(".play", "click", play);
  on(".step", "click", () => { stop(); step(); });
  on(".reset", "click", () => { stop(); showSnapshot(0); });
  for (const selector of [".same-scale", ".show-input", ".overlay", ".opacity"]) on(selector, "input", drawQuery);
  on(".mass", "input", (event) => { find(".mass-percent").textContent = `${Math.round(100 * event.target.value)}%`; drawQuery(); });
  on(".all-gates", "input", (event) => setAllGates(Number(event.target.value)));
  on(".recompute", "click", recompute);
  on(".reset-gates", "click", resetGates);
  on(".save-png", "click", () => saveFigure(false));
  on(".save-gif", "click", () => saveFigure(true));
  on(".save-csv", "click", saveGates);
  on(".train", "click", startTraining);
  on(".train-stop", "click", () => train("stop"));
  for (const name of ["right", "down", "strength"]) on(`.${name}`, "input", (event) => setKernel({ [name]: Number(event.target.value) }));
  on(".kernel-map", "pointerdown", (event) => { event.target.setPointerCapture(event.pointerId); dragKernel(event); });
  on(".kernel-map", "pointermove", (event) => { if (event.buttons) dragKernel(event); });
  on(".copy-head", "click", copyHead);
  find(".taps").innerHTML = [-1, 0, 1].flatMap((down) => [-1, 0, 1].map((right) =>
    `<button type="button" data-right="${right}" data-down="${down}" aria-label="tap ${right} right, ${down} down">${"↖↑↗←•→↙↓↘"[3 * (down + 1) + right + 1]}</button>`)).join("");
  on(".taps", "click", (event) => {
    const { right, down } = event.target.dataset;
    if (right !== undefined) setKernel({ right: Number(right), down: Number(down), strength: 4 });
  });
}
