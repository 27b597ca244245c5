// One head from near, and its choice in the maps.
const DECADES = 5;
const LOG_LAGS = 512;

function square(size, triangle, change) {
  const rows = [];
  let at = 0;
  for (let query = 0; query < size; query += 1) {
    const row = new Array(size).fill(null);
    for (let key = 0; key <= query; key += 1, at += 1) row[key] = change(triangle[at], query, key);
    rows.push(row);
  }
  return rows;
}

// The tokens of a row or column.
function tokens(view, index) {
  const from = view.first + index * view.tile;
  return view.tile === 1 ? digits(from) : `${digits(from)} to ${digits(from + view.tile - 1)}`;
}

function drawMatrix(id, view, triangle, label, scale) {
  const element = document.getElementById(id);
  const {first, tile, size} = view;
  const ticks = {tick0: first, dtick: tile * Math.max(1, 10 * Math.round(size / 50)), separatethousands: true};
  const name = (value, query, key) => `query ${tokens(view, query)}, key ${tokens(view, key)}<br>${digits(value)}`;
  element.setAttribute("aria-label", label);
  draw(element, [{
    type: "heatmap", z: square(size, triangle, scale.change), x0: first, dx: tile, y0: first, dy: tile, customdata: square(size, triangle, name), showscale: false,
    zmin: scale.low, zmax: scale.high, colorscale: ramp(scale.ramp), hoverongaps: false,
    hovertemplate: "%{customdata}<extra></extra>",
  }], {
    xaxis: axis({title: axisTitle("key"), showgrid: false, constrain: "domain", ...ticks}),
    yaxis: axis({title: axisTitle("query"), showgrid: false, autorange: "reversed", scaleanchor: "x", constrain: "domain", ...ticks}),
    margin: {l: 8, r: 8, t: 8, b: 8},
  });
}

function drawLags(view, label) {
  const element = document.getElementById("view-lags");
  const longest = Math.max(1, ...view.lags);
  const log = longest >= LOG_LAGS;
  // A logarithmic axis has no zero: lag 0 stands at one half, and is named.
  const x = view.lags.map((lag) => (log && lag === 0 ? 0.5 : lag));
  const ticks = log ? {type: "log", tickvals: [0.5, 1, 10, 100, 1000, 10000, 100000], ticktext: ["0", "1", "10", "100", "1k", "10k", "100k"]} : {tick0: 0, dtick: 10 ** Math.floor(Math.log10(longest)), range: [-0.5, longest + 0.5]};
  element.setAttribute("aria-label", label);
  draw(element, [{
    type: "scatter", mode: view.lags.length > 60 ? "lines" : "lines+markers", x, y: view.weights,
    line: {color: colour("l0"), width: 2}, marker: {size: 5},
    customdata: view.lags.map((lag, at) => [digits(lag), digits(view.weights[at])]),
    hovertemplate: "lag %{customdata[0]}<br>weight %{customdata[1]}<extra></extra>",
  }], {
    xaxis: axis({title: axisTitle("lag (tokens back)"), ...ticks}),
    yaxis: axis({title: axisTitle("weight"), type: "log", dtick: 1, tickformat: "~g"}),
    margin: {l: 8, r: 8, t: 8, b: 8},
  });
}

function setTicks(id, texts) {
  const ticks = document.querySelector(`#${id} .ticks`);
  ticks.replaceChildren(...texts.map((text) => {
    const tick = document.createElement("span");
    tick.textContent = text;
    return tick;
  }));
}

function drawAbsent(id, text) {
  const element = document.getElementById(id);
  Plotly.purge(element);
  element.replaceChildren(Object.assign(document.createElement("div"), {className: "absent", textContent: text}));
  element.setAttribute("aria-label", text);
}

function drawView(view) {
  const of = `of layer ${view.layer}, head ${view.head}`;
  for (const part of document.querySelectorAll("#view-pictures .matrix")) part.hidden = !view.exact;
  drawLags(view, `Mean weight by lag ${of}`);
  if (!view.exact) return;
  const greatest = [...view.exact, ...(view.approximate ?? [])].reduce((most, one) => Math.max(most, one), 0) || 1;
  const floor = Number((greatest / 10 ** DECADES).toPrecision(2));
  const logarithm = (weight) => Math.log10(Math.max(weight, floor));
  const weights = {change: logarithm, low: Math.log10(floor), high: Math.log10(greatest), ramp: "s"};
  drawMatrix("view-exact", view, view.exact, `Exact attention ${of}`, weights);
  setTicks("legend-weight", [`${floor.toExponential()} or less`, digits(greatest)]);
  const difference = view.approximate?.map((weight, at) => weight - view.exact[at]);
  document.getElementById("legend-difference").hidden = !difference;
  if (difference) {
    const most = difference.reduce((greatest, one) => Math.max(greatest, Math.abs(one)), 0);
    const edge = Number(most.toPrecision(2)) || 1;
    for (const id of ["view-approximate", "view-difference"]) document.querySelector(`#${id} > .absent`)?.remove();
    drawMatrix("view-approximate", view, view.approximate, `Approximation ${of}`, weights);
    const scale = {change: (value) => value, low: -edge, high: edge, ramp: "d"};
    drawMatrix("view-difference", view, difference, `Approximation minus exact ${of}; at most ${digits(most)}`, scale);
    setTicks("legend-difference", most === 0 ? ["0 everywhere"] : [`−${digits(edge)}`, "0", `+${digits(edge)}`]);
  } else {
    drawAbsent("view-approximate", "None: this head attends exactly.");
    drawAbsent("view-difference", "No difference.");
  }
}

