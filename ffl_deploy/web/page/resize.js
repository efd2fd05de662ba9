// Pillow's resampling, bit for bit: libImaging/Resample.c for 8 bits a channel. A canvas scales with filters of its own,
// and a small network sees the difference (an orange: 70 to 96 % by the browser's filters, 77.8 % by these).

const PRECISION_BITS = 32 - 8 - 2; // of the fixed-point coefficients
const A = -0.5; // of the bicubic filter (Keys)

const FILTERS = {
  box: { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight(x) {
      const d = Math.abs(x);
      if (d < 1) return ((A + 2) * d - (A + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * A : 0;
    },
  },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/**
 * What each pixel of an output side is made of: `first[i]` and `count[i]` of the input, and `count[i]` fixed-point weights at
 * `i * stride`. `start` and `end` bound the part of the input side that is scaled; both are single precision, as in Pillow.
 */
function coefficients(inputSize, start, end, outputSize, filter) {
  const { support, weight } = FILTERS[filter];
  const scale = Math.fround(end - start) / outputSize;
  const filterScale = Math.max(scale, 1); // a reduced image averages over all of the input, an enlarged one interpolates
  const reach = support * filterScale;
  const stride = Math.ceil(reach) * 2 + 1;
  const first = new Int32Array(outputSize);
  const count = new Int32Array(outputSize);
  const weights = new Int32Array(outputSize * stride);
  for (let i = 0; i < outputSize; i++) {
    const center = start + (i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - reach + 0.5));
    const to = Math.min(inputSize, Math.trunc(center + reach + 0.5));
    const exact = [];
    let sum = 0;
    for (let x = 0; x < to - from; x++) {
      exact.push(weight((x + from - center + 0.5) * (1 / filterScale)));
      sum += exact[x];
    }
    exact.forEach((value, x) => {
      const normal = sum === 0 ? value : value / sum;
      weights[i * stride + x] = Math.trunc((normal < 0 ? -0.5 : 0.5) + normal * (1 << PRECISION_BITS));
    });
    first[i] = from;
    count[i] = to - from;
  }
  return { first, count, weights, stride };
}

/** One side of an image at a time: `lines` lines of `inputSize` pixels, `step` and `lineStep` say where in `source` they lie. */
function scaleLines(source, target, table, size, lines, read, write) {
  const { first, count, weights, stride } = table;
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < size; i++) {
      let r = 1 << (PRECISION_BITS - 1);
      let g = r;
      let b = r;
      let at = line * read.line + first[i] * read.pixel;
      for (let x = 0, w = i * stride; x < count[i]; x++, w++, at += read.pixel) {
        r += source[at] * weights[w];
        g += source[at + 1] * weights[w];
        b += source[at + 2] * weights[w];
      }
      const out = line * write.line + i * write.pixel;
      // `target` is clamped: what a filter with negative lobes overshoots becomes 0 or 255, as Pillow's table does it.
      target[out] = r >> PRECISION_BITS;
      target[out + 1] = g >> PRECISION_BITS;
      target[out + 2] = b >> PRECISION_BITS;
    }
  }
}

/**
 * RGB pixels of `width` x `height` -> of `newWidth` x `newHeight`; `box` is [left, top, right, bottom] of what is scaled.
 */
export function resize(pixels, width, height, newWidth, newHeight, filter, box = [0, 0, width, height]) {
  if (height > width * 100 && newHeight < height) {
    // A very tall image: Pillow scales its columns first.
    const low = passes(pixels, width, height, width, newHeight, filter, [0, box[1], width, box[3]]);
    return passes(low, width, newHeight, newWidth, newHeight, filter, [box[0], 0, box[2], newHeight]);
  }
  return passes(pixels, width, height, newWidth, newHeight, filter, box);
}

/** Two passes, the rows first, with 8 bits between them. */
function passes(pixels, width, height, newWidth, newHeight, filter, box) {
  const [left, top, right, bottom] = box.map(Math.fround);
  const columns = coefficients(width, left, right, newWidth, filter);
  const rows = coefficients(height, top, bottom, newHeight, filter);
  let current = pixels;
  let rowWidth = width;
  if (newWidth !== width || left !== 0 || right !== newWidth) {
    // Only the rows that the second pass reads.
    const begin = rows.first[0];
    const lines = rows.first[newHeight - 1] + rows.count[newHeight - 1] - begin;
    const part = new Uint8ClampedArray(newWidth * lines * 3);
    const source = pixels.subarray(begin * width * 3);
    scaleLines(source, part, columns, newWidth, lines, { line: width * 3, pixel: 3 }, { line: newWidth * 3, pixel: 3 });
    for (let i = 0; i < newHeight; i++) rows.first[i] -= begin;
    current = part;
    rowWidth = newWidth;
  }
  if (newHeight !== height || top !== 0 || bottom !== newHeight) {
    const whole = new Uint8ClampedArray(newWidth * newHeight * 3);
    scaleLines(
      current, whole, rows, newHeight, newWidth, { line: 3, pixel: rowWidth * 3 }, { line: 3, pixel: newWidth * 3 },
    );
    current = whole;
  }
  return new Uint8Array(current.buffer, current.byteOffset, newWidth * newHeight * 3);
}

/** RGB pixels of any size -> those that the network is fed: `prepare` of ffl_deploy/images.py. */
export function prepare({ pixels, width, height }, preprocessing) {
  const { width: newWidth, height: newHeight, filter } = preprocessing;
  if (width === newWidth && height === newHeight) return pixels;
  let box;
  if (preprocessing.resize === "crop") {
    const scale = Math.min(width / newWidth, height / newHeight) * preprocessing.crop_fraction;
    const boxWidth = newWidth * scale;
    const boxHeight = newHeight * scale;
    const left = Math.max(0, (width - boxWidth) / 2);
    const top = Math.max(0, (height - boxHeight) / 2);
    box = [left, top, Math.min(left + boxWidth, width), Math.min(top + boxHeight, height)];
  }
  return resize(pixels, width, height, newWidth, newHeight, filter, box);
}
