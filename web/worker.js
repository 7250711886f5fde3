// Runs the network, so that the page stays responsive. Messages: { model }, { image }, { stop }.

import { LARGE, TILE, metadata, restore } from "./tiles.js";

let ort, session, about, stopped;

// A session on "webgpu" or "wasm", each of which has a runtime of its own; that for both is slower on the CPU.
async function create(device, buffer) {
  try {
    ort = await import(`./node_modules/onnxruntime-web/dist/ort.${device}.min.mjs`);
  } catch {
    throw new Error("onnxruntime-web is missing; run npm install in the folder of this page, then reload it");
  }
  // Threads need headers that simple servers do not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  ort.env.logLevel = "error";
  return ort.InferenceSession.create(buffer.slice(0), { executionProviders: [device] });
}

const handlers = {
  async model(buffer) {
    session = null;
    about = metadata(new Uint8Array(buffer));
    if (!about.multiple) throw new Error("it was not written by dgunet export");
    if (about.task === "compressive_sensing") throw new Error("it restores from measurements, not from images");
    const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
    const usable = adapter && (about.precision !== "float16" || adapter.features.has("shader-f16"));
    let device = usable ? "webgpu" : "wasm";
    try {
      session = await create(device, buffer);
    } catch (error) {
      if (device === "wasm" || !ort) throw error;
      session = await create((device = "wasm"), buffer);
    }
    const channels = session.inputMetadata[0].shape[1];
    if (channels !== 1 && channels !== 3) throw new Error(`it is for images of ${channels} channels`);
    return { about, channels, device };
  },

  async image(image) {
    stopped = false;
    const run = async (data, height, width) => {
      const y = new ort.Tensor("float32", data, [1, image.channels, height, width]);
      const { unclamped } = await session.run({ y }, ["unclamped"]);
      const output = await unclamped.getData();
      if (!output.every(Number.isFinite)) throw new Error("the network gave values that are not finite");
      return output;
    };
    const progress = async (done, count) => {
      postMessage({ done, count });
      await new Promise((resolve) => setTimeout(resolve)); // lets a message to stop arrive
      return !stopped;
    };
    const large = image.height * image.width > LARGE;
    const tile = about.tile ? Number(about.tile) : large ? TILE : null;
    return { restored: await restore(run, image, { tile, multiple: Number(about.multiple), progress }) };
  },
};

onmessage = async ({ data }) => {
  if (data.stop) return void (stopped = true);
  const [[kind, content]] = Object.entries(data);
  try {
    postMessage({ kind, result: await handlers[kind](content) });
  } catch (error) {
    postMessage({ kind, error: String(error?.message ?? error).slice(0, 300) });
  }
};
