// Colors of the levels 0..255: 0 not defined, 128 zero; blue and orange, which the color-blind tell apart.
const ENDS = { light: [[33, 102, 172], [247, 247, 247], [200, 84, 10], [205, 205, 205]],
  dark: [[96, 165, 250], [24, 26, 30], [245, 150, 60], [74, 76, 82]] };
const colors = (theme) => { // as words of four bytes, one to a pixel
  const [cold, paper, warm, none] = ENDS[theme] || ENDS.light, rgba = new Uint8ClampedArray(1024);
  for (let k = 0; k < 256; k++) { const a = (Math.abs(k - 128) / 127) ** 0.8, end = k < 128 ? cold : warm;
    for (let c = 0; c < 3; c++) rgba[4 * k + c] = k === 0 ? none[c] : paper[c] + (end[c] - paper[c]) * a;
    rgba[4 * k + 3] = 255; }
  return new Uint32Array(rgba.buffer);
};
const painted = (levels, wide, high, table) => { const image = new ImageData(wide, high), to = new Uint32Array(image.data.buffer), c = document.createElement("canvas");
  for (let k = 0; k < to.length; k++) to[k] = table[levels[k]];
  [c.width, c.height] = [wide, high];
  c.getContext("2d").putImageData(image, 0, 0);
  return c; };
const number = (v) => { const a = Math.abs(v); return (v < 0 ? "\u2212" : "") + (a && a < 0.001 ? a.toExponential(1) : a.toFixed(3)); };
const unpacked = (s) => Uint8Array.from(atob(s), (c) => c.charCodeAt(0));
const bytes = (b) => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength);

