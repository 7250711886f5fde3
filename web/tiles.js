// Images of any size in tiles with blended seams, as dgunet/inference.py does; no DOM, so that node can test it.

export const LARGE = 1024 * 1024; // pixels; larger images are restored in tiles
export const TILE = 512; // of networks whose record recommends none

// The tiles [top, bottom, left, right] of an image, and the number of pixels that neighbours share at least.
export function tileGrid(height, width, tile, overlap, step) {
  if (tile === null || (height <= tile && width <= tile)) return { areas: [[0, height, 0, width]], overlap: 0 };
  overlap ??= Math.min(Math.floor(tile / 4), 64);
  tile = Math.floor(tile / step) * step;
  overlap = Math.min(Math.ceil(overlap / step) * step, tile - step);
  const rows = cut(height, tile, overlap, step), columns = cut(width, tile, overlap, step);
  return { areas: rows.flatMap((down) => columns.map((right) => [...down, ...right])), overlap };
}

// Tiles along one side, evenly spread, that begin at multiples of `step`.
function cut(size, tile, overlap, step) {
  if (size <= tile) return [[0, size]];
  const count = Math.ceil((size - overlap) / (tile - overlap));
  tile = Math.ceil((size + (count - 1) * overlap) / count / step) * step;
  return Array.from({ length: count }, (_, i) => {
    const start = Math.ceil((i * (size - tile)) / (count - 1) / step) * step;
    return [start, Math.min(start + tile, size)];
  });
}

// Weights along one side of a tile, which fall linearly over the overlap towards its borders.
export function ramp(size, overlap) {
  const margin = Math.floor(overlap / 4); // the outermost quarter counts only where there is no other tile
  return Float32Array.from({ length: size }, (_, i) => {
    const distance = Math.min(i, size - 1 - i) + 1;
    return Math.min(Math.max((distance - margin) / (overlap + 1 - 2 * margin), 1e-6), 1);
  });
}

// Where pixel i of a side of `size` is taken from, padded: by reflection, by replication where it is too small.
const source = (i, size, missing) => (i < size ? i : missing < size ? 2 * (size - 1) - i : size - 1);

// A tile of an image (channels, height, width), padded at the right and bottom to multiples.
export function padTile(image, [top, bottom, left, right], multiple) {
  const inner = [bottom - top, right - left], [height, width] = inner.map((n) => Math.ceil(n / multiple) * multiple);
  const data = new Float32Array(image.channels * height * width);
  let at = 0;
  for (let c = 0; c < image.channels; c++)
    for (let i = 0; i < height; i++) {
      const row = (c * image.height + top + source(i, inner[0], height - inner[0])) * image.width + left;
      for (let j = 0; j < width; j++) data[at++] = image.data[row + source(j, inner[1], width - inner[1])];
    }
  return { data, height, width };
}

// Restore an image { data: Float32Array (channels, height, width) in [0, 1], channels, height, width }.
// `run(data, height, width)` gives the network's output for a tile. `progress(done, count)` is called before each tile,
// and may return false to stop; the result is null then.
export async function restore(run, image, { tile, overlap = null, multiple = 8, progress = () => true }) {
  const { height, width, channels } = image, { areas, overlap: shared } = tileGrid(height, width, tile, overlap, multiple);
  const sum = new Float32Array(channels * height * width), weight = new Float32Array(height * width);
  for (const [index, area] of areas.entries()) {
    if ((await progress(index, areas.length)) === false) return null;
    const part = padTile(image, area, multiple), [top, bottom, left, right] = area;
    const output = await run(part.data, part.height, part.width);
    const down = ramp(bottom - top, shared), across = ramp(right - left, shared);
    for (let i = top; i < bottom; i++)
      for (let j = left; j < right; j++) {
        const factor = down[i - top] * across[j - left];
        weight[i * width + j] += factor;
        for (let c = 0; c < channels; c++)
          sum[(c * height + i) * width + j] += factor * output[(c * part.height + i - top) * part.width + j - left];
      }
  }
  return sum.map((value, i) => Math.min(Math.max(value / weight[i % (height * width)], 0), 1));
}

// The metadata of an ONNX file: onnxruntime-web does not give them. They are field 14 of the protocol buffer.
export function metadata(bytes) {
  const found = {}, text = new TextDecoder();
  for (const [field, content] of fields(bytes))
    if (field === 14) {
      const entry = Object.fromEntries(fields(content));
      found[text.decode(entry[1])] = text.decode(entry[2]);
    }
  return found;
}

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      if (at >= bytes.length) throw new Error("not an ONNX file, or damaged");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint(), size = { 0: 0, 1: 8, 2: 1, 5: 4 }[tag % 8];
    if (size === undefined || tag < 8) throw new Error("not an ONNX file, or damaged");
    if (size === 0) varint();
    else if (size > 1) at += size;
    else {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, (at += length))];
    }
  }
}
