// What the page says about the view in words: the gate, the prediction, the caption, the facts of
// a run.

import { allHeads, currentExample, escapeHtml, find, gatedLayers, gateOf, hasGates, headMaps,
  isGrowing, lastSnapshot, listHeads,
  meanDistance, numHeads, state } from "./state.js";

const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.095 ? 1 : 0)}%`;
const accuracyAt = (epoch) => {
  const { curves } = state.model;
  return curves?.test_accuracy[curves.epochs.indexOf(epoch)];
};

// The gate that all heads of these layers have been set to: 0, 1, or undefined.
function pinOf(layers) {
  const gates = layers.flatMap((layer) => allHeads()
    .map((head) => state.gates.get(`${layer},${head}`)));
  return gates.length && gates.every((gate) => gate === gates[0]) && [0, 1].includes(gates[0])
    ? gates[0] : undefined;
}

export function drawPrediction() {
  const { predictions } = state.recomputed
    ?? { predictions: state.maps.predictions[state.snapshot] };
  const { label } = currentExample();
  const [winner] = predictions.reduce((best, other) => (other[2] > best[2] ? other : best));
  const verdict = find(".verdict");
  verdict.className = `verdict ${label === null ? "" : winner === label ? "right" : "wrong"}`;
  const truth = label === null ? (state.example ? "The image is not one of its classes." : "")
    : winner === label ? "✓ Right." : `✗ Wrong: it is “${label}”.`;
  verdict.textContent = `The model says “${winner}”. ${truth}`;
  find(".target-hint").classList.toggle("hidden", currentExample().target.length === 0);
  find(".stale").classList.toggle("hidden", state.gates.size === 0 || state.recomputed !== null);
  const bar = (value, kind) => `<div class="track ${kind}"><div class="fill"
    style="width: ${100 * value}%"></div></div> <span>${percent(value)}</span>`;
  find(".prediction").replaceChildren(...predictions.map(([name, before, after]) => {
    const row = document.createElement("div");
    const trained = `<span class="before-label">trained gates</span>${bar(before, "before")}`;
    row.innerHTML = `<span class="class-name"></span>
      ${bar(after, name === winner ? "winner" : "after")}${state.recomputed ? trained : ""}`;
    // class names are folder names: text, not HTML
    row.querySelector(".class-name").textContent = name;
    return row;
  }));
}

export function drawStory() {
  const gated = hasGates();
  const gate = gateOf(state.layer, state.head);
  find(".meter").classList.toggle("hidden", !gated);
  find(".pins").disabled = gatedLayers().length === 0;
  find(".meter").style.setProperty("--gate", `${100 * gate}%`);
  find(".meter-position").textContent = `position ${percent(gate)}`;
  find(".meter-content").textContent = `content ${percent(1 - gate)}`;
  find(".head-name").textContent = `Gate of head ${state.head + 1}, layer ${state.layer + 1}`;
  const distance = meanDistance(state.head).toFixed(1);
  find(".head-reach").textContent = `Mean attention distance ${distance} patches: how far it `
    + "looks, on average over all patches of this image.";
  for (const button of find(".pins").querySelectorAll("[data-pin]")) {
    const layers = button.dataset.scope === "layer" ? [state.layer] : gatedLayers();
    const pin = pinOf(layers.filter((layer) => hasGates(layer)));
    button.setAttribute("aria-pressed", pin === undefined
      ? button.dataset.pin === ""
        && layers.every((layer) => allHeads().every((head) => !state.gates.has(`${layer},${head}`)))
      : Number(button.dataset.pin) === pin && button.dataset.pin !== "");
  }
  find(".accuracy").innerHTML = accuracy();
  const { curves, epochs, last_epoch: lastEpoch } = state.model;
  find(".growing").textContent = isGrowing()
    ? `training, epoch ${(curves ?? { epochs }).epochs.at(-1)} of ${lastEpoch}` : "";
  drawCaption();
  find(".facts").innerHTML = facts().map((fact) => `<li>${fact}</li>`).join("");
}

export function drawCaption() {
  const [headline, details] = caption();
  find(".headline").textContent = headline;
  find(".details").textContent = details;
}

// Test accuracy of this snapshot; with all gates pinned, where it has been measured.
function accuracy() {
  const measured = accuracyAt(state.model.epochs[state.snapshot]);
  if (measured === undefined) return "";
  if (!state.gates.size) return `test accuracy <b>${measured.toFixed(1)}%</b>`;
  const pinned = pinnedAccuracy();
  return pinned === undefined ? `test accuracy ${measured.toFixed(1)}% with trained gates`
    : `test accuracy <b>${pinned.toFixed(1)}%</b>, ${measured.toFixed(1)}% with trained gates`;
}

function pinnedAccuracy() {
  const pin = pinOf(gatedLayers());
  const masked = state.model.masking.masked_in_first_layers;
  if (pin === undefined || !masked || state.snapshot !== lastSnapshot()) return undefined;
  return masked[pin === 1 ? "content" : "position"].at(-1);
}

// Gates of this layer by epoch: of all epochs where there are metrics, else of the snapshots.
function history() {
  const { curves, epochs, gate } = state.model;
  const { layer } = state;
  return curves ? curves.epochs.map((epoch, index) => [epoch, curves.gate[index][layer]])
    : epochs.map((epoch, index) => [epoch, gate[index][layer]]);
}

// When gates fell below 0.5 or rose above it, since an epoch and until that of the view: [epoch,
// heads, fell].
function crossings(since) {
  const events = [];
  const gates = history().filter(([epoch]) => epoch <= state.model.epochs[state.snapshot]);
  for (let index = 1; index < gates.length; index++) {
    const [epoch, now] = gates[index];
    const before = gates[index - 1][1];
    for (const fell of [true, false]) {
      const heads = allHeads()
        .filter((head) => now[head] < 0.5 === fell && before[head] < 0.5 !== fell);
      if (heads.length && epoch > since) events.push([epoch, heads, fell]);
    }
  }
  return events;
}

// How much the query patch attends to the example's target, or else how far, now and before
// training.
function reach() {
  const { target } = currentExample();
  const sum = (snapshot) => {
    const { mixed } = headMaps(state.head, state.query, snapshot);
    return target.reduce((total, key) => total + mixed[key], 0);
  };
  const name = `head ${state.head + 1}`;
  const before = state.snapshot > 0 && !state.gates.size;
  if (target.length && !target.includes(state.query)) {
    const start = before ? ` (before training: ${percent(sum(0))})` : "";
    return `From the framed patch, ${name} puts ${percent(sum(state.snapshot))} of its attention `
      + `on the texture of the same color${start}.`;
  }
  const start = before ? ` (before training: ${meanDistance(state.head, 0).toFixed(1)})` : "";
  return `On average, ${name} looks ${meanDistance(state.head).toFixed(1)} patches far${start}.`;
}

// What happens in this layer, as a headline and details.
function caption() {
  const { epochs } = state.model;
  const layer = `layer ${state.layer + 1}`;
  const epoch = epochs[state.snapshot];
  if (!hasGates()) return [`The heads of ${layer} have no gates: they look for content only.`,
    reach()];
  if (state.gates.size) return captionOfChangedGates(layer);
  if (epoch === 0) {
    return [`Before training, every head of ${layer} looks at one place near the framed patch.`,
      `${reach()} Press “Play training” to see which heads leave.`];
  }
  const left = allHeads().filter((head) => gateOf(state.layer, head) < 0.5);
  const [before, now] = [accuracyAt(epochs[state.snapshot - 1]), accuracyAt(epoch)];
  const rise = now - before >= 1
    ? ` Test accuracy rises from ${before.toFixed(0)} to ${now.toFixed(0)}%.` : "";
  if (state.snapshot === lastSnapshot() && !isGrowing()) return [summary(left),
    `${reach()}${invitation(left)}`];
  const events = crossings(epochs[state.snapshot - 1]).map(([when, heads, fell]) => {
    const [ending, whose] = heads.length > 1 ? ["", "their"] : ["s", "its"];
    const verb = fell ? `let${ending} go of` : `return${ending} to`;
    return `epoch ${when}: ${listHeads(heads)} ${verb} ${whose} neighbors`;
  }).join("; ");
  const headline = events ? events[0].toUpperCase() + events.slice(1)
    : left.length === 0 ? `Epoch ${epoch}: all heads of ${layer} still look at neighbors`
      : `Epoch ${epoch}: ${listHeads(left)} of ${layer} look${left.length > 1 ? "" : "s"} for `
        + "content rather than position";
  return [`${headline}.`, `${reach()}${rise}`];
}

// Which heads have left at the end of training, and when the selected one did.
function summary(left) {
  const layer = `layer ${state.layer + 1}`;
  if (left.length === 0) return `After training, all heads of ${layer} still look at neighbors.`;
  const others = left.filter((head) => head !== state.head);
  const event = crossings(0).findLast(([, heads, fell]) => fell && heads.includes(state.head));
  const too = others.length ? `; so did ${listHeads(others)} (gates below 0.5)` : "";
  if (left.includes(state.head) && event) {
    return `Head ${state.head + 1} of ${layer} left its neighbors in epoch ${event[0]}${too}.`;
  }
  return `After training, ${listHeads(left)} of ${layer} look${left.length > 1 ? "" : "s"} for `
    + "content rather than position.";
}

const invitation = (left) =>
  (left.length ? " What if the heads had to stay? Press “Pin to position”." : "");

function captionOfChangedGates(layer) {
  const pin = pinOf(gatedLayers());
  const layerPin = pinOf([state.layer]);
  const kind = { 0: "content", 1: "position" };
  const headline = pin !== undefined ? `All gates are pinned to ${kind[pin]}.`
    : layerPin !== undefined ? `The gates of ${layer} are pinned to ${kind[layerPin]}.`
      : `${state.gates.size} gate${state.gates.size > 1 ? "s have" : " has"} been changed by hand.`;
  if (!state.recomputed) return [headline, ""];
  const top = (column) =>
    state.recomputed.predictions.reduce((a, b) => (b[column] > a[column] ? b : a))[0];
  const [before, after] = [top(1), top(2)];
  const said = before === after ? `The model still says “${after}”.`
    : `The model now says “${after}” instead of “${before}”.`;
  const pinned = pinnedAccuracy();
  const measured = pinned === undefined ? ""
    : ` On all test images, its accuracy is ${pinned.toFixed(1)}% instead `
    + `of ${accuracyAt(state.model.epochs[state.snapshot]).toFixed(1)}%.`;
  return [headline, `${said}${measured} This is what this trained model relies on; one `
    + "trained with such gates may find another way."];
}

// What is known about the whole run, from its data.
function facts() {
  const { gate, masking, recipe, curves, name, grid, classes } = state.model;
  const layers = gatedLayers();
  const final = layers.flatMap((layer) => gate[lastSnapshot()][layer]);
  const left = final.filter((value) => value < 0.5).length;
  const { content, position } = masking.masked_in_first_layers ?? {};
  const percents = (values) => values.map((value) => value.toFixed(1)).join(" → ");
  return [
    `Model: ${escapeHtml(name)}; ${layers.length} layers with gates, ${numHeads()} heads each, `
      + `${grid[0]} × ${grid[1]} patches, ${classes.length} classes.`,
    final.length && `${left} of ${final.length} heads end with a gate below 0.5.`,
    content && "Test accuracy with content masked in all these layers (all gates 1): "
      + `${percents([content[0], content.at(-1)])}%; with position masked (all gates 0): `
      + `${percents([position.at(-1)])}%.`,
    recipe.gate_lr_scale > 1
      && `The gates were trained at ${recipe.gate_lr_scale} times the learning rate of the rest.`,
    curves && `One run (seed ${recipe.seed ?? "unknown"}): other seeds can release other heads.`,
  ].filter(Boolean);
}
