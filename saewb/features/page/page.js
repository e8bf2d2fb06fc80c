// The page around latents: list, search, keys. Text reaches it as textContent only, so that no token is ever markup.
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text; return e; };
const shown = (s) => s.replace(/\r?\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const digits = (v) => { const a = Math.abs(v); return a === 0 ? "0" : a >= 100 ? v.toFixed(0) : a >= 10 ? v.toFixed(1)
  : a >= 0.01 ? v.toFixed(2) : v.toExponential(1); };
const signed = (v) => (v < 0 ? "\u2212" : "+") + digits(Math.abs(v));
const percent = (v) => (v === 0 ? "0" : v >= 0.1 ? (100 * v).toFixed(0) : v >= 0.001 ? (100 * v).toFixed(2)
  : (100 * v).toPrecision(1)) + " %";
const count = (n) => n.toLocaleString("en");
function bars(counts, { label, tip, cls = "" }) {
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), most = Math.max(1e-12, ...counts);
  const rect = (values) => { const r = svg.appendChild(document.createElementNS(ns, "rect"));
    for (const [k, v] of Object.entries(values)) r.setAttribute(k, v); return r; };
  for (const [k, v] of Object.entries({ viewBox: `0 0 ${counts.length || 1} 1`, preserveAspectRatio: "none", role: "img",
    "aria-label": label, class: "bars " + cls })) svg.setAttribute(k, v);
  counts.forEach((n, x) => { const height = n ? Math.max(0.015, n / most) : 0;
    rect({ x: x + 0.06, y: 1 - height, width: 0.88, height });
    rect({ x, y: 0, width: 1, height: 1, class: "over" })._tip = () => tip(x); });
  return svg;
}

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const raw = (s) => Uint8Array.from(atob(s), (c) => c.charCodeAt(0)).buffer;
const TOKENS = new (DATA.wide ? Uint32Array : Uint16Array)(raw(DATA.tokens)), ACTS = new Int16Array(raw(DATA.acts));
const WORDS = DATA.words, LATENTS = DATA.latents, SPECIAL = new Set(DATA.special);
const byIndex = new Map(LATENTS.map((p, n) => [p.latent, n]));
const wordsOf = (c) => Array.from(TOKENS.subarray(c.start, c.start + c.length));
// Contexts as latent.js takes them, read from the tables when they are shown.
const unpack = (p) => (c) => { const words = wordsOf(c), ids = words.map((w) => DATA.ids[w]);
  return { ...c, words, ids, acts: Array.from(ACTS.subarray(c.start, c.start + c.length), (a) => (a / 32767) * p.scale),
    special: ids.flatMap((i, j) => (SPECIAL.has(i) ? [j] : [])) }; };
let order = LATENTS.map((_, n) => n), at = 0, wrap = false, query = "", start = 0;
for (const p of LATENTS) for (const c of [...p.top, ...p.groups.flat()]) { c.start = start; start += c.length; }

const textOf = (c) => { if (c.text === undefined) { c.text = ""; c.ends = [];
  for (const w of wordsOf(c)) { c.text += WORDS[w].toLowerCase(); c.ends.push(c.text.length); } }
  return c.text; };
// Positions of the tokens that share a character with the query.
const hits = (c) => { const text = textOf(c), covered = new Set();
  for (let from = query ? text.indexOf(query) : -1; from >= 0; from = text.indexOf(query, from + query.length))
    c.ends.forEach((end, j) => { if ((j ? c.ends[j - 1] : 0) < from + query.length && from < end) covered.add(j); });
  return covered; };

function snippet(p) {
  if (!p.top.length) return [make("span", "none", "never fires")];
  const c = unpack(p)(p.top[0]), begin = Math.max(0, c.at - 3), special = new Set(c.special);
  return c.words.slice(begin, c.at + 5).map((w, k) => { const j = begin + k;
    return piece(WORDS[w], Math.abs(c.acts[j]) / p.scale, special.has(j), j === c.at); });
}
function link(latent) {
  const b = make("button", "link", String(latent)), n = byIndex.get(latent);
  b.disabled = n === undefined;
  b._tip = () => (b.disabled ? "not on this page" : snippet(LATENTS[n]).map((e) => e.textContent).join(""));
  b.onclick = () => go(latent);
  return b;
}

