"use strict";
// Curves of runs on canvases: one horizontal range for all, zoomed by dragging; the nearest values under the pointer.

const COLOURS = ["#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#9c755f", "#d37295"];
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [12, 4], [1, 2]];
const FEW = 300; // a curve of at most so many points shows each of them
const MARGIN = { left: 58, right: 10, top: 8, bottom: 22 };
const state = { axis: "step", smooth: 0, log: false, range: null, pointer: null };
let data, charts;

function numbers(text, Kind) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Kind(bytes.buffer);
}

// The failures of a run, as a curve without values: places on the axis.
function marksOf(run) {
  if (!run.marked) run.marked = { steps: run.marks.map(([step]) => step), xs: {} };
  return places(run, run.marked);
}

function decode(run) {
  const axes = run.axes.map((text) => numbers(text, Float64Array));
  const wide = new Set(["tokens", "training hours"]);
  run.decoded = {};
  for (const [name, { x, y }] of Object.entries(run.curves))
    run.decoded[name] = { steps: axes[x], values: numbers(y, wide.has(name) ? Float64Array : Float32Array), xs: {} };
}

// The place of a curve's points on the chosen axis. Between reports, tokens and hours grow evenly.
function places(run, curve) {
  if (state.axis === "step") return curve.steps;
  if (curve.xs[state.axis]) return curve.xs[state.axis];
  const scale = run.decoded[state.axis === "tokens" ? "tokens" : "training hours"];
  const found = new Float64Array(curve.steps.length);
  if (!scale || !scale.steps.length) return curve.steps;
  let at = 0;
  for (let i = 0; i < found.length; i++) {
    const step = curve.steps[i];
    while (at < scale.steps.length - 1 && scale.steps[at] < step) at++;
    const [x1, y1] = [scale.steps[at], scale.values[at]];
    const [x0, y0] = at ? [scale.steps[at - 1], scale.values[at - 1]] : [0, 0];
    found[i] = x1 === x0 ? y1 : y0 + ((step - x0) / (x1 - x0)) * (y1 - y0);
  }
  return (curve.xs[state.axis] = found);
}

// Exponential moving average over the curve's points, without the bias of its begin; values that are not finite break it.
function smoothed(curve) {
  if (!state.smooth || curve.values.length <= FEW / 10) return curve.values;
  if (curve.smooth === state.smooth) return curve.averaged;
  const found = new Float64Array(curve.values.length);
  let mean = 0, weight = 0;
  for (let i = 0; i < found.length; i++) {
    if (Number.isFinite(curve.values[i])) {
      mean = state.smooth * mean + (1 - state.smooth) * curve.values[i];
      weight = state.smooth * weight + (1 - state.smooth);
      found[i] = mean / weight;
    } else found[i] = NaN;
  }
  [curve.smooth, curve.averaged] = [state.smooth, found];
  return found;
}

function firstAt(xs, x) { // index of the first place that is not below x
  let low = 0, high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low;
}

function short(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size >= 1e4) for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return Number((value / unit).toPrecision(4)) + letter;
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) found.push(i * step);
  return found;
}

function logTicks(low, high) { // low and high are logarithms to base 10
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const factor of high - low > 3 ? [1] : [1, 2, 5]) {
      const at = power + Math.log10(factor);
      if (at >= low && at <= high) found.push(at);
    }
  return found.length > 1 ? found : ticks(low, high, 4);
}

function linesOf(panel) {
  const found = [];
  data.runs.forEach((run, r) => panel.names.forEach((name, n) => {
    const curve = run.decoded[name];
    if (!curve) return;
    // One run: a colour for each curve. Several: a colour for each run, a dash for each curve.
    const one = data.runs.length === 1;
    const label = panel.names.length === 1 ? run.name : one ? name : run.name + " " + name;
    found.push({ run, curve, label, colour: COLOURS[(one ? n : r) % COLOURS.length],
      dash: one ? [] : DASHES[n % DASHES.length], factor: panel.factor });
  }));
  return found;
}

