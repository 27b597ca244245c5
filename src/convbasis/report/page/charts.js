// Charts: lines over axes, a level that means something, a point that stands out.
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star-triangle-down"];
const DASHES = ["solid", "solid", "solid", "dash", "dash", "dot", "dot"];
const FEW_TICKS = 9;

// On a logarithmic axis the measured sizes are marked, where they are few and stand apart.
function chartAxis(given, values, markMeasured) {
  const options = {title: axisTitle(given.title), type: given.log ? "log" : "linear", separatethousands: true};
  if (!given.log) return axis(options);
  const distinct = [...new Set(values.filter((value) => value > 0))].sort((a, b) => a - b);
  const spread = distinct.every((value, at) => at === 0 || value >= 1.5 * distinct[at - 1]);
  if (markMeasured && spread && distinct.length <= FEW_TICKS) {
    return axis({...options, tickvals: distinct, ticktext: distinct.map(digits)});
  }
  return axis({...options, ...decades(distinct)});
}

// Over less than two decades the digits 1, 2 and 5 are marked, otherwise powers of ten alone.
function decades(distinct) {
  const wide = distinct.length > 1 && distinct[distinct.length - 1] / distinct[0] > 100;
  return {dtick: wide ? 1 : "D2", tickformat: ",~g"};
}

function lineTrace(line, at, chart) {
  const paint = colour(`l${at % 7}`);
  const name = plainHover(line.name);
  const labels = line.labels.map((label) => plain(label));
  return {
    type: "scatter", name: plain(line.name), x: line.x, y: line.y,
    mode: line.joined ? "lines+markers" : "markers",
    line: {color: paint, width: 2.5, dash: DASHES[at % 7]},
    marker: {color: paint, size: 8, symbol: SYMBOLS[at % 7], line: {color: colour("surface"), width: 1}},
    customdata: line.x.map((x, point) => [digits(x), digits(line.y[point]), labels[point] ?? ""]),
    hovertemplate:
      `<b>${name}</b>${labels.length ? " %{customdata[2]}" : ""}<br>${plainHover(chart.x.title)}: %{customdata[0]}` +
      `<br>${plainHover(chart.y.title)}: %{customdata[1]}<extra></extra>`,
  };
}

function drawChart(element, chart) {
  const xs = chart.lines.flatMap((line) => line.x);
  const ys = chart.lines.flatMap((line) => line.y);
  const traces = chart.lines.map((line, at) => lineTrace(line, at, chart));
  const shapes = [];
  const annotations = [];
  if (chart.level && !(chart.y.log && chart.level[0] <= 0)) {
    const [y, name] = chart.level;
    shapes.push({type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: {color: colour("muted"), width: 1.5, dash: "dash"}});
    annotations.push({
      xref: "paper", x: 1, xanchor: "right", y: chart.y.log ? Math.log10(y) : y, yanchor: "bottom",
      text: plain(name), showarrow: false, font: {color: colour("muted"), size: 12},
    });
  }
  if (chart.marked) {
    const [x, y, name] = chart.marked;
    traces.push({
      type: "scatter", mode: "markers", x: [x], y: [y], name: plain(name),
      marker: {symbol: "circle-open", size: 20, color: colour("text"), line: {width: 3}},
      customdata: [[digits(x), digits(y)]],
      hovertemplate: `<b>${plainHover(name)}</b><br>${plainHover(chart.x.title)}: %{customdata[0]}` +
        `<br>${plainHover(chart.y.title)}: %{customdata[1]}<extra></extra>`,
    });
  }
  if (chart.crossings.length) {
    const points = chart.crossings;
    traces.push({
      type: "scatter", mode: "markers+text", x: points.map(([x]) => x), y: points.map(([, y]) => y), showlegend: false,
      marker: {symbol: "circle-open", size: 14, color: colour("text"), line: {width: 2.5}}, cliponaxis: false,
      text: points.map(([, , name]) => plain(name)), textfont: {size: 12, color: colour("text")},
      // Names of neighbours stand above and below by turns, so that they do not cover each other.
      textposition: points.map((point, at) => (at % 2 ? "bottom right" : "top left")),
      customdata: points.map(([x, y, name]) => [digits(x), digits(y), plain(name)]),
      hovertemplate: `<b>%{customdata[2]}</b><br>${plainHover(chart.x.title)}: %{customdata[0]}` +
        `<br>${plainHover(chart.y.title)}: %{customdata[1]}<extra></extra>`,
    });
  }
  draw(element, traces, {
    xaxis: chartAxis(chart.x, xs, true), yaxis: chartAxis(chart.y, ys, false), shapes, annotations,
    margin: {l: 10, r: 16, t: 16, b: 10}, showlegend: traces.length > 1,
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: {size: 12}},
  });
}
