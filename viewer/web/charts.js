// Line charts over epochs, as SVG. They share a cursor, and highlight the selected or hovered head.

import { escapeHtml } from "./state.js";

const WIDTH = 270, HEIGHT = 160;
const LEFT = 30, RIGHT = 218, TOP = 8, BOTTOM = 138; // edges of the plot
const LABEL_HEIGHT = 12, TICK_WIDTH = 17;

const formatTick = (value) => value.toFixed(Math.abs(value) < 10 && value % 1 ? 1 : 0);

// series: [{ epochs, values (null: missing), color, width, dash, head, name, label (at the end of
// the line) }]; references: [{ value, name }], horizontal lines.
export function chart({ title, series, references = [], high, lastEpoch, ticks, cursor }) {
  const span = Math.log1p(Math.max(lastEpoch, 1));
  const x = (epoch) => LEFT + ((RIGHT - LEFT) * Math.log1p(epoch)) / span;
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * value) / high;
  const text = (left, top, anchor, label, color = "var(--ink)") => `<text x="${left}" y="${top}"
    text-anchor="${anchor}" style="fill: ${color}">${escapeHtml(label)}</text>`;
  const horizontal = (kind, value) =>
    `<line class="${kind}" x1="${LEFT}" x2="${RIGHT}" y1="${y(value)}" y2="${y(value)}"/>`;
  const yAxis = [0, high / 2, high].map((value) =>
    horizontal("axis", value) + text(LEFT - 4, y(value) + 4, "end", formatTick(value)));
  const xAxis = thinTicks(ticks, x).map((epoch) => text(x(epoch), HEIGHT - 6, "middle", epoch));
  const curves = series.map(({ epochs, values, color, width = 1.5, dash = "", head, name }) => {
    const points = epochs.flatMap((epoch, index) =>
      (values[index] === null ? [] : [[x(epoch).toFixed(1), y(values[index]).toFixed(1)]]));
    if (points.length === 1) {
      return `<circle cx="${points[0][0]}" cy="${points[0][1]}" r="2.5" style="fill: ${color}"/>`;
    }
    return `<polyline ${head === undefined ? "" : `data-curve="${head}"`} style="stroke: ${color}"
      stroke-width="${width}" stroke-dasharray="${dash}" points="${points.join(" ")}"
      ><title>${escapeHtml(name)}</title></polyline>`;
  });
  const ends = series.map(({ label, values, color }) => ({ label, value: values.at(-1), color }))
    .concat(references.map(({ value, name }) => ({ label: name, value })))
    .filter(({ label, value }) => label && value !== null)
    .map(({ value, ...end }) => ({ ...end, top: y(value) + 4 }));
  const labels = spread(ends)
    .map(({ label, top, color }) => text(RIGHT + 4, top.toFixed(1), "start", label, color));
  const cursorLine = cursor === null ? ""
    : `<line class="cursor" x1="${x(cursor)}" x2="${x(cursor)}" y1="${TOP}" y2="${BOTTOM}"/>`;
  const lines = references.map(({ value }) => horizontal("reference", value));
  return `<figure><figcaption>${escapeHtml(title)}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}"
    data-last-epoch="${lastEpoch}" role="img" aria-label="${escapeHtml(title)} over epochs">${
    [...yAxis, ...xAxis, ...lines, ...curves, cursorLine, ...labels].join("")}</svg></figure>`;
}

// The last tick, and those before it that do not overlap.
function thinTicks(ticks, x) {
  let next = Infinity;
  return ticks.toReversed().filter((epoch) => {
    const fits = next - x(epoch) > TICK_WIDTH;
    if (fits) next = x(epoch);
    return fits;
  });
}

// Labels moved apart vertically, so that they do not overlap.
function spread(labels) {
  labels.sort((a, b) => a.top - b.top);
  labels.forEach((label, index) => {
    if (index > 0) label.top = Math.max(label.top, labels[index - 1].top + LABEL_HEIGHT);
  });
  let lowest = BOTTOM + 4;
  for (const label of labels.reverse()) {
    label.top = Math.min(label.top, lowest);
    lowest = label.top - LABEL_HEIGHT;
  }
  return labels;
}

// The epoch at a click into a chart, or null for a click elsewhere.
export function epochAt(event) {
  const svg = event.target.closest("svg[data-last-epoch]");
  if (!svg) return null;
  const box = svg.getBoundingClientRect();
  const left = ((event.clientX - box.left) / box.width) * WIDTH - LEFT;
  const fraction = Math.min(1, Math.max(0, left / (RIGHT - LEFT)));
  return Math.expm1(fraction * Math.log1p(Math.max(Number(svg.dataset.lastEpoch), 1)));
}