function map({ root, model, on, ask, set }, side) {
  const [n, m] = model.get("facts").shape, two = model.get("facts").two, canvas = make("canvas", "map"), box = make("div", "box"), caption = make("div", "caption");
  const bar = make("div", "scale"), strip = make("canvas"), low = make("span"), high = make("span");
  const maps = make("div", two ? "maps two" : "maps"), charts = [canvas, ...(two ? [make("canvas", "twin")] : [])];
  charts.forEach((c) => { c.tabIndex = 0; c.setAttribute("role", "img"); [c.width, c.height] = [560, 560]; maps.append(c); });
  [strip.width, strip.height] = [255, 1];
  bar.append(low, strip, high);
  box.append(maps, bar, caption);
  side.append(box);
  let tile = null, seq = 0, waiting = 0, again = false, plain = false, at = null, drag = null, began = 0;
  let drawn = [], theme = "";
  const words = new Map(), view = () => model.get("view");
  const request = () => { if (waiting) { again = true; return; } waiting = ++seq; began = performance.now(); ask("tile", { seq: waiting, view: view(), plain }); };
  const draw = () => {
    if (!tile) return;
    const table = colors(root.dataset.theme), [h, w] = tile.shape;
    if (theme !== root.dataset.theme || drawn.tile !== tile) { theme = root.dataset.theme;
      drawn = tile.levels.map((levels) => painted(levels, w, h, table));
      drawn.tile = tile;
      strip.getContext("2d").drawImage(painted(Uint8Array.from({ length: 255 }, (_, k) => k + 1), 255, 1, table), 0, 0); }
    const [r0, r1, c0, c1] = view(), s = tile.step, [tr, , tc] = tile.window, sx = canvas.width / (c1 - c0), sy = canvas.height / (r1 - r0);
    charts.forEach((chart, k) => { const ctx = chart.getContext("2d");
      ctx.clearRect(0, 0, chart.width, chart.height);
      ctx.imageSmoothingEnabled = false;
      if (drawn[k]) ctx.drawImage(drawn[k], (tc - c0) * sx, (tr - r0) * sy, w * s * sx, h * s * sy); });
    [low.textContent, high.textContent] = [number(-tile.scale), number(tile.scale)];
    caption.textContent = `rows ${count(r0)} to ${count(r1)}, columns ${count(c0)} to ${count(c1)}; ${tile.caption}`;
    charts.forEach((c, k) => c.setAttribute("aria-label", `${two ? ["First ", "Second "][k] : ""}${model.get("facts").what} matrix, ${caption.textContent}. Arrows move, plus and minus zoom, 0 shows all.`));
    canvas.dataset.seq = tile.tile;
    canvas.dataset.ms = (performance.now() - began).toFixed(0);
    canvas.dataset.view = tile.window.join();
    canvas.dataset.final = tile.final;
  };
  const finer = settled(() => { if (tile && !tile.final && !waiting) ask("refine"); }, 400);
  const heard = (msg, buffers) => {
    if (msg.peek) { words.set(msg.peek.join(), msg.tokens); return; }
    if (msg.tile !== waiting) return;
    waiting = 0;
    if (msg.none) return; // there is no matrix yet
    const levels = msg.levels ? msg.levels.map(unpacked) : (buffers || []).map(bytes);
    const whole = levels.length === msg.n && levels.every((l) => l.length === msg.shape[0] * msg.shape[1]);
    if (!whole) { if (!plain) { plain = true; request(); } return; } // binary buffers get lost here
    tile = { ...msg, levels };
    draw();
    if (again) { again = false; request(); } else if (!msg.final) finer();
  };
  model.on("msg:custom", heard);
  const go = (r, c, hr, hc) => {
    hr = Math.round(Math.min(n, Math.max(4, hr))); hc = Math.round(Math.min(m, Math.max(4, hc)));
    hr = Math.min(n, hr); hc = Math.min(m, hc);
    const r0 = Math.round(Math.min(n - hr, Math.max(0, r))), c0 = Math.round(Math.min(m - hc, Math.max(0, c)));
    set({ view: [r0, r0 + hr, c0, c0 + hc] });
  };
  const zoom = (k, fx = 0.5, fy = 0.5) => { const [r0, r1, c0, c1] = view(), h = (r1 - r0) * k, w = (c1 - c0) * k;
    go(r0 + fy * (r1 - r0 - h), c0 + fx * (c1 - c0 - w), h, w); };
  const move = (dr, dc) => { const [r0, r1, c0, c1] = view(); go(r0 + dr * (r1 - r0), c0 + dc * (c1 - c0), r1 - r0, c1 - c0); };
  const where = (e) => { const r = e.currentTarget.getBoundingClientRect(); return [(e.clientX - r.left) / r.width, (e.clientY - r.top) / r.height]; };
  const cell = (e) => { if (!tile) return null; const [fx, fy] = where(e), [r0, r1, c0, c1] = view();
    const i = Math.floor(r0 + fy * (r1 - r0)), j = Math.floor(c0 + fx * (c1 - c0)), s = tile.step;
    const y = Math.floor((i - tile.window[0]) / s), x = Math.floor((j - tile.window[2]) / s);
    if (y < 0 || x < 0 || y >= tile.shape[0] || x >= tile.shape[1]) return null;
    const values = tile.levels.map((levels) => { const l = levels[y * tile.shape[1] + x]; return l ? number(((l - 128) / 127) * tile.scale) : "not defined"; });
    return { i, j, value: values.length > 1 ? `${values[0]} and ${values[1]}` : values[0], row: tile.rows && tile.rows[y], col: tile.cols && tile.cols[x] }; };
  const listen = (name, f, options) => charts.forEach((c) => c.addEventListener(name, f, options));
  listen("wheel", (e) => { e.preventDefault(); zoom(Math.exp(Math.max(-120, Math.min(120, e.deltaY)) * 0.004), ...where(e)); }, { passive: false });
  listen("pointerdown", (e) => { drag = { at: where(e), view: view(), moved: false }; e.currentTarget.setPointerCapture(e.pointerId); });
  listen("pointermove", (e) => { at = cell(e); if (at && at.row !== undefined) peek(); if (!drag) return;
    const [x, y] = where(e), [r0, r1, c0, c1] = drag.view, dx = x - drag.at[0], dy = y - drag.at[1];
    if (Math.abs(dx) + Math.abs(dy) > 0.01) { drag.moved = true; go(r0 - dy * (r1 - r0), c0 - dx * (c1 - c0), r1 - r0, c1 - c0); } });
  listen("pointerup", (e) => { const moved = drag && drag.moved, c = cell(e); drag = null;
    if (moved || !c) return;
    if (c.row !== undefined) set({ pair: [c.row, c.col] }); else zoom(0.25, ...where(e)); });
  listen("dblclick", () => { const c = tile && tile.rows; if (!c) zoom(0.5); });
  const peek = throttled(() => { if (at && at.row !== undefined && !words.has(`${at.row},${at.col}`)) ask("peek", { row: at.row, col: at.col }); }, 150);
  const tip = () => { if (!at) return ""; const v = at.value;
    if (at.row === undefined) return `places ${count(at.i)}, ${count(at.j)}\n${tile.caption}: ${v}`;
    const [a, b] = words.get(`${at.row},${at.col}`) || [[], []], list = (w) => (w.length ? "  " + w.map(shown).join(" \u00b7 ") : "");
    return `${at.row}${list(a)}\n${at.col}${list(b)}\n${model.get("facts").what} ${v}`; };
  charts.forEach((c) => { c._tip = tip; });
  listen("keydown", (e) => {
    const f = { ArrowUp: () => move(-0.25, 0), ArrowDown: () => move(0.25, 0), ArrowLeft: () => move(0, -0.25), ArrowRight: () => move(0, 0.25),
      "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => go(0, 0, n, m) }[e.key];
    if (f) { e.preventDefault(); e.stopPropagation(); f(); } });
  on("view", () => { draw(); request(); });
  on("version", request);
  const themed = new MutationObserver(draw);
  themed.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  request();
  return { zoom, all: () => go(0, 0, n, m), stop: () => { themed.disconnect(); model.off("msg:custom", heard); } };
}

function correlation(parts) {
  const { body, model, on, ask, set } = parts, line = make("div", "line"), main = make("div", "main"), left = make("div"), right = make("div", "right");
  if (model.get("facts").two) parts.root.classList.add("pairwise");
  body.append(line, main);
  main.append(left, right);
  const chart = map(parts, left), order = make("select"), cells = make("select"), done = make("span", "none"), again = button("run again", "", () => ask("again"), "Begin anew what was stopped");
  order.setAttribute("aria-label", "Order");
  cells.setAttribute("aria-label", "What a cell shows");
  const orders = () => { order.replaceChildren(...model.get("facts").orders.map((o) => new Option("by " + o, o))); order.value = model.get("order"); };
  for (const c of ["strongest", "mean"]) cells.append(new Option(c + " in each cell", c));
  order.addEventListener("change", () => set({ order: order.value }));
  cells.addEventListener("change", () => set({ cells: cells.value }));
  const stop = button("stop", "", () => ask("stop"), "Stop looking through the entries");
  line.append(order, cells, button("+", "", () => chart.zoom(0.5), "Zoom in"), button("\u2212", "", () => chart.zoom(2), "Zoom out"),
    button("all", "", chart.all, "Show all"), done, stop, again, make("span", "gap"), button("code", "", () => ask("code"), "Show the Python code for this"));
  const chosen = () => { order.value = model.get("order"); cells.value = model.get("cells"); };
  let timer = null;
  const busy = () => { const b = !!model.get("busy"), had = [stop, again].includes(document.activeElement);
    stop.hidden = !b; again.hidden = b || model.get("progress") === 1;
    if (had) (b ? stop : again.hidden ? order : again).focus(); // or the notebook would hear the next key
    if (b && !timer) timer = setInterval(() => ask("progress"), 500);
    if (!b && timer) { clearInterval(timer); timer = null; } };
  const share = () => { const p = model.get("progress"); done.textContent = p > 0 && p < 1 ? `${Math.round(100 * p)} % looked through` : ""; };
  const figures = make("dl", "figures"), list = make("section", "card"), page = make("section", "card pair");
  right.append(figures, list, page);
  const link = (i, j) => button(`${i}, ${j}`, "quiet link", () => set({ pair: [i, j] }), `Open the pair ${i} and ${j}`);
  const table = () => { const f = model.get("figures");
    figures.replaceChildren(...(f.figures || []).map(([name, v]) => { const e = make("div"); e.append(make("dt", "", name), make("dd", "", number(v))); return e; }));
    const rows = make("div", "rows");
    rows.tabIndex = 0;
    rows.setAttribute("aria-label", "Strongest pairs");
    (f.pairs || []).forEach(([i, j, v, a, b]) => { const e = make("div", "row"), names = a || b ? `${shown(a)} \u00b7 ${shown(b)}` : "";
      const label = make("em", "label", names); label.title = names;
      e.append(link(i, j), label, make("span", "num", number(v))); rows.append(e); });
    list.replaceChildren(make("h3", "", "Strongest pairs"), rows);
    list.hidden = !(f.pairs || []).length; };
  const one = (s) => { const e = make("div", "one"), p = s.page;
    e.append(make("h4", "", `${s.feature} ${shown(s.label)}`.trim()));
    if (p) { e.append(make("p", "none", `fires on ${percent(p.density)} of tokens, largest ${digits(p.max)}`));
      if (p.histogram.counts.length) e.append(bars(p.histogram.counts, { cls: "gray small", label: `Activations of ${s.feature}`, tip: (x) => count(p.histogram.counts[x]) + " tokens" }));
      p.top.slice(0, 4).forEach((c) => { const r = make("div", "context");
        c.words.slice(Math.max(0, c.at - 5), c.at + 3).forEach((w, k) => { const j = k + Math.max(0, c.at - 5), t = make("span", "t" + (j === c.at ? " peak" : ""), shown(p.words[w])), a = Math.abs(c.acts[j]) / p.scale;
          if (a > 0) t.style.background = `rgba(var(--hot), ${0.1 + 0.75 * Math.min(1, a)})`;
          r.append(t); }); e.append(r); }); }
    else if (s.fires !== null) e.append(make("p", "none", `fires on ${count(s.fires)} tokens`));
    const near = make("p", "none", "strongest with ");
    near.append(s.near.map(([j, v, name]) => `${j}${name ? " " + shown(name) : ""} (${number(v)})`).join(", "));
    if (s.near.length) e.append(near);
    return e; };
  const pair = () => { const p = model.get("page");
    page.hidden = !p.sides;
    if (!p.sides) return;
    const both = p.together === null ? "" : `, together on ${count(p.together)} of ${count(p.n_tokens)} tokens`, two = make("div", "two");
    two.append(...p.sides.map(one));
    page.replaceChildren(make("h3", "", `${p.sides[0].feature} and ${p.sides[1].feature}: ${p.value === null ? "not defined" : number(p.value)}${p.second === undefined ? "" : ` and ${p.second === null ? "not defined" : number(p.second)}`}${both}`), two); };
  on("order cells", chosen);
  on("busy progress", busy);
  on("facts", orders);
  on("progress", share);
  on("figures", table);
  on("page", pair);
  for (const f of [orders, chosen, busy, share, table, pair]) f();
  return () => { clearInterval(timer); chart.stop(); };
}
export default { render: (context) => framed(context, "matrix", correlation) };
