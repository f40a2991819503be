// The demo: the text goes to the server of this page, and its routes come back. A continued text comes token by token.

const SETTINGS = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"];
let running = null; // what stops the request that is under way

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  $("error").hidden = false;
  $("error").textContent = error.remedy ? `${error.where}: ${error.problem}\nremedy: ${error.remedy}` : `${error.where}: ${error.problem}`;
}

function busy(abort) {
  running = abort;
  $("route").disabled = $("continue").disabled = abort !== null;
  $("stop").hidden = abort === null;
}

async function ask(path, body, take) {
  running?.abort();
  const abort = new AbortController();
  $("error").hidden = true;
  busy(abort);
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: abort.signal });
    await take(answer);
  } catch (error) {
    if (abort.signal.aborted) return;
    say("");
    const remedy = "see whether `megachiar demo` still runs";
    complain({ where: "the demo", problem: `does not answer (${error.message})`, remedy });
  } finally {
    if (running === abort) busy(null);
  }
}

function handle(event) {
  if (event.error) {
    say("");
    complain(event.error);
  } else if (event.record) {
    const { at, pinned } = state;
    show(event.record);
    if (pinned) lookAt(at, true);
  } else if (event.token) {
    state.record.tokens.push(event.token);
    addToken(event.token, state.record.tokens.length - 1);
    $("tokens").scrollTop = $("tokens").scrollHeight;
    say(`${(state.record.tokens.length - state.record.prompt_tokens).toLocaleString("en")} new tokens …`);
  }
}

function showRoutes() {
  say("Reading …");
  return ask("/api/routes", { text: $("input").value }, async (answer) => {
    const event = await answer.json();
    handle(event);
    if (event.record) say(`${event.record.tokens.length.toLocaleString("en")} tokens.`);
  });
}

function settings() {
  const values = SETTINGS.map((key) => [key, $(key).value === "" ? null : $(key).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => value !== null));
}

function continueText() {
  say("Reading …");
  return ask("/api/continue", { text: $("input").value, ...settings() }, async (answer) => {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let unread = "";
    let last = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (unread + value).split("\n");
      unread = lines.pop();
      for (const line of lines) {
        const event = JSON.parse(line);
        [last] = Object.keys(event);
        handle(event);
      }
    }
    if (last === "token") throw new Error("it ended too early");
    if (last === "record") {
      const count = state.record.tokens.length - state.record.prompt_tokens;
      say(`${count.toLocaleString("en")} new tokens${count ? ", with a line above them" : ": the model ended the text at once"}.`);
    }
  });
}

// The tokens that have come so far stay, and are described together.
function stop() {
  running?.abort();
  busy(null);
  const tokens = state.record.tokens.map((token) => token.id);
  return ask("/api/routes", { tokens, prompt_tokens: state.record.prompt_tokens }, async (answer) => {
    handle(await answer.json());
    say("Stopped.");
  });
}

async function savePage() {
  const template = await (await fetch("/template.html")).text();
  const json = JSON.stringify(state.record).replace(/[<>&\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  download(template.split(live.marker).join(json), "text/html", "html");
}

function startLive() {
  $("live").hidden = false;
  $("save-html").hidden = false;
  $("run").textContent = live.header.run;
  for (const [key, value] of Object.entries(live.defaults)) $(key).value = value ?? "";
  $("max_new_tokens").max = live.most_new_tokens;
  const buttons = live.examples.map(({ title, text }) => {
    const button = element("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      $("input").value = text;
      showRoutes();
    });
    return button;
  });
  $("examples").replaceChildren(...buttons);
  $("live").addEventListener("submit", (event) => {
    event.preventDefault();
    showRoutes();
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    showRoutes();
  });
  $("continue").addEventListener("click", continueText);
  $("stop").addEventListener("click", stop);
  $("save-html").addEventListener("click", savePage);
  $("input").value = live.examples[0].text;
  showRoutes();
}

// ---- the start

const found = JSON.parse($("record").textContent);
const live = found.live;
connect();
if (live) startLive();
else show(found);
