// What the controls do, and the hand on the picture, the heads, the charts.

function buildForRun() {
  find(".layer").innerHTML = run.layers.map((layer, index) => `<option value="${index}">${layer + 1}</option>`).join("");
  find(".layer").value = state.layer;
  find(".checkpoint").max = run.epochs.length - 1;
  for (const part of [".time", ".save-moving"]) find(part).classList.toggle("absent-always", run.finished && run.epochs.length === 1);
  find(".examples").innerHTML = run.examples.map(({ name, thumb }) =>
    `<button type="button" data-example="${escape(name)}"><img src="${thumb}" alt="${escape(name)}" width="48" height="48"></button>`).join("");
  find(".help-model").textContent = `On show: ${run.name}, ${run.layers.length} layers of ${heads} heads, ${run.grid[0]} × ${run.grid[1]} patches, ${run.classes.length} classes.`;
  if (cards.length !== heads || find(".heads canvas").width !== run.grid[1]) buildCards();
}

function patchAt(event) {
  const [rows, columns] = run.grid;
  const box = find(".picture").getBoundingClientRect();
  const along = (client, edge, length, count) => Math.max(0, Math.min(count - 1, Math.floor(((client - edge) / length) * count)));
  return along(event.clientY, box.top, box.height, rows) * columns + along(event.clientX, box.left, box.width, columns);
}

function hold(held) {
  state.held = held;
  find(".picture-hint").textContent = held ? "Held; click this patch again to let go." : "Move over the picture, or tap it; a click holds a patch.";
  find(".picture").classList.toggle("held", held);
  writeAddress();
}

function onPicture() {
  const canvas = find(".picture");
  canvas.addEventListener("pointermove", (event) => { if (!state.held && event.pointerType !== "touch") moveQuery(patchAt(event)); });
  canvas.addEventListener("click", (event) => {
    const query = patchAt(event);
    hold(!(state.held && query === state.query));
    moveQuery(query);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") hold(!state.held);
    else if (!move) return;
    event.preventDefault();
    if (!move) return;
    const [x, y] = [(state.query % run.grid[1]) + move[0], Math.floor(state.query / run.grid[1]) + move[1]];
    if (x < 0 || x >= run.grid[1] || y < 0 || y >= run.grid[0]) return;
    moveQuery(y * run.grid[1] + x);
    find(".spoken").textContent = `row ${y + 1}, column ${x + 1}`;
  });
}

function onFiles() {
  find(".file").addEventListener("change", (event) => {
    if (event.target.files[0]) showPicture(null, event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  find(".examples").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) showPicture(button.dataset.example);
  });
  const page = element.ownerDocument;
  page.addEventListener("dragover", (event) => { event.preventDefault(); find(".panel").classList.add("dragging"); });
  page.addEventListener("dragleave", (event) => { if (!event.relatedTarget) find(".panel").classList.remove("dragging"); });
  page.addEventListener("drop", (event) => {
    event.preventDefault();
    find(".panel").classList.remove("dragging");
    if (event.dataTransfer.files[0]) showPicture(null, event.dataTransfer.files[0]);
  });
  page.addEventListener("paste", (event) => { if (event.clipboardData.files[0]) showPicture(null, event.clipboardData.files[0]); });
}

