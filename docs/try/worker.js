// Restores pictures beside the page, so that the page stays responsive. Messages: {pixels, width, height, seed} in;
// {state, done, of}, then {pixels, width, height, seconds}, or {error}, out.

import * as ort from "./ort/ort.wasm.min.mjs";
import { noise } from "./noise.js";
import { paste, spans, unitOf } from "./tiles.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
const facts = fetch(new URL("./model.json", import.meta.url)).then((answer) => answer.json());
const session = ort.InferenceSession.create(new URL("./model.onnx", import.meta.url).href, {
  executionProviders: ["wasm"],
});

/** [3, height, width] in [0, 1]: a part of a picture of RGBA bytes, of which the last rows and columns repeat. */
function planesOf(pixels, wide, left, top, width, height) {
  const size = width * height, made = new Float32Array(3 * size);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 3; c++)
        made[c * size + y * width + x] = pixels[4 * ((top + y) * wide + left + x) + c] / 255;
  return made;
}

async function restoredTile(model, about, pixels, wide, left, top, width, height, seed) {
  const { scale, pixel_multiple, downsample, latent_channels } = about;
  const sides = [height, width].map((side) => (Math.ceil((side * scale) / pixel_multiple) * pixel_multiple) / downsample);
  const at = [top, left].map((place) => (place * scale) / downsample);
  const image = new ort.Tensor("float32", planesOf(pixels, wide, left, top, width, height), [1, 3, height, width]);
  const drawn = new ort.Tensor("float32", noise(seed, latent_channels, ...at, ...sides), [1, latent_channels, ...sides]);
  const { restored } = await model.run({ image, noise: drawn });
  return restored.data;
}

async function restore({ pixels, width, height, seed }) {
  postMessage({ state: "loading the model" });
  const about = await facts, model = await session;
  const began = performance.now(), unit = unitOf(about), scale = about.scale;
  const tile = Math.max(unit, Math.floor(about.tile_px / scale / unit) * unit);
  const overlap = Math.max(unit, Math.floor(tile / 8 / unit) * unit);
  const rows = spans(height, tile, overlap, unit), columns = spans(width, tile, overlap, unit);
  const out = new Uint8ClampedArray(4 * width * height * scale * scale);
  const of = rows.length * columns.length;
  let done = 0;
  postMessage({ state: "restoring", done, of });
  for (const [r, [top, high]] of rows.entries())
    for (const [c, [left, broad]] of columns.entries()) {
      const planes = await restoredTile(model, about, pixels, width, left, top, broad, high, seed);
      const above = r && (rows[r - 1][0] + rows[r - 1][1] - top) * scale;
      const before = c && (columns[c - 1][0] + columns[c - 1][1] - left) * scale;
      paste(out, width * scale, planes, left * scale, top * scale, broad * scale, high * scale, before, above);
      postMessage({ state: "restoring", done: ++done, of });
    }
  const seconds = (performance.now() - began) / 1000;
  const made = { pixels: out, width: width * scale, height: height * scale, seconds };
  postMessage(made, [out.buffer]);
}

onmessage = (event) => restore(event.data).catch((error) => postMessage({ error: String(error.message ?? error) }));
