// What the scripts of all pages share. All that a text holds reaches a page as text nodes, never as markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "op") made.dataset.op = value;
    else if (name === "style") Object.assign(made.style, value);
    else if (name.includes("-") || name === "colspan" || name === "scope" || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;

function sign(character) {
  const code = character.codePointAt(0);
  if (code === 9) return "⇥";
  if (code === 10) return "⏎";
  if (code < 32) return String.fromCodePoint(0x2400 + code);
  if (code === 127) return "␡";
  return code === 0x200d ? character : "◦";
}

const CONTROLS = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u;

function shownText(token) {
  if (token.control !== null) return [element("span", { className: "sign" }, `⟨${token.control}⟩`)];
  if (token.text === "") return [element("span", { className: "sign" }, "◌")]; // a later token completes its character
  if (token.text === " ") return [element("span", { className: "sign" }, "␣")];
  const nodes = [];
  let plain = "";
  for (const character of token.text) {
    if (!CONTROLS.test(character) || character === "\u200d") {
      plain += character;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(element("span", { className: "sign" }, sign(character)));
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function quantile(numbers, share) {
  const sorted = numbers.filter((number) => number !== null).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

function connectTheme() {
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme === "light dark" ? matchMedia("(prefers-color-scheme: dark)").matches
      : root.style.colorScheme === "dark";
    root.style.colorScheme = dark ? "light" : "dark";
  });
}
