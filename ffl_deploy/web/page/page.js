// The page: pictures come in, every model's answer goes out, and what this browser was found to compute is told.

import { decode } from "./image.js";
import { Files, Model, openRuntime, sha256 } from "./model.js";
import { prepare, resize } from "./resize.js";
import { errorRow, okRow, toCsv } from "./rows.js";

const TOP_K = 5;
const SHOWN_ROWS = 200; // the CSV has all of them
const PICTURE = /\.(jpe?g|jpe|jfif|mpo|png|webp|bmp|gif|tiff?)$/i;

const at = (id) => document.getElementById(id);
const models = [];
const cards = new Map();
let settings;
let pictures = 0; // which picture is the newest: an older one's late answer is not shown
let stopped = false;
let rows = [];

function element(kind, text, more = {}) {
  return Object.assign(document.createElement(kind), { textContent: text }, more);
}

function say(id, text, kind = "") {
  at(id).textContent = text;
  at(id).className = kind;
}

// One at a time: a latency includes nobody else's work, and the checks let a waiting picture go first.
let line = Promise.resolve();
function turn(work) {
  const done = line.then(work);
  line = done.catch(() => {});
  return done;
}

// ---------------------------------------------------------------- loading and checking

async function start() {
  const read = async (name) => (await fetch(new URL(name, document.baseURI))).text();
  const [page, text] = await Promise.all([read("page.json").then(JSON.parse), read("files.json")]);
  const records = JSON.parse(text);
  settings = page;
  models.push(...page.models.map((described) => new Model(described)));
  showModels();

  const files = new Files(records, (loaded, total) => (at("loading").value = loaded / total));
  files.expect([page.runtime.wasm, ...page.probes.map((probe) => probe.file)]);
  for (const model of models) files.expect([model.described.manifest, model.described.file, model.described.golden]);
  const ort = openRuntime(files, page.runtime); // meanwhile the models arrive
  await Promise.all(models.map((model) => loadModel(model, files, ort)));
  if (!models.some(usable)) throw new Error("No model could be loaded; see below.");
  const examples = await Promise.all(page.examples.map((name) => fetch(new URL(name, document.baseURI)).then((a) => a.blob())));
  showExamples(examples);
  at("loading").hidden = true;
  openInputs();
  say("status", "Ready. The checks are running.");

  await checkDecoder(files);
  for (const model of models.filter(usable)) await checkModel(model);
  await offerWebGpu();
  sayReady((await keep(files, text)) ? " It works without a network from now on." : "");
}

const usable = (model) => !["loading", "broken"].includes(model.state);

async function loadModel(model, files, ort) {
  try {
    await model.load(files, ort);
  } catch (error) {
    Object.assign(model, { state: "broken", problems: [error.message] });
  }
  showState(model);
}

async function checkModel(model) {
  try {
    const found = await model.check(settings.parity, turn);
    model.problems = found.problems;
    model.metrics = found.metrics;
  } catch (error) {
    model.problems = [error.message];
  }
  model.state = model.problems.length ? "failed" : "held";
  showState(model);
  addFinding(`${model.name}: ${verdictOf(model)}`, model.problems.length);
}

function verdictOf(model) {
  if (model.problems.length) return `does not keep its gate here (${model.problems.join("; ")}). Do not rely on its answers.`;
  const m = model.metrics;
  return (
    `keeps the ${model.described.gate.precision} gate on ${m.n} golden samples: largest logit difference ` +
    `${m.scaled_max_diff.toExponential(1)} of their standard deviation, ${m.top1_mismatches} of ${m.n} labels differ.`
  );
}

