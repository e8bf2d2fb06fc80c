const cosine = (v) => (v < 0 ? "\u2212" : "") + Math.abs(v).toFixed(3);
const small = (v) => (v === 0 ? "0" : v >= 0.001 ? +v.toPrecision(3) + "" : v.toExponential(1));
const SVG = "http://www.w3.org/2000/svg", DASHES = ["", "5 3", "2 3", "8 3 2 3"];
const styled = (e, k) => { e.classList.add("s" + (k % 6)); e.style.strokeDasharray = DASHES[k % 4]; return e; };
const outline = (svg, heights, k) => { // a line over bars, in their coordinates
  const e = styled(document.createElementNS(SVG, "path"), k);
  e.classList.add("outline");
  e.setAttribute("d", heights.map((h, x) => `${x ? "L" : "M"}${x} ${1 - h}H${x + 1}`).join(""));
  svg.append(e); };
const sample = (k) => { const svg = document.createElementNS(SVG, "svg"), e = styled(document.createElementNS(SVG, "path"), k);
  svg.setAttribute("viewBox", "0 0 24 8");
  e.setAttribute("d", "M0 4H24");
  e.classList.add("outline");
  svg.append(e);
  return svg; };

// Largest |cos| against length or density: dots on a canvas, drawn anew when its size, its data or the theme changes.
function scattered({ root, model, on, set }, box) {
  const canvas = make("canvas"), H = 220, LEFT = 40, RIGHT = 10, TOP = 8, BOTTOM = 22, NEVER = 22;
  box.append(canvas);
  canvas.setAttribute("role", "img");
  let at = [], under = -1;
  const scale = () => {
    const { x = [], y = [], log } = model.get("dots"), own = model.get("page").at, wide = canvas.clientWidth;
    const of = (v) => (log ? (v > 0 ? Math.log10(v) : null) : v), xs = [...x, ...(own ? [own[0]] : [])].map(of), there = xs.filter((v) => v !== null);
    let low = there.reduce((a, b) => Math.min(a, b), Infinity), high = there.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!there.length) [low, high] = [0, 1];
    if (high - low < 1e-6 * Math.max(Math.abs(high), 1e-9)) { const room = log ? 0.5 : Math.abs(high) * 0.1 || 0.5; low -= room; high += room; }
    const never = log && there.length < xs.length, left = LEFT + (never ? NEVER : 0), top = Math.max(0.1, y.reduce((a, b) => Math.max(a, b), 0)) * 1.04;
    const px = (v) => (of(v) === null ? LEFT + 6 : left + 6 + ((of(v) - low) / (high - low)) * (wide - left - RIGHT - 12));
    return { px, py: (v) => TOP + (1 - v / top) * (H - TOP - BOTTOM), low, high, top, log, never, wide };
  };
  const draw = () => {
    const dots = model.get("dots"), own = model.get("page").at, wide = canvas.clientWidth, dpr = window.devicePixelRatio || 1;
    if (!wide) return;
    [canvas.width, canvas.height] = [Math.round(wide * dpr), Math.round(H * dpr)];
    const ctx = canvas.getContext("2d"), css = getComputedStyle(root), dim = css.getPropertyValue("--dim"), line = css.getPropertyValue("--line"), hot = css.getPropertyValue("--hot");
    ctx.scale(dpr, dpr);
    at = [];
    canvas.dataset.dots = (dots.x || []).length;
    if (!(dots.x || []).length) { delete canvas.dataset.at; return; }
    const s = scale();
    ctx.font = `11px ${css.fontFamily}`;
    const text = (label, x, y, align) => { ctx.fillStyle = dim; ctx.textAlign = align; ctx.fillText(label, x, y); };
    const rule = (x0, y0, x1, y1) => { ctx.strokeStyle = line; ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); };
    const unit = s.top > 0.5 ? 0.25 : s.top > 0.2 ? 0.1 : 0.05;
    for (let v = 0; v <= s.top; v += unit) { rule(LEFT, s.py(v), wide - RIGHT, s.py(v)); text(String(+v.toFixed(2)), LEFT - 6, s.py(v) + 4, "right"); }
    const span = s.high - s.low, step = s.log ? Math.max(1, Math.ceil(span / 6)) : [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(span / 4))).find((m) => m >= span / 5.5);
    const ticks = [];
    for (let v = Math.ceil(s.low / step - 1e-9); v * step <= s.high + 1e-9 * step; v++) ticks.push(s.log ? 10 ** (v * step) : v * step);
    if (ticks.length < 2 && s.log) ticks.splice(0, ticks.length, 10 ** s.low, 10 ** s.high);
    ticks.forEach((v) => { const x = s.px(v); rule(x, H - BOTTOM, x, H - BOTTOM + 4); text(small(+v.toPrecision(3)), Math.min(x, wide - 14), H - 5, "center"); });
    if (s.never) text("never", LEFT + 6, H - 5, "center");
    ctx.fillStyle = `rgba(${hot}, ${dots.x.length > 1500 ? 0.45 : 0.65})`;
    at = dots.x.map((x, k) => [s.px(x), s.py(dots.y[k])]);
    at.forEach(([x, y]) => { ctx.beginPath(); ctx.arc(x, y, 2, 0, 7); ctx.fill(); });
    if (own) { const [x, y] = [s.px(own[0]), s.py(own[1])];
      ctx.strokeStyle = css.color;
      ctx.lineWidth = 2;
      ctx.beginPath(); ctx.arc(x, y, 5.5, 0, 7); ctx.stroke();
      canvas.dataset.at = `${x},${y}`; canvas.dataset.of = model.get("page").direction; }
    canvas.setAttribute("aria-label", `Largest absolute cosine of ${count(dots.x.length)} directions against ${dots.label}. The lists below name them.`);
  };
  const nearest = (e) => { const r = canvas.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top;
    let best = -1, least = 100; // within ten pixels
    at.forEach(([a, b], k) => { const far = (a - x) ** 2 + (b - y) ** 2; if (far < least) { least = far; best = k; } });
    return best; };
  canvas.addEventListener("pointermove", (e) => { under = nearest(e); canvas.style.cursor = under < 0 ? "" : "pointer"; });
  canvas.addEventListener("click", (e) => { const k = nearest(e); if (k >= 0) set({ selected: model.get("dots").latents[k] }); });
  canvas._tip = () => { const d = model.get("dots"); if (under < 0 || !d.latents || under >= d.latents.length) return "";
    const x = d.log ? (d.x[under] ? `fires on ${percent(d.x[under])} of tokens` : "never fires") : `length ${digits(d.x[under])}`;
    return `${d.latents[under]}\nlargest |cos| ${cosine(d.y[under])}\n${x}`; };
  on("dots page", draw);
  return redrawOnChange(root, canvas, draw);
}

