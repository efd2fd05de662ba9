// What a file's own bytes say before a browser decodes it: format, size, kind of pixels, EXIF orientation.
// Browsers differ in what they do about orientation; so it is read here, taken out of the bytes, and applied by image.js.

export class ImageError extends Error {
  /** `code` is the status that ffl-predict writes: empty, not_an_image, unsupported, too_large, truncated, corrupt. */
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

const ALTERNATIVE = "convert it to PNG or JPEG";
const UNREADABLE_HERE = [
  [/^(II\*\0|MM\0\*)/, "TIFF"],
  [/^\s*(<\?xml[^]{0,4096})?(<![^]{0,4096})?<svg/, "SVG"],
  [/^%PDF/, "PDF"],
  [/^8BPS/, "PSD"],
  [/^[^]{4}ftyp(heic|heix|mif1|avif|avis)/, "HEIF"],
  [/^(\xff\x0a|\0{3}\x0cJXL )/, "JPEG XL"],
  [/^\0{3}\x0cjP {2}/, "JPEG 2000"],
];

/**
 * A whole file -> {type, width, height, alpha, animated, orientation, bytes}; `bytes` is the file without its orientation.
 * Throws ImageError for what this page cannot decode as ffl-predict does.
 */
export function inspect(bytes) {
  if (!bytes.length) throw new ImageError("empty", "the file is empty");
  const start = text(bytes, 0, 8192);
  try {
    if (start.startsWith("\xff\xd8\xff")) return inspectJpeg(bytes);
    if (start.startsWith("\x89PNG\r\n\x1a\n")) return inspectPng(bytes);
    if (/^RIFF[^]{4}WEBP/.test(start)) return inspectWebp(bytes);
    if (/^GIF8[79]a/.test(start)) return inspectGif(bytes);
    if (/^BM[^]{4}\0\0\0\0/.test(start)) return inspectBmp(bytes);
  } catch (error) {
    if (error instanceof RangeError) throw new ImageError("truncated", "the file ends inside its header");
    throw error;
  }
  for (const [pattern, name] of UNREADABLE_HERE) {
    if (pattern.test(start)) throw new ImageError("unsupported", `${name} is not supported here; ${ALTERNATIVE}`);
  }
  throw new ImageError("not_an_image", "not one of JPEG, PNG, WEBP, GIF, BMP");
}

function text(bytes, from, to) {
  return String.fromCharCode(...bytes.subarray(from, Math.min(to, bytes.length)));
}

function view(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function described(type, width, height, more) {
  if (!width || !height) throw new ImageError("corrupt", "the image has no pixels");
  return { type, width, height, alpha: false, animated: false, orientation: 1, ...more };
}

function inspectJpeg(bytes) {
  const data = view(bytes);
  let frame = null;
  let exif = null;
  let xmp = "";
  let at = 2;
  for (;;) {
    while (data.getUint8(at) === 0xff && data.getUint8(at + 1) === 0xff) at++; // fill bytes
    if (data.getUint8(at) !== 0xff) throw new ImageError("corrupt", "a JPEG marker is missing");
    const marker = data.getUint8(at + 1);
    const length = data.getUint16(at + 2);
    const body = at + 4;
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      frame = { bits: data.getUint8(body), height: data.getUint16(body + 1), width: data.getUint16(body + 3) };
      frame.components = data.getUint8(body + 5);
    } else if (marker === 0xe1 && text(bytes, body, body + 6) === "Exif\0\0") {
      exif ??= findOrientation(bytes, body + 6, at + 2 + length);
    } else if (marker === 0xe1 && text(bytes, body, body + 29) === "http://ns.adobe.com/xap/1.0/\0") {
      xmp = new TextDecoder().decode(bytes.subarray(body + 29, at + 2 + length));
    }
    at += 2 + length;
    if (marker === 0xda) break;
  }
  if (!frame) throw new ImageError("corrupt", "it begins like an image, but its header cannot be read");
  if (frame.components === 4) throw new ImageError("unsupported", "a CMYK JPEG is not supported here; save it as RGB");
  if (frame.bits !== 8) throw new ImageError("unsupported", `${frame.bits} bits a channel are not supported here; save it as 8 bit`);
  if (endOfJpeg(bytes, at) < 0) throw new ImageError("truncated", "the file ends before the picture does");
  return described("image/jpeg", frame.width, frame.height, oriented(bytes, exif, xmp));
}

function endOfJpeg(bytes, from) {
  for (let at = bytes.length - 2; at >= from; at--) if (bytes[at] === 0xff && bytes[at + 1] === 0xd9) return at;
  return -1;
}

function inspectPng(bytes) {
  const data = view(bytes);
  const kept = [bytes.subarray(0, 8)];
  let header = null;
  let exif = null;
  let xmp = "";
  let transparency = false;
  let animated = false;
  let ended = false;
  for (let at = 8; at + 12 <= bytes.length && !ended; ) {
    const length = data.getUint32(at);
    const kind = text(bytes, at + 4, at + 8);
    const body = at + 8;
    const next = body + length + 4;
    if (next > bytes.length) break;
    if (kind === "IHDR") {
      header = { width: data.getUint32(body), height: data.getUint32(body + 4) };
      header.bits = data.getUint8(body + 8);
      header.color = data.getUint8(body + 9);
    }
    if (kind === "tRNS") transparency = true;
    if (kind === "acTL") animated = data.getUint32(body) > 1;
    if (kind === "eXIf") exif = findOrientation(bytes, body, body + length);
    else kept.push(bytes.subarray(at, next)); // its checksum covers the orientation, so the chunk goes as a whole
    if (kind === "iTXt" && text(bytes, body, body + 18) === "XML:com.adobe.xmp\0") {
      xmp = new TextDecoder().decode(bytes.subarray(body, body + length));
    }
    ended = kind === "IEND";
    at = next;
  }
  if (!header) throw new ImageError("truncated", "the file ends inside its header");
  if (!ended) throw new ImageError("truncated", "the file ends before the picture does");
  if (header.bits === 16) throw new ImageError("unsupported", "16 bits a channel are not supported here; save it as 8 bit");
  const alpha = transparency || header.color === 4 || header.color === 6;
  const more = oriented(bytes, exif, xmp);
  more.bytes = exif ? joined(kept) : bytes;
  return described("image/png", header.width, header.height, { ...more, alpha, animated });
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

function inspectWebp(bytes) {
  const data = view(bytes);
  const size = data.getUint32(4, true) + 8;
  if (size > bytes.length) throw new ImageError("truncated", "the file ends before the picture does");
  let found = null;
  let exif = null;
  let xmp = "";
  for (let at = 12; at + 8 <= size; ) {
    const kind = text(bytes, at, at + 4);
    const length = data.getUint32(at + 4, true);
    const body = at + 8;
    if (kind === "VP8X") {
      const flags = data.getUint8(body);
      const three = (from) => data.getUint16(from, true) + (data.getUint8(from + 2) << 16) + 1;
      found = { width: three(body + 4), height: three(body + 7), alpha: !!(flags & 16), animated: !!(flags & 2) };
    } else if (kind === "VP8L" && !found) {
      const bits = data.getUint32(body + 1, true);
      found = { width: (bits & 0x3fff) + 1, height: ((bits >> 14) & 0x3fff) + 1, alpha: !!((bits >> 28) & 1) };
    } else if (kind === "VP8 " && !found) {
      found = { width: data.getUint16(body + 6, true) & 0x3fff, height: data.getUint16(body + 8, true) & 0x3fff };
    } else if (kind === "EXIF") {
      const prefix = text(bytes, body, body + 6) === "Exif\0\0" ? 6 : 0;
      exif = findOrientation(bytes, body + prefix, body + length);
    } else if (kind === "XMP ") {
      xmp = new TextDecoder().decode(bytes.subarray(body, body + length));
    }
    at = body + length + (length & 1);
  }
  if (!found) throw new ImageError("corrupt", "it begins like an image, but its header cannot be read");
  return described("image/webp", found.width, found.height, { ...found, ...oriented(bytes, exif, xmp) });
}

function inspectGif(bytes) {
  const data = view(bytes);
  const colors = (flags) => (flags & 0x80 ? 3 << ((flags & 7) + 1) : 0);
  const afterBlocks = (at) => {
    while (data.getUint8(at)) at += data.getUint8(at) + 1;
    return at + 1;
  };
  let frames = 0;
  let at = 13 + colors(data.getUint8(10));
  while (frames < 2 && at < bytes.length && bytes[at] !== 0x3b) {
    if (bytes[at] === 0x2c) {
      frames++;
      at = afterBlocks(at + 11 + colors(data.getUint8(at + 9)));
    } else {
      at = afterBlocks(at + 2);
    }
  }
  // A canvas keeps GIF's transparency without loss: it is all or nothing.
  const more = { bytes, alpha: true, animated: frames > 1 };
  return described("image/gif", data.getUint16(6, true), data.getUint16(8, true), more);
}

function inspectBmp(bytes) {
  const data = view(bytes);
  const old = data.getUint32(14, true) === 12; // the header of OS/2
  const width = old ? data.getUint16(18, true) : Math.abs(data.getInt32(18, true));
  const height = old ? data.getUint16(20, true) : Math.abs(data.getInt32(22, true));
  return described("image/bmp", width, height, { bytes });
}

/** -> {value, at, little, wide} of the orientation entry in a TIFF structure, or null where there is none or it is broken. */
function findOrientation(bytes, start, end) {
  try {
    const data = new DataView(bytes.buffer, bytes.byteOffset + start, Math.max(0, end - start));
    const order = text(bytes, start, start + 2);
    const little = order === "II";
    if (!little && order !== "MM") return null;
    const directory = data.getUint32(4, little);
    const entries = data.getUint16(directory, little);
    for (let i = 0; i < entries; i++) {
      const entry = directory + 2 + i * 12;
      if (data.getUint16(entry, little) !== 0x0112) continue;
      const wide = data.getUint16(entry + 2, little) === 4;
      const value = wide ? data.getUint32(entry + 8, little) : data.getUint16(entry + 8, little);
      return { value, at: start + entry + 8, little, wide };
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return null;
}

/** -> {orientation, bytes}: as Pillow reads it (EXIF, else XMP), and the file with EXIF's set to upright. */
function oriented(bytes, exif, xmp) {
  const value = exif ? exif.value : Number(/tiff:Orientation(?:="|>)([0-9])/.exec(xmp)?.[1] ?? 1);
  const orientation = value >= 1 && value <= 8 ? value : 1;
  if (!exif || exif.value === 1) return { orientation, bytes };
  const upright = bytes.slice();
  const data = view(upright);
  if (exif.wide) data.setUint32(exif.at, 1, exif.little);
  else data.setUint16(exif.at, 1, exif.little);
  return { orientation, bytes: upright };
}
