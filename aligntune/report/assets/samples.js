// The browser of samples: a list of groups in pages, and the chosen group beside it.

const PAGE = 50;

const browser = { run: 0, set: "train", all: [], shown: [], page: 0, chosen: null };

// "reward" is the weighted sum; a criterion that is called so is "reward/reward".
const pathOf = (criterion) => (criterion === "reward" ? "reward/reward" : criterion);
const scoreOf = (said, name) =>
  (name === "reward" ? said.reward : (said.scores || {})[name === "reward/reward" ? "reward" : name]);
const numeric = (value) => typeof value === "number";

function meanOf(group, name) {
  const scores = (group.completions || []).map((said) => scoreOf(said, name)).filter(numeric);
  return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
}

function spreadOf(group, name) {
  const scores = (group.completions || []).map((said) => scoreOf(said, name)).filter(numeric);
  return scores.length ? Math.max(...scores) - Math.min(...scores) : -1;
}

const longestOf = (group) => Math.max(0, ...(group.completions || []).map((said) => said.tokens || 0));

// All that can be searched in a group, in lower case; made once.
const searched = new WeakMap();
function haystack(group) {
  if (!searched.has(group)) {
    const parts = [group.prompt, JSON.stringify(group.columns ?? {})];
    for (const said of group.completions || []) parts.push(said.text ?? "", said.messages ? JSON.stringify(said.messages) : "");
    searched.set(group, parts.join("\u0000").toLowerCase());
  }
  return searched.get(group);
}

function filtered(groups, wanted) {
  const from = wanted.from === "" ? -Infinity : Number(wanted.from);
  const to = wanted.to === "" ? Infinity : Number(wanted.to);
  const text = wanted.text.toLowerCase();
  const kept = groups.filter((group) => group.step >= from && group.step <= to
    && (!wanted.finish || (group.completions || []).some((said) => said.finish_reason === wanted.finish))
    && (!text || haystack(group).includes(text)));
  if (wanted.order === "newest") return kept.sort((a, b) => b.step - a.step);
  if (wanted.order === "oldest") return kept.sort((a, b) => a.step - b.step);
  const keys = new Map(kept.map((group) => [group, wanted.order === "spread" ? spreadOf(group, wanted.score)
    : wanted.order === "longest" ? longestOf(group) : meanOf(group, wanted.score)]));
  const low = wanted.order === "worst" ? Infinity : -Infinity;
  const sign = wanted.order === "worst" ? 1 : -1;
  return kept.sort((a, b) => sign * ((keys.get(a) ?? low) - (keys.get(b) ?? low)) || b.step - a.step);
}

function wanted() {
  const form = document.querySelector(".filters");
  const found = { run: "0" };
  for (const field of form.elements) if (field.name) found[field.name] = field.value;
  return found;
}

function load() {
  const { run, set } = wanted();
  browser.all = set === "eval" ? DATA.runs[run].evalSamples : DATA.runs[run].samples;
  const criteria = new Set(), reasons = new Set();
  for (const group of browser.all) {
    for (const said of group.completions || []) {
      Object.keys(said.scores || {}).forEach((name) => criteria.add(name));
      if (said.finish_reason) reasons.add(said.finish_reason);
    }
  }
  refill("score", ["reward", ...[...criteria].map(pathOf).sort()], (name) => [name, name]);
  refill("finish", ["", ...[...reasons].sort()], (name) => [name, name || "anything"]);
}

function refill(name, values, option) {
  const field = document.querySelector(`.filters [name="${name}"]`);
  const before = field.value;
  field.replaceChildren(...values.map((value) => {
    const [is, label] = option(value);
    return make("option", { value: is }, label);
  }));
  if (values.includes(before)) field.value = before;
}

function search() {
  const now = wanted();
  browser.score = now.score || "reward";
  browser.text = now.text.toLowerCase();
  browser.set = now.set;
  browser.shown = filtered(browser.all, now);
  browser.page = 0;
  const completions = browser.shown.reduce((sum, group) => sum + (group.completions || []).length, 0);
  document.getElementById("found").textContent = browser.shown.length
    ? `${whole(browser.shown.length)} of ${whole(browser.all.length)} groups, ${whole(completions)} completion${completions === 1 ? "" : "s"}`
    : browser.all.length ? "No group is like that: widen the filter." : "No groups were kept here.";
  list();
  choose(browser.shown[0] ?? null);
}

