// The model's graph: modules fold and unfold, and the picture zooms and moves.

const MOST_BOXES = 40; // modules are unfolded at first while the picture has no more
const READABLE = 0.7; // the smallest scale to start with
const DRAG = 4; // pixels, from which on a press is no click
const OPEN = new Set([""]);
let zoom = null;

// Return the modules that hold the operators of the graph, as a tree by full name.
function moduleTree() {
  const tree = new Map([["", { name: "", parent: null, children: new Set(), nodes: [] }]]);
  DATA.graph.nodes.forEach((node, index) => {
    let path = "";
    for (const part of node.module ? node.module.split(".") : []) {
      const parent = path;
      path = path ? `${path}.${part}` : part;
      if (!tree.has(path)) tree.set(path, { name: path, parent, children: new Set(), nodes: [] });
      tree.get(parent).children.add(path);
    }
    for (let at = path; at !== null; at = tree.get(at).parent) tree.get(at).nodes.push(index);
  });
  return tree;
}

const TREE = moduleTree();

// The modules that hold two operators of which one reads the other.
const JOINED = new Set(DATA.graph.edges.flatMap(([from, to]) => sharedModules(from, to)));

function sharedModules(from, to) {
  const [one, other] = [from, to].map((index) => DATA.graph.nodes[index].module);
  const found = [];
  for (let at = one; at; at = TREE.get(at).parent) if (`${other}.`.startsWith(`${at}.`)) found.push(at);
  return found;
}

// Return whether a module is drawn as one box or a frame. One that holds a single operator is drawn as the operator,
// and so is a ReLU that is called in several places.
function isGroup(module) {
  return module.nodes.length > 1 && (module.children.size > 0 || JOINED.has(module.name)) && module.name !== "";
}

function pathOf(node) {
  const path = [];
  for (let at = node.module; at; at = TREE.get(at).parent) path.unshift(TREE.get(at));
  return path.filter(isGroup);
}

// Return the folded module that hides an operator, or null.
function foldedAround(node) {
  return pathOf(node).find((module) => !OPEN.has(module.name)) || null;
}

function boxIds() {
  return DATA.graph.nodes.map((node, index) => {
    const folded = foldedAround(node);
    return folded ? `m:${folded.name}` : `n:${index}`;
  });
}

// Unfold modules level by level from the outside in, while few boxes are drawn.
function unfoldSome() {
  let level = [...TREE.get("").children];
  while (level.length) {
    for (const name of level) OPEN.add(name);
    if (new Set(boxIds()).size > MOST_BOXES) {
      for (const name of level) OPEN.delete(name);
      return;
    }
    level = level.flatMap((name) => [...TREE.get(name).children]);
  }
}

function showGraph() {
  const source = { export: "torch.export", fx: "torch.fx" }[REPORT.whole_graph];
  const notes = [source ? `Traced by ${source}.` : `No whole graph: ${DATA.graph_reason}. Layers stand alone.`];
  notes.push("A click unfolds a module, folds it again at its frame, and opens a layer. Ctrl and the wheel zoom.");
  byId("graph-note").append(notes.join(" "));
  const tool = (label, action) => element("button", { type: "button", onclick: action }, label);
  byId("graph-tools").append(
    tool("+", () => zoom.zoomIn()),
    tool("−", () => zoom.zoomOut()),
    tool("fit", drawGraph),
    ...["sparse", "dense", "unusual"].map((state) => element("span", { class: `badge ${state}` }, state)),
  );
  unfoldSome();
  drawGraph();
}

function drawGraph() {
  const ids = boxIds();
  const unique = [...new Set(ids)];
  const drawing = picture(
    unique.map((id) => (id.startsWith("m:") ? moduleBox(id.slice(2)) : nodeBox(Number(id.slice(2))))),
    openGroups().map(frame),
    edgesBetween(ids),
  );
  drawing.svg.removeAttribute("viewBox");
  byId("graph").replaceChildren(drawing.svg);
  makeMovable(drawing);
}

