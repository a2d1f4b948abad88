// Line charts over epochs, as SVG: linked by one cursor, and by the head that is pointed at.

const WIDTH = 250, HEIGHT = 150, EDGE = { left: 30, right: 8, top: 8, bottom: 22 };
const number = (value) => (Math.abs(value) >= 10 ? value.toFixed(0) : value.toFixed(value % 1 ? 1 : 0));

function escape(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span.innerHTML.replaceAll('"', "&quot;");
}

// series: [{ epochs, values (null: none), colour, width, dash, head, name }]; lines: [{ value, name }] drawn across.
function chart({ title, series, lines = [], low = 0, high, last, ticks, cursor }) {
  const x = (epoch) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * Math.log1p(epoch)) / Math.log1p(Math.max(last, 1));
  const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * (value - low)) / (high - low);
  const horizontal = [low, (low + high) / 2, high]
    .map((value) => `<line class="axis" x1="${EDGE.left}" x2="${WIDTH - EDGE.right}" y1="${y(value)}" y2="${y(value)}"/><text x="${EDGE.left - 4}" y="${y(value) + 3}" text-anchor="end">${number(value)}</text>`);
  let free = -Infinity; // labels that would touch are left out
  const vertical = ticks.filter((epoch) => x(epoch) - free > 15 && (free = x(epoch)) !== null)
    .map((epoch) => `<text x="${x(epoch)}" y="${HEIGHT - 8}" text-anchor="middle">${epoch}</text>`);
  const across = lines.map(({ value, name }) => `<line class="across" x1="${EDGE.left}" x2="${WIDTH - EDGE.right}" y1="${y(value)}" y2="${y(value)}"><title>${escape(name)}</title></line>`);
  const curves = series.map(({ epochs, values, colour, width = 1.5, dash = "", head, name }) => {
    const points = epochs.map((epoch, i) => (values[i] === null ? "" : `${x(epoch).toFixed(1)},${y(values[i]).toFixed(1)}`)).filter(Boolean);
    const marker = head === undefined ? "" : ` data-curve="${head}"`;
    return points.length < 2 ? points.map((point) => `<circle cx="${point.split(",")[0]}" cy="${point.split(",")[1]}" r="2.5" style="fill: ${colour}"/>`).join("")
      : `<polyline${marker} style="stroke: ${colour}" stroke-width="${width}" stroke-dasharray="${dash}" points="${points.join(" ")}"><title>${escape(name)}</title></polyline>`;
  });
  const now = `<line class="cursor" x1="${x(cursor)}" x2="${x(cursor)}" y1="${EDGE.top}" y2="${HEIGHT - EDGE.bottom}"/>`;
  return `<figure><figcaption>${escape(title)}</figcaption><svg viewBox="0 0 ${WIDTH} ${HEIGHT}" data-last="${last}" role="img" aria-label="${escape(title)} over epochs">${[...horizontal, ...vertical, ...across, ...curves, now].join("")}</svg></figure>`;
}

// The epoch that a click into a chart means, or null beside one.
function epochAt(event) {
  const svg = event.target.closest("svg[data-last]");
  if (!svg) return null;
  const box = svg.getBoundingClientRect();
  const inside = ((event.clientX - box.left) / box.width) * WIDTH - EDGE.left;
  const share = Math.min(1, Math.max(0, inside / (WIDTH - EDGE.left - EDGE.right)));
  return Math.expm1(share * Math.log1p(Math.max(Number(svg.dataset.last), 1)));
}