function viewTables(view) {
  const difference = view.approximate !== null;
  const rows = [];
  for (let query = 0, at = 0; query < view.size; query += 1) {
    for (let key = 0; key <= query; key += 1, at += 1) {
      rows.push([tokens(view, query), tokens(view, key), view.exact[at], ...(difference ? [view.approximate[at], view.approximate[at] - view.exact[at]] : [])]);
    }
  }
  const columns = ["query", "key", "exact", ...(difference ? ["approximation", "difference"] : [])];
  const lags = figuresTable("Mean weight by lag", ["lag", "weight"], view.lags.map((lag, at) => [lag, view.weights[at]]));
  return view.exact ? [lags, figuresTable("Attention weights", columns, rows)] : [lags];
}

// Returns a function that draws the chosen head again.
function watchHeads(views) {
  const grids = [...document.querySelectorAll('[role="grid"]')];
  const chooser = document.getElementById("chooser");
  const figures = document.getElementById("view-figures");
  const byPlace = new Map(views.map((view) => [`${view.layer},${view.head}`, view]));
  let chosen = null;

  const cellOf = (grid, layer, head) => grid.querySelector(`[data-layer="${layer}"][data-head="${head}"]`);

  function fillFigures() {
    const box = figures.querySelector("div");
    box.replaceChildren(...(figures.open && chosen.view ? viewTables(chosen.view) : []));
  }

  function redraw() {
    if (chosen?.view) drawView(chosen.view);
  }

  function choose(layer, head) {
    chosen = {view: byPlace.get(`${layer},${head}`)};
    const values = [];
    for (const grid of grids) {
      for (const cell of grid.querySelectorAll('[aria-selected="true"], [tabindex="0"]')) {
        cell.setAttribute("aria-selected", "false");
        cell.tabIndex = -1;
      }
      const cell = cellOf(grid, layer, head) ?? cellOf(grid, 0, 0);
      cell.tabIndex = 0;
      if (cell.dataset.layer !== String(layer) || cell.dataset.head !== String(head)) continue;
      cell.setAttribute("aria-selected", "true");
      const [name, value] = [document.createElement("dt"), document.createElement("dd")];
      name.textContent = document.getElementById(grid.getAttribute("aria-labelledby")).textContent;
      value.textContent = cell.getAttribute("aria-label").replace(/^[^:]*: /, "");
      const pair = document.createElement("div");
      pair.append(name, value);
      values.push(pair);
    }
    document.getElementById("view-title").textContent = `Layer ${layer}, head ${head}`;
    document.getElementById("view-values").replaceChildren(...values);
    const jump = document.querySelector(".jump");
    if (jump) {
      jump.textContent = `Layer ${layer}, head ${head}: see below`;
      jump.hidden = false;
    }
    const caption = document.getElementById("view-caption");
    const none = views.length ? "This report has no picture of this head." : "";
    caption.textContent = chosen.view ? chosen.view.caption : none;
    if (!views.length) return;
    document.getElementById("view-pictures").hidden = !chosen.view;
    if (chooser) chooser.value = chosen.view?.exact ? `${layer},${head}` : "";
    redraw();
    fillFigures();
  }

  function move(cell, key) {
    const layer = Number(cell.dataset.layer);
    const head = Number(cell.dataset.head);
    const last = cell.parentElement.cells.length - 2;
    const steps = {
      ArrowUp: [layer - 1, head], ArrowDown: [layer + 1, head], ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1], Home: [layer, 0], End: [layer, last], Enter: [layer, head], " ": [layer, head],
    };
    return steps[key];
  }

  for (const grid of grids) {
    grid.addEventListener("click", (event) => {
      const cell = event.target.closest('[role="gridcell"]');
      if (!cell) return;
      choose(Number(cell.dataset.layer), Number(cell.dataset.head));
      cell.focus();
    });
    grid.addEventListener("keydown", (event) => {
      const to = move(event.target, event.key);
      const cell = to && cellOf(grid, ...to);
      if (to) event.preventDefault();
      if (!cell) return;
      choose(...to);
      cell.focus();
    });
  }
  if (chooser) {
    chooser.append(new Option("choose …", "", true));
    chooser.options[0].disabled = true;
    for (const view of views.filter((one) => one.exact)) chooser.append(new Option(`layer ${view.layer}, head ${view.head}`, `${view.layer},${view.head}`));
    chooser.addEventListener("change", () => choose(...chooser.value.split(",").map(Number)));
  }
  figures?.addEventListener("toggle", fillFigures);
  const first = views.find((view) => view.exact) ?? views[0];
  if (first) choose(first.layer, first.head);
  else if (grids.length) choose(0, 0);
  return redraw;
}