function crowd(parts) {
  const { body, model, on, set, ask } = parts;
  const line = make("div", "line"), all = make("div", "beside"), figures = make("dl", "figures"), hists = make("div", "hists"), lists = make("div", "lists");
  const names = make("div", "sides"), sides = make("div", "sides"), list = make("section", "card"), near = make("section", "card near"), dots = make("section", "card dots");
  names.setAttribute("role", "group");
  names.setAttribute("aria-label", "Which is looked at");
  lists.append(list, near);
  line.append(names, sides, make("span", "gap"), button("code", "", () => ask("code"), "Show the Python code for this"));
  body.append(line, all, figures, hists, dots, lists);

  const card = (title, note) => { const e = make("section", "card"), h = make("h3", "", title);
    if (note) h.append(" ", make("small", "", note)); e.append(h); return e; };
  const axis = (...labels) => { const e = make("div", "axis"); labels.forEach((l) => e.append(make("span", "", l))); return e; };
  // What is in focus stays there: what is drawn anew takes the focus along, or the notebook would hear the next key.
  const choice = (box, options, trait, label, hint, pick) => { const had = box.contains(document.activeElement);
    box.replaceChildren(...options.map((s) => { const b = button(label(s), "", () => pick(s), hint(s)); b.dataset.value = s; return b; }));
    box.hidden = !options.length;
    pressed(box, trait);
    if (had) (box.querySelector("[aria-pressed=true]") || near).focus({ preventScroll: true }); };
  const pressed = (box, trait) => [...box.children].forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === model.get(trait))));
  const same = (s) => s;
  const which = () => { if (!names.children.length)
    choice(names, model.get("facts").names, "which", same, (s) => `Look at ${s}`, look); };
  const look = (name) => { const row = (model.get("beside").rows || []).find((r) => r.name === name);
    set(row && row.why === "no encoder" ? { which: name, side: "decoder" } : { which: name }); };
  const tabs = () => { which();
    choice(sides, model.get("facts").sides, "side", same, (s) => (s === "decoder" ? "What latents write" : "What latents read"), (s) => set({ side: s }));
    const has = model.get("facts").scatters;
    choice(across, has.length > 1 ? has : [], "scatter", (s) => (s === "norm" ? "length" : s), (s) => `Against the ${s === "norm" ? "length" : s}`, (s) => set({ scatter: s })); };
  const chosen = () => { pressed(names, "which"); pressed(sides, "side"); pressed(across, "scatter"); };
  const beside = () => {
    const b = model.get("beside"), many = model.get("facts").names.length > 0;
    all.hidden = !many;
    figures.hidden = many;
    if (!many) return;
    const t = make("table"), cell = (tag, text) => make(tag, "", text), top = make("tr");
    top.append(...["", "directions", "dimensions", ...(b.heads || [])].map((h) => cell("th", h)));
    t.append(top);
    (b.rows || []).forEach((r) => { const e = make("tr"), first = cell("th", r.name);
      first.scope = "row";
      e.setAttribute("aria-current", String(r.name === model.get("which")));
      if (r.figures) e.append(first, cell("td", count(r.n)), cell("td", count(r.d)), ...r.figures.map((v, k) => cell("td", k < r.figures.length - 1 ? v.toFixed(3) : digits(v))));
      else { const why = cell("td", r.why); why.colSpan = 2 + b.heads.length; why.className = "why"; e.append(first, why); }
      t.append(e); });
    all.replaceChildren(t, ...(b.note ? [make("p", "", b.note)] : []));
  };
  const overview = () => {
    const f = model.get("figures");
    figures.replaceChildren();
    hists.replaceChildren();
    if (!f.figures) return;
    f.figures.forEach(([name, value, note]) => { const e = make("div");
      e.append(make("dt", "", name), make("dd", "", digits(value)), make("small", "", note)); figures.append(e); });
    // The others as lines, as many counts in all as of the one that is looked at.
    const sum = (a) => a.reduce((x, y) => x + y, 0) || 1, order = model.get("facts").names, own = f.of;
    const others = Object.entries(model.get("beside").outlines || {}).filter(([name]) => name !== own);
    const chart = (where, counts, key, height, how) => {
      const lines = others.map(([name, o]) => [name, o[key].map((c) => height((c * sum(counts)) / sum(o[key])))]), drawn = counts.map(height);
      const most = Math.max(1e-12, ...drawn, ...lines.flatMap(([, l]) => l)), svg = bars(drawn, { ...how, most });
      lines.forEach(([name, l]) => outline(svg, l.map((h) => h / most), order.indexOf(name)));
      where.append(svg); };
    const n = f.cosines.length, at = (x) => -1 + (2 * x) / n;
    const pairs = card("Cosines of all pairs", "on a log scale");
    chart(pairs, f.cosines, "cosines", Math.log1p, { label: "Histogram of cosines between all pairs",
      tip: (x) => `${cosine(at(x))} to ${cosine(at(x + 1))}: ${count(f.cosines[x])} pairs` });
    pairs.append(axis("\u22121", "0", "1"));
    const m = f.largest.length, one = card("Largest |cos| of each direction");
    chart(one, f.largest, "largest", (c) => c, { cls: "gray", label: "Histogram of the largest absolute cosine of each direction",
      tip: (x) => `${(x / m).toFixed(2)} to ${((x + 1) / m).toFixed(2)}: ${count(f.largest[x])} directions` });
    one.append(axis("0", "1"));
    hists.append(pairs, one);
    if (!others.length) return;
    const legend = make("div", "legend"), mine = make("span", "key");
    mine.append(make("i"), own);
    legend.append(mine, ...others.map(([name]) => { const e = make("span", "key"); e.append(sample(order.indexOf(name)), name); return e; }));
    hists.append(legend);
  };
  const dotHead = make("h3"), across = make("span", "sides"), dotName = make("span"), dotCaption = make("p", "none");
  dotHead.append(dotName, across);
  dots.append(dotHead);
  const stop = scattered(parts, dots);
  dots.append(dotCaption);
  const titled = () => { const d = model.get("dots");
    dotName.textContent = `Largest |cos| of each direction against ${d.label || ""}`;
    dotCaption.textContent = d.caption || "";
    dotCaption.hidden = !d.caption; };
  const link = (i) => button(String(i), "quiet link", () => set({ selected: i }), `Neighbors of ${i}`);
  const label = (text) => { const e = make("em", "label", shown(text || "")); if (text) e.title = text; return e; };
  const bar = (v) => { const e = make("span", "bar"), b = make("i");
    b.style.width = 100 * Math.abs(v) + "%";
    if (v < 0) b.className = "minus";
    e.append(b); return e; };
  const head = make("h3"), name = make("span"), rows = make("div", "rows");
  head.append(name, button("turn round", "quiet", () => set({ closest_first: !model.get("closest_first") }), "Turn the order round"));
  rows.tabIndex = 0;
  list.append(head, rows);
  let first = null;
  const table = () => { const had = rows.contains(document.activeElement), at = first === model.get("closest_first") ? rows.scrollTop : 0;
    first = model.get("closest_first");
    name.textContent = first ? "Closest to another" : "With the most room";
    rows.setAttribute("aria-label", name.textContent);
    rows.replaceChildren(...(model.get("rows").rows || []).map(([i, , j, c, a, b]) => { const e = make("div", "row");
      e.dataset.direction = i;
      e.append(link(i), label(a), bar(c), make("span", "num", cosine(c)), link(j), label(b));
      return e; }));
    rows.scrollTop = at;
    marked();
    if (had) rows.focus({ preventScroll: true }); };
  const marked = () => [...rows.children].forEach((e) => e.setAttribute("aria-current", String(+e.dataset.direction === model.get("selected"))));
  const page = () => {
    const p = model.get("page"), had = near.contains(document.activeElement);
    near.replaceChildren(make("h3", "", p.direction === undefined ? "" : `Nearest to ${p.direction} ${shown(p.label || "")}`.trim()));
    (p.neighbors || []).forEach(([j, c, name]) => { const e = make("div", "row");
      e.append(link(j), label(name), bar(c), make("span", "num", cosine(c))); near.append(e); });
    if (had) near.focus({ preventScroll: true });
  };
  near.tabIndex = -1;
  on("facts", tabs);
  on("which side scatter", chosen);
  on("beside which", beside);
  on("figures beside", overview);
  on("dots", titled);
  on("rows closest_first", table);
  on("selected", marked);
  on("page", page);
  for (const f of [tabs, beside, overview, titled, table, page]) f();
  return stop;
}
export default { render: (context) => framed(context, "crowd", crowd) };
