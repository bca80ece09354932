// The mask viewer: a tile of a weight's mask, with the count of kept elements of each row and column.

const CELL = 12; // pixels

function maskView(mask) {
  const counts = Object.entries(mask.kept).map(([axis, kept]) => element("li", {}, countText(axis, kept, mask.block)));
  const corner = `${mask.rows.length} out-channels by ${mask.rows[0].length} in-channels, the first ones`;
  return element(
    "div",
    {},
    element("h3", {}, "Mask"),
    element("p", { class: "faint" }, `${corner}; kept elements are filled, counted right of rows and below columns.`),
    maskCanvas(mask),
    element("ul", {}, counts, element("li", {}, `${percent(mask.magnitude)} of the weight's magnitude is kept`)),
  );
}

function countText(axis, kept, block) {
  const parts = Object.entries(kept).map(([count, blocks]) => `${blocks} keep ${count}`);
  return `along ${axis}: of all blocks of ${block}, ${parts.join(", ")}`;
}

function maskCanvas(mask) {
  const [rows, columns] = [mask.rows.length, mask.rows[0].length];
  const label = `mask: ${mask.rows.map(ones).reduce((a, b) => a + b, 0)} of ${rows * columns} elements kept`;
  const canvas = element("canvas", { class: "mask", role: "img", "aria-label": label });
  const ratio = 2; // sharp on dense displays and on paper
  canvas.width = (columns + 2) * CELL * ratio;
  canvas.height = (rows + 2) * CELL * ratio;
  canvas.style.width = `${(columns + 2) * CELL}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  paintMask(context, mask);
  return canvas;
}

function ones(row) {
  return [...row].filter((one) => one === "1").length;
}

function paintMask(context, mask) {
  const [rows, columns] = [mask.rows.length, mask.rows[0].length];
  context.fillStyle = colour("bar-sparse");
  mask.rows.forEach((row, y) =>
    [...row].forEach((one, x) => one === "1" && context.fillRect(x * CELL + 1, y * CELL + 1, CELL - 2, CELL - 2)),
  );
  context.strokeStyle = colour("line");
  for (let x = 0; x <= columns; x += mask.block) strokeLine(context, x * CELL, 0, x * CELL, rows * CELL);
  for (let y = 0; y <= rows; y += mask.block) strokeLine(context, 0, y * CELL, columns * CELL, y * CELL);
  context.fillStyle = colour("faint");
  context.font = "9px system-ui, sans-serif";
  mask.rows.forEach((row, y) => context.fillText(ones(row), columns * CELL + 4, y * CELL + 9));
  // Upright, as numbers of two digits side by side are as wide as a cell.
  context.rotate(Math.PI / 2);
  for (let x = 0; x < columns; x += 1) {
    context.fillText(mask.rows.filter((row) => row[x] === "1").length, rows * CELL + 4, -x * CELL - 3);
  }
}

function strokeLine(context, x, y, toX, toY) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}
