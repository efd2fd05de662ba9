// Does this browser compute what training computed? The metrics, gates and verdicts of ffl_deploy/parity.py.

/**
 * reference, candidate: logits, Float32Array [n * classes]; probabilities: the candidate's own.
 * settings: {tie, undirected} of parity.py. -> metrics under the names of ParityMetrics.
 */
export function compare(reference, candidate, probabilities, classes, temperature, settings) {
  const n = reference.length / classes;
  const std = deviation(reference) || 1;
  const m = {
    n, non_finite: 0, logit_std: std, max_abs_diff: 0, scaled_max_diff: 0, cosine_min: 1, mean_kl: 0,
    top1_mismatches: 0, top5_mismatches: 0, probability_error: 0,
  };
  const rows = [];
  for (let i = 0; i < n; i++) {
    const row = [reference, candidate, probabilities].map((all) => Array.from(all.subarray(i * classes, (i + 1) * classes)));
    if (row[1].every(Number.isFinite) && row[2].every(Number.isFinite)) rows.push(row);
    else m.non_finite++;
  }
  // An image whose logits are short points nowhere: its cosine says nothing.
  const typical = Math.sqrt(rows.reduce((sum, [r]) => sum + norm(r) ** 2, 0) / Math.max(rows.length, 1));
  for (const [r, c, p] of rows) {
    m.max_abs_diff = Math.max(m.max_abs_diff, ...r.map((value, i) => Math.abs(value - c[i])));
    const product = norm(r) * norm(c);
    if (Math.max(norm(r), norm(c)) >= settings.undirected * typical && norm(r) + norm(c) > 0) {
      m.cosine_min = Math.min(m.cosine_min, product > 0 ? dot(r, c) / product : 0);
    }
    const [logR, logC] = [logSoftmax(r), logSoftmax(c)];
    m.mean_kl += logR.reduce((sum, value, i) => sum + Math.exp(value) * (value - logC[i]), 0) / rows.length;
    m.top1_mismatches += disagree(r, c, 1, settings.tie * std);
    m.top5_mismatches += disagree(r, c, 5, settings.tie * std);
    const expected = logSoftmax(c.map((value) => value / temperature)).map(Math.exp);
    m.probability_error = Math.max(m.probability_error, ...expected.map((value, i) => Math.abs(value - p[i])));
  }
  m.mean_kl = Math.max(0, m.mean_kl);
  m.scaled_max_diff = m.max_abs_diff / std;
  return m;
}

/** -> what broke the gate, as sentences; none: it holds. `gate` has the fields of ParityGate. */
export function judge(m, gate) {
  if (m.non_finite) return [`${m.non_finite} of ${m.n} images have NaN or infinite logits`];
  const share = 1 - gate.top1_agreement;
  const allowed = share === 0 ? 0 : Math.max(1, Math.ceil(Number((share * m.n).toFixed(6))));
  const checks = [
    ["max logit difference / standard deviation", m.scaled_max_diff, gate.scaled_max_diff, 1],
    ["smallest cosine similarity", m.cosine_min, gate.cosine_min, -1],
    ["mean KL divergence", m.mean_kl, gate.mean_kl, 1],
    ["number of top-1 disagreements", m.top1_mismatches, allowed, 1],
    ["number of top-5 disagreements", m.top5_mismatches, gate.top5_agreement === 1 ? 0 : null, 1],
    ["error of the probabilities", m.probability_error, gate.probability_error, 1],
  ];
  return checks
    .filter(([, measured, limit, sign]) => limit !== null && sign * measured > sign * limit)
    .map(([name, measured, limit]) => `${name} is ${measured.toPrecision(3)}, the gate is ${limit}`);
}

/** -> indices of the `k` largest values, falling; equal values keep their order. */
export function largest(values, k) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b).slice(0, k);
}

function disagree(r, c, k, tie) {
  if (r.length <= k) return 0;
  const order = largest(r, k + 1);
  if (r[order[k - 1]] - r[order[k]] <= tie) return 0; // rounding may order these either way
  const wanted = new Set(order.slice(0, k));
  return largest(c, k).every((i) => wanted.has(i)) ? 0 : 1;
}

function deviation(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
}

function logSoftmax(values) {
  const most = Math.max(...values);
  const log = Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
  return values.map((value) => value - most - log);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const norm = (a) => Math.sqrt(dot(a, a));
