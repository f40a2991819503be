// The page that compares runs: tables, and each chart with a curve a run.

const record = JSON.parse($("record").textContent);

function fill(id, heads, rows) {
  const head = element("thead", {}, element("tr", {}, ...heads.map((cell) => element("th", { scope: "col" }, cell))));
  $(id).replaceChildren(head, element("tbody", {}, ...rows));
}

$("title").textContent = record.runs.join(" · ");
$("warnings").hidden = !record.warnings.length;
$("warnings-list").replaceChildren(...record.warnings.map((warning) => element("li", {}, warning)));
fill("numbers", ["", ...record.runs], record.rows.map(({ name, cells, best }) => element("tr", {},
  element("th", { scope: "row" }, name),
  ...cells.map((cell, index) => element("td", {}, index === best ? element("b", {}, cell) : cell)))));
$("config-card").hidden = !record.differences.length;
fill("differences", ["key", ...record.runs], record.differences.map(([key, ...cells]) => element("tr", {},
  element("th", { scope: "row" }, key), ...cells.map((cell) => element("td", {}, cell)))));
connectTheme();
fillCharts(record.axes, record.charts);
