// What the page says in words: the gate, the prediction, the caption, the facts of a run.

import { find, html, render } from "./dom.js";
import { allHeads, attentionToTarget, changedGate, currentEpoch, currentExample, gatedLayers,
  gateOf, hasGates, isGrowing, lastSnapshot, meanDistance, outputOf, startsLocal,
  state } from "./state.js";

const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.095 ? 1 : 0)}%`;
const accuracyAt = (epoch) =>
  state.model.curves?.test_accuracy[state.model.curves.epochs.indexOf(epoch)];

// "head 7" or "heads 1, 7, and 9", from indices.
const numbers = new Intl.ListFormat("en-US");
const listHeads = (heads) =>
  `head${heads.length > 1 ? "s" : ""} ${numbers.format(heads.map((head) => `${head + 1}`))}`;

// What all gates of some layers can be set to; "" are the trained ones.
const PINS = [[1, "Pin to position"], ["", "Trained"], [0, "All content"]];

// What the user has set all gates of these layers to; undefined if they differ.
function pinOf(layers) {
  const gates = layers.filter(hasGates).flatMap((layer) =>
    allHeads().map((head) => changedGate(layer, head) ?? ""));
  return ["", 0, 1].find((pin) => gates.every((gate) => gate === pin));
}

// The class with the highest probability before (1) or after (2) gates were changed.
const topClass = (predictions, column) =>
  predictions.reduce((best, other) => (other[column] > best[column] ? other : best))[0];

function verdictOn(winner, label) {
  if (label === null) return ["", ""]; // unknown
  if (label === "") return ["", "The image is not one of its classes."];
  return winner === label ? ["correct", "✓\u00a0Correct."]
    : ["wrong", `✗\u00a0Wrong: the answer is “${label}”.`];
}

export function drawPrediction() {
  const { predictions } = outputOf(state.snapshot);
  const { label, target } = currentExample();
  const winner = topClass(predictions, 2);
  const [verdict, comment] = verdictOn(winner, label);
  render(".verdict", html`<b class="${verdict}">The model says “${winner}”. ${comment}</b>`);
  find(".target-hint").hidden = target.length === 0;
  find(".stale").hidden = state.gates.size === 0 || state.recomputed !== null;
  const bar = (value, kind) => html`<div class="track ${kind}"><div class="fill"
    style="width: ${100 * value}%"></div></div> <span>${percent(value)}</span>`;
  render(".prediction", predictions.map(([name, before, after]) => html`<div>
    <span class="class-name">${name}</span> ${bar(after, name === winner ? "winner" : "")}
    ${state.recomputed ? html`<span class="before-label">trained gates</span>
      ${bar(before, "before")}` : ""}</div>`));
}

export function drawStory() {
  const { layer, head } = state;
  const { curves, epochs, last_epoch: lastEpoch } = state.model;
  const gate = gateOf(layer, head);
  render(".selected-head", html`<h2>Gate of head ${head + 1}, layer ${layer + 1}</h2>
    ${hasGates() ? html`<div class="meter" style="--gate: ${100 * gate}%">
      <div class="meter-bar"></div> <span class="position">position ${percent(gate)}</span>
      <span class="content">content ${percent(1 - gate)}</span></div>` : ""}
    <p class="hint">Mean attention distance: ${meanDistance(head).toFixed(1)} patches. This is how
      far the head looks, averaged over all patches of this image.</p>`);
  find(".pins").disabled = gatedLayers().length === 0;
  const scopes = [["model", "all layers", gatedLayers()], ["layer", "this layer", [layer]]];
  render(".pin-buttons", scopes.map(([scope, name, layers]) => html`<div role="group"
    aria-label="gates of ${name}"><span>${name}</span>${PINS.map(([pin, label]) => html`<button
      data-scope="${scope}" data-pin="${pin}" aria-pressed="${pinOf(layers) === pin}"
      >${label}</button>`)}</div>`));
  const measured = accuracyAt(currentEpoch())?.toFixed(1);
  render(".accuracy", measured ? html`accuracy${state.gates.size ? " with trained gates" : ""}
    <b>${measured}%</b>` : "");
  render(".growing", isGrowing()
    ? `epoch ${(curves ?? { epochs }).epochs.at(-1)} of ${lastEpoch} so far` : "");
  render(".facts", facts().map((fact) => html`<li>${fact}</li>`));
  drawCaption();
}

export function drawCaption() {
  const [headline, details] = caption();
  render(".caption", html`<b class="headline">${headline}</b>
    <span class="details">${details}</span>`);
}

// The measured accuracy of the last snapshot with all gates pinned; undefined where there is none.
function pinnedAccuracy() {
  const masked = state.model.masking.masked_in_first_layers;
  const part = { 0: "position", 1: "content" }[pinOf(gatedLayers())];
  return state.snapshot === lastSnapshot() ? masked?.[part]?.at(-1).toFixed(1) : undefined;
}

// When gates of this layer fell below 0.5 or rose above it, since an epoch and until that of the
// view: [epoch, heads, fell]. From all epochs where there are metrics, else from the snapshots.
function crossings(since) {
  const { curves, epochs, gate } = state.model;
  const history = curves ?? { epochs, gate };
  const gates = history.gate.map((layers) => layers[state.layer]);
  return history.epochs.flatMap((epoch, index) => {
    if (index === 0 || !(epoch > since && epoch <= currentEpoch())) return [];
    return [true, false].map((fell) => [epoch, allHeads().filter((head) =>
      gates[index][head] < 0.5 === fell && gates[index - 1][head] < 0.5 !== fell), fell]);
  }).filter(([, heads]) => heads.length);
}

// Attention to the example's target, or else how far the head looks, now and before training.
function reach() {
  const { target } = currentExample();
  const name = `head ${state.head + 1}`;
  const since = (format) =>
    (state.snapshot > 0 && !state.gates.size ? ` (before training: ${format(0)})` : "");
  if (target.length && !target.includes(state.query)) {
    const share = (snapshot) => percent(attentionToTarget(state.query, snapshot));
    return `From the framed patch, ${name} puts ${share(state.snapshot)} of its attention on the `
      + `dashed texture${since(share)}.`;
  }
  const distance = (snapshot) => meanDistance(state.head, snapshot).toFixed(1);
  return `On average, ${name} looks ${distance(state.snapshot)} patches away${since(distance)}.`;
}

// What happens in this layer, as a headline and details.
function caption() {
  const layer = `layer ${state.layer + 1}`;
  const epoch = currentEpoch();
  if (!hasGates()) {
    return [`The heads of ${layer} have no gates: they attend by content only.`, reach()];
  }
  if (state.gates.size) return captionOfChangedGates(layer);
  const place = startsLocal() ? "neighbors" : "fixed offsets";
  const left = allHeads().filter((head) => gateOf(state.layer, head) < 0.5);
  if (epoch === 0 && left.length === 0) {
    return [`Before training, every head of ${layer} looks mostly at ${place}.`,
      `${reach()} Press “Play training” to see which heads leave.`];
  }
  const status = left.length === 0 ? `all heads of ${layer} still attend mostly by position`
    : `${listHeads(left)} of ${layer} attend${left.length > 1 ? "" : "s"} more by content than by `
      + "position";
  if (state.snapshot === lastSnapshot() && !isGrowing()) {
    const who = left.length > 1 ? "they" : "it";
    const invitation = left.length ? ` What if ${who} had to stay? Pin all to position.` : "";
    return [departure(left, layer, place) ?? `After training, ${status}.`,
      `${reach()}${invitation}`];
  }
  const before = state.model.epochs[state.snapshot - 1];
  const events = crossings(before).map(([when, heads, fell]) => {
    const [ending, whose] = heads.length > 1 ? ["", "their"] : ["s", "its"];
    const verb = fell ? `let${ending} go of` : `return${ending} to`;
    return `epoch ${when}: ${listHeads(heads)} ${verb} ${whose} ${place}`;
  }).join("; ") || `epoch ${epoch}: ${status}`;
  const [old, now] = [accuracyAt(before), accuracyAt(epoch)];
  const rise = now - old >= 1
    ? ` Since epoch ${before}, accuracy rose from ${old.toFixed(0)} to ${now.toFixed(0)}%.` : "";
  return [`${events[0].toUpperCase()}${events.slice(1)}.`, `${reach()}${rise}`];
}

// When the selected head left its place, if it did.
function departure(left, layer, place) {
  const event = crossings(0).findLast(([, heads, fell]) => fell && heads.includes(state.head));
  if (!left.includes(state.head) || !event) return null;
  const others = left.filter((head) => head !== state.head);
  const too = others.length ? ` So did ${listHeads(others)} by epoch ${currentEpoch()}.` : "";
  return `Head ${state.head + 1} of ${layer} left its ${place} in epoch ${event[0]}, when its `
    + `gate (the share of position) fell below 0.5.${too}`;
}

function captionOfChangedGates(layer) {
  const kinds = { 0: "content", 1: "position" };
  const [all, own] = [gatedLayers(), [state.layer]].map((layers) => kinds[pinOf(layers)]);
  const count = state.gates.size;
  const headline = all ? `All gates are pinned to ${all}.`
    : own ? `The gates of ${layer} are pinned to ${own}.`
      : `${count} gate${count > 1 ? "s have" : " has"} been changed by hand.`;
  if (!state.recomputed) return [headline, ""];
  const [before, after] = [1, 2].map((column) => topClass(state.recomputed.predictions, column));
  const said = before === after ? `The model still says “${after}”.`
    : `The model now says “${after}” instead of “${before}”.`;
  const [pinned, trained] = [pinnedAccuracy(), accuracyAt(currentEpoch())?.toFixed(1)];
  const measured = pinned && trained
    ? ` On all test images, its accuracy is ${pinned}% instead of ${trained}%.` : "";
  return [headline,
    `${said}${measured} A model trained with these gates from the start might find another way.`];
}

// What is known about the whole run, from its data.
function facts() {
  const { gate, masking, recipe, curves, name, grid, classes } = state.model;
  const final = gatedLayers().flatMap((layer) => gate[lastSnapshot()][layer]);
  const left = final.filter((value) => value < 0.5).length;
  const { content, position } = masking.masked_in_first_layers ?? {};
  return [
    `Model: ${name}. Layers with gates: ${gatedLayers().length}, ${allHeads().length} heads each, `
      + `${grid[0]} × ${grid[1]} patches, ${classes.length} classes.`,
    final.length && `${left} of ${final.length} heads ${isGrowing() ? "now have" : "end with"} a `
      + "gate below 0.5.",
    content && `Test accuracy ${content[0].toFixed(1)}%; with all gates pinned to position `
      + `(content masked) ${content.at(-1).toFixed(1)}%, to content `
      + `${position.at(-1).toFixed(1)}%.`,
    recipe.gate_lr_scale > 1
      && `The gates were trained at ${recipe.gate_lr_scale} times the learning rate of the other `
        + "weights.",
    curves && `One run (seed ${recipe.seed ?? "unknown"}): other seeds can release other heads.`,
  ].filter(Boolean);
}