/** The probes are small files whose pixels Python has written down. */
async function checkDecoder(files) {
  for (const probe of settings.probes) {
    const wanted = Uint8Array.from(atob(probe.pixels), (character) => character.charCodeAt(0));
    let most = 255;
    try {
      const image = await decode(await files.load(probe.file), settings.max_pixels);
      if (image.width === probe.width && image.height === probe.height) {
        most = image.pixels.reduce((worst, value, i) => Math.max(worst, Math.abs(value - wanted[i])), 0);
      }
    } catch (error) {
      addFinding(`${probe.name}: ${error.message}`, true);
      continue;
    }
    const right = most <= probe.allowed;
    const what = most === 0 ? "the same pixels as in Python" : `pixels differ from Python's by up to ${most} of 255`;
    addFinding(`${probe.name}: ${what}${right ? "." : "; answers may differ from ffl-predict's."}`, !right);
  }
  const threads = self.crossOriginIsolated ? "several threads" : "one thread (several need two headers of the web server)";
  addFinding(`WebAssembly on ${threads}.`);
}

/** WebGPU is offered where every model keeps its gate on it. */
async function offerWebGpu() {
  if (!settings.runtime.webgpu) return;
  at("providers").hidden = false;
  const choice = document.querySelector('input[value="webgpu"]');
  try {
    if (!(await navigator.gpu?.requestAdapter())) throw new Error("this browser has none");
    for (const model of models.filter(usable)) {
      model.sessions.webgpu = await turn(() => model.open("webgpu"));
      const { problems } = await model.check(settings.parity, turn, "webgpu");
      if (problems.length) throw new Error(`${model.name} does not keep its gate on it: ${problems[0]}`);
    }
    choice.disabled = false;
    at("webgpu-note").textContent = "(keeps the gate here)";
  } catch (error) {
    at("webgpu-note").textContent = `(not offered: ${error.message})`;
  }
  at("providers").addEventListener("change", (event) => {
    for (const model of models) model.provider = event.target.value;
  });
}

/** Keep the page for a visit without a network; -> whether it is kept. Not on plain http, or in some private windows. */
async function keep(files, records) {
  try {
    if (!models.every(usable)) return false; // a damaged file would stay here when the server's is whole again
    const { serviceWorker } = navigator;
    if (!serviceWorker.controller) {
      const version = (await sha256(new TextEncoder().encode(records))).slice(0, 16);
      const cache = await caches.open(`ffl-web ${new URL("./", document.baseURI)} ${version}`);
      for (const [name, bytes] of files.read) await cache.put(new URL(name, document.baseURI), new Response(bytes));
    }
    await serviceWorker.register("sw.js");
    await serviceWorker.ready;
    return true;
  } catch {
    return false;
  }
}

function sayReady(offline) {
  const held = models.filter((model) => model.state === "held").length;
  const all = held === models.length;
  const kept = all ? "This browser keeps every gate." : `${models.length - held} of ${models.length} models do not keep their gate here.`;
  say("status", `Ready. ${kept}${offline}`, all ? "fine" : "problem");
  document.body.dataset.ready = "true";
}

function addFinding(text, bad = false) {
  at("findings").append(element("li", text, { className: bad ? "problem" : "" }));
}

// ---------------------------------------------------------------- one picture

/** Decode a file and show every model's answer. */
async function classify(blob, name) {
  const mine = ++pictures;
  say("verdict", `Reading ${name}.`);
  try {
    const image = await decode(new Uint8Array(await blob.arrayBuffer()), settings.max_pixels);
    if (mine !== pictures) return;
    showPicture(URL.createObjectURL(blob), `${name}, ${image.width} × ${image.height}`, image);
    await answer(image, mine);
  } catch (error) {
    if (mine === pictures) refuse(`${name} cannot be classified: ${error.message}.`);
  }
}

async function answer(image, mine) {
  const labels = [];
  for (const model of models.filter(usable)) {
    const pixels = prepare(image, model.preprocessing);
    const found = await turn(() => model.run(pixels));
    if (mine !== pictures) return;
    const top = model.top(found, TOP_K);
    if (!Number.isFinite(top[0].confidence)) throw new Error(`the output of ${model.name} is not a finite number`);
    showAnswer(model, pixels, found, top);
    labels.push(`${model.name} says ${top[0].label}`);
  }
  const remark = image.animated ? " Only the first frame was classified." : "";
  say("verdict", `${labels.join(", ")}.${remark}`);
}