function openGroups() {
  return [...TREE.values()].filter((module) => isGroup(module) && isShownOpen(module));
}

function isShownOpen(module) {
  return OPEN.has(module.name) && (!module.parent || !isGroup(TREE.get(module.parent)) || isShownOpen(TREE.get(module.parent)));
}

function edgesBetween(ids) {
  const found = new Map();
  for (const [from, to] of DATA.graph.edges) {
    if (ids[from] !== ids[to]) found.set(JSON.stringify([ids[from], ids[to]]), [ids[from], ids[to]]);
  }
  return [...found.values()];
}

function groupAround(module) {
  for (let at = module.parent; at; at = TREE.get(at).parent) if (isGroup(TREE.get(at))) return `m:${at}`;
  return undefined;
}

function frame(module) {
  const tip = `${module.name}: fold`;
  const action = () => toggleModule(module.name);
  return { id: `m:${module.name}`, label: lastPart(module.name), parent: groupAround(module), tip, action };
}

function moduleBox(name) {
  const module = TREE.get(name);
  const layers = layersIn(module);
  const states = new Set(layers.map(stateOf));
  const sparse = layers.filter((layer) => stateOf(layer) === "sparse").length;
  const count = layers.length ? `${sparse} of ${layers.length} layers sparse` : `${module.nodes.length} operators`;
  const classes = states.size === 1 ? [...states][0] : states.has("unusual") ? "unusual" : states.size ? "mixed" : "";
  const action = () => toggleModule(name);
  const lines = [`▸ ${lastPart(name)}`, count];
  return { id: `m:${name}`, lines, parent: groupAround(module), classes, tip: `${name}: unfold`, action };
}

function nodeBox(index) {
  const node = DATA.graph.nodes[index];
  const layers = node.layers.map((name) => BY_NAME.get(name)).filter(Boolean);
  const states = new Set(layers.map(stateOf));
  const classes = states.size > 1 ? "mixed" : [...states][0] || "";
  const groups = pathOf(node);
  const inner = node.module && !isGroup(TREE.get(node.module)) ? lastPart(node.module) : "";
  const label = inner && inner !== node.label ? `${inner}: ${node.label}` : node.label;
  return {
    id: `n:${index}`,
    lines: [label, node.shape].filter(Boolean),
    parent: groups.length ? `m:${groups[groups.length - 1].name}` : undefined,
    classes,
    tip: [node.module, node.label, node.shape, ...layers.map((layer) => layer.note)].filter(Boolean).join("\n"),
    action: layers.length ? () => openLayer(layers[0]) : undefined,
  };
}

function layersIn(module) {
  const names = new Set(module.nodes.flatMap((index) => DATA.graph.nodes[index].layers));
  return [...names].map((name) => BY_NAME.get(name)).filter(Boolean);
}

function lastPart(name) {
  return name.slice(name.lastIndexOf(".") + 1);
}

function toggleModule(name) {
  if (!OPEN.delete(name)) OPEN.add(name);
  drawGraph();
}

// Fit the picture to its place, and let it be moved and zoomed; a press that moves it is no click.
function makeMovable({ svg, content, width, height }) {
  const place = svg.getBoundingClientRect();
  zoom?.destroy();
  const scale = Math.min(1, place.width / width, Math.max(READABLE, place.height / height));
  const startX = Math.max(0, (place.width / scale - width) / 2);
  zoom = Panzoom(content, { canvas: true, maxScale: 6, minScale: 0.05, startScale: scale, startX, startY: 0, step: 0.4 });
  svg.addEventListener("wheel", (event) => event.ctrlKey && zoom.zoomWithWheel(event), { passive: false });
  let start = null;
  svg.addEventListener("pointerdown", (event) => (start = [event.clientX, event.clientY]), true);
  svg.addEventListener(
    "click",
    (event) => {
      const moved = start && event.detail && Math.hypot(event.clientX - start[0], event.clientY - start[1]) > DRAG;
      if (moved) event.stopPropagation();
    },
    true,
  );
}
