// Line charts over epochs, as SVG. They share one cursor and highlight the selected or hovered head.

const WIDTH = 250, HEIGHT = 150, MARGINS = { left: 30, right: 8, top: 8, bottom: 22 };
const PLOT_WIDTH = WIDTH - MARGINS.left - MARGINS.right, PLOT_HEIGHT = HEIGHT - MARGINS.top - MARGINS.bottom;

const formatTick = (value) => (Math.abs(value) >= 10 ? value.toFixed(0) : value.toFixed(value % 1 ? 1 : 0));

function escapeHtml(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span.innerHTML.replaceAll('"', "&quot;");
}

// series: [{ epochs, values (null: missing), color, width, dash, head, name }]; references: [{ value, name }], horizontal lines.
function chart({ title, series, references = [], high, lastEpoch, ticks, cursor }) {
  const x = (epoch) => MARGINS.left + (PLOT_WIDTH * Math.log1p(epoch)) / Math.log1p(Math.max(lastEpoch, 1));
  const y = (value) => MARGINS.top + PLOT_HEIGHT * (1 - value / high);
  const text = (left, top, anchor, label) => `<text x="${left}" y="${top}" text-anchor="${anchor}">${label}</text>`;
  const horizontal = (kind, value, content = "") =>
    `<line class="${kind}" x1="${MARGINS.left}" x2="${WIDTH - MARGINS.right}" y1="${y(value)}" y2="${y(value)}">${content}</line>`;
  const yAxis = [0, high / 2, high].map((value) =>
    horizontal("axis", value) + text(MARGINS.left - 4, y(value) + 3, "end", formatTick(value)));
  let previous = -Infinity; // labels that would overlap the previous one are left out
  const xAxis = ticks.filter((epoch) => x(epoch) - previous > 15 && (previous = x(epoch)) !== null)
    .map((epoch) => text(x(epoch), HEIGHT - 8, "middle", epoch));
  const lines = references.map(({ value, name }) => horizontal("reference", value, `<title>${escapeHtml(name)}</title>`));
  const curves = series.map(({ epochs, values, color, width = 1.5, dash = "", head, name }) => {
    const points = epochs.flatMap((epoch, i) => (values[i] === null ? [] : [[x(epoch).toFixed(1), y(values[i]).toFixed(1)]]));
    if (points.length < 2) return points.map(([cx, cy]) => `<circle cx="${cx}" cy="${cy}" r="2.5" style="fill: ${color}"/>`).join("");
    const data = head === undefined ? "" : ` data-curve="${head}"`;
    return `<polyline${data} style="stroke: ${color}" stroke-width="${width}" stroke-dasharray="${dash}" points="${points.join(" ")}"><title>${escapeHtml(name)}</title></polyline>`;
  });
  const cursorLine = `<line class="cursor" x1="${x(cursor)}" x2="${x(cursor)}" y1="${MARGINS.top}" y2="${HEIGHT - MARGINS.bottom}"/>`;
  return `<figure><figcaption>${escapeHtml(title)}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}" data-last-epoch="${lastEpoch}"
    role="img" aria-label="${escapeHtml(title)} over epochs">${[...yAxis, ...xAxis, ...lines, ...curves, cursorLine].join("")}</svg></figure>`;
}

// The epoch at a click into a chart, or null for a click elsewhere.
function epochAt(event) {
  const svg = event.target.closest("svg[data-last-epoch]");
  if (!svg) return null;
  const box = svg.getBoundingClientRect();
  const left = ((event.clientX - box.left) / box.width) * WIDTH - MARGINS.left;
  const fraction = Math.min(1, Math.max(0, left / PLOT_WIDTH));
  return Math.expm1(fraction * Math.log1p(Math.max(Number(svg.dataset.lastEpoch), 1)));
}
