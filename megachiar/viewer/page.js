// The page of routes: one record, shown for one layer at a time. panels.js draws what stands around the text, live.js talks
// to the demo's server.

const state = { record: null, layer: 0, mode: "operator", at: -1, pinned: false, spans: [] };

const name = (operator) => state.record.words.names[operator];
const operatorOf = (token, layer) => state.record.operators[token.operator[layer]];
const described = () => state.record.layers[state.layer];

// ---- the text

function addToken(token, index) {
  const span = element("span", { id: `t${index}`, role: "option" }, ...shownText(token));
  if (index >= state.record.prompt_tokens) span.classList.add("new");
  $("tokens").append(span, "\n".repeat(token.text.split("\n").length - 1));
  state.spans.push(span);
  colour(span, token, scaleOf());
}

function valueOf(token) {
  return state.mode === "entropy" ? token.entropy[state.layer] : token.loss;
}

function scaleOf() {
  if (state.mode !== "entropy" && state.mode !== "loss") return null;
  const values = state.record.tokens.map(valueOf);
  return state.mode === "loss" ? [0, quantile(values, 0.98) || 1] : [quantile(values, 0.02), quantile(values, 0.98)];
}

function colour(span, token, scale) {
  span.removeAttribute("style");
  delete span.dataset.op;
  if (state.mode === "operator") {
    span.dataset.op = operatorOf(token, state.layer);
  } else if (state.mode === "layers") {
    const width = 100 / token.operator.length;
    const stops = token.operator.map((_, layer) => {
      const tint = `var(--${operatorOf(token, layer)})`;
      return `${tint} ${layer * width}%, ${tint} ${(layer + 1) * width}%`;
    });
    span.style.backgroundImage = `linear-gradient(90deg, ${stops.join(", ")})`;
  } else if (valueOf(token) !== null) {
    const [low, high] = scale;
    const share = high > low ? Math.min(1, Math.max(0, (valueOf(token) - low) / (high - low))) : 0.5;
    const tint = state.mode === "entropy" ? "attention" : "loss";
    span.style.backgroundColor = `color-mix(in oklab, var(--${tint}) ${Math.round(100 * share)}%, var(--card))`;
    if (share > 0.55) span.style.color = "var(--attention-ink)";
  }
}

function colourAll() {
  const scale = scaleOf();
  state.spans.forEach((span, index) => colour(span, state.record.tokens[index], scale));
  $("tokens").dataset.mode = state.mode;
  $("scale").hidden = scale === null;
  $("scale").dataset.mode = state.mode;
  if (scale !== null) {
    const digits = state.mode === "entropy" ? 4 : 1;
    const unit = state.mode === "entropy" ? `H in layer ${state.layer + 1}` : "nats a token, given those before it";
    $("scale").replaceChildren(scale[0].toFixed(digits), element("i"), `${scale[1].toFixed(digits)}  ${unit}`);
  }
}

function fillText() {
  $("tokens").replaceChildren();
  state.spans = [];
  state.record.tokens.forEach(addToken);
  $("notes").replaceChildren(...state.record.words.notes.map((note) => element("p", {}, note)));
}

// ---- layers and tokens that are looked at

function setLayer(layer) {
  state.layer = Math.min(state.record.layers.length - 1, Math.max(0, layer));
  $("layer").value = state.layer + 1;
  $("layer").setAttribute("aria-valuetext", `layer ${state.layer + 1}: ${described().how}`);
  $("previous").disabled = state.layer === 0;
  $("next").disabled = state.layer === state.record.layers.length - 1;
  $("layer-title").replaceChildren(
    `Layer ${state.layer + 1} of ${state.record.layers.length}  `,
    element("small", {}, described().how),
  );
  [...$("stack").children].forEach((column, index) => column.classList.toggle("on", index === state.layer));
  colourAll();
  fillPanels();
}

function lookAt(index, pinned = false) {
  state.spans[state.at]?.classList.remove("at", "pinned");
  state.at = index;
  state.pinned = pinned;
  const span = state.spans[index];
  if (span === undefined) {
    $("tokens").removeAttribute("aria-activedescendant");
  } else {
    span.classList.add(pinned ? "pinned" : "at");
    const token = state.record.tokens[index];
    const at = `layer ${state.layer + 1}: ${name(operatorOf(token, state.layer))}, H ${token.entropy[state.layer].toFixed(4)}`;
    span.setAttribute("aria-label", `${token.control ?? token.text}, ${token.class}, ${at}`);
    $("tokens").setAttribute("aria-activedescendant", span.id);
  }
  fillInspector();
}

function move(index) {
  const next = Math.min(state.spans.length - 1, Math.max(0, index));
  lookAt(next);
  state.spans[next]?.scrollIntoView({ block: "nearest" });
}

function lineAway(direction) {
  const from = state.spans[Math.max(0, state.at)].getBoundingClientRect();
  let best = state.at;
  let distance = Infinity;
  state.spans.forEach((span, index) => {
    const box = span.getBoundingClientRect();
    const rows = (box.top - from.top) * direction;
    if (rows < from.height / 2) return;
    const far = rows * 1000 + Math.abs(box.left - from.left);
    if (far < distance) [best, distance] = [index, far];
  });
  return best;
}

const KEYS = {
  ArrowRight: () => move(state.at + 1),
  ArrowLeft: () => move(state.at - 1),
  ArrowDown: () => move(lineAway(1)),
  ArrowUp: () => move(lineAway(-1)),
  Home: () => move(0),
  End: () => move(state.spans.length - 1),
  Enter: () => lookAt(state.at, !state.pinned),
  Escape: () => lookAt(-1),
  "[": () => setLayer(state.layer - 1),
  "]": () => setLayer(state.layer + 1),
};

function tokenUnder(event) {
  const span = event.target.closest("[role=option]");
  return span === null ? -1 : Number(span.id.slice(1));
}

// ---- the whole page

function show(record) {
  const before = state.record;
  state.record = record;
  state.at = -1;
  state.pinned = false;
  if (before === null) state.layer = Math.max(0, record.layers.findIndex((layer) => layer.routed));
  $("view").hidden = false;
  fillHeader(record);
  $("layer").max = record.layers.length;
  $("layer").parentElement.style.setProperty("--layers", record.layers.length);
  fillStack();
  fillText();
  setLayer(state.layer);
}

function download(content, type, ending) {
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type })), download: `routes.${ending}` });
  link.click();
  URL.revokeObjectURL(link.href);
}

function connect() {
  $("layer").addEventListener("input", () => setLayer($("layer").valueAsNumber - 1));
  $("previous").addEventListener("click", () => setLayer(state.layer - 1));
  $("next").addEventListener("click", () => setLayer(state.layer + 1));
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.addEventListener("change", () => {
      state.mode = radio.value;
      colourAll();
    });
  }
  const tokens = $("tokens");
  tokens.addEventListener("pointerover", (event) => {
    const index = tokenUnder(event);
    if (index >= 0 && !state.pinned) lookAt(index);
  });
  tokens.addEventListener("click", (event) => {
    const index = tokenUnder(event);
    if (index >= 0) lookAt(index, !(state.pinned && index === state.at));
  });
  tokens.addEventListener("focus", () => {
    if (state.at < 0 && state.spans.length && tokens.matches(":focus-visible")) lookAt(0);
  });
  tokens.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? undefined : KEYS[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  });
  connectTheme();
  $("save-json").addEventListener("click", () => download(JSON.stringify(state.record), "application/json", "json"));
}
