// What stands around the text: header, statistics, layers, classes, histogram, and the token that is looked at.

function fillHeader(record) {
  $("run").textContent = record.run;
  const size = record.parameters >= 1e6 ? `${(record.parameters / 1e6).toFixed(1)} M` : record.parameters.toLocaleString("en");
  const validation = Object.entries(record.validation).map(([set, loss]) => `${set}: perplexity ${Math.exp(loss).toFixed(2)}`);
  const about = [
    `step ${record.step.toLocaleString("en")}`,
    record.router === null ? "attention in every layer" : `${record.router} router`,
    `${record.num_layers} layers of ${record.hidden_size} channels`,
    `${size} parameters`,
    ...validation,
  ];
  $("about").replaceChildren(...about.map((text) => element("li", {}, text)));
  $("legend").replaceChildren(...record.operators.map((operator) => element("span", { op: operator }, name(operator))));
}

function stat(value, label, more = "") {
  return element("div", { className: "stat" }, element("b", {}, value), element("span", {}, label), element("span", {}, more));
}

function others(shares) {
  const rest = state.record.operators.filter((operator) => operator !== "attention");
  return rest.map((operator) => `${name(operator)} ${percent(shares[operator])}`).join(" · ");
}

function fillStats() {
  const { record } = state;
  const layer = described();
  const routed = record.layers.filter((each) => each.routed);
  const mean = routed.reduce((sum, each) => sum + each.shares.attention, 0) / (routed.length || 1);
  const generated = record.tokens.length - record.prompt_tokens;
  const saved = record.flops_saved;
  const cost = (share) => `${Math.abs(100 * share).toFixed(1)} %`;
  const cards = [
    stat(record.tokens.length.toLocaleString("en"), "tokens", generated ? `${generated.toLocaleString("en")} of them generated` : ""),
    stat(percent(layer.shares.attention), `attention in layer ${state.layer + 1}`, others(layer.shares)),
  ];
  if (routed.length) cards.push(stat(percent(mean), `attention in the ${routed.length} routed layers`));
  const noise = `white noise: ${record.noise.mean.toFixed(4)} ± ${record.noise.deviation.toFixed(4)}`;
  cards.push(stat(layer.entropy_mean.toFixed(4), `mean H in layer ${state.layer + 1}`, noise));
  if (record.meta_gate_mean !== null) {
    cards.push(stat(record.meta_gate_mean.toFixed(3), "mean gate g of layer 1", "g · layer 1 + (1 − g) · its input"));
  }
  if (routed.length) {
    const word = saved.operators < 0 ? "more" : "fewer";
    cards.push(stat(cost(saved.operators), `${word} operator FLOPs than attention everywhere`, `whole model: ${cost(saved.model)}`));
  }
  if (record.mean_loss !== null) {
    cards.push(stat(record.mean_loss.toFixed(3), "nats a token", `perplexity ${Math.exp(record.mean_loss).toFixed(1)}`));
  }
  $("stats").replaceChildren(...cards);
}

function bars(shares) {
  const parts = state.record.operators.filter((operator) => shares[operator] > 0);
  return parts.map((operator) => element("i", { op: operator, title: `${name(operator)} ${percent(shares[operator])}` }));
}

function fillStack() {
  const columns = state.record.layers.map((layer, index) => {
    const parts = bars(layer.shares);
    for (const part of parts) part.style.flexGrow = layer.shares[part.dataset.op];
    const column = element("div", {}, element("small", {}, `${layer.layer}`), element("div", { className: "bar" }, ...parts));
    column.addEventListener("click", () => setLayer(index));
    return column;
  });
  $("stack").replaceChildren(...columns);
}

