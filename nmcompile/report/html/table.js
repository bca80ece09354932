// The table of layers: sorted, filtered, equal rows folded.

const COLUMNS = [
  { title: "layer", key: (fold) => fold.layers[0].index },
  { title: "state", key: (fold) => fold.layers[0].status },
  { title: "kind", key: (fold) => fold.layers[0].kind },
  { title: "weight", key: (fold) => product(fold.layers[0].weight_shape), number: true },
  ...PHASES.map((phase) => ({ title: phase, key: (fold) => fold.layers[0].operands[phase] })),
  { title: "MACs", key: (fold) => fold.layers[0].macs ?? -1, number: true },
  { title: "dense / chosen", key: (fold) => gain(fold.layers), number: true },
  { title: "note", key: (fold) => fold.layers[0].note },
];
const SHORT_NAME = 36; // characters that stay on one line
const UNFOLDED = new Set();
let sorting = { column: 0, descending: false };

function product(sizes) {
  return sizes.reduce((total, size) => total * size, 1);
}

function gain(layers) {
  const times = sumTimes(layers, PHASES);
  return times ? times.dense / times.chosen : -1;
}

// Return the numbers of the reasons that hold for a layer, with links, and what else is known of it.
function noteCell(layer) {
  const link = (text) => element("a", { href: `#reason-${NUMBERS.get(text)}`, title: shown(text) }, NUMBERS.get(text));
  const links = [...new Set([layer.status, ...reasonsOf(layer)])].filter((text) => NUMBERS.has(text)).map(link);
  const separated = links.flatMap((one, index) => (index ? [", ", one] : ["reason ", one]));
  const found = layer.mask ? `mask by ${layer.mask.method}, output error ${percent(layer.mask.error)}` : "";
  return [...separated, ...[found, layer.permutation].filter(Boolean).map((text) => ` ${text}`)];
}

function showTable() {
  const states = [...new Set(LAYERS.map(stateOf))];
  byId("state").append(...["all states", ...states].map((state) => element("option", { value: state }, state)));
  byId("filter").addEventListener("input", drawTable);
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  drawTable();
}

function drawTable() {
  const folds = sorted(visibleFolds());
  const count = folds.reduce((sum, fold) => sum + fold.layers.length, 0);
  byId("count").textContent = `${count} of ${LAYERS.length} layers`;
  const measured = folds.some((fold) => gain(fold.layers) > 0);
  const columns = COLUMNS.filter((column) => measured || column.title !== "dense / chosen");
  byId("layers").replaceChildren(
    element("thead", {}, element("tr", {}, columns.map(headCell))),
    element("tbody", {}, folds.flatMap((fold) => foldRows(fold, columns))),
  );
}

// Return the folds of the layers that pass the filter; one for each layer if nothing is to be folded.
function visibleFolds() {
  const search = byId("search").value.trim().toLowerCase();
  const state = byId("state").selectedIndex > 0 ? byId("state").value : "";
  const passes = (layer) =>
    (!state || stateOf(layer) === state) && (!search || searchText(layer).includes(search));
  const kept = FOLDS.map((fold) => {
    const layers = fold.layers.filter(passes);
    return { name: layers.length === fold.layers.length ? fold.name : `${fold.name} (some)`, layers };
  }).filter((fold) => fold.layers.length);
  if (byId("fold").checked) return kept.map((fold) => (fold.layers.length > 1 ? fold : single(fold.layers[0])));
  return kept.flatMap((fold) => fold.layers.map(single));
}

function single(layer) {
  return { name: layer.name, layers: [layer] };
}

function searchText(layer) {
  return [nameOf(layer), layer.kind, layer.status, layer.note, ...Object.values(layer.operands)].join(" ").toLowerCase();
}

function sorted(folds) {
  const { key } = COLUMNS[sorting.column];
  const order = (one, other) => {
    const [a, b] = [key(one), key(other)];
    return a < b ? -1 : a > b ? 1 : one.layers[0].index - other.layers[0].index;
  };
  const found = [...folds].sort(order);
  return sorting.descending ? found.reverse() : found;
}

function headCell(column) {
  const index = COLUMNS.indexOf(column);
  const order = sorting.descending ? "descending" : "ascending";
  const attributes = { scope: "col", class: column.number ? "number" : false };
  if (sorting.column === index) attributes["aria-sort"] = order;
  const arrow = sorting.column === index ? (sorting.descending ? " ↓" : " ↑") : "";
  return element("th", attributes, element("button", { type: "button", onclick: () => sortBy(index) }, column.title + arrow));
}

function sortBy(column) {
  const isNumber = Boolean(COLUMNS[column].number);
  sorting = { column, descending: sorting.column === column ? !sorting.descending : isNumber };
  drawTable();
}

function foldRows(fold, columns) {
  if (fold.layers.length === 1) return [layerRow(single(fold.layers[0]), "one", columns)];
  const isOpen = UNFOLDED.has(fold.name);
  const members = isOpen ? fold.layers.map((layer) => layerRow(single(layer), "member", columns)) : [];
  return [layerRow(fold, "fold", columns), ...members];
}

function layerRow(fold, kind, columns) {
  const layer = fold.layers[0];
  const times = sumTimes(fold.layers, PHASES);
  const ratio = times ? `${milliseconds(times.dense)} / ${milliseconds(times.chosen)} = ${gain(fold.layers).toFixed(2)}` : "";
  const cells = {
    layer: nameCell(fold, kind),
    state: element("span", { class: `badge ${stateOf(layer)}` }, layer.status),
    kind: layer.kind,
    weight: layer.weight_shape.join("×"),
    ...layer.operands,
    MACs: layer.macs === null ? "" : amount(layer.macs),
    "dense / chosen": ratio,
    note: noteCell(layer),
  };
  return element("tr", { class: kind }, columns.map((column) => dataCell(column, cells[column.title])));
}

function dataCell(column, content) {
  const attributes = { class: column.number ? "number" : false };
  if (!["layer", "state"].includes(column.title)) attributes["data-label"] = column.title;
  return element("td", attributes, content === "" ? [] : [content].flat());
}

function nameCell(fold, kind) {
  const open = () => openLayer(fold.layers[0]);
  const name = foldName(fold);
  const classes = `name mono${name.length <= SHORT_NAME ? " short" : ""}`;
  const button = element("button", { type: "button", class: classes, onclick: open }, name);
  if (kind !== "fold") return [button];
  const isOpen = UNFOLDED.has(fold.name);
  const label = isOpen ? "fold" : "unfold";
  const attributes = { "aria-expanded": String(isOpen), "aria-label": label, title: label, onclick: () => toggleFold(fold) };
  return [element("button", { type: "button", class: "more", ...attributes }, isOpen ? "▾" : "▸"), button];
}

function toggleFold(fold) {
  if (!UNFOLDED.delete(fold.name)) UNFOLDED.add(fold.name);
  drawTable();
}
