// Metrics over epochs: all of them in tab 2, and two charts of this layer and run in tab 1.

import { chart } from "./charts.js";
import { gateColor } from "./heads.js";
import { allHeads, find, gatedLayers, hasGates, lastSnapshot, state } from "./state.js";

// of the other runs, which also differ in their dashes
const OTHER_COLORS = ["#8a6d00", "#a0438f", "#00795c"];
const OTHER_DASHES = ["6 3", "2 2", "8 2 2 2"];
const INK = "var(--ink)";

const meanOf = (values) =>
  (!values || values[0] === null ? null
    : values.reduce((sum, value) => sum + value, 0) / values.length);

// Line style of a run: 0 is the one on display.
function styleOf(index) {
  const [color, dash] = [OTHER_COLORS, OTHER_DASHES].map((list) => list[(index - 1) % list.length]);
  return index === 0 ? { color: INK, dash: "" } : { color, dash };
}

const runsOf = (withOthers) =>
  [state.model.curves, ...(withOthers ? state.model.other_curves : [])];

// Curves of one layer: heads thin, their mean thick, the means of other runs dashed.
function layerSeries(metric, layer, withOthers) {
  const { epochs, [metric]: values } = state.model.curves;
  const finalGates = state.model.gate[lastSnapshot()][layer]; // a head has one color in all charts
  const labeled = finalGates && metric === "gate" && !withOthers;
  const heads = allHeads().map((head) => ({
    epochs, head, name: `head ${head + 1}`, color: finalGates ? gateColor(finalGates[head])
      : "var(--no-gate)",
    label: labeled && (finalGates[head] < 0.5 || head === state.head) ? `head ${head + 1}` : "",
    values: values.map((layers) => layers[layer][head]),
  }));
  const means = runsOf(withOthers).map((run, index) => ({
    epochs: run.epochs, name: `${run.name}: mean`, width: 2.5, ...styleOf(index),
    label: index === 0 ? "mean" : run.name.slice(0, 8),
    values: run[metric].map((layers) => meanOf(layers[layer])),
  }));
  return [...heads, ...(labeled ? [] : means)];
}

export function drawCurves() {
  const { curves } = state.model;
  const title = `Gates of layer ${state.layer + 1}`;
  find(".layer-chart").innerHTML = curves && hasGates()
    ? layerChart("gate", state.layer, false, title) : "";
  find(".score-chart").innerHTML = curves ? scoreChart("Test accuracy (%)", false)
    : "<p class='hint'>No training history for these weights.</p>";
  if (state.tab !== "curves") return;
  find(".no-curves").classList.toggle("hidden", curves !== null);
  find(".all-curves").classList.toggle("hidden", curves === null);
  if (!curves) return;
  const layers = curves.non_locality[0].map((_, layer) => layer);
  find(".gate-charts").innerHTML = gatedLayers()
    .map((layer) => layerChart("gate", layer, true)).join("");
  find(".distance-charts").innerHTML = layers
    .map((layer) => layerChart("non_locality", layer, true)).join("");
  find(".score-charts").innerHTML = scoreCharts();
}

function layerChart(metric, layer, withOthers, title = null) {
  const references = [{ value: state.model.uniform, name: "uniform" }];
  const range = metric === "gate" ? { high: 1 }
    : { high: Math.ceil(1.3 * state.model.uniform), references };
  return chart({
    ...epochAxis(withOthers), ...range, series: layerSeries(metric, layer, withOthers),
    title: title ?? `layer ${layer + 1}${hasGates(layer) ? "" : " (self-attention)"}`,
  });
}

const scoreSeries = (metric, withOthers, width, label) => runsOf(withOthers).map((run, index) => ({
  epochs: run.epochs, values: run[metric], name: `${run.name}: ${label}`, ...styleOf(index), width,
    label:
    index === 0 ? label : `${run.name.slice(0, 8)}`,
}));

const scoreChart = (title, withOthers) => chart({
  ...epochAxis(withOthers), title, series: scoreSeries("test_accuracy", withOthers, 2.2, "test"),
    high: 100,
});

function scoreCharts() {
  const losses = runsOf(true).flatMap((run) => [...run.test_loss, ...run.train_loss]);
  const names = runsOf(true).map(({ name }, index) => {
    const { color, dash } = styleOf(index);
    const item = document.createElement("li");
    item.innerHTML = `<svg viewBox="0 0 30 8" aria-hidden="true"><line x1="0" x2="30" y1="4" y2="4"
      style="stroke: ${color}" stroke-width="2.5" stroke-dasharray="${dash}"/></svg>`;
    item.append(name);
    return item.outerHTML;
  });
  return scoreChart("test accuracy (%)", true)
    + chart({ ...epochAxis(true), title: "loss", high: Math.ceil(Math.max(...losses)),
      series: [...scoreSeries("test_loss", true, 2.2, "test"),
        ...scoreSeries("train_loss", true, 1, "training")] })
    + (names.length > 1 ? `<ul class="run-names">${names.join("")}</ul>` : "");
}

function epochAxis(withOthers) {
  const { epochs } = state.model;
  const lastEpoch = Math.max(...[...runsOf(withOthers), state.model]
    .map((run) => run.epochs.at(-1)));
  return { lastEpoch, ticks: epochs, cursor: epochs[state.snapshot] };
}

export function nearestSnapshot(epoch) {
  const gaps = state.model.epochs.map((other) => Math.abs(other - epoch));
  return gaps.indexOf(Math.min(...gaps));
}