function makeChart(panel) {
  const box = document.createElement("div"), title = document.createElement("h3");
  box.className = "panel";
  const wide = document.createElement("button");
  wide.textContent = "\u2922";
  wide.title = "wide or narrow";
  wide.onclick = () => { box.classList.toggle("wide"); draw(); };
  title.textContent = panel.title + " ";
  const unit = document.createElement("span");
  unit.textContent = panel.unit;
  title.append(unit, wide);
  const canvas = document.createElement("canvas"), legend = document.createElement("div");
  legend.className = "legend";
  box.append(title, canvas, legend);
  const chart = { panel, canvas, legend, lines: linesOf(panel) };
  for (const line of chart.lines) {
    const entry = document.createElement("span"), mark = document.createElement("i");
    mark.style.background = line.colour;
    line.shown = document.createElement("b");
    entry.append(mark, line.label + " ", line.shown);
    legend.append(entry);
  }
  const xAt = (event) => {
    const area = canvas.getBoundingClientRect(), [low, high] = shownRange();
    const share = (event.clientX - area.left - MARGIN.left) / (area.width - MARGIN.left - MARGIN.right);
    return low + Math.min(1, Math.max(0, share)) * (high - low);
  };
  let from = null;
  canvas.onpointerdown = (event) => { from = xAt(event); canvas.setPointerCapture(event.pointerId); };
  canvas.onpointermove = (event) => {
    state.pointer = { x: xAt(event), from };
    canvas.title = marksNear(state.pointer.x);
    draw();
  };
  canvas.onpointerup = (event) => {
    const to = xAt(event), [low, high] = shownRange();
    if (from !== null && Math.abs(to - from) > (high - low) / 100) state.range = [Math.min(from, to), Math.max(from, to)];
    from = null;
    state.pointer = null;
    draw();
  };
  canvas.onpointerleave = () => { if (from === null) { state.pointer = null; draw(); } };
  canvas.ondblclick = () => { state.range = null; draw(); };
  return [box, chart];
}

// What failed at a place, to be read when the pointer rests there.
function marksNear(x) {
  const [low, high] = shownRange(), found = [];
  for (const run of data.runs) marksOf(run).forEach((at, i) => {
    if (Math.abs(at - x) < (high - low) / 100) found.push(run.name + ": " + run.marks[i][1]);
  });
  return found.slice(0, 8).join("\n");
}

function fullRange() {
  let high = 0;
  for (const run of data.runs) for (const curve of Object.values(run.decoded)) {
    const xs = places(run, curve);
    if (xs.length) high = Math.max(high, xs[xs.length - 1]);
  }
  return [0, high || 1];
}

// Not that of the last drawing: events may come before the next one.
function shownRange() { return state.range || fullRange(); }

function drawChart(chart, range, style) {
  const { canvas, lines } = chart, ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  const log = state.log && /loss|norm/i.test(chart.panel.title);
  const of = (value, line) => (log ? Math.log10(value * line.factor) : value * line.factor);
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    line.xs = places(line.run, line.curve);
    line.ys = smoothed(line.curve);
    [line.begin, line.end] = [firstAt(line.xs, range[0]), firstAt(line.xs, range[1] + 1e-9 * (range[1] - range[0]))];
    while (line.end < line.xs.length && line.xs[line.end] <= range[1]) line.end++;
    for (let i = line.begin; i < line.end; i++) {
      const y = of(line.ys[i], line);
      if (Number.isFinite(y)) { if (y < low) low = y; if (y > high) high = y; }
    }
  }
  if (low > high) [low, high] = [0, 1];
  if (high - low < 1e-9 * Math.max(1e-300, Math.abs(high))) {
    const pad = Math.abs(high) * 0.05 || 1;
    [low, high] = [low - pad, high + pad];
  }
  [low, high] = [low - (high - low) * 0.04, high + (high - low) * 0.04];
  const right = width - MARGIN.right, foot = height - MARGIN.bottom;
  const px = (x) => MARGIN.left + ((x - range[0]) / (range[1] - range[0])) * (right - MARGIN.left);
  const py = (y) => foot - ((y - low) / (high - low)) * (foot - MARGIN.top);
  pen.strokeStyle = style.line;
  pen.fillStyle = style.dim;
  pen.lineWidth = 1;
  pen.textAlign = "right";
  for (const tick of log ? logTicks(low, high) : ticks(low, high, 5)) {
    pen.beginPath();
    pen.moveTo(MARGIN.left, py(tick));
    pen.lineTo(right, py(tick));
    pen.stroke();
    pen.fillText(short(log ? 10 ** tick : tick), MARGIN.left - 6, py(tick) + 4);
  }
  pen.textAlign = "center";
  for (const tick of ticks(range[0], range[1], Math.max(2, width / 110)))
    pen.fillText(short(tick), Math.min(px(tick), right - 12), height - 6);
  pen.save();
  pen.beginPath();
  pen.rect(MARGIN.left, 0, right - MARGIN.left, height);
  pen.clip();
  for (const line of lines) {
    if (line.ys !== line.curve.values) stroke(pen, line, line.curve.values, of, px, py, 0.25);
    stroke(pen, line, line.ys, of, px, py, 1);
  }
  for (const [r, run] of data.runs.entries()) {
    pen.fillStyle = data.runs.length === 1 ? style.dim : COLOURS[r % COLOURS.length];
    for (const at of marksOf(run)) {
      const x = px(at);
      pen.beginPath();
      pen.moveTo(x - 4, foot);
      pen.lineTo(x + 4, foot);
      pen.lineTo(x, foot - 7);
      pen.fill();
    }
  }
  if (state.pointer) mark(pen, chart, of, px, py, foot, style);
  else for (const line of lines) {
    const last = line.ys[line.ys.length - 1];
    line.shown.textContent = line.ys.length ? short(last * line.factor) : "";
  }
  pen.restore();
}