function refuse(text) {
  say("verdict", text, "problem");
  at("shown").hidden = true;
  for (const card of cards.values()) card.answer.replaceChildren();
}

function showPicture(url, caption, image) {
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = url;
  at("preview").className = Math.max(image.width, image.height) <= 128 ? "small" : "";
  at("caption").textContent = caption;
  at("shown").hidden = false;
}

function showModels() {
  for (const model of models) {
    const box = element("article", "", { className: "model" });
    const card = { state: element("p", "Loading."), answer: element("div", "") };
    box.append(element("h3", model.name), card.state, card.answer);
    box.dataset.model = model.name;
    at("models").append(box);
    cards.set(model, card);
    at("batch-model").append(element("option", model.name));
    at("cards").append(element("a", model.name, { href: model.described.card }), " ");
  }
  at("which").hidden = models.length < 2;
}

function showState(model) {
  const { state } = cards.get(model);
  const size = `${(model.described.bytes / 1e6).toFixed(1)} MB`;
  const texts = {
    checking: `${model.described.variant}, ${size}; being checked.`,
    held: `${model.described.variant}, ${size}; keeps its gate in this browser.`,
    failed: `${model.described.variant}: does not keep its gate in this browser.`,
    broken: model.problems.join(" "),
  };
  state.textContent = texts[model.state];
  state.className = ["failed", "broken"].includes(model.state) ? "problem" : "";
}

function showAnswer(model, pixels, found, top) {
  const list = element("ol", "", { className: "top" });
  for (const { label, confidence } of top) {
    const item = element("li", "");
    const bar = element("span", "", { className: "bar" });
    bar.style.width = `${confidence * 100}%`;
    item.append(bar, element("span", label), element("span", percent(confidence)));
    list.append(item);
  }
  const took = `${found.milliseconds.toFixed(1)} ms`;
  const exit = model.answeredBy(found);
  const by = exit ? ` Answered by ${exit}.` : "";
  const views = element("div", "", { className: "views" });
  views.append(view(pixels, model.preprocessing, "What the network sees"));
  if (found.cam) views.append(view(overlay(pixels, model.preprocessing, found.cam), model.preprocessing, "Why: evidence for this label"));
  const label = element("p", top[0].label, { className: "label" });
  cards.get(model).answer.replaceChildren(label, element("p", `${took}.${by}`), list, views);
}

const percent = (share) => `${(share * 100).toFixed(1)} %`;

function paint(canvas, rgb, width, height) {
  [canvas.width, canvas.height] = [width, height];
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let i = 0; i < width * height; i++) rgba.set(rgb.subarray(i * 3, i * 3 + 3), i * 4);
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  if (Math.max(width, height) <= 128) canvas.className = "small";
  return canvas;
}

function view(rgb, { width, height }, text) {
  const box = element("div", "");
  box.append(paint(document.createElement("canvas"), rgb, width, height), element("span", text));
  return box;
}

/** The class activation map (Zhou et al. 2016) over what the network saw, from dark violet over orange to yellow. */
function overlay(pixels, { width, height }, cam) {
  const [rowsOfMap, columns] = cam.shape;
  const most = Math.max(...cam.data, 0);
  const evidence = new Uint8Array(rowsOfMap * columns * 3);
  cam.data.forEach((value, i) => evidence.fill(most > 0 ? (Math.max(value, 0) / most) * 255 : 0, i * 3, i * 3 + 3));
  const heat = resize(evidence, columns, rowsOfMap, width, height, "bicubic");
  const stops = [[68, 1, 84], [225, 90, 50], [253, 231, 37]]; // ordered by lightness: it reads without colour vision too
  const shown = new Uint8Array(pixels.length);
  for (let i = 0; i < pixels.length; i += 3) {
    const strength = heat[i] / 255;
    const gray = 0.299 * pixels[i] + 0.587 * pixels[i + 1] + 0.114 * pixels[i + 2];
    const [from, to, share] = strength < 0.5 ? [stops[0], stops[1], strength * 2] : [stops[1], stops[2], strength * 2 - 1];
    for (let channel = 0; channel < 3; channel++) {
      const colour = from[channel] + (to[channel] - from[channel]) * share;
      shown[i + channel] = gray * (1 - 0.75 * strength) + colour * 0.75 * strength;
    }
  }
  return shown;
}

