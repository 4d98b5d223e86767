// Tiles of a large picture: where they begin, and how their results are joined without seams.

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

/** The smallest number of low-quality pixels whose enlargement is a multiple of the model's `pixel_multiple`. */
export const unitOf = (facts) => facts.pixel_multiple / gcd(facts.pixel_multiple, facts.scale);

/** Spans [start, size] that cover 0 .. length, overlap by at least `overlap` and begin at multiples of `unit`. */
export function spans(length, tile, overlap, unit) {
  if (length <= tile) return [[0, length]];
  const made = [];
  const step = Math.floor((tile - overlap) / unit) * unit;
  for (let start = 0; ; start += step) {
    if (start + tile >= length) {
      const last = Math.ceil((length - tile) / unit) * unit;
      made.push([last, length - last]);
      return made;
    }
    made.push([start, tile]);
  }
}

/** Weight of a new tile at distance `i` (in px) from its inner edge: 0 in the margin, then rising to 1. */
const ramp = (i, margin, overlap) => Math.min(1, Math.max(0, (i + 0.5 - margin) / (overlap - 2 * margin)));

/**
 * Write a tile's result, planes [3, height, width] in [0, 1], into RGBA bytes of a picture of `wide` px, at (left, top).
 * Over what earlier tiles have written (`above` rows and `before` columns of overlap, 0: none) it is blended.
 */
export function paste(pixels, wide, planes, left, top, width, height, before, above) {
  const size = width * height;
  for (let y = 0; y < height; y++) {
    const wy = above ? ramp(y, above / 4, above) : 1;
    for (let x = 0; x < width; x++) {
      const w = wy * (before ? ramp(x, before / 4, before) : 1);
      const to = 4 * ((top + y) * wide + left + x), from = y * width + x;
      for (let c = 0; c < 3; c++) pixels[to + c] += w * (255 * planes[c * size + from] - pixels[to + c]);
      pixels[to + 3] = 255;
    }
  }
}
