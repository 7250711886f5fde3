// The page: choosing files, the slider, the download. worker.js computes.

const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let network, modelName, file, began;

$("served").hidden = true;
$("app").hidden = false;

const say = (text, bad = false) => {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
};

function busy(working) {
  $("working").hidden = !working;
  $("model").disabled = $("image").disabled = working;
}

async function loadModel(blob, name) {
  say(`Loading ${name} ...`);
  busy(true);
  $("bar").removeAttribute("value");
  modelName = name;
  const buffer = await blob.arrayBuffer();
  worker.postMessage({ model: buffer }, [buffer]);
}

// The image as the network takes it, (channels, height, width) in [0, 1]; and drawn, as it was.
async function loadImage() {
  if (!network || !file) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`${file.name} is not an image that this browser reads; try a PNG or JPEG.`, true);
  }
  const { width, height } = bitmap, canvas = $("before"), { channels } = network;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  let pixels;
  try {
    pixels = context.getImageData(0, 0, width, height).data;
  } catch {
    return say(`${file.name} is too large for this browser (${width}x${height} pixels).`, true);
  }
  const data = new Float32Array(channels * width * height), size = width * height;
  const [red, green, blue] = [0.299 / 255, 0.587 / 255, 0.114 / 255]; // grey, as Pillow has it
  for (let i = 0; i < size; i++)
    if (channels === 3) for (let c = 0; c < 3; c++) data[c * size + i] = pixels[4 * i + c] / 255;
    else data[i] = red * pixels[4 * i] + green * pixels[4 * i + 1] + blue * pixels[4 * i + 2];
  $("result").hidden = true;
  say(`Restoring ${file.name}, ${width}x${height} pixels ...`);
  busy(true);
  began = performance.now();
  worker.postMessage({ image: { data, channels, height, width } }, [data.buffer]);
}

function show(restored) {
  const { width, height } = $("before"), size = width * height, canvas = $("after");
  Object.assign(canvas, { width, height });
  const image = $("before").getContext("2d").getImageData(0, 0, width, height); // which has the transparency
  for (let i = 0; i < size; i++)
    for (let c = 0; c < 3; c++)
      image.data[4 * i + c] = Math.round(255 * restored[i + (network.channels === 3 ? c * size : 0)]);
  canvas.getContext("2d").putImageData(image, 0, 0);
  $("result").hidden = false;
  $("caption").textContent = `${file.name}: before on the left, restored on the right`;
  $("download").textContent = `Save the restored image (${downloadName()})`;
  say(`Restored ${file.name} in ${Math.round((performance.now() - began) / 1000)} s.`);
  $("slider").focus({ preventScroll: true });
}

const downloadName = () => file.name.replace(/\.[^.]*$/, "") + ".png";

worker.onerror = () => say("The page cannot start its worker; a newer browser is needed.", true);
worker.onmessage = ({ data: { kind, result, error, done, count } }) => {
  if (count) {
    const left = Math.round(((performance.now() - began) / 1000 / done) * (count - done));
    if (count > 1) $("bar").value = done / count;
    else $("bar").removeAttribute("value"); // moves, without saying how far it is
    if (count > 1) say(`Restoring ${file.name}: tile ${done + 1} of ${count}` + (done ? `, about ${left} s left` : ""));
    return;
  }
  busy(false);
  if (kind === "model") {
    network = error ? null : result;
    if (error) return say(`${modelName} cannot be used: ${error}.`, true);
    const { name, weights, trained_for, not_for } = network.about;
    $("about").textContent = `${modelName}: ${weights ?? name}, on ${network.device === "webgpu" ? "the GPU (WebGPU)" : "the CPU"}.`
      + (trained_for ? ` For: ${trained_for} Not for: ${not_for}` : "");
    say("Ready: choose an image.");
    return loadImage();
  }
  if (error) return say(`${file.name} was not restored: ${error}.`, true);
  if (result.restored) show(result.restored);
  else say("Stopped.");
};

$("model").onchange = () => $("model").files[0] && loadModel($("model").files[0], $("model").files[0].name);
$("image").onchange = () => take($("image").files[0]);
$("stop").onclick = () => {
  say("Stopping after this tile ...");
  worker.postMessage({ stop: true });
};
$("slider").oninput = () => $("pair").style.setProperty("--at", `${$("slider").value}%`);
$("download").onclick = () =>
  $("after").toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: downloadName() });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });

function take(chosen) {
  if (!chosen) return;
  file = chosen;
  if (network) loadImage();
  else say(`${file.name} is chosen; choose a network, too.`);
}

// An image may be dropped anywhere on the page, and a network as well.
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  const [dropped] = event.dataTransfer.files;
  if (!dropped || $("image").disabled) return;
  if (dropped.name.endsWith(".onnx")) loadModel(dropped, dropped.name);
  else take(dropped);
};

// A network beside the page is used unless another is chosen.
const beside = await fetch("model.onnx").catch(() => null);
if (beside?.ok) loadModel(await beside.blob(), "model.onnx");