function list() {
  const begin = browser.page * PAGE, end = Math.min(begin + PAGE, browser.shown.length);
  document.getElementById("groups").replaceChildren(...browser.shown.slice(begin, end).map((group) => {
    const mean = meanOf(group, browser.score);
    const button = make("button", { type: "button", "aria-current": group === browser.chosen ? "true" : null, onclick: () => choose(group, true) },
      make("span", { class: "row" }, make("span", {}, `step ${whole(group.step)} · ${nameOf(group)}`),
        make("span", {}, number(mean === null ? null : Number(mean.toPrecision(3))))),
      make("span", { class: "text" }, ...textNodes(String(group.prompt).slice(-160))));
    button.group = group;
    return make("li", {}, button);
  }));
  document.getElementById("groups").scrollTop = 0;
  document.getElementById("range").textContent = browser.shown.length ? `${whole(begin + 1)}–${whole(end)} of ${whole(browser.shown.length)}` : "none";
  document.getElementById("earlier").disabled = begin === 0;
  document.getElementById("later").disabled = end >= browser.shown.length;
}

// Groups of evaluations have ids below 0.
const nameOf = (group) => (group.group < 0 ? `prompt ${-1 - group.group}` : `group ${group.group}`);

function choose(group, byHand) {
  browser.chosen = group;
  document.querySelectorAll("#groups button").forEach((button) => {
    if (button.group === group) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  const place = document.getElementById("group");
  place.replaceChildren(...(group ? shownGroup(group) : [make("p", { class: "quiet" }, "Nothing is chosen.")]));
  if (byHand && matchMedia("(max-width: 46rem)").matches) {
    place.scrollIntoView();
    place.focus({ preventScroll: true });
  }
}

function step(by) {
  const to = browser.shown.indexOf(browser.chosen) + by;
  if (to < 0 || to >= browser.shown.length) return;
  const page = Math.floor(to / PAGE);
  if (page !== browser.page) { browser.page = page; list(); }
  choose(browser.shown[to]);
}

function shownGroup(group) {
  const at = browser.shown.indexOf(group);
  const move = (label, by) => make("button", {
    type: "button", disabled: !browser.shown[at + by],
    onclick: () => {
      step(by);
      const again = [...document.querySelectorAll(".moves button")].find((button) => button.textContent === label);
      (again.disabled ? document.getElementById("group") : again).focus();
    },
  }, label);
  const row = group.row === undefined || group.row === null ? "" : `, row ${group.row} of the data`;
  const parts = [
    make("div", { class: "moves" }, make("h3", {}, `Step ${whole(group.step)}, ${nameOf(group)}${row}`),
      make("span", {}, move("Previous group", -1), " ", move("Next group", 1))),
    make("h4", {}, "Prompt"),
    make("div", { class: "said prompt", dir: "auto", tabindex: "0", role: "region", "aria-label": "Prompt" }, ...textNodes(String(group.prompt), browser.text)),
  ];
  const columns = Object.entries(group.columns || {});
  if (columns.length) {
    parts.push(make("h4", {}, "The data's other columns"), make("dl", { class: "columns" }, columns.flatMap(([name, value]) => [
      make("dt", {}, ...textNodes(name)),
      make("dd", { class: "said", dir: "auto" }, ...textNodes(typeof value === "string" ? value : JSON.stringify(value, null, 1), browser.text)),
    ])));
  }
  const scores = group.completions.map((said) => scoreOf(said, browser.score)).filter(numeric);
  const best = rare(scores, Math.max(...scores)), worst = rare(scores, Math.min(...scores));
  parts.push(make("h4", {}, `${group.completions.length} completion${group.completions.length === 1 ? "" : "s"}`),
    make("div", { class: "cards", tabindex: "0", role: "region", "aria-label": "Completions beside each other" },
      group.completions.map((said, index) => card(said, index, { best, worst }))));
  const others = browser.all.filter((other) => other !== group && other.prompt === group.prompt);
  if (others.length) parts.push(...comparison(group, others));
  return parts;
}

// A score that at most half of the completions have: only that is worth a mark.
const rare = (scores, score) => (scores.filter((other) => other === score).length * 2 <= scores.length ? score : null);

function card(said, index, { best, worst }) {
  const score = scoreOf(said, browser.score);
  const tag = numeric(score) && score === best ? "best" : numeric(score) && score === worst ? "worst" : "";
  const facts = [
    ["reward", said.reward], ...Object.entries(said.scores || {}).map(([name, score]) => [pathOf(name), score]), ["advantage", said.advantage],
    ["tokens", said.tokens], ["turns", said.turns], ["ended by", said.finish_reason], ["policy version", versions(said)],
  ].filter(([, value]) => value !== undefined && value !== "");
  const body = said.messages ? said.messages.map(turn)
    : said.text === null || said.text === undefined ? [make("p", { class: "quiet" }, "The text was lost with a node.")]
      : [make("div", { class: "said", dir: "auto" }, ...textNodes(said.text, browser.text))];
  return make("section", { class: `card ${tag}`, "aria-label": `Completion ${index + 1}` },
    make("header", {}, make("b", {}, `${index + 1}`), make("span", { class: "tag" }, tag)),
    make("div", { class: "body", tabindex: "0", role: "region", "aria-label": `Text of completion ${index + 1}` }, ...body),
    make("table", { class: "scores" }, make("tbody", {}, facts.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, ...textNodes(name)),
      make("td", { class: "n" }, ...(numeric(value) || value === null ? [number(value)] : textNodes(String(value)))))))));
}

