"use strict";
// Elements, controls and charts of the report. Text is only ever set as text.

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
// Called again when the width or the colour scheme changes.
const redraws = [];

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}

function drawing(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- numbers and colours

const whole = (value) => value.toLocaleString("en");
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const range = (length) => Array.from({ length }, (_, index) => index);

function mix(from, to, part) {
  return `rgb(${range(3).map((i) => Math.round(from[i] + (to[i] - from[i]) * part)).join(" ")})`;
}

function signed(value, digits) {
  const size = Math.abs(value).toFixed(digits);
  return (Number(size) === 0 ? "" : value < 0 ? "−" : "+") + size;
}

// -1 blue, 0 the background, 1 red.
function diverging(value) {
  const [low, middle, high] = darkScheme.matches
    ? [[84, 160, 240], [45, 49, 55], [244, 96, 84]]
    : [[33, 102, 172], [244, 244, 243], [178, 24, 43]];
  const part = Math.min(1, Math.abs(value));
  return mix(middle, value < 0 ? low : high, part);
}

// Multiples of an even share: 0 to 1 in blue, 1 to 4 in red; the same scale in every report.
const MAX_SHARE = 4;
const shareColour = (value) => diverging(value < 1 ? value - 1 : (value - 1) / (MAX_SHARE - 1));
const SHARE_TICKS = [[0, "0"], [0.5, "½"], [1, "even"], [2, "2×"], [3, "3×"], [4, "≥4×"]];

// Neighbouring numbers get hues far apart.
function expertColour(expert) {
  const hue = (expert * 137.508 + 20) % 360;
  return darkScheme.matches ? `hsl(${hue} 48% 31%)` : `hsl(${hue} 72% 82%)`;
}

// ---- the tip under the pointer

const tip = document.getElementById("tip");

function showTip(text, event) {
  tip.textContent = text;
  tip.style.display = "block";
  const { offsetWidth: width, offsetHeight: height } = tip;
  const [x, y] = [event.clientX, event.clientY];
  const left = x + 14 + width > innerWidth ? x - width - 10 : x + 14;
  const top = y + 18 + height > innerHeight ? y - height - 10 : y + 18;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

const hideTip = () => { tip.style.display = "none"; };

// text(event) is what the tip says there, or null.
function addTips(node, text) {
  const show = (event) => {
    const found = text(event);
    if (found === null) hideTip();
    else showTip(found, event);
  };
  node.addEventListener("pointermove", show);
  node.addEventListener("click", show);
  node.addEventListener("pointerleave", hideTip);
}

// ---- controls

// A slider over the routed layers; nothing where there is but one.
function layerSlider(layers, changed) {
  if (layers.length < 2) return [];
  const output = element("output", { textContent: String(layers[0]) });
  const ends = { min: "0", max: String(layers.length - 1), value: "0" };
  const input = element("input", { type: "range", ...ends });
  input.addEventListener("input", () => {
    output.textContent = String(layers[input.value]);
    changed(Number(input.value));
  });
  return [element("label", {}, "layer", input, output)];
}

function selector(title, options, changed) {
  const option = (name) => element("option", { textContent: name });
  const select = element("select", {}, options.map(option));
  select.addEventListener("change", () => changed(select.selectedIndex));
  return element("label", {}, title, select);
}

function checkbox(title, changed) {
  const input = element("input", { type: "checkbox" });
  input.addEventListener("change", () => changed(input.checked));
  return element("label", {}, input, title);
}

// A row of numbers a line; `text` columns are aligned to the left.
function table(head, rows, textColumns = 0) {
  const cell = (value, column) =>
    value instanceof Node
      ? element("td", { className: "tokens" }, value)
      : element("td", { textContent: value, className: column < textColumns ? "text" : "" });
  const title = (name, column) =>
    element("th", { textContent: name, style: column < textColumns ? "text-align: left" : "" });
  return element("div", { className: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, head.map(title))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map(cell))))));
}

