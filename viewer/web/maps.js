// What heads look at. Position maps are computed here, from three numbers a head; content maps come as the server's bytes.

function bytes(base64) {
  const text = atob(base64);
  const values = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) values[index] = text.charCodeAt(index);
  return values;
}

// Softmax over one axis of slope * offset + curvature * offset^2, offsets key minus query, in patches.
function axisAttention(slope, curvature, query, length) {
  const scores = Float64Array.from({ length }, (_, key) => slope * (key - query) + curvature * (key - query) ** 2);
  const highest = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - highest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

// A head's position map from one query patch: the product of its two factors, rows first.
function positionMap([slopeX, slopeY, curvature], query, [rows, columns]) {
  const down = axisAttention(slopeY, curvature, Math.floor(query / columns), rows);
  const across = axisAttention(slopeX, curvature, query % columns, columns);
  return Float64Array.from({ length: rows * columns }, (_, key) => down[Math.floor(key / columns)] * across[key % columns]);
}

// A head's content map from one query patch, of bytes 255 C / peak for all heads, queries and keys.
function contentMap(values, peak, head, query, patches) {
  const start = (head * patches + query) * patches;
  return Float64Array.from(values.subarray(start, start + patches), (value) => (value / 255) * peak);
}

const mix = (position, content, gate) => content.map((value, key) => (1 - gate) * value + gate * position[key]);

function distance(a, b, columns) {
  return Math.hypot((a % columns) - (b % columns), Math.floor(a / columns) - Math.floor(b / columns));
}

// The smallest value among the largest ones that together hold this share of a map.
function threshold(map, share) {
  if (share >= 1) return 0;
  const sorted = Float64Array.from(map).sort().reverse();
  const wanted = share * sorted.reduce((sum, value) => sum + value, 0) - 1e-9;
  let held = 0;
  for (const value of sorted) if ((held += value) >= wanted) return value;
  return 0;
}
