// The start: head, theme, download, and the parts of the page in order.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  showCharts();
}

function download() {
  const blob = new Blob([JSON.stringify(REPORT, null, 2)], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: `${REPORT.model}-${REPORT.mode}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Paper is light, whatever the screen is.
function printLight() {
  const theme = document.documentElement.dataset.theme;
  window.addEventListener("afterprint", () => setTheme(theme), { once: true });
  setTheme("light");
}

function start() {
  byId("title").append(shown(`${REPORT.model}, ${REPORT.mode}`));
  byId("subtitle").append("What was done to each layer, why, and what was measured. Made by nmcompile.");
  showCards();
  showReasons();
  showTable();
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(prefersDark.matches ? "dark" : "light");
  prefersDark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  byId("print").addEventListener("click", () => window.print());
  byId("download").addEventListener("click", download);
  window.addEventListener("beforeprint", printLight);
  showGraph();
  document.documentElement.dataset.readyAfter = String(Math.round(performance.now()));
}

start();