function onHeads() {
  const headOf = (event) => { const card = event.target.closest("[data-head]"); return card ? Number(card.dataset.head) : null; };
  const side = find(".heads");
  side.addEventListener("pointerover", (event) => paintChoice(headOf(event)));
  side.addEventListener("pointerleave", () => paintChoice());
  side.addEventListener("click", (event) => {
    if (event.target.closest(".gate") || headOf(event) === null) return;
    state.head = state.head === headOf(event) ? null : headOf(event);
    paint();
  });
  side.addEventListener("input", (event) => {
    setGate(state.layer, headOf(event), Number(event.target.value));
    paint();
  });
  find(".wall").addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    go({ layer: Number(cell.dataset.layer), head: Number(cell.dataset.cell) });
  });
  find(".wall").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads }[event.key];
    const cells = [...findAll(".wall .cell")];
    const next = cells[cells.indexOf(event.target) + (move ?? NaN)];
    if (move) event.preventDefault();
    next?.focus();
  });
  find(".wall").addEventListener("pointerover", (event) => {
    const cell = event.target.closest(".cell");
    paintChoice(cell && Number(cell.dataset.layer) === state.layer ? Number(cell.dataset.cell) : null);
  });
  find(".wall").addEventListener("pointerleave", () => paintChoice());
  find(".kinds").innerHTML = Object.entries(KINDS).map(([kind, word]) => `<button type="button" data-kind="${kind}" aria-pressed="${kind === "mixed"}">${word}</button>`).join("");
  find(".heads").dataset.kind = "mixed";
  find(".kinds").addEventListener("click", (event) => {
    const { kind } = event.target.dataset;
    if (!kind) return;
    find(".heads").dataset.kind = kind;
    for (const button of findAll(".kinds button")) button.setAttribute("aria-pressed", button.dataset.kind === kind);
  });
}

function onCharts() {
  element.addEventListener("click", (event) => {
    const epoch = epochAt(event);
    if (epoch !== null) { stop(); showCheckpoint(nearestCheckpoint(epoch)); }
  });
  element.addEventListener("pointerover", (event) => {
    if (event.target.dataset?.curve) paintChoice(Number(event.target.dataset.curve));
    else if (event.target.closest("svg[data-last]")) paintChoice();
  });
}

function onTabs() {
  const tabs = [...findAll("[role=tab]")];
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const wanted = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
      if (wanted === undefined) return;
      const other = tabs[(wanted + tabs.length) % tabs.length];
      event.preventDefault();
      other.focus();
      showTab(other.dataset.tab);
    });
  }
}

function onControls() {
  const on = (selector, kind, act) => find(selector).addEventListener(kind, act);
  on(".layer", "change", (event) => go({ layer: Number(event.target.value) }));
  on(".runs", "change", (event) => showRun(event.target.value));
  on(".checkpoint", "input", (event) => { stop(); showCheckpoint(Number(event.target.value)); });
  on(".play", "click", play);
  on(".step", "click", () => { stop(); step(); });
  on(".reset", "click", () => { stop(); showCheckpoint(0); });
  for (const selector of [".same-scale", ".as-seen", ".overlay", ".opacity"]) on(selector, "input", paintQuery);
  on(".mass", "input", (event) => { find(".mass-share").textContent = `${Math.round(100 * event.target.value)}%`; paintQuery(); });
  on(".all-gates", "input", (event) => setAllGates(Number(event.target.value)));
  on(".recompute", "click", recompute);
  on(".undo", "click", () => {
    state.gates.clear();
    forgetAnswer();
    paint();
    find(".all-gates").value = find(".all-gates").defaultValue;
    find(".all-gates").focus();
  });
  on(".save-view", "click", () => saveFigure(false));
  on(".save-moving", "click", () => saveFigure(true));
  on(".save-gates", "click", saveGates);
  on(".train", "click", trainAnew);
  on(".train-stop", "click", () => train("stop"));
  for (const name of ["right", "down", "strength"]) on(`.${name}`, "input", (event) => setKernel({ [name]: Number(event.target.value) }));
  on(".kernel-map", "pointerdown", (event) => { event.target.setPointerCapture(event.pointerId); dragKernel(event); });
  on(".kernel-map", "pointermove", (event) => { if (event.buttons) dragKernel(event); });
  on(".take", "click", takeHead);
  find(".taps").innerHTML = [-1, 0, 1].flatMap((down) => [-1, 0, 1].map((right) =>
    `<button type="button" data-right="${right}" data-down="${down}" aria-label="tap ${right} right, ${down} down">${"↖↑↗←•→↙↓↘"[3 * (down + 1) + right + 1]}</button>`)).join("");
  on(".taps", "click", (event) => {
    const { right, down } = event.target.dataset;
    if (right === undefined) return;
    setKernel({ right: Number(right), down: Number(down), strength: 4 });
  });
}
