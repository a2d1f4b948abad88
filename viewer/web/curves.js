// Tab 2, and the small chart of tab 1: metrics over epochs.

const OTHER_COLORS = ["#8a6d00", "#a0438f", "#00795c"]; // of the other runs, which also differ in their dashes
const OTHER_DASHES = ["6 3", "2 2", "8 2 2 2"];
const meanOf = (values) => (values[0] === null ? null : values.reduce((sum, value) => sum + value, 0) / values.length);

// Line style of a run: 0 is the one on display.
const styleOf = (index) => (index === 0 ? { color: "var(--body-text-color)", dash: "" }
  : { color: OTHER_COLORS[(index - 1) % OTHER_COLORS.length], dash: OTHER_DASHES[(index - 1) % OTHER_DASHES.length] });

const runsOf = (withOthers) => [model.curves, ...(withOthers ? model.other_curves : [])];

// Curves of one layer: heads thin, their mean thick, the means of other runs dashed.
function layerSeries(metric, layer, withOthers) {
  const { epochs, [metric]: values } = model.curves;
  const finalGates = model.gate[model.gate.length - 1][model.layers.indexOf(layer)]; // a head has one color in all charts
  const heads = Array.from({ length: numHeads }, (_, head) => ({
    epochs, head, name: `head ${head + 1}`, color: finalGates ? gateColor(finalGates[head]) : "var(--no-gate)",
    values: values.map((layers) => layers[layer][head]),
  }));
  const means = runsOf(withOthers).map((run, index) => ({
    epochs: run.epochs, name: `${run.name}: mean`, width: 2.5, ...styleOf(index),
    values: run[metric].map((layers) => (layers[layer] ? meanOf(layers[layer]) : null)),
  }));
  return [...heads, ...means];
}

function drawCurves() {
  find(".layer-chart").innerHTML = model.curves ? layerChart("gate", model.layers[state.layer], false)
    : "<p class='hint'>No training history for these weights.</p>";
  if (state.tab !== "curves") return;
  find(".no-curves").classList.toggle("hidden", model.curves !== null);
  find(".all-curves").classList.toggle("hidden", model.curves === null);
  if (!model.curves) return;
  find(".gate-charts").innerHTML = model.layers.map((layer) => layerChart("gate", layer, true)).join("");
  find(".distance-charts").innerHTML = model.curves.non_locality[0].map((_, layer) => layerChart("non_locality", layer, true)).join("");
  find(".score-charts").innerHTML = scoreCharts();
}

function layerChart(metric, layer, withOthers) {
  const title = `layer ${layer + 1}${model.layers.includes(layer) ? "" : " (self-attention)"}`;
  const range = metric === "gate" ? { high: 1 }
    : { high: Math.ceil(1.3 * model.uniform), references: [{ value: model.uniform, name: "uniform attention" }] };
  return chart({ ...epochAxis(withOthers), ...range, title, series: layerSeries(metric, layer, withOthers) });
}

function scoreCharts() {
  const runs = runsOf(true);
  const series = (metric, label, width) => runs.map((run, index) => ({
    epochs: run.epochs, values: run[metric], name: `${run.name}: ${label}`, ...styleOf(index), width,
  }));
  const losses = runs.flatMap((run) => [...run.test_loss, ...run.train_loss]).filter((value) => value !== null);
  const names = runs.map(({ name }, index) => {
    const { color, dash } = styleOf(index);
    return `<li><svg viewBox="0 0 30 8" aria-hidden="true"><line x1="0" x2="30" y1="4" y2="4" style="stroke: ${color}"
      stroke-width="2.5" stroke-dasharray="${dash}"/></svg>${escapeHtml(name)}</li>`;
  });
  return chart({ ...epochAxis(true), title: "test accuracy (%)", series: series("test_accuracy", "test accuracy", 2.2), high: 100 })
    + chart({ ...epochAxis(true), title: "loss (thick: test, thin: training)", high: Math.ceil(Math.max(...losses)),
      series: [...series("test_loss", "test loss", 2.2), ...series("train_loss", "training loss", 1)] })
    + (runs.length > 1 ? `<ul class="run-names">${names.join("")}</ul>` : "");
}

function epochAxis(withOthers) {
  const lastEpoch = Math.max(...[...runsOf(withOthers), model].map(({ epochs }) => epochs[epochs.length - 1]));
  return { lastEpoch, ticks: model.epochs, cursor: model.epochs[state.snapshot] };
}

function nearestSnapshot(epoch) {
  const gaps = model.epochs.map((other) => Math.abs(other - epoch));
  return gaps.indexOf(Math.min(...gaps));
}
