// Charts of what the report holds: MACs, predicted and measured times, masks, and the figures of a step with real data.

const MOST_BARS = 30;
const CHARTS = [];

function showCharts() {
  for (const chart of CHARTS.splice(0)) chart.destroy();
  byId("charts").replaceChildren();
  macsChart();
  predictionsChart();
  for (const phase of PHASES) timesChart(phase);
  barsOfLayers("Magnitude that the masks keep", "% of the weight's sum of magnitudes", (layer) =>
    layer.tile ? layer.tile.magnitude * 100 : null,
  );
  barsOfLayers("Output error of masks found from data", "% of the layer's output", (layer) =>
    layer.mask ? layer.mask.error * 100 : null,
  );
  barsOfLayers("Variance that pruned dY adds to the weight's gradient, in one step", "× the gradient's squared norm", (layer) =>
    layer.sample ? layer.sample.noise : null,
  );
  zerosChart();
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

function predictionsChart() {
  const found = REPORT.predictions;
  if (!found.length) return;
  const name = (one) => `${one.machine}  ${(one.dense / one.pruned).toFixed(2)} ×`;
  const section = bars("Predicted time of all GEMMs of a step with their pruning", "ms", found.map(name), [
    series("dense", found.map((one) => one.dense * 1e3), "bar-dense"),
    series("pruned", found.map((one) => one.pruned * 1e3), "bar-sparse"),
  ]);
  section.append(element("ul", { class: "faint" }, found.map((one) => element("li", {}, `${one.machine}: ${one.basis}`))));
}

// Draw the zeros of pruned inputs, before and after pruning, in the step with real data.
function zerosChart() {
  const zeros = (fold, key) => mean(fold.layers.map((layer) => (layer.sample ? layer.sample[key] : null)).filter((one) => one !== null));
  const rows = FOLDS.map((fold) => ({ fold, natural: zeros(fold, "natural_zeros"), forced: zeros(fold, "forced_zeros") }));
  const known = rows.filter((row) => row.natural !== null).slice(0, MOST_BARS);
  if (!known.length) return;
  bars("Zeros of pruned inputs, in one step", "% of the input's elements", known.map((row) => foldName(row.fold)), [
    series("natural", known.map((row) => row.natural * 100), "bar-dense"),
    series("after pruning", known.map((row) => row.forced * 100), "bar-sparse"),
  ]);
}

function mean(values) {
  return values.length ? values.reduce((sum, one) => sum + one, 0) / values.length : null;
}

// Draw the mean of a value of each layer over each fold, if any layer has it.
function barsOfLayers(title, unit, value) {
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
  const section = element("section", {}, element("h2", {}, title), box);
  byId("charts").append(section);
  const [ink, grid] = [colour("ink"), { color: colour("line") }];
  const width = window.innerWidth < 640 ? 24 : 44;
  const head = Math.floor(width / 3);
  const short = (label) => (label.length > width ? `${label.slice(0, head)}…${label.slice(head + 1 - width)}` : label);
  const tick = (value) => (value < 1000 ? value : amount(value).replace(/\.?0+ /, " "));
  const options = {
    indexAxis: "y",
    animation: false,
    maintainAspectRatio: false,
    color: ink,
    plugins: { legend: { labels: { color: ink }, display: datasets.length > 1 } },
    scales: {
      x: { beginAtZero: true, title: { display: true, text: unit, color: ink }, ticks: { color: ink, callback: tick }, grid },
      y: { ticks: { color: ink, autoSkip: false, callback: (_, index) => short(shown(labels[index])) }, grid },
    },
  };
  CHARTS.push(new Chart(canvas, { type: "bar", data: { labels: labels.map(shown), datasets }, options }));
  return section;
}