// "3", or "3–5" where several versions wrote it.
function versions(said) {
  const found = (said.versions || []).map(([version]) => version);
  if (!found.length) return "";
  const low = Math.min(...found), high = Math.max(...found);
  return low === high ? String(low) : `${low}–${high}`;
}

function turn(message) {
  const calls = (message.tool_calls || []).map(({ function: made, ...rest }) => (made ? `${made.name} ${JSON.stringify(made.arguments)}` : JSON.stringify(rest)));
  const content = typeof message.content === "string" ? message.content : message.content === undefined || message.content === null ? "" : JSON.stringify(message.content, null, 1);
  const text = [content, ...calls].filter(Boolean).join("\n");
  const kind = ["assistant", "tool", "user", "system"].includes(message.role) ? message.role : "";
  return make("div", { class: `turn ${kind}` }, make("b", {}, ...textNodes([message.role, message.name].filter(Boolean).join(" "))),
    make("div", { class: "said", dir: "auto" }, ...textNodes(text, browser.text)));
}

const spoken = (said) => said.text ?? "";

// The same prompt at another step, word by word.
function comparison(group, others) {
  others.sort((a, b) => a.step - b.step);
  const mine = make("select", {}, group.completions.map((_, index) => make("option", { value: index }, `completion ${index + 1}`)));
  const other = make("select", {}, others.map((each, index) => make("option", { value: index }, `step ${whole(each.step)}, ${nameOf(each)}`)));
  const its = make("select");
  const out = make("div", { class: "said diff", dir: "auto", role: "region", "aria-label": "Differences", "aria-live": "polite" });
  const fill = () => its.replaceChildren(...others[other.value].completions.map((_, index) => make("option", { value: index }, `completion ${index + 1}`)));
  const compare = () => {
    const [a, b] = others[other.value].step <= group.step
      ? [others[other.value].completions[its.value], group.completions[mine.value]]
      : [group.completions[mine.value], others[other.value].completions[its.value]];
    out.replaceChildren(...differ(spoken(a), spoken(b)).map(([kind, text]) => (kind === "same"
      ? make("span", {}, ...textNodes(text)) : make(kind, {}, ...textNodes(text)))));
  };
  other.value = others.findIndex((each) => each.step !== group.step) < 0 ? 0 : others.findIndex((each) => each.step !== group.step);
  fill();
  mine.addEventListener("change", compare);
  its.addEventListener("change", compare);
  other.addEventListener("change", () => { fill(); compare(); });
  compare();
  return [make("h4", {}, "The same prompt at other steps: what the earlier one had, and what the later one has instead"),
    make("div", { class: "compare" }, make("label", {}, "This group's", mine), make("label", {}, "against", other), make("label", {}, "its", its)), out];
}

function startBrowser() {
  const form = document.querySelector(".filters");
  if (!form) return;
  let waiting = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { load(); search(); }));
  form.addEventListener("input", (event) => {
    if (["run", "set"].includes(event.target.name)) load();
    clearTimeout(waiting);
    waiting = setTimeout(search, event.target.name === "text" ? 150 : 0);
  });
  document.getElementById("earlier").addEventListener("click", () => { browser.page--; list(); });
  document.getElementById("later").addEventListener("click", () => { browser.page++; list(); });
  document.getElementById("groups").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const buttons = [...document.querySelectorAll("#groups button")];
    buttons[Math.min(buttons.length - 1, Math.max(0, buttons.indexOf(document.activeElement) + by))]?.focus();
  });
  if (!DATA.runs.some((run) => run.samples.length)) form.elements.set.value = "eval";
  load();
  search();
}