// ---------------------------------------------------------------- where pictures come from

function showExamples(blobs) {
  blobs.forEach((blob, i) => {
    const name = settings.examples[i].split("/").pop();
    const picture = element("img", "", { src: URL.createObjectURL(blob), alt: name });
    addExample(picture, () => classify(blob, name));
  });
  if (blobs.length) return;
  const { images } = models.find(usable).golden; // pixels of the network's size reach it unchanged
  const [n, height, width] = images.shape;
  const size = height * width * 3;
  for (let i = 0; i < Math.min(n, 10); i++) {
    const pixels = images.data.subarray(i * size, (i + 1) * size);
    const canvas = paint(document.createElement("canvas"), pixels, width, height);
    const name = `golden sample ${i + 1}`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", name);
    addExample(canvas, () => classifyPixels({ pixels, width, height }, name));
  }
}

function addExample(picture, choose) {
  const button = element("button", "", { type: "button" });
  const item = element("li", "");
  button.append(picture);
  button.addEventListener("click", choose);
  item.append(button);
  at("examples").append(item);
}

/** Pixels that need no decoding: a golden sample, a picture of the camera. */
async function classifyPixels(image, name) {
  const mine = ++pictures;
  const canvas = paint(document.createElement("canvas"), image.pixels, image.width, image.height);
  const blob = await new Promise((done) => canvas.toBlob(done));
  if (mine !== pictures) return;
  showPicture(URL.createObjectURL(blob), `${name}, ${image.width} × ${image.height}`, image);
  await answer(image, mine).catch((error) => refuse(`${name} cannot be classified: ${error.message}.`));
}

function openInputs() {
  at("file").addEventListener("change", () => receive([...at("file").files].map(named), at("file")));
  at("files").addEventListener("change", () => receive([...at("files").files].map(named), at("files"), true));
  at("folder").addEventListener("change", () => receive([...at("folder").files].map(named), at("folder"), true));
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) receive([...event.clipboardData.files].map(named));
  });
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const folders = entries.some((entry) => entry.isDirectory);
    const plain = [...event.dataTransfer.files].map(named);
    receive(folders ? (await Promise.all(entries.map(filesBelow))).flat() : plain, null, folders);
  });
  at("stop").addEventListener("click", () => (stopped = true));
  at("csv").addEventListener("click", downloadCsv);
  openPaste();
  openCamera();
}

const named = (file) => ({ file, path: file.webkitRelativePath || file.name });

/** A dropped entry -> its files, those of a folder in the order of their names. */
async function filesBelow(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return [{ file, path: entry.fullPath.replace(/^\//, "") }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed)); // a hundred at a time
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(filesBelow))).flat();
}

function receive(found, input = null, asBatch = false) {
  if (!found.length) return;
  if (asBatch || found.length > 1) classifyAll(found).catch((error) => say("batch-status", `${error.message}.`, "problem"));
  else classify(found[0].file, found[0].path);
  if (input) input.value = ""; // so that the same file can be chosen again
}

function openPaste() {
  if (!navigator.clipboard?.read) return;
  at("paste").hidden = false;
  at("paste").addEventListener("click", async () => {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) return void classify(await item.getType(type), "pasted picture");
      }
      refuse("There is no picture on the clipboard; copy one first.");
    } catch (error) {
      refuse(`The clipboard cannot be read: ${error.message}.`);
    }
  });
}

