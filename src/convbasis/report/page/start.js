// Unpacks the library that draws, then draws everything.
async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  if (!window.Plotly) throw new Error("the library that draws did not start");
}

async function start() {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  await loadPlotly();
  const charts = [...document.querySelectorAll("[data-chart]")];
  const drawCharts = () => charts.forEach((element) => drawChart(element, pictures.charts[element.dataset.chart]));
  const drawHead = watchHeads(pictures.heads);
  const redraw = () => { drawCharts(); drawHead(); };
  watchTheme(redraw);
  drawCharts();
  document.documentElement.dataset.ready = "";
}

start().catch((error) => {
  const failure = document.getElementById("failure");
  failure.textContent = `Pictures could not be drawn (${error.message}). All figures are in the tables; a browser of 2024 or later draws them.`;
  failure.hidden = false;
});
