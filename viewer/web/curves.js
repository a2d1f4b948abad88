// Tab 2, and the small chart of tab 1: numbers over epochs.

const OTHERS = ["#8a6d00", "#a0438f", "#00795c"]; // of runs compared; each also has a dash of its own
const DASHES = ["6 3", "2 2", "8 2 2 2"];
const meanOf = (values) => (values[0] === null ? null : values.reduce((sum, value) => sum + value, 0) / values.length);

// Of the run on show (0), and of those beside it.
const styleOf = (index) => (index ? { colour: OTHERS[(index - 1) % OTHERS.length], dash: DASHES[(index - 1) % DASHES.length] } : { colour: "var(--body-text-color)", dash: "" });

// The curves of one layer: every head thin, their mean thick, other runs' means dashed.
function layerSeries(name, layer, withOthers) {
  const { epochs, [name]: values } = run.story;
  const gates = run.gate[run.gate.length - 1][run.layers.indexOf(layer)]; // heads have one colour in all charts
  const thin = Array.from({ length: heads }, (_, head) => ({
    epochs, head, name: `head ${head + 1}`, colour: gates ? gateColour(gates[head]) : "var(--plain)",
    values: values.map((layers) => layers[layer][head]),
  }));
  const means = [run.story, ...(withOthers ? run.others : [])].map((story, index) => ({
    epochs: story.epochs, name: `${story.name}: mean`, width: 2.5, ...styleOf(index),
    values: story[name].map((layers) => (layers[layer] ? meanOf(layers[layer]) : null)),
  }));
  return [...thin, ...means];
}

function paintStory() {
  find(".layer-chart").innerHTML = run.story ? layerChart("gate", run.layers[state.layer], false) : "<p class='hint'>These weights come without their training.</p>";
  if (state.tab !== "story") return;
  find(".untold").classList.toggle("absent", run.story !== null);
  find(".told").classList.toggle("absent", run.story === null);
  const plain = run.story ? run.story.non_locality[0].map((_, layer) => layer) : [];
  find(".gate-charts").innerHTML = run.story ? run.layers.map((layer) => layerChart("gate", layer, true)).join("") : "";
  find(".distance-charts").innerHTML = plain.map((layer) => layerChart("non_locality", layer, true)).join("");
  find(".score-charts").innerHTML = run.story ? scoreCharts() : "";
  paintChoice();
}

function layerChart(name, layer, withOthers) {
  const distances = name === "non_locality";
  return chart({
    ...axis(withOthers), title: `layer ${layer + 1}${run.layers.includes(layer) ? "" : ", plain"}`, series: layerSeries(name, layer, withOthers),
    high: distances ? Math.ceil(1.3 * run.uniform) : 1, lines: distances ? [{ value: run.uniform, name: "uniform attention" }] : [],
  });
}

function scoreCharts() {
  const stories = [run.story, ...run.others];
  const of = (name, title) => stories.map((story, index) => ({
    epochs: story.epochs, values: story[name], name: `${story.name}: ${title}`, width: 2.2, ...styleOf(index),
  }));
  const losses = stories.flatMap((story) => [...story.test_loss, ...story.train_loss]).filter((value) => value !== null);
  const names = stories.map((story, index) =>
    `<li><svg viewBox="0 0 30 8" aria-hidden="true"><line x1="0" x2="30" y1="4" y2="4" style="stroke: ${styleOf(index).colour}" stroke-width="2.5" stroke-dasharray="${styleOf(index).dash}"/></svg>${escape(story.name)}</li>`);
  return chart({ ...axis(true), title: "test accuracy, %", series: of("test_accuracy", "test accuracy"), high: 100 }) +
    chart({ ...axis(true), title: "loss: test, and thin in training", high: Math.ceil(Math.max(...losses)), series: [...of("test_loss", "test loss"), ...of("train_loss", "training loss").map((one) => ({ ...one, width: 1 }))] }) +
    (run.others.length ? `<ul class="names">${names.join("")}</ul>` : "");
}

function axis(withOthers) {
  const last = Math.max(...[run.story, ...(withOthers ? run.others : [])].map((story) => story.epochs[story.epochs.length - 1]), run.epochs[run.epochs.length - 1]);
  return { last, ticks: run.epochs, cursor: run.epochs[state.checkpoint] };
}

const nearestCheckpoint = (epoch) => run.epochs.reduce((best, one, index) => (Math.abs(one - epoch) < Math.abs(run.epochs[best] - epoch) ? index : best), 0);