function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) return;
  const video = at("video");
  const close = () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    at("viewfinder").hidden = true;
    at("camera").focus();
  };
  at("camera").hidden = false;
  at("camera").addEventListener("click", async () => {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      at("shoot").disabled = true; // until there is a frame to take
      at("viewfinder").hidden = false;
      await video.play();
      at("shoot").disabled = false;
      at("shoot").focus();
    } catch (error) {
      if (error.name === "AbortError") return; // closed before the first frame
      close();
      refuse(`The camera cannot be used: ${error.message}.`);
    }
  });
  at("close-camera").addEventListener("click", close);
  at("shoot").addEventListener("click", () => {
    const [width, height] = [video.videoWidth, video.videoHeight];
    const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    context.drawImage(video, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    const pixels = new Uint8Array(width * height * 3);
    for (let i = 0; i < width * height; i++) pixels.set(data.subarray(i * 4, i * 4 + 3), i * 3);
    close();
    classifyPixels({ pixels, width, height }, "camera");
  });
}

// ---------------------------------------------------------------- many pictures

let running = false;

async function classifyAll(found) {
  if (running) throw new Error("A batch is running; stop it first");
  // A folder has other files too, which ffl-predict passes over; what was chosen by hand gets its row.
  const folder = found.some(({ path }) => path.includes("/"));
  const chosen = folder ? found.filter(({ path }) => PICTURE.test(path)) : found;
  if (folder) chosen.sort((a, b) => (a.path < b.path ? -1 : 1));
  const model = models.find((one) => one.name === at("batch-model").value);
  if (!usable(model)) throw new Error(`${model.name} could not be loaded`);
  [running, stopped, rows] = [true, false, []];
  at("rows").replaceChildren();
  at("more-rows").textContent = "";
  at("csv").hidden = true;
  for (const id of ["batch-progress", "stop", "rows-scroll"]) at(id).hidden = false;
  say("batch-status", `0 of ${chosen.length}`);
  const started = performance.now();
  let told = 0;
  for (const { file, path } of chosen) {
    if (stopped) break;
    addRow(await rowOf(model, file, path));
    at("batch-progress").value = rows.length / chosen.length;
    if (performance.now() - told > 250) {
      told = performance.now();
      say("batch-status", `${rows.length} of ${chosen.length}`);
      await new Promise((done) => setTimeout(done)); // so that the page is drawn, and Stop can be pressed
    }
  }
  const seconds = (performance.now() - started) / 1000;
  const failed = rows.filter((row) => row.status !== "ok").length;
  const left = chosen.length - rows.length;
  const rest = left ? ` Stopped; ${left} not looked at.` : "";
  say("batch-status", `${rows.length} pictures: ${rows.length - failed} classified, ${failed} could not be read, ${seconds.toFixed(1)} s.${rest}`);
  if (rows.length > SHOWN_ROWS) at("more-rows").textContent = `The first ${SHOWN_ROWS} rows are shown; the CSV has all of them.`;
  at("batch-progress").hidden = at("stop").hidden = true;
  at("csv").hidden = rows.length === 0;
  running = false;
}

async function rowOf(model, file, path) {
  try {
    const image = await decode(new Uint8Array(await file.arrayBuffer()), settings.max_pixels);
    const found = await turn(() => model.run(prepare(image, model.preprocessing)));
    if (!found.probabilities.data.every(Number.isFinite)) {
      return errorRow(path, { code: "nonfinite", message: "the model's output is not a finite number" });
    }
    return okRow(path, image, model.top(found, Math.min(TOP_K, model.classes.length)));
  } catch (error) {
    return errorRow(path, error);
  }
}

function addRow(row) {
  rows.push(row);
  if (rows.length > SHOWN_ROWS) return;
  const line = element("tr", "");
  const confidence = row.status === "ok" ? percent(row.confidence) : "";
  line.append(element("td", row.path), element("td", row.status), element("td", row.label ?? row.error), element("td", confidence));
  at("rows").append(line);
}

function downloadCsv() {
  const url = URL.createObjectURL(new Blob([toCsv(rows)], { type: "text/csv" }));
  element("a", "", { href: url, download: "predictions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

start().catch((error) => {
  say("status", error.message, "problem");
  at("loading").hidden = true;
  document.body.dataset.ready = "false";
});
