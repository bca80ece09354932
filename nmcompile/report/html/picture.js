// Pictures of graphs: dagre places boxes and edges, and this draws them as SVG.

const LINE = 15; // pixels between two lines of a box
const PADDING = 9;
const MEASURE = document.createElement("canvas").getContext("2d");
MEASURE.font = "12px system-ui, sans-serif";

function sizeOf(lines) {
  const width = Math.max(...lines.map((line) => MEASURE.measureText(shown(line)).width));
  return { width: Math.ceil(width) + 2 * PADDING, height: lines.length * LINE + PADDING };
}

// Draw a graph and return { svg, content, width, height }.
// boxes: { id, lines, parent, classes, action, tip }; clusters: { id, label, parent, action }; edges: [id, id].
function picture(boxes, clusters, edges) {
  const graph = new dagre.graphlib.Graph({ compound: true });
  graph.setGraph({ nodesep: 18, ranksep: 26, marginx: 12, marginy: 12 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const cluster of clusters) graph.setNode(cluster.id, { ...cluster });
  for (const box of boxes) graph.setNode(box.id, { ...box, ...sizeOf(box.lines) });
  for (const one of [...clusters, ...boxes]) if (one.parent) graph.setParent(one.id, one.parent);
  for (const [from, to] of edges) graph.setEdge(from, to);
  dagre.layout(graph);
  const { width, height } = graph.graph();
  const content = drawn(
    "g",
    {},
    clusters.map((cluster) => clusterShape(cluster, graph.node(cluster.id))),
    graph.edges().map((edge) => edgeShape(graph.edge(edge).points)),
    boxes.map((box) => boxShape(box, graph.node(box.id))),
  );
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height }, arrowHead(), content);
  return { svg, content, width, height };
}

function boxShape(box, { x, y, width, height }) {
  const group = drawn("g", { class: box.classes, "data-id": box.id }, drawn("title", {}, box.tip || box.lines.join("\n")));
  group.append(drawn("rect", { x: x - width / 2, y: y - height / 2, width, height }));
  const top = y - ((box.lines.length - 1) * LINE) / 2 + 4;
  box.lines.forEach((line, number) => {
    const attributes = { x, y: top + number * LINE, "text-anchor": "middle", class: number ? "small" : false };
    group.append(drawn("text", attributes, line));
  });
  return box.action ? pressable(group, box.action) : group;
}

function clusterShape(cluster, { x, y, width, height }) {
  const [left, top] = [x - width / 2, y - height / 2];
  const group = drawn(
    "g",
    { class: "cluster", "data-id": cluster.id },
    drawn("title", {}, cluster.tip),
    drawn("rect", { x: left, y: top, width, height }),
    drawn("text", { x: left + 2, y: top - 3, class: "small" }, cluster.label),
  );
  return pressable(group, cluster.action);
}

function edgeShape(points) {
  const [first, ...rest] = points.map(({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`);
  return drawn("path", { d: `M${first} L${rest.join(" L")}`, "marker-end": "url(#arrow)" });
}

function arrowHead() {
  const size = { viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" };
  return drawn("defs", {}, drawn("marker", { id: "arrow", ...size }, drawn("path", { d: "M0 0 L8 4 L0 8 z" })));
}
