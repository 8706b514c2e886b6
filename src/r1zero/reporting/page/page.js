"use strict";
// Everything that comes from a run goes into the page as text (textContent), never as HTML: a completion is hostile.

const $ = (id) => document.getElementById(id);
const COLOURS = 8;
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const EVENT_LETTERS = { restart: "R", resume: "C", requeue: "Q", alert: "!" };
const VERDICT_SIGNS = { correct: "✓", wrong: "✗", unparsed: "?", timed_out: "…" };
const OF_A_PAGE = 25;
const OF_A_QUESTION = 200;
const ROWS_OF_A_TABLE = 100;

// ---- small things

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function unpacked(id) {
  const packed = atob($(id).textContent.trim());
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function said(value, unit = "") {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "share") return `${said(100 * value)} %`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return new Intl.NumberFormat("en", { maximumSignificantDigits: 4, maximumFractionDigits: 4 }).format(value);
}

// As many digits as tell one tick from the next.
function tick(value, step) {
  if (Math.abs(value) >= 1e7 || step < 1e-4) return value === 0 ? "0" : value.toExponential(2);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

function colour(name) {
  // light-dark() is resolved in a used colour only.
  const probe = make("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function transparent(rgb, alpha) {
  return rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);
}

function number(id) {
  const value = $(id).value;
  return value === "" ? null : Number(value);
}

function table(head, rows, firstIsHeading = true) {
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", { scope: "col" }, cell)))),
    make(
      "tbody",
      {},
      ...rows.map((row) =>
        make("tr", {}, ...row.map((cell, at) => (at === 0 && firstIsHeading ? make("th", { scope: "row" }, cell) : make("td", {}, cell)))),
      ),
    ),
  );
}

function scrolling(label, content) {
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, content);
}

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
}

// ---- curves

let facts;
const figures = [];
let ink = {};

function readColours() {
  ink = { text: colour("--ink"), rule: colour("--rule"), quiet: colour("--quiet"), series: [] };
  for (let at = 0; at < COLOURS; at++) ink.series.push(colour(`--c${at}`));
}

