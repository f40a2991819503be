// Charts of curves and of layers, drawn as SVG and canvas. A pointer or the arrow keys move a cursor, and the line above a
// chart has the values at it.

const COLOURS = 8;
const MARGIN = { left: 58, right: 14, top: 8, bottom: 24 };
const settings = { axis: "step", log: false };
const drawers = [];

const FORMS = {
  decimal,
  percent: (value) => `${(100 * value).toFixed(1)} %`,
  scientific: (value) => value.toExponential(3),
  whole: (value) => grouped(value),
};

function decimal(value) {
  const size = Math.abs(value);
  if (size >= 1e9 || (size && size < 0.00005)) return value.toExponential(3);
  return size >= 1000 ? grouped(value) : value.toFixed(4);
}

const grouped = (value) => Math.round(value).toLocaleString("en");

function brief(value) {
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return `${Number((value / limit).toPrecision(3))}${letter}`;
  }
  return size && size < 0.001 ? value.toExponential(0) : `${Number(value.toPrecision(3))}`;
}

function lasting(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, "0")}s`;
  return `${Math.floor(whole / 3600)}h${String(Math.floor(whole / 60) % 60).padStart(2, "0")}m`;
}

function along(axis, value) {
  if (axis === "elapsed_seconds") return lasting(value);
  return axis === "flops" ? brief(value) : grouped(value);
}

function ticks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw) ?? raw;
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step);
  return found;
}

function nearest(values, wanted) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - values[low - 1] <= values[low] - wanted ? low - 1 : low;
}

function title(spec) {
  return element("h2", {}, `${spec.title} `, element("small", {}, spec.unit ?? ""));
}

function focusable(box, label, keys) {
  box.tabIndex = 0;
  box.setAttribute("role", "slider");
  box.setAttribute("aria-label", label);
  box.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? undefined : keys[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  });
}

// ---- curves

function curveChart(spec) {
  const readout = element("ul", { className: "readout" });
  const plot = element("div", { className: "plot" });
  const card = element("section", { className: "card chart", id: `chart-${spec.id}` }, title(spec), readout, plot);
  const state = { at: null, shown: [], xs: [], place: null };
  const format = FORMS[spec.form];

  const move = (to) => {
    state.at = Math.min(state.xs.length - 1, Math.max(0, to));
    say();
    drawCursor();
  };
  const by = (count) => () => move((state.at ?? state.xs.length - 1) + count);
  focusable(plot, `${spec.title}: arrow keys move along the curve`, {
    ArrowRight: by(1), ArrowLeft: by(-1), PageUp: by(10), PageDown: by(-10),
    Home: () => move(0), End: () => move(state.xs.length - 1),
    Escape: () => { state.at = null; say(); drawCursor(); },
  });

  function say() {
    const x = state.xs[state.at ?? state.xs.length - 1];
    const words = [];
    const items = state.shown.map((series) => {
      const place = state.at === null ? series.y.length - 1 : nearest(series.xs, x);
      const value = state.at === null && series.is_lost ? "not finite" : format(series.y[place]);
      words.push(`${series.name} ${value}`);
      const swatch = element("span", { className: `swatch ${series.colour}${series.dots ? " round" : ""}` });
      const item = element("li", {}, swatch, element("span", {}, series.name), element("b", {}, value));
      if (state.at !== null && series.xs[place] !== x) {
        item.append(element("span", { className: "at" }, `at ${along(settings.axis, series.xs[place])}`));
      }
      return item;
    });
    const where = `${settings.axis === "elapsed_seconds" ? "time" : settings.axis} ${along(settings.axis, x)}`;
    items.push(element("li", { className: "at" }, state.at === null ? "newest" : where));
    readout.replaceChildren(...items);
    plot.setAttribute("aria-valuetext", `${where}: ${words.join(", ")}`);
    plot.setAttribute("aria-valuemin", "0");
    plot.setAttribute("aria-valuemax", String(state.xs.length - 1));
    plot.setAttribute("aria-valuenow", String(state.at ?? state.xs.length - 1));
  }

  function drawCursor() {
    plot.querySelectorAll(".cursor, .on").forEach((old) => old.remove());
    if (state.at === null) return;
    const svg = plot.firstChild;
    const x = state.place.x(state.xs[state.at]);
    svg.append(drawn("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: state.place.bottom }));
    for (const series of state.shown) {
      const at = nearest(series.xs, state.xs[state.at]);
      svg.append(drawn("circle", { cx: state.place.x(series.xs[at]), cy: state.place.y(series.y[at]), r: 4, class: `on ${series.colour}` }));
    }
  }

  function draw() {
    const log = settings.log && spec.has_log;
    state.shown = spec.series
      .map((series, index) => ({ ...series, xs: series.x[settings.axis], colour: `s${(series.colour ?? index) % COLOURS}` }))
      .filter((series) => series.xs !== undefined && series.xs.length);
    card.hidden = !state.shown.length;
    if (card.hidden || !plot.clientWidth) return;
    state.xs = [...new Set(state.shown.flatMap((series) => series.xs))].sort((a, b) => a - b);
    if (state.at !== null) state.at = Math.min(state.at, state.xs.length - 1);
    const { clientWidth: width, clientHeight: height } = plot;
    const ys = state.shown.flatMap((series) => series.y).filter((value) => !log || value > 0);
    let low = ys.reduce((a, b) => Math.min(a, b), Infinity);
    let high = ys.reduce((a, b) => Math.max(a, b), -Infinity);
    if (spec.form === "whole") low = Math.min(low, 0);
    if (!(high > low)) [low, high] = [low - Math.abs(low || 1) * 0.05, high + Math.abs(high || 1) * 0.05];
    else if (!log) [low, high] = [low === 0 ? 0 : low - (high - low) * 0.04, high + (high - low) * 0.04];
    const scale = log ? Math.log : (value) => value;
    const [left, right] = [state.xs[0], state.xs[state.xs.length - 1]];
    const bottom = height - MARGIN.bottom;
    state.place = {
      bottom,
      x: (value) => MARGIN.left + (right > left ? (value - left) / (right - left) : 0.5) * (width - MARGIN.left - MARGIN.right),
      y: (value) => bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (bottom - MARGIN.top),
    };
    const svg = drawn("svg", { "aria-hidden": "true", width, height });
    const marks = log ? logTicks(low, high) : ticks(low, high, 5);
    for (const value of marks) {
      const y = state.place.y(value);
      const label = spec.form === "percent" ? `${Number((100 * value).toPrecision(3))} %` : brief(value);
      svg.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      svg.append(drawn("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, label));
    }
    const across = right > left ? ticks(left, right, Math.max(3, Math.floor(width / 110))) : [left];
    for (const value of across) {
      const label = settings.axis === "elapsed_seconds" ? lasting(value) : brief(value);
      svg.append(drawn("text", { x: state.place.x(value), y: height - 6, "text-anchor": "middle" }, label));
    }
    for (const series of state.shown) drawSeries(svg, series, log);
    plot.replaceChildren(svg);
    say();
    drawCursor();
  }

  function drawSeries(svg, series, log) {
    const at = series.xs.map((x, index) => [x, series.y[index]]).filter(([, y]) => !log || y > 0);
    const path = at.map(([x, y], index) => `${index ? "L" : "M"}${state.place.x(x).toFixed(1)} ${state.place.y(y).toFixed(1)}`).join("");
    svg.append(drawn("path", { d: path, class: `${series.colour}${series.dots ? " dotted" : ""}` }));
    if (!series.dots && at.length > 1) return;
    for (const [x, y] of at.length > 200 ? [] : at) {
      svg.append(drawn("circle", { cx: state.place.x(x), cy: state.place.y(y), r: 3, class: series.colour }));
    }
  }

  const point = (event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    const wanted = state.xs[0] + share * (state.xs[state.xs.length - 1] - state.xs[0]);
    move(nearest(state.xs, wanted));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "mouse" || document.activeElement === plot) return;
    state.at = null;
    say();
    drawCursor();
  });
  drawers.push(draw);
  return card;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found.length > 1 ? found : [low, Math.sqrt(low * high), high];
}

// ---- layers

function layerChart(spec) {
  const layers = spec.rows[0].length;
  const format = FORMS[spec.form];
  const readout = element("ul", { className: "readout" });
  const canvas = element("canvas", { width: spec.rows.length, height: layers });
  const mark = element("div", { className: "mark", hidden: true });
  const field = element("div", { className: "field" }, canvas, mark);
  const every = Math.ceil(layers / 16);
  const names = [...Array(layers).keys()].filter((layer) => layer % every === 0);
  const rows = element("div", { className: "rows" }, ...names.map((layer) => element("span", {}, `${layer + 1}`)));
  const ends = element("div", { className: "ends" }, element("span", {}, `step ${grouped(spec.steps[0])}`), element("span", {}, grouped(spec.steps[spec.steps.length - 1])));
  const heat = element("div", { className: "heat" }, rows, field, ends);
  field.style.height = `${Math.min(320, Math.max(96, layers * 20))}px`;
  const scale = element("span", { className: "at" }, `${format(spec.low)} `, element("span", { className: "ramp" }), ` ${format(spec.high)}`);
  const heading = element("div", { className: "row spread" }, title({ ...spec, unit: "layer 1 at the top" }), scale);
  const card = element("section", { className: "card chart", id: `chart-${spec.id}` }, heading, readout, heat);
  const state = { column: spec.rows.length - 1, layer: null };

  function say() {
    const step = element("li", { className: "at" }, `step ${grouped(spec.steps[state.column])}`);
    const row = spec.rows[state.column];
    const shown = state.layer === null ? row.map((_, layer) => layer).filter((layer) => layers <= 12 || layer % every === 0) : [state.layer];
    const words = shown.map((layer) => [`layer ${layer + 1}`, row[layer] === null ? "none" : format(row[layer])]);
    const items = words.map(([layer, value]) => element("li", {}, element("span", {}, layer), element("b", {}, value)));
    readout.replaceChildren(step, ...items);
    heat.setAttribute("aria-valuetext", `step ${spec.steps[state.column]}: ${words.map((pair) => pair.join(" ")).join(", ")}`);
    heat.setAttribute("aria-valuemin", "0");
    heat.setAttribute("aria-valuemax", String(spec.rows.length - 1));
    heat.setAttribute("aria-valuenow", String(state.column));
    mark.hidden = state.layer === null;
    Object.assign(mark.style, {
      left: `${(100 * state.column) / spec.rows.length}%`, width: `max(4px, ${100 / spec.rows.length}%)`,
      top: `${(100 * (state.layer ?? 0)) / layers}%`, height: `${100 / layers}%`,
    });
  }

  const look = (column, layer) => {
    state.column = Math.min(spec.rows.length - 1, Math.max(0, column));
    state.layer = layer === null ? null : Math.min(layers - 1, Math.max(0, layer));
    say();
  };
  const by = (columns, count) => () => look(state.column + columns, count ? (state.layer ?? -1) + count : state.layer);
  focusable(heat, `${spec.title}: arrow keys move along steps and layers`, {
    ArrowRight: by(1, 0), ArrowLeft: by(-1, 0), ArrowDown: by(0, 1), ArrowUp: by(0, -1),
    Home: () => look(0, state.layer), End: () => look(spec.rows.length - 1, state.layer),
    Escape: () => look(spec.rows.length - 1, null),
  });
  const point = (event) => {
    const box = field.getBoundingClientRect();
    look(Math.floor(((event.clientX - box.left) / box.width) * spec.rows.length), Math.floor(((event.clientY - box.top) / box.height) * layers));
  };
  field.addEventListener("pointermove", point);
  field.addEventListener("pointerdown", point);
  field.addEventListener("pointerleave", () => look(spec.rows.length - 1, null));

  drawers.push(() => {
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = getComputedStyle(canvas).color;
    spec.rows.forEach((row, column) => row.forEach((value, layer) => {
      if (value === null) return;
      pen.globalAlpha = spec.high > spec.low ? 0.04 + 0.96 * Math.min(1, Math.max(0, (value - spec.low) / (spec.high - spec.low))) : 0.5;
      pen.fillRect(column, layer, 1, 1);
    }));
  });
  say();
  return card;
}

// ---- all charts of a page

function drawAll() {
  for (const draw of drawers) draw();
}

function chooseAxis(axes, charts) {
  const known = Object.entries(axes).filter(([axis]) => charts.some((chart) => chart.series.some((series) => series.x[axis] !== undefined)));
  $("axes").replaceChildren(...known.map(([axis, word]) => {
    const radio = element("input", { type: "radio", name: "axis", value: axis, checked: axis === settings.axis });
    radio.addEventListener("change", () => {
      settings.axis = axis;
      drawAll();
    });
    return element("label", {}, radio, element("span", {}, word));
  }));
  $("log").addEventListener("change", () => {
    settings.log = $("log").checked;
    drawAll();
  });
}

function fillCharts(axes, charts, layers = []) {
  $("charts").replaceChildren(...charts.map(curveChart), ...layers.map(layerChart));
  $("controls").hidden = !charts.length;
  chooseAxis(axes, charts);
  drawAll();
  new ResizeObserver(drawAll).observe($("charts"));
  $("theme").addEventListener("click", () => requestAnimationFrame(drawAll)); // a canvas has no colours of its own
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}
