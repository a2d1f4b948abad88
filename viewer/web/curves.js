// Metrics over epochs: all of them in tab 2, and two charts of this layer and run in tab 1.

import { chart } from "./charts.js";
import { gateColor } from "./heads.js";
import { allHeads, depth, escapeHtml, find, gatedLayers, hasGates, lastSnapshot,
  state } from "./state.js";

const OWN_STYLE = { color: "var(--ink)", dash: "" };
const OTHER_STYLES = [
  { color: "#8a6d00", dash: "6 3" },
  { color: "#a0438f", dash: "2 2" },
  { color: "#00795c", dash: "8 2 2 2" },
];

const styleOf = (index) =>
  (index === 0 ? OWN_STYLE : OTHER_STYLES[(index - 1) % OTHER_STYLES.length]);

// The run on display and, with others, those that it is compared with.
const runsOf = (withOthers) =>
  [state.model.curves, ...(withOthers ? state.model.other_curves : [])];

// One series per run: `pick` selects its value from a record of the metric.
const runSeries = (metric, withOthers, width, label, pick = (value) => value) =>
  runsOf(withOthers).map((run, index) => ({
    epochs: run.epochs, values: run[metric].map(pick), name: `${run.name}: ${label}`, width,
    label: index === 0 ? label : run.name.slice(0, 8), ...styleOf(index),
  }));

function runChart(title, high, withOthers, series, references = []) {
  const { epochs } = state.model;
  const ends = [...runsOf(withOthers), state.model].map((run) => run.epochs.at(-1));
  const axis = { lastEpoch: Math.max(...ends), ticks: epochs, cursor: epochs[state.snapshot] };
  return chart({ title, high, series, references, ...axis });
}

// Curves of one layer: heads thin, their mean thick, the means of other runs dashed. Without other
// runs, the heads that leave are labeled instead.
function layerChart(metric, layer, withOthers, title = `layer ${layer + 1}`) {
  const { curves: { epochs, [metric]: values }, gate, uniform } = state.model;
  const finalGates = gate[lastSnapshot()][layer]; // a head has one color in all charts
  const isLabeled = (head) => !withOthers && (finalGates[head] < 0.5 || head === state.head);
  const heads = allHeads().map((head) => ({
    epochs, head, name: `head ${head + 1}`, values: values.map((layers) => layers[layer][head]),
    color: finalGates ? gateColor(finalGates[head]) : "#888",
    label: isLabeled(head) ? `head ${head + 1}` : "",
  }));
  const meanOf = ({ [layer]: weights }) => (!weights || weights[0] === null ? null
    : weights.reduce((sum, value) => sum + value, 0) / weights.length);
  const means = withOthers ? runSeries(metric, true, 2.5, "mean", meanOf) : [];
  const series = [...heads, ...means];
  if (metric === "gate") return runChart(title, 1, withOthers, series);
  const references = [{ value: uniform, name: "uniform" }];
  return runChart(title, Math.ceil(1.3 * uniform), withOthers, series, references);
}

const accuracyChart = (title, withOthers) =>
  runChart(title, 100, withOthers, runSeries("test_accuracy", withOthers, 2.2, "test"));

export function drawCurves() {
  const { curves } = state.model;
  find(".layer-chart").innerHTML = curves && hasGates()
    ? layerChart("gate", state.layer, false, `Gates of layer ${state.layer + 1}`) : "";
  find(".score-chart").innerHTML = curves ? accuracyChart("Test accuracy (%)", false)
    : "<p class='hint'>No training history for these weights.</p>";
  if (state.tab !== "curves") return;
  find(".no-curves").hidden = curves !== null;
  find(".all-curves").hidden = curves === null;
  if (!curves) return;
  find(".gate-charts").innerHTML =
    gatedLayers().map((layer) => layerChart("gate", layer, true)).join("");
  find(".distance-charts").innerHTML = [...Array(depth()).keys()].map((layer) =>
    layerChart("non_locality", layer, true,
      `layer ${layer + 1}${hasGates(layer) ? "" : " (self-attention)"}`)).join("");
  const runs = runsOf(true);
  const losses = runs.flatMap((run) => [...run.test_loss, ...run.train_loss]);
  const series = [...runSeries("test_loss", true, 2.2, "test"),
    ...runSeries("train_loss", true, 1, "training")];
  const names = runs.map(({ name }, index) => `<li><svg viewBox="0 0 30 8" aria-hidden="true"
    ><line x1="0" x2="30" y1="4" y2="4" style="stroke: ${styleOf(index).color}" stroke-width="2.5"
    stroke-dasharray="${styleOf(index).dash}"/></svg>${escapeHtml(name)}</li>`);
  find(".score-charts").innerHTML = accuracyChart("test accuracy (%)", true)
    + runChart("loss", Math.ceil(Math.max(...losses)), true, series)
    + (runs.length > 1 ? `<ul class="run-names">${names.join("")}</ul>` : "");
}

export function nearestSnapshot(epoch) {
  const gaps = state.model.epochs.map((other) => Math.abs(other - epoch));
  return gaps.indexOf(Math.min(...gaps));
}
