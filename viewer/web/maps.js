// Attention maps: position maps from three numbers per head, and content maps, sent as bytes.

export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const mean = (values) => sum(values) / values.length;

// Softmax over one axis of slope * offset + curvature * offset^2; offset: key - query, in patches.
export function axisAttention(slope, curvature, query, length) {
  const scores = Float64Array.from({ length },
    (_, key) => slope * (key - query) + curvature * (key - query) ** 2);
  const highest = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - highest));
  const total = sum(weights);
  return weights.map((weight) => weight / total);
}

// Position map of a head for one query patch, row-major: the product of one factor per axis.
export function positionMap([slopeX, slopeY, curvature], query, [rows, columns]) {
  const down = axisAttention(slopeY, curvature, Math.floor(query / columns), rows);
  const across = axisAttention(slopeX, curvature, query % columns, columns);
  return Float64Array.from({ length: rows * columns },
    (_, key) => down[Math.floor(key / columns)] * across[key % columns]);
}

// Content map of a head for one query patch, from the bytes 255 C / peak of all heads and patches.
export function contentMap(bytes, peak, head, query, numPatches) {
  const start = (head * numPatches + query) * numPatches;
  return Float64Array.from(bytes.subarray(start, start + numPatches), (byte) => byte / 255 * peak);
}

// The smallest of the largest values that together hold this fraction of a map.
export function massThreshold(map, fraction) {
  if (fraction >= 1) return 0;
  const target = fraction * sum(map) - 1e-9;
  let held = 0;
  return map.toSorted().reverse().find((value) => (held += value) >= target) ?? 0;
}
