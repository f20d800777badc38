// What the other scripts share. Every text of a run goes into the page as a text node.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

// Characters that would be invisible, or turn the text around them: shown by their code.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// The nodes of a text: odd characters by their codes, and what is searched for marked.
function textNodes(text, sought) {
  const nodes = [];
  const plain = (part) => {
    let last = 0;
    for (const match of part.matchAll(ODD)) {
      if (match.index > last) nodes.push(part.slice(last, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      nodes.push(make("span", { class: "odd-char" }, `‹U+${code}›`));
      last = match.index + 1;
    }
    if (last < part.length) nodes.push(part.slice(last));
  };
  if (!sought) {
    plain(text);
    return nodes;
  }
  const lower = text.toLowerCase();
  let from = 0;
  // Lower case may have another length in some scripts: then nothing is marked.
  for (let at = lower.length === text.length ? lower.indexOf(sought) : -1; at >= 0; at = lower.indexOf(sought, from)) {
    plain(text.slice(from, at));
    nodes.push(make("mark", { class: "found" }, text.slice(at, at + sought.length)));
    from = at + sought.length;
  }
  plain(text.slice(from));
  return nodes;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : String(Number(value.toPrecision(4)));
}

const colour = (index) => getComputedStyle(document.documentElement).getPropertyValue(`--s${(index % 8) + 1}`).trim();
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const whole = (value) => value.toLocaleString("en");