function stroke(pen, line, values, of, px, py, alpha) {
  pen.globalAlpha = alpha;
  pen.strokeStyle = pen.fillStyle = line.colour;
  pen.lineWidth = 1.4;
  pen.setLineDash(line.dash);
  pen.beginPath();
  const begin = Math.max(0, line.begin - 1), end = Math.min(values.length, line.end + 1);
  let column = null, low = 0, high = 0, open = false;
  const flush = () => { if (column !== null && low !== high) { pen.moveTo(column, low); pen.lineTo(column, high); } };
  const many = end - begin > 4000; // then a line from the lowest to the highest value of each pixel's column
  for (let i = begin; i < end; i++) {
    const y = of(values[i], line);
    if (!Number.isFinite(y)) { open = false; continue; }
    const [x, h] = [many ? Math.round(px(line.xs[i])) : px(line.xs[i]), py(y)];
    if (many && x === column) { low = Math.min(low, h); high = Math.max(high, h); continue; }
    if (many) flush();
    if (open) { if (many) pen.moveTo(column, (low + high) / 2); pen.lineTo(x, h); } else pen.moveTo(x, h);
    [column, low, high, open] = [x, h, h, true];
  }
  if (many) flush();
  pen.stroke();
  pen.setLineDash([]);
  if (end - begin <= FEW / 5) for (let i = begin; i < end; i++) {
    const y = of(values[i], line);
    if (!Number.isFinite(y)) continue;
    pen.beginPath();
    pen.arc(px(line.xs[i]), py(y), 2.6, 0, 7);
    pen.fill();
  }
  pen.globalAlpha = 1;
}

function mark(pen, chart, of, px, py, foot, style) {
  const { x, from } = state.pointer;
  if (from !== null) {
    pen.globalAlpha = 0.15;
    pen.fillStyle = style.text;
    pen.fillRect(Math.min(px(from), px(x)), MARGIN.top, Math.abs(px(x) - px(from)), foot - MARGIN.top);
    pen.globalAlpha = 1;
  }
  pen.strokeStyle = style.dim;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(px(x), MARGIN.top);
  pen.lineTo(px(x), foot);
  pen.stroke();
  for (const line of chart.lines) {
    let i = firstAt(line.xs, x);
    if (i > 0 && (i === line.xs.length || x - line.xs[i - 1] < line.xs[i] - x)) i--;
    if (!(i < line.xs.length)) continue;
    line.shown.textContent = short(line.ys[i] * line.factor) + " at " + short(line.xs[i]);
    const y = of(line.ys[i], line);
    if (!Number.isFinite(y)) continue;
    pen.fillStyle = line.colour;
    pen.beginPath();
    pen.arc(px(line.xs[i]), py(y), 3.2, 0, 7);
    pen.fill();
  }
}

let waiting = false;
function draw() { // at most once a frame
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const computed = getComputedStyle(document.documentElement), style = {};
    for (const name of ["text", "dim", "line"]) style[name] = computed.getPropertyValue("--" + name);
    const range = shownRange();
    for (const chart of charts) drawChart(chart, range, style);
    document.body.dataset.drawn = charts.length;
  });
}

function show(found) {
  data = found;
  data.runs.forEach(decode);
  const made = data.panels.map(makeChart);
  charts = made.map(([, chart]) => chart);
  document.querySelector(".panels").replaceChildren(...made.map(([box]) => box));
  if (made.length) made[0][0].classList.add("wide");
  draw();
}

for (const name of ["axis", "smooth", "log"]) {
  const input = document.getElementById(name);
  input.oninput = () => {
    if (name === "axis") state.range = null;
    state[name] = input.type === "checkbox" ? input.checked : name === "smooth" ? Number(input.value) : input.value;
    draw();
  };
}
document.getElementById("reset").onclick = () => { state.range = null; draw(); };
window.onresize = draw;
matchMedia("(prefers-color-scheme: dark)").onchange = draw;
show(JSON.parse(document.getElementById("data").textContent));

// A page that is served gets new data as the runs go on; what was zoomed stays.
if (document.body.dataset.live) setInterval(async () => {
  const answer = await fetch("page").catch(() => null);
  if (!answer || !answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of ["summary", "rest"]) document.getElementById(part).replaceWith(page.getElementById(part));
  const wide = charts.map((chart) => chart.canvas.parentNode.classList.contains("wide"));
  show(JSON.parse(page.getElementById("data").textContent));
  charts.forEach((chart, i) => i in wide && chart.canvas.parentNode.classList.toggle("wide", wide[i]));
}, 1000 * Number(document.body.dataset.live));
