// Bytes of a file -> upright RGB pixels, the same ones that ffl_deploy/images.py makes. The browser's codecs decode, without
// colour management; transparency, orientation and size are done here, because browsers do them in ways of their own.

import { ImageError, inspect } from "./header.js";

export { ImageError };

const TILE = 2048; // pixels a side: small enough for every browser's canvas and texture

/** -> {pixels: Uint8Array RGB, width, height, animated}. Throws ImageError. */
export async function decode(bytes, maxPixels) {
  const header = inspect(bytes);
  if (header.width * header.height > maxPixels) {
    throw new ImageError("too_large", `${header.width} x ${header.height} is more than ${maxPixels / 1e6} megapixels`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([header.bytes], { type: header.type }), {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch (error) {
    throw new ImageError("corrupt", `the pixels cannot be decoded (${error.message})`);
  }
  try {
    const rgba = await (header.alpha && header.type !== "image/gif" ? readAlpha(bitmap) : readOpaque(bitmap));
    const image = upright(onWhite(rgba), bitmap.width, bitmap.height, header.orientation);
    return { ...image, animated: header.animated };
  } finally {
    bitmap.close();
  }
}

/** Calls `read(x, y, width, height)` for each tile of a bitmap; -> the whole as RGBA. */
async function inTiles(bitmap, read) {
  const { width, height } = bitmap;
  const whole = new Uint8Array(width * height * 4);
  for (let y = 0; y < height; y += TILE) {
    for (let x = 0; x < width; x += TILE) {
      const [w, h] = [Math.min(TILE, width - x), Math.min(TILE, height - y)];
      const tile = await read(x, y, w, h);
      for (let row = 0; row < h; row++) {
        whole.set(tile.subarray(row * w * 4, (row + 1) * w * 4), ((y + row) * width + x) * 4);
      }
    }
  }
  return whole;
}

/** RGBA of a bitmap without half-transparent pixels: exact, because a canvas multiplies by an alpha of 0 or 255. */
function readOpaque(bitmap) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.min(TILE, bitmap.width), Math.min(TILE, bitmap.height)];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return inTiles(bitmap, (x, y, width, height) => {
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, -x, -y);
    return context.getImageData(0, 0, width, height).data;
  });
}

/** RGBA of any bitmap, through a texture: a 2D canvas stores colours multiplied by alpha, and cannot give them back. */
async function readAlpha(bitmap) {
  const canvas = document.createElement("canvas");
  const gl = canvas.getContext("webgl2");
  if (!gl) return readOpaque(bitmap); // off by one here and there; the page's check of its decoder says so
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  try {
    return await inTiles(bitmap, async (x, y, width, height) => {
      const whole = width === bitmap.width && height === bitmap.height;
      const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
      const tile = whole ? bitmap : await createImageBitmap(bitmap, x, y, width, height, options);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, tile);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
      const pixels = new Uint8Array(width * height * 4);
      gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
      return pixels;
    });
  } finally {
    gl.getExtension("WEBGL_lose_context")?.loseContext(); // a browser keeps sixteen at most
  }
}

/** RGBA -> RGB on white, with the rounding of Pillow's alpha_composite. */
export function onWhite(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const sum = (rgba[from + channel] * alpha + 255 * (255 - alpha)) * 128 + (128 << 7);
      rgb[to + channel] = (((sum >> 8) + sum) >> 8) >> 7;
    }
  }
  return rgb;
}

/** Undo an EXIF orientation: 2 to 4 are flips, 5 to 8 also swap the sides. */
export function upright(rgb, width, height, orientation) {
  if (orientation === 1) return { pixels: rgb, width, height };
  const swapped = orientation >= 5;
  const [newWidth, newHeight] = swapped ? [height, width] : [width, height];
  const mirrored = [2, 3, 6, 7].includes(orientation);
  const flipped = [3, 4, 7, 8].includes(orientation);
  const pixels = new Uint8Array(rgb.length);
  for (let y = 0, to = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++, to += 3) {
      const column = mirrored ? newWidth - 1 - x : x;
      const row = flipped ? newHeight - 1 - y : y;
      const from = (swapped ? column * width + row : row * width + column) * 3;
      pixels[to] = rgb[from];
      pixels[to + 1] = rgb[from + 1];
      pixels[to + 2] = rgb[from + 2];
    }
  }
  return { pixels, width: newWidth, height: newHeight };
}
