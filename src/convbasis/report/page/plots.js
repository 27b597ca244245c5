// What all pictures have in common.

// Plotly reads some markup in its texts; names come from people and are shown as they are.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// In hover templates braces after a percent sign are Plotly's.
function plainHover(text) {
  return plain(text).replace(/%/g, "&#37;");
}

function digits(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const short = Number(value.toPrecision(4));
  const size = Math.abs(short);
  return size >= 1e-4 && size < 1e7 ? short.toLocaleString("en-US", {maximumFractionDigits: 8}) : String(short);
}

function axis(options) {
  return {
    color: colour("muted"), gridcolor: colour("line"), linecolor: colour("line"), zeroline: false,
    automargin: true, tickfont: {size: 12}, ...options,
  };
}

function layout(options) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text")},
    hoverlabel: {bgcolor: colour("surface"), bordercolor: colour("muted"), font: {color: colour("text")}, align: "left"},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("text")},
    dragmode: touch ? false : "zoom",
    ...options,
  };
}

// On a touch screen a finger that moves is scrolling, and there is no hovering to hide buttons until.
const touch = matchMedia("(pointer: coarse)").matches;

const config = {
  displaylogo: false, responsive: true, displayModeBar: touch ? false : "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

function draw(element, traces, options) {
  return Plotly.react(element, traces, layout(options), config);
}

function axisTitle(text) {
  return {text: plain(text), font: {size: 13}, standoff: 8};
}

function tableRow(cells, kind) {
  const row = document.createElement("tr");
  for (const cell of cells) {
    const element = document.createElement(kind);
    if (kind === "th") element.scope = "col";
    else if (typeof cell === "number") element.className = "number";
    element.textContent = typeof cell === "number" ? digits(cell) : cell;
    row.append(element);
  }
  return row;
}

// A table in a box of its own that scrolls.
function figuresTable(title, columns, rows) {
  const box = document.createElement("div");
  box.className = "scroll";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", title);
  const table = document.createElement("table");
  table.createTHead().append(tableRow(columns, "th"));
  table.createTBody().append(...rows.map((row) => tableRow(row, "td")));
  box.append(table);
  return box;
}
