// The curves: drawn by uPlot when they come into sight, read by mouse, keys and screen readers.

const DRAWN = new Map(); // figure element -> its chart
const DASHES = [[], [6, 4], [2, 3]];

// One chart's lines: {label, run, dash, points, x: [], y: []}; those of evaluations as points too.
function linesOf(chart) {
  const lines = [];
  DATA.runs.forEach((run, index) => {
    chart.curves.forEach((curve, place) => {
      const held = curve.metric.startsWith("eval/");
      const source = held ? run.evals : run.steps;
      let values = source.values[curve.metric];
      if (!values) return;
      if (curve.of) {
        const of = source.values[curve.of] || [];
        values = values.map((value, at) => (value === null || !of[at] ? null : value / of[at]));
      }
      const several = DATA.runs.length > 1;
      lines.push({
        label: several ? `${run.name}: ${curve.label}` : curve.label,
        colour: several && chart.curves.length === 1 ? index : several ? index + 2 * place : place,
        dash: several ? DASHES[index % DASHES.length] : [],
        points: held || source.steps.length < 2,
        x: source.steps,
        y: values,
      });
    });
  });
  return lines;
}

// [x, y of each line], on the union of their steps.
function joined(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, at) => [step, at]));
  const rows = lines.map((line) => {
    const row = new Array(steps.length).fill(null);
    line.x.forEach((step, at) => { row[place.get(step)] = line.y[at]; });
    return row;
  });
  return [steps, ...rows];
}

// The mean of the values around each, over a twentieth of them.
function smoothed(values) {
  const reach = Math.max(1, Math.floor(values.length / 40));
  return values.map((value, at) => {
    if (value === null) return null;
    let sum = 0, count = 0;
    for (let near = Math.max(0, at - reach); near <= Math.min(values.length - 1, at + reach); near++) {
      if (values[near] !== null) { sum += values[near]; count++; }
    }
    return sum / count;
  });
}

function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential().replace("e+", "e");
  return size >= 1e4 ? `${Number((value / 1000).toPrecision(4))}k` : String(Number(value.toPrecision(6)));
}

function options(chart, lines, width, height, bars) {
  const axis = {
    stroke: () => themed("--quiet"),
    grid: { stroke: () => themed("--soft"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    values: (_, ticks) => ticks.map(tick),
  };
  const range = (_, low, high) => {
    if (low === null) return [0, 1];
    if (chart.share) { low = Math.min(low, 0); if (high <= 0) high = 0.1; }
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; return [low - room, high + room]; }
    return uPlot.rangeNum(low, high, 0.08, true);
  };
  return {
    width,
    height,
    legend: { show: false },
    cursor: { sync: bars ? undefined : { key: "steps", setSeries: false }, points: { size: 7 }, y: false },
    scales: { x: { time: false }, y: { range } },
    axes: [
      { ...axis, label: bars ? "tokens" : "step", labelSize: 16, labelGap: 0, labelFont: "12px system-ui, sans-serif", size: 24, gap: 4, space: 55, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 2e4, 5e4, 1e5, 1e6] },
      { ...axis, size: 52, gap: 4, space: 34 },
    ],
    series: [
      { label: bars ? "tokens" : "step" },
      ...lines.map((line) => ({
        label: line.label,
        stroke: () => colour(line.colour),
        fill: bars ? () => `${colour(line.colour)}40` : undefined,
        width: 1.75,
        dash: line.dash,
        spanGaps: true,
        paths: bars ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: line.points && !bars, size: 5, fill: () => colour(line.colour) },
      })),
    ],
  };
}

// What a chart says when nothing is chosen: each line's last value.
function lastOf(row) {
  for (let at = row.length - 1; at >= 0; at--) if (row[at] !== null && row[at] !== undefined) return row[at];
  return null;
}

