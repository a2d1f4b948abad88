// Line charts over epochs, as SVG.

import { html } from "./dom.js";

const WIDTH = 270, HEIGHT = 160;
const LEFT = 30, RIGHT = 218, TOP = 8, BOTTOM = 138; // edges of the plot
const LABEL_HEIGHT = 12;
const TICKS = [0, 1, 3, 10, 30, 100, 300]; // of the epoch axis, which is logarithmic

const xOf = (epoch, lastEpoch) =>
  LEFT + ((RIGHT - LEFT) * Math.log1p(epoch)) / Math.log1p(Math.max(lastEpoch, 1));
const formatTick = (value) => value.toFixed(Math.abs(value) < 10 && value % 1 ? 1 : 0);

// series: [{ epochs, values (null: missing), color, width, dash, head, name, label (at the end of
// the line) }]; references: [{ value, label }], horizontal lines.
export function chart({ title, series, references = [], high, lastEpoch, cursor }) {
  const x = (epoch) => xOf(epoch, lastEpoch);
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * value) / high;
  const text = (left, top, anchor, label, color = "var(--ink)") => html`<text x="${left}" y="${top}"
    text-anchor="${anchor}" style="fill: color-mix(in oklab, ${color} 50%, var(--ink))"
    >${label}</text>`;
  const line = (kind, x1, y1, x2, y2) =>
    html`<line class="${kind}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
  const horizontal = (kind, value) => line(kind, LEFT, y(value), RIGHT, y(value));
  const yAxis = [0, high / 2, high].map((value) =>
    [horizontal("axis", value), text(LEFT - 4, y(value) + 4, "end", formatTick(value))]);
  const xAxis = [...TICKS.filter((epoch) => epoch < 0.6 * lastEpoch), lastEpoch]
    .map((epoch) => text(x(epoch), HEIGHT - 6, "middle", epoch));
  const curves = series.map(({ epochs, values, color, width = 1.5, dash = "", head, name }) => {
    const points = epochs.map((epoch, index) => [epoch, values[index]])
      .filter(([, value]) => value !== null)
      .map(([epoch, value]) => [x(epoch).toFixed(1), y(value).toFixed(1)]);
    if (points.length === 1) {
      const [[left, top]] = points;
      return html`<circle cx="${left}" cy="${top}" r="2.5" style="fill: ${color}"/>`;
    }
    return html`<polyline ${head === undefined ? "" : html`data-curve="${head}"`}
      style="stroke: ${color}" stroke-width="${width}" stroke-dasharray="${dash}"
      points="${points.join(" ")}"><title>${name}</title></polyline>`;
  });
  const ends = [...series.map(({ values, ...end }) => ({ value: values.at(-1), ...end })),
    ...references].filter(({ label, value }) => label && value !== null);
  const labels = spread(ends.map(({ value, ...end }) => ({ top: y(value) + 4, ...end })))
    .map(({ label, top, color }) => text(RIGHT + 4, top.toFixed(1), "start", label, color));
  return html`<figure><figcaption>${title}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}"
    data-last-epoch="${lastEpoch}" role="img" aria-label="${title} over epochs">
    ${yAxis}${xAxis}${references.map(({ value }) => horizontal("reference", value))}${curves}
    ${line("cursor", x(cursor), TOP, x(cursor), BOTTOM)}${labels}
    </svg></figure>`;
}

// Labels moved apart vertically, so that they do not overlap.
function spread(labels) {
  labels.sort((a, b) => a.top - b.top);
  let top = -Infinity;
  for (const label of labels) top = label.top = Math.max(label.top, top + LABEL_HEIGHT);
  top = BOTTOM + 4 + LABEL_HEIGHT;
  for (const label of labels.reverse()) top = label.top = Math.min(label.top, top - LABEL_HEIGHT);
  return labels;
}

// The index of the epoch that is drawn nearest to a click into a chart.
export function nearestEpoch(epochs, { target, clientX }) {
  const svg = target.closest("svg");
  const box = svg.getBoundingClientRect();
  const x = ((clientX - box.left) / box.width) * WIDTH;
  const gaps = epochs.map((epoch) => Math.abs(xOf(epoch, svg.dataset.lastEpoch) - x));
  return gaps.indexOf(Math.min(...gaps));
}