function smoothed(values) {
  const weight = Number($("smoothing").value);
  if (!weight) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = weight * sum + (1 - weight) * value; // an exponential mean, without the bias of its beginning
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function shownRuns() {
  return facts.runs.map((run, at) => ({ ...run, at })).filter((run) => $(`run-${run.at}`)?.checked ?? true);
}

function across(run) {
  return $("axis").value === "hours" ? run.hours : run.steps;
}

// One figure: a drawing, its legend, the values under the cursor, and the same as a table.
class Figure {
  constructor(parent, title, unit, meaning, build) {
    this.title = title;
    this.unit = unit;
    this.build = build;
    this.off = new Set();
    this.plot = make("div", { class: "plot", tabindex: "0", role: "group" });
    this.legend = make("ul", { class: "legend" });
    this.output = make("output", { class: "cursor" });
    this.values = make("details", {}, make("summary", {}, "Values"));
    this.values.addEventListener("toggle", () => this.values.open && this.fillTable());
    this.element = make(
      "figure",
      {},
      make("figcaption", {}, title, unit && unit !== "share" ? ` (${unit})` : "", meaning ? make("span", { class: "meaning" }, meaning) : null),
      this.plot,
      this.output,
      this.legend,
      this.values,
    );
    this.plot.addEventListener("keydown", (event) => this.onKey(event));
    parent.append(this.element);
    new ResizeObserver(() => this.resize()).observe(this.plot);
    figures.push(this);
    this.draw();
  }

  // build() gives {tables: [[x, y, ...], ...], series: [{label, colour, dash, hidden, bars}], bands, stacked, events, range}
  draw() {
    this.uplot?.destroy();
    this.uplot = null;
    const built = this.build();
    this.built = built;
    this.element.hidden = built.series.length === 0;
    if (this.element.hidden) return;
    let tables = built.tables;
    if (built.stacked) tables = [this.stack(tables[0], built)];
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    this.raw = built.tables.length > 1 ? data : built.tables[0];
    const percent = this.unit === "share";
    const axis = { stroke: ink.text, grid: { stroke: ink.rule, width: 1 }, ticks: { stroke: ink.rule, width: 1 }, font: "12px system-ui, sans-serif" };
    const lone = data[0].length === 1;
    const series = built.series.map((each, at) => ({
      label: each.label,
      show: !this.off.has(each.label),
      stroke: each.hidden ? "transparent" : ink.series[each.colour % COLOURS],
      width: each.hidden ? 0 : 1.75,
      dash: DASHES[each.dash % DASHES.length],
      spanGaps: true,
      points: { show: !each.hidden && (lone || each.points || false), size: 6, fill: ink.series[each.colour % COLOURS] },
      ...(built.stacked && at === 0 ? { fill: transparent(ink.series[each.colour % COLOURS], 0.35) } : {}),
    }));
    const bands = (built.bands || []).map((band) => ({
      series: [band.high + 1, band.low + 1],
      fill: transparent(ink.series[band.colour % COLOURS], built.stacked ? 0.35 : 0.16),
    }));
    this.uplot = new uPlot(
      {
        width: this.plot.clientWidth || 300,
        height: 220,
        legend: { show: false },
        cursor: {
          sync: { key: "x", filters: { pub: (type) => type.startsWith("mouse") && type !== "mousedown" && type !== "mouseup" } },
          drag: { x: true, y: false, setScale: false },
          points: { size: 7 },
        },
        scales: { x: { time: false }, y: { range: built.range || ((_, low, high) => yRange(low, high, percent)) } },
        series: [{}, ...series],
        bands,
        axes: [
          { ...axis, size: 30, label: $("axis").value === "hours" ? "hours" : "step", labelSize: 16, labelGap: -2, labelFont: axis.font, values: (_, splits, __, ___, step) => splits.map((value) => tick(value, step)) },
          { ...axis, size: 62, values: (_, splits, __, ___, step) => splits.map((value) => (percent ? `${tick(100 * value, 100 * step)} %` : tick(value, step))) },
        ],
        hooks: {
          draw: [(uplot) => this.drawOver(uplot)],
          setCursor: [(uplot) => this.say(uplot.cursor.idx)],
          setSelect: [
            (uplot) => {
              if (uplot.select.width < 3) return;
              $("from").value = said(uplot.posToVal(uplot.select.left, "x")).replaceAll(",", "");
              $("to").value = said(uplot.posToVal(uplot.select.left + uplot.select.width, "x")).replaceAll(",", "");
              uplot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
              zoom();
            },
          ],
        },
      },
      data,
      this.plot,
    );
    this.uplot.over.addEventListener("dblclick", wholeRun);
    this.zoom();
    this.drawLegend();
    this.plot.setAttribute("aria-label", this.summary());
    if (this.values.open) this.fillTable();
  }

  stack(rows, built) {
    const sums = new Array(rows[0].length).fill(0);
    const stacked = rows.slice(1).map((values, at) => {
      if (this.off.has(built.series[at].label)) return sums.slice();
      return values.map((value, index) => (sums[index] += value ?? 0));
    });
    return [rows[0], ...stacked];
  }

  visible() {
    return this.built.series.map((each, at) => ({ ...each, at })).filter((each) => !each.hidden && !this.off.has(each.label));
  }

  drawLegend() {
    const shown = this.built.series.filter((each) => !each.hidden);
    this.legend.replaceChildren(
      ...(shown.length < 2 && facts.runs.length < 2 ? [] : shown).map((each) => {
        const swatch = make("span", { class: "swatch" });
        swatch.style.background = ink.series[each.colour % COLOURS];
        return make(
          "li",
          {},
          make("button", { type: "button", "aria-pressed": String(!this.off.has(each.label)), onclick: () => this.toggle(each.label) }, swatch, each.label),
        );
      }),
    );
  }

  toggle(label) {
    const focused = [...this.legend.querySelectorAll("button")].indexOf(document.activeElement);
    if (!this.off.delete(label)) this.off.add(label);
    this.draw();
    this.legend.querySelectorAll("button")[focused]?.focus();
  }

  // Letters for what happened to the runs, and the whiskers of intervals.
  drawOver(uplot) {
    const { ctx, bbox } = uplot;
    const pixels = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineWidth = pixels;
    ctx.font = `bold ${12 * pixels}px system-ui, sans-serif`;
    for (const event of this.built.events || []) {
      const x = Math.round(uplot.valToPos(event.x, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = ink.quiet;
      ctx.setLineDash([3 * pixels, 3 * pixels]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(EVENT_LETTERS[event.kind] || "?", Math.min(x + 3 * pixels, bbox.left + bbox.width - 10 * pixels), bbox.top + 11 * pixels);
    }
    ctx.setLineDash([]);
    this.built.series.forEach((each, at) => {
      if (!each.bars || this.off.has(each.label)) return;
      ctx.strokeStyle = ink.series[each.colour % COLOURS];
      ctx.lineWidth = 2 * pixels;
      uplot.data[0].forEach((value, index) => {
        const [low, high] = [uplot.data[at + 2][index], uplot.data[at + 3][index]];
        if (low === null || low === undefined) return;
        const x = uplot.valToPos(value, "x", true);
        const [bottom, top] = [uplot.valToPos(low, "y", true), uplot.valToPos(high, "y", true)];
        ctx.beginPath();
        ctx.moveTo(x, bottom);
        ctx.lineTo(x, top);
        for (const y of [bottom, top]) {
          ctx.moveTo(x - 4 * pixels, y);
          ctx.lineTo(x + 4 * pixels, y);
        }
        ctx.stroke();
      });
    });
    ctx.restore();
  }

  say(index) {
    if (index === null || index === undefined) {
      this.output.textContent = "";
      return;
    }
    const where = `${$("axis").value === "hours" ? "hour" : "step"} ${said(this.raw[0][index])}`;
    const values = this.visible().map((each) => {
      const value = this.raw[each.at + 1][index];
      if (value === null || value === undefined) return null;
      const bars = each.bars ? ` [${said(this.raw[each.at + 2][index], this.unit)}, ${said(this.raw[each.at + 3][index], this.unit)}]` : "";
      return `${each.label} ${said(value, this.unit)}${bars}`;
    });
    this.output.textContent = `${where}: ${values.filter((each) => each !== null).join(", ") || "nothing"}`;
  }

  onKey(event) {
    if (!this.uplot) return;
    const last = this.raw[0].length - 1;
    const now = this.uplot.cursor.idx ?? -1;
    const index = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (index === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(last, index));
    this.output.setAttribute("aria-live", "polite");
    this.uplot.setCursor({ left: this.uplot.valToPos(this.raw[0][next], "x"), top: 20 });
  }

  summary() {
    const parts = this.visible().map((each) => {
      const values = this.raw[each.at + 1].filter((value) => value !== null && value !== undefined);
      if (!values.length) return `${each.label}: nothing`;
      return `${each.label}: first ${said(values[0], this.unit)}, last ${said(values.at(-1), this.unit)}`;
    });
    return `${this.title}. ${parts.join("; ")}. The arrow keys move along it.`;
  }

  fillTable() {
    const shown = this.visible();
    const length = this.raw[0].length;
    const every = Math.max(1, Math.ceil(length / ROWS_OF_A_TABLE));
    const indices = [...Array(length).keys()].filter((at) => at % every === 0 || at === length - 1);
    const head = [$("axis").value === "hours" ? "hours" : "step", ...shown.flatMap((each) => (each.bars ? [each.label, "low", "high"] : [each.label]))];
    const cells = (index) =>
      shown.flatMap((each) => (each.bars ? [1, 2, 3] : [1]).map((more) => said(this.raw[each.at + more][index], this.unit)));
    const rows = indices.map((index) => [said(this.raw[0][index]), ...cells(index)]);
    this.values.querySelector(".scroll")?.remove();
    this.values.append(scrolling(`${this.title}, values`, table(head, rows)));
  }

  resize() {
    const width = this.plot.clientWidth;
    if (this.uplot && width > 50 && width !== this.uplot.width) this.uplot.setSize({ width, height: 220 });
  }

  zoom() {
    if (!this.uplot) return;
    const xs = this.uplot.data[0];
    let [low, high] = [number("from") ?? xs[0], number("to") ?? xs[xs.length - 1]];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    if (low < high) this.uplot.setScale("x", { min: low, max: high });
  }
}

function yRange(low, high, percent) {
  if (low === null || low === undefined) return [0, 1];
  if (low !== high) return uPlot.rangeNum(low, high, 0.1, true);
  if (low === 0) return [0, 1];
  return percent ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
}

const zoom = () => figures.forEach((figure) => figure.zoom());
const redraw = () => figures.forEach((figure) => figure.draw());

function wholeRun() {
  $("from").value = $("to").value = "";
  zoom();
}

function eventsOf(runs) {
  return runs.flatMap((run) => run.events.map((event) => ({ ...event, x: $("axis").value === "hours" ? event.hours : event.step })));
}

function lines(chart) {
  const runs = shownRuns().filter((run) => chart.series.some((each) => run.metrics[each.metric]));
  const tables = [];
  const series = [];
  const bands = [];
  for (const run of runs) {
    const rows = [across(run)];
    chart.series.forEach((each, at) => {
      const values = run.metrics[each.metric];
      if (!values) return;
      rows.push(smoothed(values));
      const label = facts.runs.length > 1 ? `${run.name}${chart.series.length > 1 ? ` ${each.label}` : ""}` : each.label;
      series.push({ label, colour: facts.runs.length > 1 ? run.at : at, dash: facts.runs.length > 1 ? at : 0 });
    });
    const band = chart.bands.find((each) => run.metrics[each.low] && run.metrics[each.high]);
    if (band) {
      const [low, high] = [run.metrics[band.low], run.metrics[band.high]];
      const around = (sign) => low.map((value, at) => (value === null || high[at] === null ? null : value + sign * high[at]));
      const colourOfBand = facts.runs.length > 1 ? run.at : 0;
      bands.push({ low: series.length, high: series.length + 1, colour: colourOfBand });
      for (const values of band.around ? [around(-1), around(1)] : [low, high]) {
        rows.push(smoothed(values));
        series.push({ label: `${run.name} band ${series.length}`, colour: colourOfBand, dash: 0, hidden: true });
      }
    }
    tables.push(rows);
  }
  return { tables, series, bands, events: eventsOf(runs) };
}

function stacked(chart, run) {
  const shown = shownRuns().some((each) => each.at === run.at) ? chart.series.filter((each) => run.metrics[each.metric]) : [];
  const series = shown.map((each, at) => ({ label: each.label, colour: at, dash: 0 }));
  return {
    tables: [[across(run), ...shown.map((each) => smoothed(run.metrics[each.metric]))]],
    series,
    bands: series.slice(1).map((each, at) => ({ high: at + 1, low: at, colour: each.colour })),
    stacked: true,
    events: eventsOf([run]),
    range: chart.unit === "share" ? [0, 1] : (_, __, high) => [0, (high || 1) * 1.05],
  };
}

function intervals() {
  const runs = shownRuns().filter((run) => run.evaluations.length);
  const tables = [];
  const series = [];
  for (const run of runs) {
    const hours = $("axis").value === "hours";
    tables.push([run.evaluations.map((each) => (hours ? each.hours : each.step)), ...["mean", "low", "high"].map((name) => run.evaluations.map((each) => each[name]))]);
    const label = facts.runs.length > 1 ? run.name : "held-out accuracy";
    series.push({ label, colour: run.at, dash: 0, bars: true, points: true });
    for (const end of ["low", "high"]) series.push({ label: `${label} ${end}`, colour: run.at, dash: 0, hidden: true });
  }
  return { tables, series, events: eventsOf(runs) };
}

function drawCurves() {
  const parent = $("charts");
  const meaning = (chart) => facts.definitions[chart.series[0]?.metric]?.meaning;
  for (const chart of facts.charts) {
    if (chart.kind === "stacked") {
      facts.runs.forEach((run, at) => {
        if (!chart.series.some((each) => run.metrics[each.metric])) return;
        const title = facts.runs.length > 1 ? `${chart.title}: ${run.name}` : chart.title;
        new Figure(parent, title, chart.unit, null, () => stacked(chart, { ...run, at }));
      });
    } else if (chart.kind === "intervals") new Figure(parent, chart.title, chart.unit, null, intervals);
    else new Figure(parent, chart.title, chart.unit, chart.series.length === 1 ? meaning(chart) : null, () => lines(chart));
  }
  const drawn = new Set(facts.charts.flatMap((chart) => chart.series.map((each) => each.metric)));
  const rest = [...new Set(facts.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !drawn.has(name)).sort();
  options($("other"), [["", "none"], ...rest.map((name) => [name, name])]);
  let other = null;
  $("other").addEventListener("change", () => {
    if (other) {
      other.element.remove();
      figures.splice(figures.indexOf(other), 1);
      other.uplot?.destroy();
      other = null;
    }
    const name = $("other").value;
    if (!name) return;
    const definition = facts.definitions[name] || {};
    const chart = { series: [{ metric: name, label: name }], bands: [] };
    other = new Figure(parent, name, definition.unit || "", definition.meaning, () => lines(chart));
    parent.prepend(other.element);
  });
  if (!facts.charts.length) parent.append(make("p", {}, "No step and no evaluation has been recorded yet."));
}

function setUpCurves() {
  if (facts.runs.length > 1) {
    $("run-choice").hidden = false;
    facts.runs.forEach((run, at) => {
      const swatch = make("span", { class: "swatch" });
      swatch.style.background = `var(--c${at % COLOURS})`;
      $("run-choice").append(make("label", {}, make("input", { type: "checkbox", id: `run-${at}`, checked: true, onchange: redraw }), " ", swatch, run.name));
    });
  }
  const kinds = new Map();
  for (const event of facts.runs.flatMap((run) => run.events)) kinds.set(event.kind, (kinds.get(event.kind) || 0) + 1);
  if (kinds.size) $("markers").textContent = `Marked on the curves: ${[...kinds].map(([kind, count]) => `${EVENT_LETTERS[kind]} ${kind} (${count})`).join(", ")}; listed under Facts.`;
  $("axis").addEventListener("change", () => {
    $("from").value = $("to").value = "";
    redraw();
  });
  $("smoothing").addEventListener("input", () => {
    $("smoothing-value").textContent = Number($("smoothing").value) ? $("smoothing").value : "none";
    redraw();
  });
  for (const id of ["from", "to"]) $(id).addEventListener("input", zoom);
  $("whole").addEventListener("click", wholeRun);
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  drawCurves();
}

// ---- rollouts

const reader = { runs: [], run: 0, matches: [], page: 0, question: null, row: null };

function cell(name, at) {
  const { rows, tables } = reader.runs[reader.run];
  return tables[name] ? tables[name][rows[name][at]] : rows[name][at];
}

function setUpReader(rollouts) {
  reader.runs = rollouts.runs;
  if (facts.runs.length > 1) {
    $("reader-run-label").hidden = false;
    options($("reader-run"), facts.runs.map((run, at) => [String(at), run.name]));
    $("reader-run").addEventListener("change", () => chooseRun(Number($("reader-run").value)));
  }
  for (const id of ["split", "step", "verdict", "source", "clipped", "order"]) $(id).addEventListener("change", () => list());
  for (const id of ["reward-low", "reward-high", "length-low", "length-high", "text"]) $(id).addEventListener("input", () => list());
  $("step-before").addEventListener("click", () => moveStep(-1));
  $("step-after").addEventListener("click", () => moveStep(1));
  $("clear").addEventListener("click", clearFilters);
  $("question-off").addEventListener("click", () => {
    reader.question = null;
    list();
    $("list").querySelector("button")?.focus();
  });
  $("page-before").addEventListener("click", () => turn(-1));
  $("page-after").addEventListener("click", () => turn(1));
  chooseRun(Math.max(0, reader.runs.findIndex((run) => run.rows.step.length)));
}

function chooseRun(at) {
  reader.run = at;
  reader.question = null;
  $("reader-run").value = String(at);
  const { rows, tables } = reader.runs[at];
  const broken = facts.runs[at].unreadable;
  $("said").textContent = facts.runs[at].said + (broken.length ? ` Not readable as parquet, and left out: ${broken.join(", ")}.` : "");
  const steps = [...new Set(rows.step)].sort((one, two) => one - two);
  options($("step"), [["", "all"], ...steps.map((step) => [String(step), String(step)])]);
  options($("verdict"), [["", "any"], ...tables.verdict.map((name, index) => [String(index), name ?? "none"])]);
  options($("source"), [["", "any"], ...tables.source.map((name, index) => [String(index), name ?? "none"])]);
  $("source-label").hidden = tables.source.length < 2;
  clearFilters();
}

function clearFilters() {
  for (const id of ["split", "step", "verdict", "source", "reward-low", "reward-high", "length-low", "length-high", "text"]) $(id).value = "";
  $("clipped").checked = false;
  $("order").value = "newest";
  reader.question = null;
  list();
}

function moveStep(by) {
  const choices = $("step").options.length;
  if (choices < 2) return;
  const from = $("step").selectedIndex || (by < 0 ? choices : 0);
  $("step").selectedIndex = Math.max(1, Math.min(choices - 1, from + by));
  list();
}

function lowered() {
  const run = reader.runs[reader.run];
  run.lowered ??= run.rows.completion.map((text, at) => [text, cell("prompt", at), cell("answer", at) ?? "", cell("gold", at) ?? ""].join("\n").toLowerCase());
  return run.lowered;
}

function list() {
  const { rows, tables } = reader.runs[reader.run];
  const wanted = {
    split: $("split").value === "" ? null : tables.split.indexOf($("split").value),
    step: number("step"),
    verdict: number("verdict"),
    source: number("source"),
    text: $("text").value.trim().toLowerCase(),
  };
  const [rewardLow, rewardHigh, lengthLow, lengthHigh] = ["reward-low", "reward-high", "length-low", "length-high"].map(number);
  const text = wanted.text ? lowered() : null;
  const matches = [];
  for (let at = 0; at < rows.step.length; at++) {
    if (reader.question !== null && rows.prompt[at] !== reader.question) continue;
    if (wanted.split !== null && rows.split[at] !== wanted.split) continue;
    if (wanted.step !== null && rows.step[at] !== wanted.step) continue;
    if (wanted.verdict !== null && rows.verdict[at] !== wanted.verdict) continue;
    if (wanted.source !== null && rows.source[at] !== wanted.source) continue;
    if (rewardLow !== null && !(rows.reward[at] >= rewardLow)) continue;
    if (rewardHigh !== null && !(rows.reward[at] <= rewardHigh)) continue;
    if (lengthLow !== null && !(rows.length[at] >= lengthLow)) continue;
    if (lengthHigh !== null && !(rows.length[at] <= lengthHigh)) continue;
    if ($("clipped").checked && !rows.clipped[at]) continue;
    if (text && !text[at].includes(wanted.text)) continue;
    matches.push(at);
  }
  const by = (column, sign) => (one, two) => sign * ((rows[column][one] ?? 0) - (rows[column][two] ?? 0)) || one - two;
  const orders = {
    newest: by("step", -1), oldest: by("step", 1), "reward-down": by("reward", -1), "reward-up": by("reward", 1),
    "length-down": by("length", -1), "length-up": by("length", 1),
  };
  reader.matches = matches.sort(orders[$("order").value]);
  reader.page = 0;
  $("question-filter").hidden = reader.question === null;
  showPage();
  choose(reader.matches[0] ?? null);
}

function turn(by) {
  reader.page += by;
  showPage();
  $("list").querySelector("button")?.focus();
}

function showPage() {
  const first = reader.page * OF_A_PAGE;
  const shown = reader.matches.slice(first, first + OF_A_PAGE);
  const right = reader.matches.filter((at) => cell("verdict", at) === "correct").length;
  $("found").textContent = reader.matches.length
    ? `${first + 1} to ${first + shown.length} of ${said(reader.matches.length)} completions of this page, ${said(right / reader.matches.length, "share")} of them correct`
    : "No completion of this page is like that.";
  $("page-before").disabled = reader.page === 0;
  $("page-after").disabled = first + OF_A_PAGE >= reader.matches.length;
  $("list").replaceChildren(
    ...shown.map((at) =>
      make(
        "li",
        {},
        make(
          "button",
          {
            type: "button",
            "data-row": at,
            "aria-current": String(at === reader.row),
            onclick: () => {
              choose(at);
              if (matchMedia("(max-width: 760px)").matches) $("detail").scrollIntoView();
            },
          },
          ...headline(at),
          make("span", { class: "snippet" }, cell("completion", at).slice(0, 160)),
        ),
      ),
    ),
  );
}

function splitName(at) {
  return cell("split", at) === "test" ? "held-out" : "training";
}

function verdictOf(at) {
  const verdict = cell("verdict", at) ?? "none";
  return make("span", { class: `verdict ${VERDICT_SIGNS[verdict] ? verdict : ""}` }, `${VERDICT_SIGNS[verdict] || ""} ${verdict}`);
}

function headline(at) {
  return [`step ${cell("step", at)} ${splitName(at)} · `, verdictOf(at), ` · reward ${said(cell("reward", at))} · ${said(cell("length", at))} tokens${cell("clipped", at) ? ", cut off" : ""}`];
}

function choose(at) {
  reader.row = at;
  for (const button of $("list").querySelectorAll("button")) button.setAttribute("aria-current", String(Number(button.dataset.row) === at));
  const detail = $("detail");
  detail.scrollTop = 0;
  if (at === null) {
    detail.replaceChildren(make("p", { class: "quiet" }, "Nothing is chosen."));
    return;
  }
  const byFunction = cell("rewards", at).map(([name, value]) => `${name} ${said(value)}`).join(", ");
  const version = cell("policy_version", at);
  const quiet = [
    byFunction && `rewards: ${byFunction}`,
    version !== null && version !== undefined && `policy version ${version}`,
    cell("source", at) && `source ${cell("source", at)}`,
  ].filter(Boolean);
  detail.replaceChildren(
    make("h3", {}, ...headline(at)),
    make("p", { class: "quiet" }, quiet.join(" · ")),
    make("div", { class: "side" },
      make("div", {}, make("h4", { class: "quiet" }, "Gold"), make("pre", { class: "text", id: "gold" }, cell("gold", at) ?? "none")),
      make("div", {}, make("h4", { class: "quiet" }, "Extracted answer"), make("pre", { class: "text", id: "answer" }, cell("answer", at) ?? "none"))),
    make("details", { open: true }, make("summary", {}, "Prompt"), ...prompt(cell("prompt", at))),
    make("h4", { class: "quiet" }, "Completion"),
    marked(cell("completion", at), cell("marks", at)),
    make("p", { class: "key" }, make("span", { class: "reasoning" }, "reasoning"), ", ", make("mark", {}, "the answer that was read"), ", and all else as it is"),
    ...sameQuestion(at),
  );
}

// A prompt is a text, or the messages of a chat as JSON.
function prompt(text) {
  let messages = null;
  if (text.startsWith("[{")) {
    try {
      messages = JSON.parse(text);
    } catch {
      messages = null; // a text that only looks like JSON
    }
  }
  if (!Array.isArray(messages) || !messages.every((each) => each && typeof each.content === "string")) return [make("pre", { class: "text" }, text)];
  return messages.flatMap((each) => [make("p", { class: "key" }, String(each.role)), make("pre", { class: "text" }, each.content)]);
}

function marked(text, marks) {
  const whole = make("pre", { class: "text", id: "completion" });
  let at = 0;
  for (const [start, end, kind] of marks) {
    if (start < at) continue;
    whole.append(text.slice(at, start), make(kind === "answer" ? "mark" : "span", { class: kind }, text.slice(start, end)));
    at = end;
  }
  whole.append(text.slice(at));
  return whole;
}

function sameQuestion(at) {
  const { rows } = reader.runs[reader.run];
  const same = [];
  for (let other = 0; other < rows.step.length; other++) if (rows.prompt[other] === rows.prompt[at]) same.push(other);
  same.sort((one, two) => rows.step[one] - rows.step[two] || rows.split[one] - rows.split[two] || one - two);
  const steps = new Set(same.map((other) => rows.step[other]));
  const buttons = same.slice(0, OF_A_QUESTION).map((other) =>
    make(
      "button",
      {
        type: "button", "aria-current": String(other === at),
        "aria-label": `step ${rows.step[other]}, ${cell("verdict", other)}`,
        onclick: () => {
          choose(other);
          $("detail").focus();
        },
      },
      `${rows.step[other]} `, make("span", { class: `verdict ${cell("verdict", other)}` }, VERDICT_SIGNS[cell("verdict", other)] || "–"),
    ),
  );
  return [
    make("h4", { class: "quiet" }, `This question: ${same.length} completions at ${steps.size} step${steps.size > 1 ? "s" : ""}`),
    make("div", { class: "across" }, ...buttons),
    make("p", {}, make("button", {
      type: "button", id: "question-on",
      onclick: () => {
        reader.question = rows.prompt[at];
        for (const id of ["split", "step"]) $(id).value = "";
        $("order").value = "oldest";
        list();
        $("question-off").focus();
      },
    }, "List only this question, at every step")),
  ];
}

// ---- self-verification

function phraseData(run, at) {
  const counted = run.counted.filter((each) => each.split === $("phrase-split").value);
  const names = Object.keys(facts.phrases).filter((name) => counted.some((each) => each.shares[name] > 0));
  if (!shownRuns().some((each) => each.at === at) || !names.length) return { tables: [], series: [] };
  const hours = new Map(run.steps.map((step, index) => [step, run.hours[index]]));
  const shown = $("axis").value === "hours" ? counted.filter((each) => hours.has(each.step)) : counted;
  return {
    tables: [[shown.map((each) => ($("axis").value === "hours" ? hours.get(each.step) : each.step)), ...names.map((name) => smoothed(shown.map((each) => each.shares[name])))]],
    series: names.map((name) => ({ label: name, colour: Object.keys(facts.phrases).indexOf(name), dash: 0 })),
    events: eventsOf([run]),
  };
}

function setUpPhrases() {
  facts.runs.forEach((run, at) => {
    if (!run.counted.length) return;
    const title = `Completions with the phrase${facts.runs.length > 1 ? `: ${run.name}` : ""}`;
    new Figure($("phrase-charts"), title, "share", null, () => phraseData(run, at));
  });
  $("phrase-split").addEventListener("change", () => {
    showExamples();
    redraw();
  });
  showExamples();
}

function showExamples() {
  const parts = facts.runs.flatMap((run) => {
    const counted = run.counted.filter((each) => each.split === $("phrase-split").value);
    const total = counted.reduce((sum, each) => sum + each.completions, 0);
    const found = Object.keys(facts.phrases).map((name) => {
      const having = counted.filter((each) => each.examples[name]);
      if (!having.length) return null;
      const count = counted.reduce((sum, each) => sum + each.shares[name] * each.completions, 0);
      const few = having.filter((_, at) => at % Math.ceil(having.length / 5) === 0 || at === having.length - 1);
      return make(
        "details",
        {},
        make("summary", {}, `${name}: in ${said(Math.round(count))} of ${said(total)} completions (${said(count / total, "share")}), first at step ${having[0].step}`),
        ...few.map((each) => make("div", {}, make("p", { class: "key" }, `step ${each.step}, ${each.examples[name][1]}`), make("blockquote", {}, each.examples[name][0]))),
        make("button", { type: "button", onclick: () => findText(name) }, "Find the word in the rollouts of this page"),
      );
    });
    const shown = found.filter((each) => each !== null);
    const heading = facts.runs.length > 1 ? [make("h3", {}, run.name)] : [];
    return [...heading, ...(shown.length ? shown : [make("p", { class: "quiet" }, counted.length ? `None of the phrases in ${said(total)} completions.` : "No completions to count.")])];
  });
  $("examples").replaceChildren(...parts);
}

function findText(word) {
  clearFilters();
  $("text").value = word;
  list();
  $("text").focus();
}

// ---- overview and facts

function showOverview() {
  const one = facts.runs.length === 1;
  $("title").textContent = one ? facts.runs[0].name : `${facts.runs.length} runs`;
  document.title = `${$("title").textContent} · r1zero report`;
  $("written").textContent = `Written ${new Date(facts.written * 1000).toLocaleString("en-GB")}; reload the page for what has come since, where the run goes on.`;
  for (const run of facts.runs) {
    const findings = run.findings.map((each) =>
      make(
        "div",
        { class: `finding ${each.severity}` },
        make("p", {}, make("strong", {}, `${each.name} (${each.severity}): ${each.what}`), `; ${each.evidence}`),
        make("p", {}, "→ ", make("strong", {}, each.remedy)),
      ),
    );
    const tiles = run.tiles.map((tile) =>
      make("div", { class: "tile" }, make("h3", {}, tile.question), make("ul", {}, ...(tile.answers.length ? tile.answers : ["nothing recorded yet"]).map((answer) => make("li", {}, answer)))),
    );
    const change = make("div", { class: "tile" }, make("h3", {}, "What should I change?"), ...(findings.length ? findings : [make("p", {}, "The doctor found nothing that holds the run back.")]));
    $("overview").append(make("h2", {}, one ? "In a minute" : run.name), make("p", {}, run.state), make("div", { class: "tiles" }, ...tiles, change));
  }
}

function showFacts() {
  const labels = [...new Set(facts.runs.flatMap((run) => run.facts.map(([label]) => label)))];
  const rows = labels.map((label) => [label, ...facts.runs.map((run) => run.facts.find(([each]) => each === label)?.[1] ?? "–")]);
  $("fact-tables").append(scrolling("Facts", table(["", ...facts.runs.map((run) => run.name)], rows)));
  for (const id of ["recipe-choice", "recipe-text"]) $(id).addEventListener("input", showRecipe);
  showRecipe();
  const more = $("more-facts");
  for (const run of facts.runs) {
    const of = facts.runs.length > 1 ? ` of ${run.name}` : "";
    if (run.events.length) {
      const shown = run.events.map((each) => [each.kind, String(each.step), `${said(each.hours)} h`, each.text]);
      more.append(make("h3", {}, `Events${of}`), scrolling(`Events${of}`, table(["what", "step", "after", "in words"], shown)));
    }
    if (run.plan) more.append(make("details", {}, make("summary", {}, `Plan${of}`), make("pre", { class: "text" }, run.plan)));
    const packages = Object.entries(run.packages);
    if (packages.length) more.append(make("details", {}, make("summary", {}, `Versions${of}`), scrolling(`Versions${of}`, table(["package", "version"], packages))));
  }
}

function showRecipe() {
  const changedOnly = $("recipe-choice").value === "changed";
  const name = $("recipe-text").value.trim().toLowerCase();
  const several = facts.runs.length > 1;
  const based = facts.recipe.some((row) => row.bases.some((base) => base !== null));
  const rows = facts.recipe
    .map((row) => {
      const differs = row.values.map((value, at) => value !== row.defaults[at]);
      const fromBase = row.values.map((value, at) => row.bases[at] !== null && value !== row.bases[at]);
      const between = several && new Set(row.values).size > 1;
      return { ...row, differs, fromBase, between, any: between || row.asked.some(Boolean) || differs.some(Boolean) || fromBase.some(Boolean) };
    })
    .filter((row) => (!changedOnly || row.any) && row.key.toLowerCase().includes(name));
  const badge = (shown, text) => (shown ? [" ", make("span", { class: "badge" }, text)] : []);
  const head = ["key", ...facts.runs.map((run) => (several ? run.name : "value")), ...(based ? ["base"] : []), "default"];
  $("recipe").replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map((row) =>
      make("tr", {},
        make("th", { scope: "row", class: row.any ? "changed" : "" }, row.key, ...badge(row.between, "runs")),
        ...row.values.map((value, at) =>
          make("td", { class: row.differs[at] || row.fromBase[at] ? "changed" : "" }, value, ...badge(row.differs[at], "differs"), ...badge(row.fromBase[at], "base"), ...badge(row.asked[at], "command line"))),
        ...(based ? [make("td", {}, row.bases.find((base) => base !== null) ?? "–")] : []),
        make("td", {}, row.defaults[0]),
      ))),
  );
}

// ---- theme, and the beginning

function setUpTheme() {
  const stored = (() => {
    try {
      return localStorage.getItem("r1zero-theme") || "";
    } catch {
      return ""; // a browser that keeps nothing for files
    }
  })();
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    readColours();
    redraw();
  };
  $("theme").value = stored;
  $("theme").addEventListener("change", () => {
    apply($("theme").value);
    try {
      localStorage.setItem("r1zero-theme", $("theme").value);
    } catch {
      return;
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply($("theme").value));
  apply(stored);
}

async function begin() {
  setUpTheme();
  facts = await unpacked("page-facts");
  showOverview();
  setUpCurves();
  showFacts();
  setUpPhrases();
  setUpReader(await unpacked("page-rollouts"));
  performance.mark("ready");
  document.documentElement.dataset.state = "ready";
}

begin().catch((error) => {
  $("problem").hidden = false;
  $("problem").textContent = `This page could not be drawn (${error.message}). It needs a browser of 2024 or later.`;
  throw error;
});
