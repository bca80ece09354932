// The data of the page, and what several parts of it ask about a layer.

const DATA = JSON.parse(byId("data").textContent);
const REPORT = DATA.report;
const PHASES = ["forward", "backward", "update"];
const LAYERS = REPORT.layers.map((layer, index) => ({ ...layer, ...DATA.layers[index], index }));
const BY_NAME = new Map(LAYERS.map((layer) => [layer.name, layer]));
const FOLDS = DATA.folds.map((fold) => ({ name: fold.name, layers: fold.layers.map((index) => LAYERS[index]) }));

function nameOf(layer) {
  return layer.name || "(model)";
}

function foldName(fold) {
  const name = fold.name || "(model)";
  return fold.layers.length > 1 ? `${name} ×${fold.layers.length}` : name;
}

// Return the class of a layer's state: sparse, dense or unusual.
function stateOf(layer) {
  return layer.status === "sparse" || layer.status === "dense" ? layer.status : "unusual";
}

// Return why GEMMs are as they are, each reason with its phase: of the plan, and of kernels that run dense.
function reasonPairs(layer) {
  const planned = layer.rows.filter((row) => row.reason).map((row) => [row.reason, row.phase]);
  const dense = PHASES.filter((phase) => layer.why_dense[phase]).map((phase) => [`dense kernel: ${layer.why_dense[phase]}`, phase]);
  return [...planned, ...dense];
}

function reasonsOf(layer) {
  return [...new Set(reasonPairs(layer).map(([reason]) => reason))];
}

// Return the backends that left a GEMM with a pruned operand to slower kernels.
function refusalsIn(layer, phase) {
  const isPruned = layer.rows.some((row) => row.phase === phase && row.pattern);
  return isPruned ? layer.refusals[phase] || [] : [];
}

// Return the measured seconds of a layer's GEMM: with the dense kernel, and with the kernel that was chosen.
function timesOf(layer, phase) {
  const choice = layer.choices[phase];
  if (!choice || choice.dense_seconds === null) return null;
  const pruned = choice.kernel === "integers" ? choice.integers_seconds : choice.sparse_seconds;
  const chosen = choice.kernel === "dense" ? choice.dense_seconds : pruned;
  return chosen === null ? null : { dense: choice.dense_seconds, sparse: pruned, chosen };
}

// Return the sums of the measured times of some layers over some phases, null if nothing was measured.
function sumTimes(layers, phases) {
  const found = layers.flatMap((layer) => phases.map((phase) => timesOf(layer, phase))).filter(Boolean);
  if (!found.length) return null;
  const sum = (key) => found.reduce((total, one) => total + one[key], 0);
  return { dense: sum("dense"), chosen: sum("chosen") };
}

function percent(share) {
  return share === null || share === undefined ? "–" : `${(share * 100).toFixed(1)}%`;
}

function amount(value, unit = "") {
  if (value === null || value === undefined) return "–";
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = steps.find(([step]) => value >= step) || [1, ""];
  const digits = size === 1 && Number.isInteger(value) ? 0 : 2;
  return `${(value / size).toFixed(digits)} ${letter}${unit}`.replace("  ", " ").trim();
}

function milliseconds(seconds) {
  return seconds < 1 ? `${(seconds * 1e3).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`;
}
