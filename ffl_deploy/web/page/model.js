// A bundle's variant in onnxruntime-web: its files checked against their hashes, its session, its golden samples.

import { compare, judge, largest } from "./gate.js";
import { readNpz } from "./golden.js";

/** Fetches the page's files, checks each against the SHA-256 that the builder wrote down, and counts what has arrived. */
export class Files {
  constructor(records, report) {
    this.records = records;
    this.report = report;
    this.loaded = 0;
    this.total = 0;
    this.read = new Map(); // name -> bytes
  }

  expect(names) {
    this.total += names.reduce((sum, name) => sum + this.records[name].bytes, 0);
  }

  async load(name) {
    const answer = await fetch(new URL(name, document.baseURI));
    if (!answer.ok) throw new Error(`${name} cannot be loaded (${answer.status}); copy the page's folder completely.`);
    const chunks = [];
    for await (const chunk of iterate(answer.body)) {
      chunks.push(chunk);
      this.loaded += chunk.length;
      this.report(this.loaded, this.total);
    }
    const bytes = new Uint8Array(await new Blob(chunks).arrayBuffer());
    // Browsers hash on https and on this machine only; elsewhere the golden samples alone decide.
    if (crypto.subtle) {
      if ((await sha256(bytes)) !== this.records[name].sha256) {
        throw new Error(`${name} was changed since the page was built (SHA-256 differs); build the page again or copy it anew.`);
      }
    }
    this.read.set(name, bytes);
    return bytes;
  }
}

/** -> hexadecimal. Where the browser does not hash, on plain http, this throws. */
export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function* iterate(stream) {
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

/** -> onnxruntime-web, ready to open sessions. `files`: where its WebAssembly comes from; `runtime`: of page.json. */
export async function openRuntime(files, runtime) {
  const [ort, wasm] = await Promise.all([import(new URL(runtime.module, document.baseURI)), files.load(runtime.wasm)]);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = wasm.buffer;
  return ort;
}

export class Model {
  /** described: an entry of page.json's `models`. */
  constructor(described) {
    this.name = described.name;
    this.described = described;
    this.state = "loading"; // then checking, and held, failed or broken
    this.problems = [];
    this.checked = 0;
    this.sessions = {};
    this.provider = "wasm";
  }

  /** ort: a promise of what openRuntime gives. Throws where a file or the session is not what it should be. */
  async load(files, ort) {
    const [manifest, weights, golden] = await Promise.all(
      ["manifest", "file", "golden"].map((kind) => files.load(this.described[kind])),
    );
    this.manifest = JSON.parse(new TextDecoder().decode(manifest));
    this.preprocessing = this.manifest.input.preprocessing;
    this.classes = this.manifest.classes;
    this.temperature = this.manifest.calibration?.temperature ?? 1;
    this.golden = await readNpz(golden);
    this.weights = weights;
    this.ort = await ort;
    this.sessions.wasm = await this.open("wasm");
    this.state = "checking";
  }

  open(provider) {
    return this.ort.InferenceSession.create(this.weights, { executionProviders: [provider], logSeverityLevel: 3 });
  }

  /** Prepared pixels of one image -> {logits, probabilities, cam?, exit?, milliseconds}. */
  async run(pixels, provider = this.provider) {
    const { height, width } = this.preprocessing;
    const batch = this.manifest.input.batch ?? 1; // a graph with a fixed batch gets the image as often as it needs
    const input = new Uint8Array(batch * pixels.length);
    for (let i = 0; i < batch; i++) input.set(pixels, i * pixels.length);
    const tensor = new this.ort.Tensor("uint8", input, [batch, height, width, 3]);
    const started = performance.now();
    const results = await this.sessions[provider].run({ [this.manifest.input.name]: tensor });
    const answer = { milliseconds: performance.now() - started };
    for (const [name, value] of Object.entries(results)) {
      answer[name] = { data: value.data.slice(0, value.data.length / batch), shape: value.dims.slice(1) };
      value.dispose();
    }
    tensor.dispose();
    return answer;
  }

  /** An answer of a cascade -> the name of the classifier that gave it; "" of another model. */
  answeredBy(answer) {
    if (!answer.exit) return "";
    const variant = this.manifest.variants.find(({ name }) => name === this.described.variant);
    const number = Number(answer.exit.data[0]); // a BigInt
    return variant?.details?.cascade?.exits[number] ?? `exit ${number}`;
  }

  /** An answer -> [{label, id, confidence}], falling. */
  top(answer, k) {
    const { data } = answer.probabilities;
    return largest(data, k).map((id) => ({ id, label: this.classes[id], confidence: data[id] }));
  }

  /**
   * Run the golden samples through the session and judge them by the gate that ffl-verify uses.
   * `turn` runs its argument when no one else is using a session. -> {metrics, problems}.
   */
  async check(settings, turn, provider = "wasm") {
    const { images, logits } = this.golden;
    const [n, height, width] = images.shape;
    const classes = this.classes.length;
    const found = { logits: new Float32Array(n * classes), probabilities: new Float32Array(n * classes) };
    for (let i = 0; i < n; i++) {
      const size = height * width * 3;
      const answer = await turn(() => this.run(images.data.subarray(i * size, (i + 1) * size), provider));
      found.logits.set(answer.logits.data, i * classes);
      found.probabilities.set(answer.probabilities.data, i * classes);
      if (provider === "wasm") this.checked = i + 1;
    }
    const metrics = compare(
      Float32Array.from(logits.data), found.logits, found.probabilities, classes, this.temperature, settings,
    );
    return { metrics, problems: judge(metrics, this.described.gate) };
  }
}
