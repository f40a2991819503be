// The page of a run: one record, shown as it is.

const record = JSON.parse($("record").textContent);

const when = (seconds) => new Date(1000 * seconds).toLocaleString("sv").replace("T", " "); // 2026-01-31 14:05:09

function fillHead() {
  $("run").textContent = record.run;
  const { word, detail } = record.state;
  const about = [detail ? `${word}: ${detail}` : word, `written ${when(record.written)}`, record.folder];
  if (record.damaged) about.push(`${record.damaged} damaged lines of metrics.jsonl are left out`);
  $("about").replaceChildren(...about.map((text) => element("li", {}, text)));
  const cards = record.facts.map(([value, label, note]) =>
    element("div", { className: "stat" }, element("b", {}, value), element("span", {}, label), element("span", {}, note)));
  $("stats").replaceChildren(...cards);
}

function fillTable(id, rows) {
  $(id).replaceChildren(element("tbody", {}, ...rows.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)))));
}

function fillEvents() {
  const newestFirst = [...record.events].reverse();
  $("events").replaceChildren(...newestFirst.map(({ time, text, alarming }) => element("li", {},
    element("time", {}, time === null ? "" : when(time)),
    element("span", { className: alarming ? "alarming" : "" }, text))));
  const more = record.more_events ? `and ${record.more_events} earlier ones` : "";
  $("events-note").textContent = record.events.length ? more : "none is recorded";
}

function fillStarts() {
  $("starts-card").hidden = !record.starts.length;
  $("starts").replaceChildren(...record.starts.map((start, index) => {
    const head = [start.time === null ? "" : when(start.time), `step ${grouped(start.step)}`, start.from, start.device, start.layout, start.commit];
    const line = element("p", { className: index ? "" : "first" }, head.filter((text) => text).join(" · "));
    const rows = start.changed.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))));
    const titles = element("thead", {}, element("tr", {}, ...["key", "before", "now"].map((cell) => element("th", { scope: "col" }, cell))));
    const table = rows.length ? [element("table", {}, titles, element("tbody", {}, ...rows))] : [];
    return element("div", { className: "start" }, line, ...table);
  }));
}

function fillSamples() {
  $("samples").hidden = !record.samples.length;
  $("samples-list").replaceChildren(...record.samples.map(({ step, prompt, text }) => {
    const at = element("small", { className: "faint" }, `step ${grouped(step)}  `);
    return element("div", { className: "sample" }, at, element("mark", {}, prompt), text);
  }));
}

// ---- routes

function fillRoutes() {
  const { routes } = record;
  $("routes-note").textContent = routes.note ?? `after step ${grouped(routes.step)}; point at a token for its H`;
  if (routes.note !== null) return;
  const used = routes.operators.map((operator) => element("span", { op: operator }, routes.names[operator]));
  $("legend").replaceChildren(...used);
  $("layer-row").hidden = false;
  $("layer").max = routes.layers.length;
  $("layer").value = routes.layers.findIndex((layer) => layer.routed) + 1;
  $("layer").addEventListener("input", () => showLayer($("layer").valueAsNumber - 1));
  showLayer($("layer").valueAsNumber - 1);
}

function showLayer(index) {
  const { routes } = record;
  const layer = routes.layers[index];
  const shares = routes.operators.filter((operator) => layer.shares[operator] > 0).map((operator) => `${routes.names[operator]} ${percent(layer.shares[operator])}`);
  $("layer-title").textContent = `Layer ${index + 1} of ${routes.layers.length}: ${shares.join(", ")}`;
  $("layer").setAttribute("aria-label", "layer");
  $("layer").setAttribute("aria-valuetext", $("layer-title").textContent);
  $("tokens").replaceChildren(...routes.tokens.flatMap((token) => {
    const operator = routes.operators[token.operator[index]];
    const about = `${routes.names[operator]}, H ${token.entropy[index] === null ? "unknown" : token.entropy[index].toFixed(4)}`;
    return [element("span", { op: operator, title: about }, ...shownText(token)), "\n".repeat(token.text.split("\n").length - 1)];
  }));
}

fillHead();
fillTable("environment", record.environment);
fillEvents();
fillStarts();
fillSamples();
fillRoutes();
$("config").textContent = record.config;
$("footer").textContent = `Written by megachiar at each evaluation; \`megachiar page ${record.folder}\` writes it again. \`megachiar monitor\` shows a run live.`;
connectTheme();
fillCharts(record.axes, record.charts, record.layers);
