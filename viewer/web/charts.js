// Line charts over epochs, as SVG. They share one cursor and highlight the selected or hovered
// head.

import { escapeHtml } from "./state.js";

const WIDTH = 270, HEIGHT = 160, MARGINS = { left: 30, right: 52, top: 8, bottom: 22 };
const PLOT_WIDTH = WIDTH - MARGINS.left - MARGINS.right;
const PLOT_HEIGHT = HEIGHT - MARGINS.top - MARGINS.bottom;
const LABEL_HEIGHT = 12, TICK_WIDTH = 17;

const formatTick = (value) => value.toFixed(Math.abs(value) < 10 && value % 1 ? 1 : 0);

// series: [{ epochs, values (null: missing), color, width, dash, head, name, label (at the end of
// the line) }];
// references: [{ value, name }], horizontal lines.
export function chart({ title, series, references = [], high, lastEpoch, ticks, cursor }) {
  const span = Math.log1p(Math.max(lastEpoch, 1));
  const x = (epoch) => MARGINS.left + (PLOT_WIDTH * Math.log1p(epoch)) / span;
  const y = (value) => MARGINS.top + PLOT_HEIGHT * (1 - value / high);
  const right = WIDTH - MARGINS.right;
  const text = (left, top, anchor, label) =>
    `<text x="${left}" y="${top}" text-anchor="${anchor}">${escapeHtml(label)}</text>`;
  const horizontal = (kind, value) =>
    `<line class="${kind}" x1="${MARGINS.left}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`;
  const yAxis = [0, high / 2, high].map((value) =>
    horizontal("axis", value) + text(MARGINS.left - 4, y(value) + 4, "end", formatTick(value)));
  const xAxis = thinTicks(ticks, x).map((epoch) => text(x(epoch), HEIGHT - 6, "middle", epoch));
  const curves = series.map(({ epochs, values, color, width = 1.5, dash = "", head, name }) => {
    const points = epochs.flatMap((epoch, index) =>
      (values[index] === null ? [] : [[x(epoch).toFixed(1), y(values[index]).toFixed(1)]]));
    if (points.length < 2) {
      return points.map(([cx, cy]) =>
        `<circle cx="${cx}" cy="${cy}" r="2.5" style="fill: ${color}"/>`).join("");
    }
    return `<polyline${head === undefined ? "" : ` data-curve="${head}"`} style="stroke: ${color}"
      stroke-width="${width}" stroke-dasharray="${dash}" points="${points.join(" ")}"
      ><title>${escapeHtml(name)}</title></polyline>`;
  });
  const lines = references.map(({ value }) => horizontal("reference", value));
  const ends = [...series, ...references
    .map(({ value, name }) => ({ values: [value], label: name }))]
    .filter(({ label, values }) => label && values.at(-1) !== null)
    .map(({ label, values, color }) => ({ label, color, top: y(values.at(-1)) + 4 }));
  const labels = spread(ends)
    .map(({ label, color, top }) => `<text x="${right + 4}" y="${top.toFixed(1)}"
    style="fill: ${color ?? "inherit"}">${escapeHtml(label)}</text>`);
  const cursorLine = cursor === null ? ""
    : `<line class="cursor" x1="${x(cursor)}" x2="${x(cursor)}"
    y1="${MARGINS.top}" y2="${HEIGHT - MARGINS.bottom}"/>`;
  return `<figure><figcaption>${escapeHtml(title)}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}"
    data-last-epoch="${lastEpoch}" role="img" aria-label="${escapeHtml(title)} over epochs">${
    [...yAxis, ...xAxis, ...lines, ...curves, cursorLine, ...labels].join("")}</svg></figure>`;
}

// The last tick, and those before it that do not overlap.
function thinTicks(ticks, x) {
  let next = Infinity;
  return [...ticks].reverse().filter((epoch) => {
    const fits = next - x(epoch) > TICK_WIDTH || next === Infinity;
    if (fits) next = x(epoch);
    return fits;
  });
}

// Labels moved apart vertically, so that they do not overlap.
function spread(labels) {
  labels.sort((a, b) => a.top - b.top);
  for (let index = 1; index < labels.length; index++) {
    labels[index].top = Math.max(labels[index].top, labels[index - 1].top + LABEL_HEIGHT);
  }
  let lowest = HEIGHT - MARGINS.bottom + 4;
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
  const left = ((event.clientX - box.left) / box.width) * WIDTH - MARGINS.left;
  const fraction = Math.min(1, Math.max(0, left / PLOT_WIDTH));
  return Math.expm1(fraction * Math.log1p(Math.max(Number(svg.dataset.lastEpoch), 1)));
}
