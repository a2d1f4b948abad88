// The heads of a layer as small multiples, and the heatmap of all gates.

import { find, findAll, html, render } from "./dom.js";
import { drawHero, paintMap, shade } from "./hero.js";
import { allHeads, allLayers, changedGate, gatedLayers, gateOf, hasGates, headMaps, meanDistance,
  placeOf, shownKind, startsLocal, state } from "./state.js";

export const gateColor = (gate) =>
  `color-mix(in oklab, var(--position) ${(100 * gate).toFixed(1)}%, var(--content))`;
export const formatGate = (gate) =>
  gate.toFixed(Math.abs(gate - 0.5) < 0.005 ? 3 : 2); // 0.496 is below 0.5
export const arrowOf = (right, down) => "↖↑↗←•→↙↓↘"[3 * (down + 1) + right + 1];

// One card per head, laid out as the taps: head h in row h % rows, column floor(h / rows).
export function drawHeads() {
  const [kernelRows, kernelColumns] = state.model.kernel;
  const [number, isGated] = [state.layer + 1, hasGates()];
  render(".heads-title", `The ${allHeads().length} heads of layer ${number}`);
  render(".heads-hint", isGated
    ? `Laid out as the taps of a convolution kernel${startsLocal()
      ? ": each head is placed where it looks before training (arrows)" : ""}.`
    : `Layer ${number} is plain self-attention: its heads have no gate and no position map.`);
  find(".heads").style.gridTemplateColumns = `repeat(${kernelColumns}, minmax(0, 1fr))`;
  render(".heads", allHeads().map((tap) => {
    const head = Math.floor(tap / kernelColumns) + (tap % kernelColumns) * kernelRows;
    const gate = gateOf(state.layer, head);
    const [label, distance] = [formatGate(gate), meanDistance(head).toFixed(1)];
    const side = gate > 0.5 ? "mostly position" : "mostly content";
    const changed = changedGate(state.layer, head) === undefined ? "" : "changed";
    return html`<div class="head ${changed}" data-head="${head}" data-gate="${gate.toFixed(3)}"
      style="--gate-color: ${gateColor(gate)}; --gate: ${100 * gate}%">
      <div class="head-line"><button class="select-head" aria-pressed="${head === state.head}"
        aria-label="select head ${head + 1}">head ${head + 1}</button>
        ${isGated ? arrowOfStart(head) : ""}</div>
      <div class="map">${mapMarkup()}</div>
      ${isGated ? html`<label class="gate"><input type="range" min="0" max="1" step="0.01"
        value="${gate}" aria-label="gate of head ${head + 1}" aria-valuetext="${label}, ${side}"
        ><b>${label}</b></label>` : ""}
      <div class="head-distance">looks <span class="distance">${distance}</span> patches away,
        max <span class="maximum">0</span></div></div>`;
  }));
}

// Where a head looks before training, if that is known: the center of its position map.
function arrowOfStart(head) {
  if (!startsLocal()) return "";
  const [x, y, curvature] = state.model.v_pos[0][state.layer][head];
  const [right, down] = [x, y].map((slope) => slope / (-2 * curvature))
    .map((center) => (Math.abs(center) > 0.25 ? Math.sign(center) : 0));
  const words = [["up", "", "down"][down + 1], ["left", "", "right"][right + 1]].filter(Boolean);
  const place = words.join(" and ") || "at the patch itself";
  return html`<span class="arrow" role="img" title="before training, it looks ${place}"
    >${arrowOf(right, down)}</span>`;
}

// A map, one pixel per patch, with a frame around the query patch.
export function mapMarkup() {
  const [rows, columns] = state.model.grid;
  return html`<canvas width="${columns}" height="${rows}"></canvas>
    <i style="width: ${100 / columns}%; height: ${100 / rows}%"></i>`;
}

// What depends on the query patch. Runs on every mouse move: it must not cause a page layout.
export function drawMaps() {
  const place = placeOf(state.query).map((index) => `${100 * index}%`);
  for (const node of findAll(".heads, .image")) {
    node.style.setProperty("--query", `translate(${place})`);
  }
  const allMaps = allHeads().map((head) => headMaps(head, state.query));
  const highest = allMaps.map((maps) => Math.max(...maps[shownKind()]));
  const shared = find(".same-scale").checked ? Math.max(...highest) : 0;
  for (const card of findAll(".head")) {
    const head = Number(card.dataset.head);
    paintMap(card.querySelector("canvas"), shade(allMaps[head], shared), ({ color, strength }) =>
      [...color, 255 * strength]);
    card.querySelector(".maximum").firstChild.data = highest[head].toFixed(2);
  }
  drawHero(allMaps[state.head]);
}

// The gates of all layers as rows of cells. The Tab key reaches only the selected one.
export function drawHeatmap() {
  const [heads, gated, depth] = [allHeads(), gatedLayers(), allLayers().length];
  const tabLayer = hasGates() ? state.layer : gated[0];
  find(".gate-heatmap").style.gridTemplateColumns = `auto repeat(${heads.length}, minmax(0, 1fr))`;
  const cell = (layer, head) => {
    const gate = gateOf(layer, head);
    const isCurrent = layer === state.layer;
    const title = `layer ${layer + 1}, head ${head + 1}: gate ${formatGate(gate)}`;
    return html`<button class="cell ${isCurrent ? "current-layer" : ""}" data-layer="${layer}"
      data-cell="${head}" tabindex="${layer === tabLayer && head === state.head ? 0 : -1}"
      style="background: ${gateColor(gate)}" title="${title}" aria-label="${title}"
      aria-current="${isCurrent && head === state.head}"></button>`;
  };
  find(".gate-scale").hidden = gated.length === 0;
  render(".gate-heatmap", gated.length === 0 ? "" : html`<span>head</span>
    ${heads.map((head) => html`<span>${head + 1}</span>`)}
    ${gated.map((layer) => html`<span>layer ${layer + 1}</span>
      ${heads.map((head) => cell(layer, head))}`)}`);
  const gates = gated.flatMap((layer) => heads.map((head) => gateOf(layer, head)));
  const others = { 0: "", 1: ` Layer ${depth} has no gates.` }[depth - gated.length]
    ?? ` Layers ${gated.length + 1} to ${depth} have no gates.`;
  render(".heatmap-summary", gated.length === 0
    ? "This model is a plain ViT: no head has a gate or a position map, only content maps."
    : `${gates.filter((gate) => gate < 0.5).length} of ${gates.length} gates are below 0.5.`
      + others);
}

// The head that a card, a curve, or a cell stands for; null in another layer.
export function headOf({ dataset: { head, curve, cell, layer = state.layer } }) {
  return Number(layer) === state.layer ? Number(head ?? curve ?? cell) : null;
}

// Highlight the hovered head, or else the selected one; in the cards, both.
export function drawSelection() {
  const hovered = find(":is([data-head], [data-curve], [data-cell]):hover");
  const highlighted = (hovered && headOf(hovered)) ?? state.head;
  for (const node of findAll("[data-head], [data-curve], [data-cell]")) {
    const head = headOf(node);
    const isSelectedCard = node.dataset.head && head === state.head;
    node.classList.toggle("selected", isSelectedCard || head === highlighted);
  }
}
