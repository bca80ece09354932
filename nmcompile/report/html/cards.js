// The totals, each only if the report holds it.

function showCards() {
  const summary = REPORT.summary;
  byId("cards").append(
    card(`${summary.sparse_layers} of ${summary.layers}`, "layers sparse"),
    ...PHASES.flatMap((phase) => phaseCard(phase, summary.phases[phase])),
    ...bytesCard(summary),
    ...stepCard(),
    ...timeCard(),
    ...accuracyCard(),
  );
}

function card(value, ...lines) {
  return element("div", { class: "card" }, element("b", {}, value), lines.map((line) => element("span", {}, line)));
}

function phaseCard(phase, totals) {
  if (!totals.macs) return [];
  const left = `, ${percent(totals.expected_macs / totals.macs)} of the products left`;
  return [card(percent(totals.sparse_share), `of the ${phase}'s ${amount(totals.macs, " MACs")} pruned${left}`)];
}

function bytesCard(summary) {
  const { dense, stored } = summary.bytes;
  const share = percent(summary.sparse_parameters / Math.max(1, summary.model_parameters));
  const rest = stored < dense ? `, ${amount(stored, "B")} as kept values with positions` : "";
  return [card(amount(dense, "B"), `of parameters in fp32${rest}; ${share} of them are in sparse layers`)];
}

function stepCard() {
  const step = REPORT.step_seconds;
  if (!step) return [];
  const text = `gain of the whole step: ${milliseconds(step.dense)} dense, ${milliseconds(step.compiled)} as compiled`;
  return [card(`${(step.dense / step.compiled).toFixed(2)} ×`, text)];
}

function timeCard() {
  const times = sumTimes(LAYERS, PHASES);
  if (!times) return [];
  const text = `GEMMs measured alone: ${milliseconds(times.dense)} dense, ${milliseconds(times.chosen)} as chosen`;
  return [card(`${(times.dense / times.chosen).toFixed(2)} ×`, text)];
}

function accuracyCard() {
  const reverted = REPORT.reverted;
  if (!reverted || reverted.dense === null || reverted.compiled === null) return [];
  const scores = `score ${reverted.compiled.toPrecision(4)}, dense ${reverted.dense.toPrecision(4)}`;
  const text = `drop of the score (${scores}); ${reverted.layers.length} layers reverted for it`;
  return [card((reverted.dense - reverted.compiled).toPrecision(3), text)];
}
