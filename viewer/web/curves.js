// Metrics over epochs: all of them in tab 2, and two charts of this layer and run in tab 1.

import { chart } from "./charts.js";
import { find, html, render } from "./dom.js";
import { gateColor } from "./heads.js";
import { mean } from "./maps.js";
import { allHeads, allLayers, currentEpoch, gatedLayers, hasGates, lastSnapshot,
  state } from "./state.js";

const OWN_STYLE = { color: "var(--ink)", dash: "" };
const OTHER_STYLES = [
  { color: "#8a6d00", dash: "6 3" },
  { color: "#a0438f", dash: "2 2" },
  { color: "#00795c", dash: "8 2 2 2" },
];
const styleOf = (run) => (run === 0 ? OWN_STYLE : OTHER_STYLES[(run - 1) % OTHER_STYLES.length]);

// One series per run: `pick` selects its value from a record of the metric.
const runSeries = (runs, metric, width, label, pick = (value) => value) =>
  runs.map((run, index) => ({
    epochs: run.epochs, values: run[metric].map(pick), name: `${run.name}: ${label}`, width,
    label: index === 0 ? label : run.name.slice(0, 8), ...styleOf(index),
  }));

function runChart(runs, title, high, series, references) {
  const lastEpoch = Math.max(...[...runs, state.model].map(({ epochs }) => epochs.at(-1)));
  return chart({ title, high, series, references, lastEpoch, cursor: currentEpoch() });
}

const accuracyChart = (runs, title) =>
  runChart(runs, title, 100, runSeries(runs, "test_accuracy", 2.2, "eval"));

// The heads of a layer, and their mean in every run or else labels of the heads that leave.
function layerChart(runs, metric, layer, title, areLabeled = false) {
  const [{ epochs, [metric]: values }] = runs;
  const finalGates = state.model.gate[lastSnapshot()][layer]; // a head has one color in all charts
  const series = allHeads().map((head) => ({
    epochs, head, name: `head ${head + 1}`, values: values.map((layers) => layers[layer][head]),
    color: finalGates ? gateColor(finalGates[head]) : "#888",
    label: areLabeled && (finalGates[head] < 0.5 || head === state.head) && `head ${head + 1}`,
  }));
  const meanOf = ({ [layer]: heads }) => (!heads || heads[0] === null ? null : mean(heads));
  if (!areLabeled) series.push(...runSeries(runs, metric, 2.5, "mean", meanOf));
  if (metric === "gate") return runChart(runs, title, 1, series);
  const uniform = { value: state.model.uniform, label: "uniform" };
  return runChart(runs, title, Math.ceil(1.3 * uniform.value), series, [uniform]);
}

export function drawCurves() {
  const { curves, other_curves: others } = state.model;
  const title = `Gates of layer ${state.layer + 1}`;
  const gates = curves && hasGates() ? layerChart([curves], "gate", state.layer, title, true) : "";
  render(".run-charts", curves ? [gates, accuracyChart([curves], "Accuracy (%)")]
    : html`<p class="hint">No training history for these weights.</p>`);
  if (state.tab !== "curves") return;
  find(".no-curves").hidden = curves !== null;
  find(".all-curves").hidden = curves === null;
  if (!curves) return;
  const runs = [curves, ...others];
  render(".gate-charts", gatedLayers().map((layer) =>
    layerChart(runs, "gate", layer, `layer ${layer + 1}`)));
  render(".distance-charts", allLayers().map((layer) => layerChart(runs, "non_locality", layer,
    `layer ${layer + 1}${hasGates(layer) ? "" : " (self-attention)"}`)));
  const losses = runs.flatMap((run) => [...run.test_loss, ...run.train_loss]);
  const series = [...runSeries(runs, "test_loss", 2.2, "eval"),
    ...runSeries(runs, "train_loss", 1, "training")];
  render(".score-charts", [accuracyChart(runs, "accuracy (%)"),
    runChart(runs, "loss", Math.ceil(Math.max(...losses)), series)]);
  render(".run-names", runs.length === 1 ? "" : runs.map(({ name }, index) => html`<li
    ><svg viewBox="0 0 30 8" aria-hidden="true"><line x2="30" y1="4" y2="4" stroke-width="2.5"
    style="stroke: ${styleOf(index).color}" stroke-dasharray="${styleOf(index).dash}"/></svg
    >${name}</li>`));
}