function draw(figure, chart) {
  const bars = chart.id === "lengths";
  const lines = bars ? lengthLines() : linesOf(chart);
  const raw = bars ? [DATA.lengths.edges, ...lines.map((line) => line.y)] : joined(lines);
  const place = figure.querySelector(".plot");
  const legend = figure.querySelector(".legend");
  const unit = bars ? "tokens" : "step";
  const shown = () => (!bars && document.getElementById("smooth")?.checked
    ? [raw[0], ...raw.slice(1).map((row, at) => (lines[at].points ? row : smoothed(row)))] : raw);
  const plot = new uPlot(options(chart, lines, place.clientWidth, place.clientHeight, bars), shown(), place);

  const at = make("li", { class: "at" }, bars ? "tokens per completion" : "last value");
  const values = lines.map(() => make("span"));
  legend.replaceChildren(at, ...lines.map((line, index) => {
    const swatch = make("i", { class: line.dash.length ? "dashed" : "" });
    swatch.dataset.colour = line.colour;
    swatch.style.borderTopColor = colour(line.colour);
    const button = make("button", {
      type: "button", "aria-pressed": "true", title: "show or hide",
      onclick: () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", on);
        plot.setSeries(index + 1, { show: on });
      },
    }, swatch, `${line.label} `, values[index]);
    return make("li", {}, button);
  }));

  const x = raw[0];
  const describe = (index) => lines.map((line, row) => `${line.label} ${number(raw[row + 1][index])}`).join(", ");
  place.setAttribute("role", "slider");
  place.setAttribute("tabindex", "0");
  place.setAttribute("aria-label", `${chart.title}${chart.unit ? `, ${chart.unit}` : ""}: by ${unit}`);
  place.setAttribute("aria-valuemin", x[0]);
  place.setAttribute("aria-valuemax", x[x.length - 1]);
  const tell = (index) => {
    const chosen = index === null || index === undefined;
    const here = chosen ? x.length - 1 : index;
    at.textContent = chosen ? (bars ? "tokens per completion" : "last value")
      : bars ? `${x[here]}–${(x[here + 1] ?? x[here]) - 1} tokens` : `step ${whole(x[here])}`;
    lines.forEach((_, row) => { values[row].textContent = number(chosen ? (bars ? null : lastOf(raw[row + 1])) : raw[row + 1][here]); });
    place.setAttribute("aria-valuenow", x[here]);
    place.setAttribute("aria-valuetext", `${unit} ${x[here]}: ${describe(here)}`);
  };
  plot.hooks.setCursor = [() => tell(plot.cursor.idx)];
  tell(null);

  const move = (index) => plot.setCursor({ left: plot.valToPos(x[index], "x"), top: 1 });
  place.addEventListener("keydown", (event) => {
    const now = plot.cursor.idx ?? (event.key === "ArrowRight" ? -1 : x.length);
    const stride = event.shiftKey ? Math.max(1, Math.floor(x.length / 20)) : 1;
    const to = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: x.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      move(Math.min(x.length - 1, Math.max(0, to)));
    } else if (event.key === "Escape") {
      plot.setScale("x", { min: x[0], max: x[x.length - 1] });
      plot.setCursor({ left: -10, top: -10 });
    }
  });
  place.addEventListener("blur", () => plot.setCursor({ left: -10, top: -10 }));
  new ResizeObserver(() => {
    if (place.clientWidth) plot.setSize({ width: place.clientWidth, height: place.clientHeight });
  }).observe(place);
  const numbers = figure.querySelector(".numbers");
  const unfold = () => {
    if (numbers.open && !numbers.querySelector("table")) numbers.append(table(unit, lines, raw, chart.title));
  };
  numbers.addEventListener("toggle", unfold);
  unfold(); // it may have been opened before this was drawn
  return { plot, refresh: () => plot.setData(shown(), false) };
}

// The table behind a chart.
function table(unit, lines, raw, title) {
  const head = make("tr", {}, make("th", { scope: "col" }, unit), lines.map((line) => make("th", { scope: "col", class: "n" }, line.label)));
  const body = make("tbody");
  raw[0].forEach((step, at) => {
    if (raw.slice(1).every((row) => row[at] === null || row[at] === undefined)) return;
    body.append(make("tr", {}, make("th", { scope: "row" }, whole(step)),
      raw.slice(1).map((row) => make("td", { class: "n" }, number(row[at])))));
  });
  return make("div", { class: "rows", tabindex: "0", role: "region", "aria-label": `Numbers of ${title}` },
    make("table", {}, make("thead", {}, head), body));
}

function lengthLines() {
  return Object.entries(DATA.lengths.counts).map(([label, counts], index) => ({
    label, colour: index, dash: DASHES[0], points: false, y: [...counts, counts[counts.length - 1]],
  }));
}

function drawCharts() {
  const charts = new Map(DATA.charts.map((chart) => [chart.id, chart]));
  charts.set("lengths", { id: "lengths", title: "Lengths of samples", unit: "share of completions", share: true, curves: [] });
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || DRAWN.has(entry.target)) continue;
      watch.unobserve(entry.target);
      DRAWN.set(entry.target, draw(entry.target, charts.get(entry.target.dataset.chart)));
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll("figure.chart").forEach((figure) => watch.observe(figure));
  document.getElementById("smooth")?.addEventListener("change", () => DRAWN.forEach((chart) => chart.refresh()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    document.querySelectorAll(".legend i").forEach((swatch) => { swatch.style.borderTopColor = colour(Number(swatch.dataset.colour)); });
    DRAWN.forEach((chart) => chart.plot.redraw(false));
  });
}
