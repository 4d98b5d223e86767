// Gaussian noise that is a function of the seed and the position, so that tiles see parts of one noise without storing
// it. Two hashes of the position (the finaliser of MurmurHash3) become one normal number (Box and Muller).

function mix(h) {
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** Float32Array [channels, height, width]: the part of the noise that begins at row `top` and column `left`. */
export function noise(seed, channels, top, left, height, width) {
  const made = new Float32Array(channels * height * width);
  let i = 0;
  for (let c = 0; c < channels; c++) {
    const plane = mix(mix(seed + 0x9e3779b9) + c);
    for (let y = top; y < top + height; y++) {
      const row = mix(plane + y);
      for (let x = left; x < left + width; x++) {
        const a = mix(row + x), b = mix(a ^ 0x5bd1e995);
        made[i++] = Math.sqrt(-2 * Math.log((a + 1) / 4294967297)) * Math.cos((2 * Math.PI * b) / 4294967296);
      }
    }
  }
  return made;
}
