// The page of one layer: its plan, its kernels, its three graphs and its mask.

function openLayer(layer) {
  const dialog = byId("layer");
  dialog.replaceChildren(
    element(
      "header",
      {},
      element("h2", { id: "layer-title", class: "mono" }, nameOf(layer)),
      element("span", { class: `badge ${stateOf(layer)}` }, layer.status),
      element("button", { type: "button", class: "screen", onclick: () => dialog.close() }, "Close"),
    ),
    element("p", { class: "faint" }, factsOf(layer)),
    planTable(layer),
    ...refusalsOf(layer),
    element("h3", {}, "Graphs"),
    element("div", { class: "graphs" }, PHASES.map((phase) => phaseGraph(layer, phase))),
    layer.tile ? maskView(layer.tile) : element("p", { class: "faint" }, maskReason(layer)),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function factsOf(layer) {
  const macs = layer.macs === null ? "MACs unknown: no example input" : `${amount(layer.macs, " MACs")} in each GEMM`;
  const extra = [layer.permutation, layer.norm && `absorbs ${layer.norm} in eval()`].filter(Boolean);
  const mask = layer.mask ? `mask by ${layer.mask.method}, output error ${percent(layer.mask.error)}` : "";
  return [layer.kind, `weight ${layer.weight_shape.join("×")}`, macs, mask, ...sampleOf(layer), ...extra].filter(Boolean).join("; ");
}

// Return the figures of a step with real data.
function sampleOf(layer) {
  if (!layer.sample) return [];
  const { noise, natural_zeros: natural, forced_zeros: forced, kept_magnitude: kept } = layer.sample;
  return [
    kept === null ? "" : `${percent(kept)} of the weight's magnitude kept`,
    noise === null ? "" : `pruned dY adds a variance of ${noise.toPrecision(3)} × the gradient's squared norm`,
    natural === null ? "" : `input: ${percent(natural)} zeros, ${percent(forced)} after pruning`,
  ];
}

const PLAN = ["phase", "operand", "operator", "pattern", "axis", "grid", "kernels", "choice", "reason"];

function planTable(layer) {
  const rows = PHASES.flatMap((phase) => phaseRows(layer, phase));
  const used = PLAN.filter((key) => rows.some((row) => row[key]));
  const cell = (row, key) => element("td", { "data-label": key }, row[key] || []);
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, used.map((key) => element("th", { scope: "col" }, key)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, used.map((key) => cell(row, key))))),
  );
}

// Return the rows of a GEMM; its kernels stand in the first one.
function phaseRows(layer, phase) {
  const [first, ...rest] = layer.rows.filter((row) => row.phase === phase);
  return [{ ...first, choice: choiceText(layer.choices[phase]) }, ...rest.map((row) => ({ ...row, kernels: "" }))];
}

function choiceText(choice) {
  if (!choice) return "";
  const times = [
    ["dense", choice.dense_seconds],
    ["sparse", choice.sparse_seconds],
    ["packed integers", choice.integers_seconds],
  ];
  const told = times.filter(([, seconds]) => seconds !== null).map(([name, s]) => `${name} ${milliseconds(s)}`);
  if (choice.predicted !== null) told.push(`predicted ${choice.predicted.toFixed(2)} ×`);
  return `${choice.kernel}: ${[choice.reason, ...told].join(", ")}`;
}

function refusalsOf(layer) {
  const found = new Map();
  for (const phase of PHASES) {
    for (const one of refusalsIn(layer, phase)) {
      const text = `${one.kind}: ${one.backend}: ${one.reason}`;
      found.set(text, [...(found.get(text) || []), phase]);
    }
  }
  if (!found.size) return [];
  const items = [...found].map(([text, phases]) => element("li", {}, `${phases.join(", ")}: ${text}`));
  return [element("h3", {}, "Why no faster kernel"), element("ul", {}, items)];
}

function phaseGraph(layer, phase) {
  const graph = DATA.graphs[layer.graphs][phase];
  const boxes = graph.nodes.map((node, index) => ({
    id: String(index),
    lines: graphLines(node),
    classes: `${node.kind}${node.result ? " result" : ""}`,
    tip: [node.name, node.call, node.planned, node.backend].filter(Boolean).join("\n"),
  }));
  const edges = graph.edges.map(([from, to]) => [String(from), String(to)]);
  const title = element("h4", {}, `${phase}: ${layer.operands[phase]}`);
  return element("div", {}, title, element("div", { class: "picture" }, picture(boxes, [], edges).svg));
}

function graphLines(node) {
  const head = node.kind === "operand" ? node.name : `${node.kind}: ${node.call}`;
  const backend = node.backend && `by ${node.backend}`;
  return [head, node.planned, node.shape.length ? node.shape.join("×") : "", backend].filter(Boolean);
}

function maskReason(layer) {
  const prunes = layer.rows.some((row) => row.operand === "weight" && row.pattern);
  if (!prunes) return "No mask: the weight is not pruned.";
  return "No mask at hand: the report is of a plan, or its model was split among processes or gone when this was written.";
}
