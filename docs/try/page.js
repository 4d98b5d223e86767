// The page: takes a picture, hands it to the worker, and shows both pictures under a slider.

const $ = (id) => document.getElementById(id);
const MOST_PIXELS = 4e6; // of the given picture; its result is `scale` squared times as large
let worker = null, given = null, link = null;

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

function show(busy) {
  for (const id of ["choose", "sample", "again", "seed"]) $(id).disabled = busy;
  $("stop").hidden = $("progress").hidden = !busy;
}

function stop(text) {
  worker?.terminate();
  worker = null;
  show(false);
  say(text);
}

function start() {
  const message = { pixels: given.data, width: given.width, height: given.height, seed: Number($("seed").value) | 0 };
  worker ??= new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onerror = (event) => stop(`The restorer could not be loaded (${event.message ?? "no message"}).`);
  worker.onmessage = ({ data }) => {
    if (data.error) return show(false), say(`This failed: ${data.error}`, "error");
    if (data.pixels) return finish(data);
    if (data.done) $("progress").value = data.done / data.of;
    else $("progress").removeAttribute("value");
    say(data.done ? `restoring: part ${data.done} of ${data.of}` : `${data.state} …`);
  };
  show(true);
  worker.postMessage(message);
}

function finish({ pixels, width, height, seconds }) {
  const after = $("after"), before = $("before");
  for (const canvas of [after, before]) [canvas.width, canvas.height] = [width, height];
  after.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  const source = new OffscreenCanvas(given.width, given.height);
  source.getContext("2d").putImageData(given, 0, 0);
  const context = before.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  $("compared").hidden = $("bar").hidden = false;
  show(false);
  say(`${given.width}×${given.height} → ${width}×${height} px in ${seconds.toFixed(1)} s`, "done");
  after.toBlob((blob) => {
    URL.revokeObjectURL(link);
    $("download").href = link = URL.createObjectURL(blob);
  });
}

async function take(file) {
  if (!file || $("choose").disabled) return;
  try {
    const bitmap = await createImageBitmap(file);
    if (bitmap.width * bitmap.height > MOST_PIXELS)
      throw new Error(`${bitmap.width}×${bitmap.height} px are too many for a browser: use teasr upscale`);
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext("2d");
    context.fillStyle = "white"; // transparency is not kept
    context.fillRect(0, 0, bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    given = context.getImageData(0, 0, bitmap.width, bitmap.height);
    $("download").download = `${(file.name ?? "picture").replace(/\.[^.]*$/, "")}_restored.png`;
    start();
  } catch (error) {
    say(error.name === "InvalidStateError" ? "This file is not a picture that the browser can read." : error.message, "error");
  }
}

const split = (share) => $("compared").style.setProperty("--split", `${100 * Math.min(1, Math.max(0, share))}%`);
$("compared").addEventListener("pointermove", (event) => {
  const box = $("compared").getBoundingClientRect();
  split((event.clientX - box.left) / box.width);
});
$("compared").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -0.05, ArrowRight: 0.05 }[event.key];
  if (step) split(parseFloat(getComputedStyle($("compared")).getPropertyValue("--split")) / 100 + step);
});
$("choose").onclick = () => $("file").click();
$("file").onchange = () => take($("file").files[0]);
$("sample").onclick = async () => {
  const blob = await (await fetch(new URL("./sample.jpg", import.meta.url))).blob();
  take(new File([blob], "sample.jpg", { type: "image/jpeg" }));
};
$("again").onclick = start;
$("stop").onclick = () => stop("stopped");
$("drop").ondragover = document.body.ondragover = (event) => (event.preventDefault(), $("drop").classList.add("over"));
document.body.ondragleave = () => $("drop").classList.remove("over");
document.body.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
};
document.body.onpaste = (event) => take(event.clipboardData.files[0]);
