// The rows and the CSV of ffl-predict: one row per file, in order, errors included.

const COLUMNS = [
  "path", "status", "error", "label", "label_id", "confidence", "top_k_labels", "top_k_confidences", "width", "height",
];
const FORMULA_STARTS = /^[=+\-@\t\r]/; // what a spreadsheet executes: OWASP, CSV injection

export function okRow(path, image, top) {
  return {
    path,
    status: "ok",
    error: image.animated ? "animated: only the first frame was classified" : null,
    label: top[0].label,
    label_id: top[0].id,
    confidence: top[0].confidence,
    top_k_labels: top.map((one) => one.label),
    top_k_confidences: top.map((one) => one.confidence),
    width: image.width,
    height: image.height,
  };
}

export function errorRow(path, error) {
  return { path, status: error.code ?? "failed", error: error.message };
}

export function toCsv(rows) {
  const lines = rows.map((row) => COLUMNS.map((name) => cell(row[name])).join(","));
  return [COLUMNS.join(","), ...lines, ""].join("\n");
}

function cell(value) {
  if (value === null || value === undefined) return "";
  let text = Array.isArray(value) ? `[${value.map((one) => JSON.stringify(one)).join(", ")}]` : String(value);
  if (typeof value === "string" && FORMULA_STARTS.test(text)) text = "'" + text;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