function fillClasses() {
  const { record, layer } = state;
  $("classes-layer").textContent = `layer ${layer + 1}`;
  const head = ["class", "tokens", "", "attention", "mean H"].map((title) => element("th", { scope: "col" }, title));
  const rows = record.classes.map((each) => {
    const shares = each.shares[layer];
    const parts = bars(shares);
    for (const part of parts) part.style.flex = `${shares[part.dataset.op]} 0 0`;
    const row = element(
      "tr",
      {},
      element("th", { scope: "row" }, each.class),
      element("td", {}, each.tokens.toLocaleString("en")),
      element("td", { className: "bars" }, element("div", { className: "whole" }, ...parts)),
      element("td", {}, percent(shares.attention)),
      element("td", {}, each.entropy_mean[layer].toFixed(4)),
    );
    if (each.class === "led by white space") row.className = "overlap"; // of all tokens, whatever their class
    return row;
  });
  $("classes").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

// ---- histogram of H

const BINS = 44;
const BOX = { left: 34, right: 548, top: 24, bottom: 206 };

function fillHistogram() {
  const { record, layer } = state;
  const values = record.tokens.map((token) => token.entropy[layer]);
  const { mean, deviation } = record.noise;
  const bounds = described().bounds;
  let low = Math.min(mean - 3 * deviation, ...bounds, quantile(values, 0));
  let high = Math.max(mean + 3 * deviation, ...bounds.filter((bound) => bound < 1), quantile(values, 1));
  low = Math.max(low, 0);
  const width = (high - low) / BINS || 1e-6;
  const counts = Array.from({ length: BINS }, () => record.operators.map(() => 0));
  record.tokens.forEach((token, index) => {
    const bin = Math.min(BINS - 1, Math.max(0, Math.floor((values[index] - low) / width)));
    counts[bin][token.operator[layer]] += 1;
  });
  const density = (h) => Math.exp(-((h - mean) ** 2) / (2 * deviation ** 2)) / (deviation * Math.sqrt(2 * Math.PI));
  const noise = Array.from({ length: 121 }, (_, i) => low + ((high - low) * i) / 120);
  const expected = (h) => density(h) * values.length * width;
  const top = Math.max(...counts.map((bin) => bin.reduce((a, b) => a + b, 0)), expected(mean));
  const x = (h) => BOX.left + ((BOX.right - BOX.left) * (h - low)) / (high - low || 1);
  const y = (count) => BOX.bottom - ((BOX.bottom - BOX.top) * count) / top;

  const shapes = [];
  counts.forEach((bin, index) => {
    let below = 0;
    bin.forEach((count, operator) => {
      if (!count) return;
      const box = { x: x(low + index * width) + 0.5, width: x(low + width) - x(low) - 1, y: y(below + count) };
      const tall = { height: y(below) - y(below + count), class: record.operators[operator] };
      shapes.push(drawn("rect", { ...box, ...tall }));
      below += count;
    });
  });
  shapes.push(drawn("line", { class: "axis", x1: BOX.left, x2: BOX.right, y1: BOX.bottom, y2: BOX.bottom }));
  for (let i = 0; i <= 4; i += 1) {
    const h = low + ((high - low) * i) / 4;
    const anchor = i === 0 ? "start" : i === 4 ? "end" : "middle";
    shapes.push(drawn("text", { x: x(h), y: BOX.bottom + 18, "text-anchor": anchor }, h.toFixed(3)));
  }
  shapes.push(drawn("path", { class: "noise", d: `M${noise.map((h) => `${x(h).toFixed(1)} ${y(expected(h)).toFixed(1)}`).join("L")}` }));
  bounds.forEach((bound, index) => {
    if (bound < low || bound > high) return;
    shapes.push(drawn("line", { class: "bound", x1: x(bound), x2: x(bound), y1: BOX.top - 6, y2: BOX.bottom }));
    const label = ["τ", "τ high"][index] && bounds.length > 1 ? ["τ low", "τ high"][index] : "τ";
    const side = bounds.length > 1 && index === 0 ? { "text-anchor": "end", x: x(bound) - 5 } : { x: x(bound) + 5 };
    shapes.push(drawn("text", { class: "strong", y: BOX.top, ...side }, `${label} ${bound.toFixed(4)}`));
  });
  shapes.push(drawn("text", { x: 4, y: y(top) + 4 }, `${Math.round(top)}`));
  const says = `Histogram of H in layer ${layer + 1}: mean ${described().entropy_mean.toFixed(4)}, white noise ${mean.toFixed(4)}.`;
  $("histogram").setAttribute("aria-label", says);
  $("histogram").replaceChildren(...shapes);
  $("histogram-layer").textContent = `layer ${layer + 1}`;
  $("histogram-note").textContent =
    `Dashed: what white noise of ${record.hidden_size} channels would show. Where both look alike, a threshold routes like a hash of the row.`;
}

// ---- the token that is looked at

function axis(token, layer, low, high) {
  const x = (h) => 3 + (86 * (h - low)) / (high - low || 1);
  const within = state.record.layers[layer].bounds.filter((bound) => bound >= low && bound <= high);
  return drawn(
    "svg",
    { viewBox: "0 0 92 14", "aria-hidden": "true" },
    drawn("line", { class: "axis", x1: 0, x2: 92, y1: 7, y2: 7 }),
    ...within.map((bound) => drawn("line", { class: "bound", x1: x(bound), x2: x(bound), y1: 1, y2: 13 })),
    drawn("circle", { class: "dot", cx: x(token.entropy[layer]), cy: 7, r: 3.5 }),
  );
}

function layerRow(token, layer, low, high) {
  const operator = operatorOf(token, layer);
  const chip = element("td", {}, element("span", { className: "op", op: operator }, name(operator)));
  const gates = token.gates?.[layer];
  if (gates) {
    const parts = gates.map((gate, index) => element("i", { op: state.record.operators[index], style: { flex: `${gate} 0 0` } }));
    const says = gates.map((gate, index) => `${state.record.operators[index]} ${gate.toFixed(3)}`).join(", ");
    chip.append(element("div", { className: "gates", title: `gates: ${says}` }, ...parts));
    chip.append(element("small", { className: "faint" }, gates.map((gate) => gate.toFixed(2)).join(" · ")));
  }
  const row = element(
    "tr",
    {},
    element("td", {}, `${layer + 1}`),
    chip,
    element("td", { className: "h" }, token.entropy[layer].toFixed(4)),
    element("td", {}, axis(token, layer, low, high)),
  );
  row.classList.toggle("on", layer === state.layer);
  row.addEventListener("click", () => setLayer(layer));
  return row;
}

function fillInspector() {
  const { record, at } = state;
  const token = record.tokens[at];
  if (token === undefined) {
    const hint = "Point at a token, or move through the text with the arrow keys. A click or Enter holds a token, Escape lets it go.";
    $("inspector").replaceChildren(element("h2", {}, "Token"), element("p", { className: "notes" }, hint, " [ and ] change the layer."));
    return;
  }
  const facts = [
    ["token", `${(at + 1).toLocaleString("en")} of ${record.tokens.length.toLocaleString("en")}${at >= record.prompt_tokens ? ", generated" : ""}`],
    ["id", `${token.id}`],
    ["class", token.class],
  ];
  if (token.loss !== null) facts.push(["loss", `${token.loss.toFixed(3)} nats (p = ${Math.exp(-token.loss).toPrecision(2)})`]);
  if (token.meta_gate !== null) facts.push(["gate g of layer 1", token.meta_gate.toFixed(3)]);
  const all = record.tokens.length > 2000 ? token.entropy : record.tokens.flatMap((each) => each.entropy);
  const inside = record.layers.flatMap((layer) => layer.bounds).filter((bound) => bound > 0 && bound < 1);
  const low = Math.min(...inside, quantile(all, 0.01), ...token.entropy);
  const high = Math.max(...inside, quantile(all, 0.99), ...token.entropy);
  const titles = ["layer", "operator", "H", ""].map((title) => element("th", { scope: "col" }, title));
  $("inspector").replaceChildren(
    element("p", { className: "word" }, ...shownText(token)),
    element("dl", {}, ...facts.flatMap(([what, value]) => [element("dt", {}, what), element("dd", {}, value)])),
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...titles)),
      element("tbody", {}, ...record.layers.map((_, layer) => layerRow(token, layer, low, high))),
    ),
  );
}

function fillPanels() {
  fillStats();
  fillClasses();
  fillHistogram();
  fillInspector();
}
