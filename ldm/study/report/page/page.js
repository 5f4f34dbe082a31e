"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, values = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), values);
  node.append(...children);
  return node;
};

// --- light and dark: what the system says, until the button is used
const root = document.documentElement, themeButton = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const stored = () => { try { return localStorage.getItem("ldm-report-theme"); } catch { return null; } };
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
function showTheme() {
  themeButton.setAttribute("aria-pressed", isDark());
  drawPlots();
}
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("ldm-report-theme", root.dataset.theme); } catch { /* a page that may keep nothing */ }
  showTheme();
});
if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
system.addEventListener("change", showTheme);

// --- plots
const narrow = () => innerWidth < 640;
const touch = matchMedia("(pointer: coarse)").matches;

async function loadLibrary() {
  const bytes = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", { textContent: await new Response(unpacked).text() }));
}

function themed(spec) {
  const css = getComputedStyle(root), colour = (name) => css.getPropertyValue(name).trim();
  const text = colour("--text"), muted = colour("--muted"), line = colour("--line");
  const axis = (own = {}) => ({
    automargin: true, gridcolor: line, linecolor: line, zerolinecolor: muted, zeroline: false, tickcolor: line, ...own,
    title: { ...own.title, standoff: 10 },
  });
  const traces = spec.data.map((trace) => {
    const shown = { ...trace };
    if (trace.marker?.line?.color === "ring") {
      shown.marker = { ...trace.marker, line: { ...trace.marker.line, color: text } };
    }
    if (trace.colorbar) shown.showscale = !narrow();
    return shown;
  });
  const names = traces.filter((trace) => trace.name).length;
  const below = narrow() && names > 1;
  const rows = traces[0]?.type === "heatmap" ? traces[0].y.length : 0;
  const height = rows ? 110 + 46 * rows : below ? 420 + 22 * names : Math.max(420, 90 + 19 * names);
  return [traces, {
    ...spec.layout, xaxis: axis(spec.layout.xaxis), yaxis: axis(spec.layout.yaxis),
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: Math.max(height, 260),
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 11 : 13, color: text },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: line, font: { color: text }, align: "left" },
    margin: { l: 10, r: 10, t: 10, b: 10 }, showlegend: names > 1, dragmode: touch ? false : "zoom",
    legend: below ? { orientation: "h", y: -0.25, x: 0 } : { x: 1.02, y: 1 },
  }];
}

function drawPlots() {
  if (!window.Plotly) return;
  for (const node of all(".plot")) {
    const name = node.id.slice("plot-".length);
    const chosen = document.querySelector(`select[data-plot="${name}"]`)?.value ?? node.dataset.first;
    Plotly.react(node, ...themed(data.plots[name][chosen]), { displayModeBar: false, responsive: true });
    if (name === "heat-map" && !node.dataset.clicks) {
      node.dataset.clicks = "yes";
      node.on("plotly_click", ({ points: [point] }) => showRoute(point.customdata));
    }
  }
}
for (const select of all("select[data-plot]")) select.addEventListener("change", drawPlots);
for (const button of all("[data-save]")) {
  button.addEventListener("click", () => {
    const node = document.getElementById(`plot-${button.dataset.of}`);
    Plotly.downloadImage(node, { format: button.dataset.save, filename: button.dataset.of, width: 1000, height: 600 });
  });
}
let wasNarrow = narrow();
addEventListener("resize", () => { if (wasNarrow !== narrow()) { wasNarrow = narrow(); drawPlots(); } });

