// Every reason once, with a number and the layers that it holds for.

const REASONS = reasonGroups();
const NUMBERS = new Map(REASONS.map((group, index) => [group.text, index + 1]));

function showReasons() {
  const groups = [...REASONS, ...refusalGroups(), ...codeGroups()];
  byId("reasons").append(
    ...groups.map((group, index) => reasonItem(group, index + 1)),
    ...(groups.length ? [] : [element("p", { class: "faint" }, "Every GEMM is pruned as the mode says.")]),
  );
}

// Return the folds of layers for each text that `texts` finds in a layer, in the order of the layers.
function grouped(texts) {
  const found = new Map();
  for (const fold of FOLDS) {
    for (const [text, phase] of texts(fold.layers[0])) {
      const group = found.get(text) || { text, phases: new Set(), folds: new Set() };
      group.phases.add(phase);
      group.folds.add(fold);
      found.set(text, group);
    }
  }
  return [...found.values()];
}

function reasonGroups() {
  const statuses = (layer) => (stateOf(layer) === "unusual" ? [[layer.status, ""]] : []);
  return grouped((layer) => [...statuses(layer), ...reasonPairs(layer)]);
}

function refusalGroups() {
  const text = (one) => `no faster ${one.kind} kernel: ${one.backend}: ${one.reason}`;
  return grouped((layer) => PHASES.flatMap((phase) => refusalsIn(layer, phase).map((one) => [text(one), phase])));
}

// Return the modules that are not layers and yet multiply, or whose code is left as it is.
function codeGroups() {
  const titles = { skipped: "skipped", python: "stays Python" };
  const one = (title, [module, why]) => ({ text: `${title}: ${why}`, modules: [module || "(model)"] });
  return Object.entries(titles).flatMap(([key, title]) => {
    const found = new Map();
    for (const entry of Object.entries(REPORT[key])) {
      const group = one(title, entry);
      if (found.has(group.text)) found.get(group.text).modules.push(...group.modules);
      else found.set(group.text, group);
    }
    return [...found.values()];
  });
}

function reasonItem(group, number) {
  const names = group.modules || [...group.folds].map(foldName);
  const count = group.modules ? names.length : [...group.folds].reduce((sum, fold) => sum + fold.layers.length, 0);
  const what = group.modules ? "module" : "layer";
  const phases = group.phases ? [...group.phases].filter(Boolean) : [];
  const where = phases.length && phases.length < PHASES.length ? ` (${phases.join(", ")})` : "";
  return element(
    "details",
    { id: `reason-${number}` },
    element(
      "summary",
      {},
      element("span", { class: "sign" }, `${number}.`),
      `${count} ${what}${count === 1 ? "" : "s"}${where}: ${group.text}`,
    ),
    element("ul", {}, names.map((name) => element("li", { class: "mono" }, name))),
  );
}
