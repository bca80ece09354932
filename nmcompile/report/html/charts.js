// Charts of what the report holds: MACs, measured times, magnitude that masks keep, errors of found masks.

const MOST_BARS = 30;
const CHARTS = [];

function showCharts() {
  for (const chart of CHARTS.splice(0)) chart.destroy();
  byId("charts").replaceChildren();
  macsChart();
  for (const phase of PHASES) timesChart(phase);
  barsOfLayers("Magnitude that the masks keep", "% of the weight's sum of magnitudes", (layer) =>
    layer.tile ? layer.tile.magnitude * 100 : null,
  );
  barsOfLayers("Output error of masks found from data", "% of the layer's output", (layer) =>
    layer.mask ? layer.mask.error * 100 : null,
  );
}

function macsChart() {
  const totals = PHASES.map((phase) => REPORT.summary.phases[phase]);
  if (!totals.every((one) => one.macs)) return;
  bars("Products of the GEMMs", "MACs", PHASES, [
    series("dense", totals.map((one) => one.macs), "bar-dense"),
    series("left by pruning", totals.map((one) => one.expected_macs), "bar-sparse"),
  ]);
}

function timesChart(phase) {
  const rows = FOLDS.map((fold) => ({ fold, times: sumTimes(fold.layers, [phase]) })).filter((row) => row.times);
  if (!rows.length) return;
  rows.sort((one, other) => other.times.dense - one.times.dense);
  const shownRows = rows.slice(0, MOST_BARS);
  const more = rows.length > MOST_BARS ? ` (the ${MOST_BARS} slowest of ${rows.length})` : "";
  const name = ({ fold, times }) => `${foldName(fold)}  ${(times.dense / times.chosen).toFixed(2)} ×`;
  bars(`Measured time, ${phase}${more}; × is dense / chosen, below 1 does not pay`, "ms", shownRows.map(name), [
    series("dense kernel", shownRows.map((row) => row.times.dense * 1e3), "bar-dense"),
    series("chosen kernel", shownRows.map((row) => row.times.chosen * 1e3), "bar-sparse"),
  ]);
}

// Draw the mean of a value of each layer over each fold, if any layer has it.
function barsOfLayers(title, unit, value) {
  const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
  const rows = FOLDS.map((fold) => [fold, fold.layers.map(value).filter((one) => one !== null)]);
  const known = rows.filter(([, values]) => values.length).slice(0, MOST_BARS);
  if (!known.length) return;
  bars(title, unit, known.map(([fold]) => foldName(fold)), [
    series("mean of the layers", known.map(([, values]) => mean(values)), "bar-sparse"),
  ]);
}

function series(label, data, name) {
  return { label, data, backgroundColor: colour(name) };
}

function bars(title, unit, labels, datasets) {
  const canvas = element("canvas", { role: "img", "aria-label": title });
  const box = element("div", { class: "chart" }, canvas);
  box.style.height = `${70 + labels.length * (datasets.length > 1 ? 34 : 24)}px`;
  byId("charts").append(element("section", {}, element("h2", {}, title), box));
  const [ink, grid] = [colour("ink"), { color: colour("line") }];
  const width = window.innerWidth < 640 ? 18 : 44;
  const short = (label) => (label.length > width ? `…${label.slice(1 - width)}` : label);
  const options = {
    indexAxis: "y",
    animation: false,
    maintainAspectRatio: false,
    color: ink,
    plugins: { legend: { labels: { color: ink }, display: datasets.length > 1 } },
    scales: {
      x: { beginAtZero: true, title: { display: true, text: unit, color: ink }, ticks: { color: ink, callback: (value) => (value < 1000 ? value : amount(value)) }, grid },
      y: { ticks: { color: ink, autoSkip: false, callback: (_, index) => short(shown(labels[index])) }, grid },
    },
  };
  CHARTS.push(new Chart(canvas, { type: "bar", data: { labels: labels.map(shown), datasets }, options }));
}
