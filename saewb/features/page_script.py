"""What the page does. Text reaches the page as `textContent` only, so that no token is ever markup."""

SCRIPT = r"""
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const raw = (s) => { const b = atob(s), a = new Uint8Array(b.length);
  for (let i = 0; i < b.length; i++) a[i] = b.charCodeAt(i); return a.buffer; };
const TOKENS = new (DATA.wide ? Uint32Array : Uint16Array)(raw(DATA.tokens));
const ACTS = new Int16Array(raw(DATA.acts));
const WORDS = DATA.words, FEATURES = DATA.features;
const SPECIAL = new Set(DATA.special);
const byLatent = new Map(FEATURES.map((f, n) => [f.i, n]));
const $ = (id) => document.getElementById(id);
const shown = (s) => s.replace(/\r?\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text; return e; };
const digits = (v) => { const a = Math.abs(v); return a === 0 ? "0" : a >= 100 ? v.toFixed(0) : a >= 10 ? v.toFixed(1)
  : a >= 0.01 ? v.toFixed(2) : v.toExponential(1); };
const percent = (v) => (v === 0 ? "0" : v >= 0.1 ? (100 * v).toFixed(0) : v >= 0.001 ? (100 * v).toFixed(2)
  : (100 * v).toExponential(1)) + " %";
const act = (f, k) => ACTS[k] / 32767 * f.scale;
let order = FEATURES.map((_, n) => n), at = 0, wrap = false, query = "";

function token(f, c, j) {
  const k = c.o + j, word = WORDS[TOKENS[k]], a = act(f, k), mark = SPECIAL.has(word);
  const e = make("span", mark ? "t mark" : "t", mark ? " \u00b6 " : shown(word));
  if (a !== 0) e.style.background = `rgba(var(--hot), ${(0.1 + 0.75 * Math.min(1, Math.abs(a) / f.scale)).toFixed(3)})`;
  if (j === c.at) e.classList.add("peak");
  e._tip = () => JSON.stringify(WORDS[TOKENS[k]]) + "   activation " + digits(a)
    + (c.l ? "\nloss without it  " + (c.l[j] >= 0 ? "+" : "") + c.l[j].toFixed(3) + " nats" : "");
  return e;
}

function contextRow(f, c) {
  const row = make("div", wrap ? "row plain" : "row"), left = make("span", "left"), right = make("span", "right");
  row.append(make("span", "value", digits(act(f, c.o + c.at))), left, right);
  const hits = query ? covered(c) : null;
  for (let j = 0; j < c.n; j++) { const e = token(f, c, j); if (hits && hits.has(j)) e.classList.add("hit");
    (j <= c.at ? left : right).append(e); }
  return row;
}

function textOf(c) { if (c.text === undefined) { c.text = ""; c.ends = [];
  for (let j = 0; j < c.n; j++) { c.text += WORDS[TOKENS[c.o + j]].toLowerCase(); c.ends.push(c.text.length); } }
  return c.text; }
function covered(c) { const text = textOf(c), found = new Set(); let from = text.indexOf(query);
  while (from >= 0) { const to = from + query.length;
    c.ends.forEach((end, j) => { const begin = j ? c.ends[j - 1] : 0; if (begin < to && from < end) found.add(j); });
    from = text.indexOf(query, to); } return found; }

function bars(counts, cls, tips) {
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg"), most = Math.max(1e-12, ...counts);
  svg.setAttribute("viewBox", `0 0 ${counts.length} 1`); svg.setAttribute("preserveAspectRatio", "none");
  if (cls) svg.setAttribute("class", cls);
  counts.forEach((n, x) => { if (!n) return;
    const r = document.createElementNS(ns, "rect"), h = Math.max(0.012, n / most);
    for (const [k, v] of Object.entries({ x: x + 0.06, y: 1 - h, width: 0.88, height: h })) r.setAttribute(k, v);
    r._tip = () => tips(x, n); svg.append(r); });
  return svg;
}
function card(title, note) { const e = make("div", "card"), h = make("h3", "", title + (note ? "  " : ""));
  if (note) h.append(make("small", "", note)); e.append(h); return e; }
function axis(...labels) { const e = make("div", "axis"); labels.forEach((t) => e.append(make("span", "", t)));
  return e; }
function logits(list, cls) { const e = make("div", cls); list.slice(0, 8).forEach(([w, v]) => {
  const r = make("div", "logit");
  r.append(make("span", "", shown(WORDS[w]) || "\u2205"),
    make("i", "", (v >= 0 ? "+" : "\u2212") + digits(Math.abs(v)))); e.append(r); }); return e; }
function link(latent) { const a = make("a", "", String(latent)); const n = byLatent.get(latent);
  if (n === undefined) { a.className = "off"; a._tip = () => "not on this page"; return a; }
  a.tabIndex = 0; a.onclick = () => go(latent); a.onkeydown = (e) => { if (e.key === "Enter") go(latent); };
  a._tip = () => snippet(FEATURES[n]).map((e) => e.textContent).join(""); return a; }
function near(list, text) { const e = make("div"); list.forEach((x) => { const r = make("div", "near");
  r.append(link(x[0]), make("span", "", text(x))); e.append(r); }); return e; }

function snippet(f) { const c = f.top[0]; if (!c) return [make("span", "none", "never fires")];
  const out = []; for (let j = Math.max(0, c.at - 3); j < Math.min(c.n, c.at + 5); j++) out.push(token(f, c, j));
  return out; }

function show() {
  const main = $("page"); main.replaceChildren();
  const f = FEATURES[order[at]];
  if (!f) { main.append(make("p", "none", "Nothing here has that text.")); return; }
  const top = make("div", "top"); top.append(make("h2", "", "Latent " + f.i), make("span", "gap"));
  const keys = make("span", "keys");
  for (const [k, t] of [["j", ""], ["k", " next, previous  "], ["/", " search  "], ["w", " whole text  "],
    ["t", " theme"]]) keys.append(make("kbd", "", k), t || " ");
  top.append(keys); main.append(top);
  const facts = make("div", "facts");
  for (const [name, value] of [["fires on", percent(f.density) + " of tokens"], ["largest", digits(f.max)],
    ["mean", digits(f.mean)], ["decoder norm", digits(f.norm)]]) { const s = make("span", "", name + " ");
    s.append(make("b", "", value)); facts.append(s); }
  main.append(facts);
  const cards = make("div", "cards"), hist = card("Activations", `${f.n.toLocaleString("en")} tokens`);
  if (f.h.c.length) hist.append(bars(f.h.c, "", (x, n) => `${digits(x * f.h.w)} to ${digits((x + 1) * f.h.w)}: ${n}`),
    axis("0", digits(f.h.w * f.h.c.length)));
  else hist.append(make("p", "none", "It never fired."));
  hist.append(below("Fires by position in the text"), small(bars(f.p, "gray",
    (x, v) => `from token ${DATA.starts[x]} on: ${percent(v)}`)), axis("0", DATA.starts[DATA.starts.length - 1] + "+"));
  cards.append(hist);
  if (f.lt.length) { const words = card("Makes likelier, unlikelier", "logits per unit"), pair = make("div", "pair");
    const w = (f.lh.b - f.lh.a) / f.lh.c.length;
    pair.append(logits(f.lt, "up"), logits(f.lb, "down"));
    words.append(pair, below("All words, on a log scale"), small(bars(f.lh.c.map((n) => Math.log1p(n)), "gray",
      (x) => `${digits(f.lh.a + x * w)} to ${digits(f.lh.a + (x + 1) * w)}: ${f.lh.c[x]} words`)),
      axis(digits(f.lh.a), digits(f.lh.b)));
    cards.append(words); }
  const beside = card("Neighbors"), pair = make("div", "pair"), a = make("div"), b = make("div");
  a.append(make("h3", "", "direction, cosine"), near(f.nd.slice(0, 8), (x) => x[1].toFixed(2)));
  b.append(make("h3", "", "fires together"), near(f.co.slice(0, 8), (x) => percent(x[2])));
  if (f.nd.length || f.co.length) { pair.append(a, b); beside.append(pair); cards.append(beside); }
  main.append(cards);
  group(main, f, "Where it is strongest", "", f.top);
  f.groups.forEach((g, n) => { if (g.length) group(main, f, `Sampled: ${fifth(n, f.groups.length)}`, "", g); });
  main.scrollTop = 0;
}
const below = (title) => make("h3", "below", title);
function small(svg) { svg.classList.add("small"); return svg; }
function fifth(n, of) { return n === 0 ? `strongest 1/${of} of its firings` : n === of - 1 ? `weakest 1/${of}`
  : `${n + 1} of ${of}`; }
function group(main, f, title, note, list) { const e = make("section"); e.append(make("h3", "", title));
  list.forEach((c) => e.append(contextRow(f, c))); main.append(e); }

function list() {
  const box = $("list"); box.replaceChildren();
  order.forEach((n, place) => { const f = FEATURES[n], li = make("li");
    li.id = "f" + place; li.setAttribute("role", "option");
    const inside = make("span", "in"); inside.append(...snippet(f)); li.append(make("b", "", String(f.i)), inside);
    li.onclick = () => select(place); box.append(li); });
  $("count").textContent = query ? `${order.length} of ${FEATURES.length} features` : `${FEATURES.length} features`;
}
function select(place) {
  at = Math.max(0, Math.min(order.length - 1, place));
  document.querySelectorAll("#list [aria-selected=true]").forEach((e) => e.setAttribute("aria-selected", "false"));
  const li = $("f" + at);
  if (li) { li.setAttribute("aria-selected", "true"); li.scrollIntoView({ block: "nearest" }); }
  if (FEATURES[order[at]]) history.replaceState(null, "", "#" + FEATURES[order[at]].i);
  show();
}
function go(latent) { if (!order.includes(byLatent.get(latent))) { $("search").value = ""; search(); }
  select(order.indexOf(byLatent.get(latent))); }
function score(f) {
  if (String(f.i) === query) return 1e9;
  let n = 0;
  for (const c of [...f.top, ...f.groups.flat()]) if (textOf(c).includes(query))
    n += [...covered(c)].some((j) => ACTS[c.o + j] !== 0) ? 100 : 1;
  for (const [w] of [...f.lt, ...f.lb]) if (WORDS[w].toLowerCase().includes(query)) n += 10;
  return n;
}
function search() {
  query = $("search").value.toLowerCase();
  order = FEATURES.map((_, n) => n);
  if (query) { const scores = FEATURES.map(score);
    order = order.filter((n) => scores[n] > 0).sort((a, b) => scores[b] - scores[a] || a - b); }
  list(); select(0);
}
function theme() {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("saewb-theme", root.dataset.theme); } catch { /* a file may have no storage */ }
}
try { const kept = localStorage.getItem("saewb-theme"); if (kept) document.documentElement.dataset.theme = kept; }
catch { /* likewise */ }
const tip = $("tip");
document.addEventListener("mousemove", (e) => { const text = e.target._tip && e.target._tip();
  tip.style.display = text ? "block" : "none";
  if (text) { tip.textContent = text; const w = tip.offsetWidth;
    tip.style.left = Math.min(e.clientX + 14, innerWidth - w - 8) + "px"; tip.style.top = (e.clientY + 16) + "px"; } });
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
const wanted = byLatent.get(Number(location.hash.slice(1)));
select(location.hash && wanted !== undefined ? order.indexOf(wanted) : 0);
"""