// ---- charts

// A bar of colours: colour(value) between the first and the last of the ticks [value, name].
function colourLegend(title, ticks, colour) {
  const [first, last] = [ticks[0][0], ticks[ticks.length - 1][0]];
  const gradient = element("i");
  const names = ticks.map(([value, name], index) => element("span", {
    textContent: name,
    className: index === 0 ? "first" : index === ticks.length - 1 ? "last" : "",
    style: `left: ${(100 * (value - first)) / (last - first)}%`,
  }));
  const draw = () => {
    const stops = range(33).map((i) => colour(first + ((last - first) * i) / 32));
    gradient.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  };
  redraws.push(draw);
  return element("div", { className: "legend" },
    element("span", { textContent: title, className: "muted" }),
    element("div", { className: "bar" }, gradient, ...names));
}

// A map of cells. chart: {rows, columns, exists(r, c), rowTitle, columnTitle, rowName(r),
// columnName(c), colour(r, c), tip(r, c), square}; a cell that does not exist stays empty. Returns
// its node; node.redraw() after a change.
function heatMap(chart) {
  const canvas = element("canvas");
  const box = element("div", {}, canvas);
  let place = null;

  function layOut() {
    const context = canvas.getContext("2d");
    context.font = "12px system-ui, sans-serif";
    const names = range(chart.rows).map(chart.rowName);
    const widest = Math.max(...names.map((name) => context.measureText(name).width));
    const left = Math.min(widest, 150) + 30;
    const width = Math.max(120, box.clientWidth);
    const cellWidth = Math.min(44, (width - left - 4) / chart.columns);
    const cellHeight = chart.square
      ? Math.min(cellWidth, 26)
      : Math.max(4, Math.min(26, 560 / chart.rows));
    return { left, top: 4, width, cellWidth: chart.square ? cellHeight : cellWidth, cellHeight };
  }

  function draw() {
    place = layOut();
    const { left, top, width, cellWidth, cellHeight } = place;
    const height = top + cellHeight * chart.rows + 40;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const gap = Math.min(cellWidth, cellHeight) > 8 ? 1 : 0;
    for (let r = 0; r < chart.rows; r++) {
      for (let c = 0; c < chart.columns; c++) {
        if (!chart.exists(r, c)) continue;
        context.fillStyle = chart.colour(r, c);
        const [x, y] = [left + c * cellWidth, top + r * cellHeight];
        context.fillRect(x, y, cellWidth - gap, cellHeight - gap);
      }
    }
    labels(context, height);
  }

  function labels(context, height) {
    const { left, top, cellWidth, cellHeight } = place;
    context.fillStyle = getComputedStyle(document.body).getPropertyValue("--muted");
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = Math.ceil(14 / cellHeight);
    for (let r = 0; r < chart.rows; r += everyRow) {
      context.fillText(chart.rowName(r), left - 6, top + (r + 0.5) * cellHeight, left - 26);
    }
    context.textAlign = "center";
    const widest = context.measureText(chart.columnName(chart.columns - 1)).width + 8;
    const everyColumn = 2 ** Math.max(0, Math.ceil(Math.log2(widest / cellWidth)));
    for (let c = 0; c < chart.columns; c += everyColumn) {
      context.fillText(chart.columnName(c), left + (c + 0.5) * cellWidth, height - 28);
    }
    context.fillText(chart.columnTitle, left + (cellWidth * chart.columns) / 2, height - 10);
    context.save();
    context.translate(9, top + (cellHeight * chart.rows) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(chart.rowTitle, 0, 0);
    context.restore();
  }

  addTips(canvas, (event) => {
    const c = Math.floor((event.offsetX - place.left) / place.cellWidth);
    const r = Math.floor((event.offsetY - place.top) / place.cellHeight);
    const inside = c >= 0 && c < chart.columns && r >= 0 && r < chart.rows;
    return inside && chart.exists(r, c) ? chart.tip(r, c) : null;
  });
  redraws.push(draw);
  box.redraw = draw;
  return box;
}

// Lines over numbers x, from 0 to 1. chart: {x, xTitle, yTitle, series: [{name, values, colour(),
// dashed}], base: [value, name] of a horizontal line, or null}.
function lineChart(chart) {
  const svg = drawing("svg");
  const keys = element("div", { className: "legend" });
  const box = element("div", {}, keys, svg);
  const [left, right, top, height] = [58, 16, 10, 290];
  const bottom = height - 46;
  const [first, last] = [Math.min(...chart.x), Math.max(...chart.x)];
  const yAt = (y) => bottom - y * (bottom - top);
  const label = (x, y, name, anchor = "middle", more = {}) =>
    drawing("text", { x, y, "text-anchor": anchor, ...more }, name);

  function axes(width, xAt) {
    const level = (y, style) =>
      drawing("line", { x1: left, x2: width - right, y1: yAt(y), y2: yAt(y), style });
    for (const y of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
      const name = label(left - 8, yAt(y) + 4, y.toFixed(1), "end");
      svg.append(level(y, "stroke: var(--line)"), name);
    }
    // From the right, which is what the others are compared with, as far as they have room.
    let free = Infinity;
    for (const x of [...chart.x].sort((a, b) => b - a)) {
      if (xAt(x) > free) continue;
      svg.append(label(xAt(x), bottom + 18, whole(x)));
      free = xAt(x) - 60;
    }
    svg.append(label((left + width) / 2, height - 6, chart.xTitle));
    const middle = (top + bottom) / 2;
    const turned = { transform: `rotate(-90 14 ${middle})` };
    svg.append(label(14, middle, chart.yTitle, "middle", turned));
    if (chart.base === null) return;
    const [base, name] = chart.base;
    svg.append(level(base, "stroke: var(--muted); stroke-dasharray: 2 4"));
    svg.append(label(width - right, yAt(base) - 5, name, "end"));
  }

  function stroke(colour, dashed, width) {
    return `stroke: ${colour()}; stroke-width: ${width}; stroke-dasharray: ${dashed ? "6 4" : ""}`;
  }

  function draw() {
    const width = Math.max(260, Math.min(box.clientWidth, 900));
    svg.replaceChildren();
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    const xAt = (x) => last === first
      ? (left + width - right) / 2
      : left + 12 + ((x - first) / (last - first)) * (width - left - right - 24);
    axes(width, xAt);
    for (const { name, values, colour, dashed } of chart.series) {
      const points = values.map((y, i) => `${xAt(chart.x[i])},${yAt(y)}`).join(" ");
      const style = `fill: none; ${stroke(colour, dashed, 2)}`;
      svg.append(drawing("polyline", { points, style }));
      values.forEach((y, i) => {
        const at = { cx: xAt(chart.x[i]), cy: yAt(y), r: 4 };
        const dot = drawing("circle", { ...at, style: `fill: ${colour()}` });
        addTips(dot, () => `${name}\n${chart.xTitle} ${whole(chart.x[i])}: ${y.toFixed(4)}`);
        svg.append(dot);
      });
    }
    keys.replaceChildren(...chart.series.map(({ name, colour, dashed }) => {
      const line = { x1: 0, y1: 5, x2: 24, y2: 5, style: stroke(colour, dashed, 3) };
      const sign = drawing("svg", { width: 24, height: 10 }, drawing("line", line));
      return element("span", { className: "key" }, sign, name);
    }));
  }

  redraws.push(draw);
  return box;
}

// From the lowest to the highest of a number of lines.
function lineColour(index, count) {
  const hue = 255 - (235 * index) / Math.max(1, count - 1);
  return () => (darkScheme.matches ? `hsl(${hue} 70% 66%)` : `hsl(${hue} 65% 42%)`);
}
