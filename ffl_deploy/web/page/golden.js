// golden.npz, as the bundle has it: a zip of NumPy arrays.

const KINDS = { "|u1": Uint8Array, "<f4": Float32Array, "<f8": Float64Array, "<i8": BigInt64Array, "<i4": Int32Array };

/** Bytes of an .npz file -> {name: {data, shape}}. Throws Error where it is none. */
export async function readNpz(bytes) {
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let end = bytes.length - 22; // the end of the central directory, before a comment that NumPy does not write
  while (end >= 0 && data.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("the golden samples are no .npz file");
  const arrays = {};
  let at = data.getUint32(end + 16, true);
  for (let left = data.getUint16(end + 10, true); left > 0; left--) {
    const method = data.getUint16(at + 10, true);
    const size = data.getUint32(at + 20, true);
    const [nameLength, extraLength, commentLength] = [28, 30, 32].map((offset) => data.getUint16(at + offset, true));
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const local = data.getUint32(at + 42, true);
    const start = local + 30 + data.getUint16(local + 26, true) + data.getUint16(local + 28, true);
    const packed = bytes.subarray(start, start + size);
    arrays[name.replace(/\.npy$/, "")] = readNpy(method === 8 ? await inflate(packed) : packed);
    at += 46 + nameLength + extraLength + commentLength;
  }
  return arrays;
}

async function inflate(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function readNpy(bytes) {
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [lengthSize, start] = bytes[6] === 1 ? [2, 10] : [4, 12];
  const length = lengthSize === 2 ? data.getUint16(8, true) : data.getUint32(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const Kind = KINDS[/'descr': *'([^']+)'/.exec(header)?.[1]];
  const shape = /'shape': *\(([^)]*)\)/.exec(header)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!Kind || !shape || /'fortran_order': *True/.test(header)) throw new Error("the golden samples have another form");
  return { data: new Kind(bytes.slice(start + length).buffer), shape };
}