function show() {
  const main = $("page"), p = LATENTS[order[at]];
  main.replaceChildren();
  if (!p) { main.append(make("p", "none", "Nothing here has that text.")); return; }
  const top = make("div", "top"), keys = make("span", "keys");
  top.append(make("h2", "", "Latent " + p.latent), labelOf(p.label, p.explained), make("span", "gap"), keys);
  for (const [k, t] of [["j", ""], ["k", " next, previous  "], ["/", " search  "], ["w", " whole text  "],
    ["t", " theme"]]) keys.append(make("kbd", "", k), t || " ");
  const page = { ...p, words: WORDS, top: p.top.map(unpack(p)), groups: p.groups.map((g) => g.map(unpack(p))) };
  main.append(top, latentFacts(p), latentCards(p, link),
    ...contextGroups(page, (list) => contexts(page, list, wrap, hits)));
  main.scrollTop = 0;
}

function list() {
  const box = $("list");
  box.replaceChildren();
  order.forEach((n, place) => { const li = make("li"), inside = make("span", "in");
    li.id = "f" + place;
    li.setAttribute("role", "option");
    if (LATENTS[n].explained) inside.append(labelOf(LATENTS[n].label, true));
    inside.append(...snippet(LATENTS[n]));
    li.append(make("b", "", String(LATENTS[n].latent)), inside);
    li.onclick = () => select(place);
    box.append(li); });
  const all = `${LATENTS.length} features`;
  $("count").textContent = query ? `${order.length} of ${all}` : all;
}
function select(place) {
  at = Math.max(0, Math.min(order.length - 1, place));
  document.querySelectorAll("#list [aria-selected=true]").forEach((e) => e.setAttribute("aria-selected", "false"));
  const li = $("f" + at), p = LATENTS[order[at]];
  if (li) { li.setAttribute("aria-selected", "true"); li.scrollIntoView({ block: "nearest" }); }
  if (p) history.replaceState(null, "", "#" + p.latent);
  show();
}
function go(latent) {
  if (!order.includes(byIndex.get(latent))) { $("search").value = ""; search(); }
  select(order.indexOf(byIndex.get(latent)));
}
function score(p) {
  if (String(p.latent) === query) return 1e9;
  let n = p.label.toLowerCase().includes(query) ? 1e6 : 0;
  for (const c of [...p.top, ...p.groups.flat()]) if (textOf(c).includes(query))
    n += [...hits(c)].some((j) => ACTS[c.start + j] !== 0) ? 100 : 1;
  for (const [text] of [...p.raised, ...p.lowered]) if (text.toLowerCase().includes(query)) n += 10;
  return n;
}
function search() {
  query = $("search").value.toLowerCase();
  order = LATENTS.map((_, n) => n);
  if (query) { const scores = LATENTS.map(score);
    order = order.filter((n) => scores[n] > 0).sort((a, b) => scores[b] - scores[a] || a - b); }
  list();
  select(0);
}
function theme() {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("saewb-theme", root.dataset.theme); } catch { /* a file may have no storage */ }
}
try { const stored = localStorage.getItem("saewb-theme"); if (stored) document.documentElement.dataset.theme = stored; }
catch { /* likewise */ }
const tip = $("tip");
document.addEventListener("mousemove", (e) => {
  let owner = e.target;
  while (owner && !owner._tip) owner = owner.parentElement;
  const text = owner && owner._tip();
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = (e.clientY + 16) + "px"; });
$("search").addEventListener("input", search);
$("theme").onclick = theme;
document.addEventListener("keydown", (e) => {
  if (e.target.tagName === "INPUT") { if (e.key === "Escape" || e.key === "Enter") e.target.blur(); return; }
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const moves = { j: 1, ArrowDown: 1, ArrowRight: 1, k: -1, ArrowUp: -1, ArrowLeft: -1, PageDown: 10, PageUp: -10 };
  if (moves[e.key]) { e.preventDefault(); select(at + moves[e.key]); }
  else if (e.key === "Home") select(0); else if (e.key === "End") select(order.length - 1);
  else if (e.key === "/") { e.preventDefault(); $("search").focus(); $("search").select(); }
  else if (e.key === "w") { wrap = !wrap; show(); } else if (e.key === "t") theme();
});
list();
const first = byIndex.get(Number(location.hash.slice(1)));
select(location.hash && first !== undefined ? order.indexOf(first) : 0);