// --- tables: sorting
const orderOf = (row, column) => row.cells[column].dataset.order ?? row.cells[column].firstChild?.textContent.trim() ?? "";
function sortBy(header) {
  const table = header.closest("table"), column = header.cellIndex;
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const number = (text) => (text === "" || text === "–" ? NaN : Number(text.replaceAll(",", "").replace("−", "-")));
  const rows = [...table.tBodies[0].rows].map((row) => [orderOf(row, column), row]);
  rows.sort(([a], [b]) => {
    const [x, y] = [number(a), number(b)];
    if (a === "–" || b === "–") return (a === "–") - (b === "–");  // what has no value comes last
    return sign * (isNaN(x) || isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y);
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const button of all(".sort")) button.addEventListener("click", () => sortBy(button.closest("th")));

// --- tables: filtering
const big = document.getElementById("big-table");
const search = document.getElementById("search"), earlier = document.getElementById("earlier");
const filters = all("[data-for=big-table] select");
const compare = { ">": (a, b) => a > b, "<": (a, b) => a < b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b, "=": (a, b) => a === b };

function test(word, names) {
  const [, name, sign, given] = /^([\w.]+)(>=|<=|>|<|=)(.+)$/.exec(word) ?? [];
  const column = names.indexOf(name);
  if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
  if (given.trim() === "" || isNaN(given)) return (row) => orderOf(row, column).toLowerCase() === given;
  return (row) => {
    const value = orderOf(row, column);
    return value !== "–" && compare[sign](Number(value), Number(given));
  };
}

function filter() {
  const names = [...big.tHead.rows[0].cells].map((cell) => cell.textContent.trim().toLowerCase());
  const tests = search.value.toLowerCase().split(/\s+/).filter(Boolean).map((word) => test(word, names));
  for (const select of filters) {
    if (select.value) tests.push((row) => row.cells[select.dataset.column].firstChild.textContent.trim() === select.value);
  }
  let count = 0;
  const rows = [...big.tBodies[0].rows];
  for (const row of rows) {
    row.hidden = ("earlier" in row.dataset && !earlier.checked) || !tests.every((one) => one(row));
    count += !row.hidden;
  }
  document.getElementById("count").textContent = `${count} of ${rows.length} rows`;
}

function showRoute(route) {
  const select = filters.find((one) => one.dataset.name === "route");
  if (!select || ![...select.options].some((one) => one.value === route)) return;
  select.value = route;
  filter();
  document.getElementById("trials").scrollIntoView();
}
if (big) {
  search.addEventListener("input", filter);
  for (const input of [...filters, ...(earlier ? [earlier] : [])]) input.addEventListener("change", filter);
  document.getElementById("clear").addEventListener("click", () => {
    search.value = "";
    for (const select of filters) select.value = "";
    if (earlier) earlier.checked = false;
    filter();
  });
  filter();
}

// --- the wall of pictures
const wall = data.wall, viewer = document.getElementById("viewer"), tip = document.getElementById("tip");
const picture = (number, alt) => {
  const image = make("img", { src: wall.uris[number], alt, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("fine", image.naturalWidth <= 128));
  return image;
};
const lines = (pairs) => pairs.map(([name, value]) => `${name}: ${value}`).join("\n");
const heading = (one) => (one.seed === null || one.seed === "" ? one.prompt : `${one.prompt}, seed ${one.seed}`);
let shown = [];  // rows of the wall, each a list of cells or null
let place = [0, 0], subjectOf, seedOf;

function choose(label, values) {
  const select = make("select", {}, ...values.map((value) => make("option", { value, textContent: value })));
  select.addEventListener("change", drawWall);
  if (values.length > 1) document.getElementById("wall-filters").append(make("label", {}, `${label} `, select));
  return select;
}

function tipOn(button, text) {
  const show = () => {
    tip.textContent = text;
    tip.hidden = false;
    const at = button.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - own.width - 8))}px`;
    tip.style.top = `${at.top > own.height + 12 ? at.top - own.height - 8 : at.bottom + 8}px`;
    button.setAttribute("aria-describedby", "tip");
  };
  const hide = () => { tip.hidden = true; button.removeAttribute("aria-describedby"); };
  button.addEventListener("pointerenter", show);
  button.addEventListener("focus", () => { if (button.matches(":focus-visible")) show(); });
  for (const name of ["pointerleave", "blur", "click"]) button.addEventListener(name, hide);
}

function cell(row, column, entry) {
  const button = make("button", { type: "button", tabIndex: row || column ? -1 : 0 },
    picture(entry.number, `${entry.config}, ${entry.prompt}`));
  button.addEventListener("click", () => enlarge(row, column));
  tipOn(button, [entry.config, entry.prompt, lines(entry.told)].filter(Boolean).join("\n"));
  entry.button = button;
  return make("td", {}, button);
}

function drawWall() {
  const subject = subjectOf.value, seed = seedOf.value;
  const trials = wall.trials.filter((one) => one.subject === subject && String(one.seed) === seed);
  const columnOf = new Map();
  for (const trial of trials) {
    for (const one of trial.pictures) columnOf.set(`${one.prompt}\n${one.seed}`, one);
  }
  const names = [...columnOf.keys()];
  const places = (trial) => new Map(trial.pictures.map((one) => [`${one.prompt}\n${one.seed}`, one]));
  const row = (config, found, told) => names.map((name) => {
    const one = found.get(name);
    if (one?.drawn === undefined || one.drawn === null) return null;
    return { config, subject, number: one.drawn, base: one.base, prompt: one.prompt, seed: one.seed, told: told(one) };
  });
  shown = trials.map((trial) => row(trial.config, places(trial), (one) => [...trial.told, ["seed of the picture", one.seed], ...one.told.map(([name, value]) => [`${name} of this picture`, value])]));
  const bases = new Map();
  for (const trial of trials) {
    for (const one of trial.pictures) {
      if (one.base !== null) bases.set(`${one.prompt}\n${one.seed}`, { ...one, drawn: one.base, base: null });
    }
  }
  if (bases.size) shown.unshift(row("the base, before tuning", bases, (one) => [["seed of the picture", one.seed]]));
  const head = make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "config" }),
    ...names.map((name) => make("th", { scope: "col", textContent: heading(columnOf.get(name)) }))));
  const body = make("tbody", {}, ...shown.map((cells, number) => make("tr", { className: bases.size && !number ? "base" : "" },
    make("th", { scope: "row", textContent: cells.find(Boolean)?.config ?? "" }),
    ...cells.map((one, column) => (one ? cell(number, column, one) : make("td"))))));
  document.getElementById("wall-table").replaceChildren(head, body);
  const photographs = wall.subjects[subject] ?? [];
  document.getElementById("wall-photographs").replaceChildren(...(photographs.length ? [make("div", { className: "photographs" },
    make("span", { textContent: `photographs of ${subject}` }), ...photographs.map((number, i) => picture(number, `photograph ${i + 1} of ${subject}`)))] : []));
}

function enlarge(row, column) {
  const entry = shown[row]?.[column];
  if (!entry) return;
  place = [row, column];
  const photographs = wall.subjects[entry.subject] ?? [];
  const few = photographs.length < 4 ? photographs.slice(0, 1) : photographs.slice(0, 4);
  const framed = (node, text) => make("figure", {}, node, make("figcaption", { textContent: text }));
  const figure = (number, text) => framed(picture(number, text), text);
  const parts = [];
  if (few.length) {
    const mosaic = make("div", { className: few.length > 1 ? "mosaic" : "" });
    mosaic.append(...few.map((number, i) => picture(number, `photograph ${i + 1} of ${entry.subject}`)));
    parts.push(framed(mosaic, `photographs of ${entry.subject}`));
  }
  if (entry.base !== null && entry.base !== undefined) parts.push(figure(entry.base, "the base, before tuning"));
  parts.push(figure(entry.number, entry.config));
  const close = make("button", { type: "button", textContent: "Close" });
  close.addEventListener("click", () => viewer.close());
  const pairs = [["prompt", entry.prompt], ...entry.told];
  viewer.replaceChildren(
    make("div", { className: "tools" }, make("h3", { textContent: entry.config }), make("small", { textContent: "arrow keys: other pictures" }), close),
    make("div", { className: "trio" }, ...parts),
    make("dl", {}, ...pairs.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })))));
  if (!viewer.open) viewer.showModal();
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
function next([row, column], key) {
  const [down, right] = ARROWS[key];
  for (let r = row + down, c = column + right; shown[r] && c >= 0 && c < shown[r].length; r += down, c += right) {
    if (shown[r][c]) return [r, c];
  }
  return [row, column];
}
if (wall) {
  subjectOf = choose("subject", [...new Set(wall.trials.map((one) => one.subject))]);
  seedOf = choose("training seed", [...new Set(wall.trials.map((one) => String(one.seed)))].sort((a, b) => a - b));
  document.getElementById("wall-table").classList.toggle("grids", Boolean(wall.grids));
  drawWall();
  viewer.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    enlarge(...next(place, event.key));
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  document.getElementById("wall-table").addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    const row = shown.findIndex((cells) => cells.some((one) => one?.button === document.activeElement));
    if (row < 0) return;
    event.preventDefault();
    const from = [row, shown[row].findIndex((one) => one?.button === document.activeElement)];
    const [r, c] = next(from, event.key);
    shown[from[0]][from[1]].button.tabIndex = -1;
    shown[r][c].button.tabIndex = 0;
    shown[r][c].button.focus();
  });
}

// --- code
for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.closest(".code").querySelector("pre").textContent);
    button.textContent = "Copied";
  });
}

(async () => {
  if (Object.keys(data.plots).length) {
    try {
      await loadLibrary();
    } catch {
      for (const node of all(".plot")) node.textContent = "This browser cannot unpack the plots; the numbers are below.";
    }
  }
  showTheme();
  root.dataset.ready = "yes";
})();
