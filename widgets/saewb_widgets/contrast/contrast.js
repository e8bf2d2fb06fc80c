const AUC = (v) => (v === null || v === undefined ? "\u2013" : v.toFixed(3));
const tiny = (v) => (v === null || v === undefined ? "\u2013" : v === 0 ? "0" : Math.abs(v) >= 0.001 ? +v.toPrecision(3) + "" : v.toExponential(1));
const HEADS = { auc: ["AUC", "On the texts that choose"], auc_held_out: ["held out", "AUC on the texts held out"], q: ["q", "False discovery rate"],
  p_family: ["p family", "Chance of one such latent anywhere, by permutations"], freq_a: ["in a", "Fraction of texts of a on which it fires"],
  freq_b: ["in b", "Fraction of texts of b on which it fires"], d: ["d", "Cohen's d"] };
const shownAs = (name, v) => (name.startsWith("auc") || name.startsWith("ci") ? AUC(v) : name.startsWith("freq") ? percent(v) : tiny(v));

// Log odds against -log10 q: marks on a canvas, drawn anew when its size, its data or the theme changes.
function volcano({ root, model, on, set }, box) {
  const canvas = make("canvas"), H = 280, LEFT = 40, RIGHT = 12, TOP = 10, BOTTOM = 24;
  canvas.setAttribute("role", "img");
  box.append(canvas);
  let at = [], under = -1;
  const draw = () => {
    const d = model.get("dots"), wide = canvas.clientWidth, dpr = window.devicePixelRatio || 1;
    if (!wide) return;
    [canvas.width, canvas.height] = [Math.round(wide * dpr), Math.round(H * dpr)];
    const ctx = canvas.getContext("2d"), css = getComputedStyle(root), of = (name) => css.getPropertyValue(name);
    ctx.scale(dpr, dpr);
    canvas.dataset.marks = (d.x || []).length;
    at = [];
    if (!(d.x || []).length) return;
    const far = Math.max(1, ...d.x.map(Math.abs)) * 1.05, high = Math.max(d.limit * 1.4, ...d.y) * 1.05;
    const px = (v) => LEFT + ((v + far) / (2 * far)) * (wide - LEFT - RIGHT), py = (v) => TOP + (1 - v / high) * (H - TOP - BOTTOM);
    const line = (x0, y0, x1, y1) => { ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); };
    const text = (label, x, y, align) => { ctx.textAlign = align; ctx.fillText(label, x, y); };
    const step = (span) => [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(span / 4))).find((m) => m >= span / 5.5);
    ctx.font = `11px ${css.fontFamily}`;
    ctx.fillStyle = of("--dim");
    ctx.strokeStyle = of("--line");
    for (let v = 0, s = step(high); v <= high; v += s) { line(LEFT, py(v), wide - RIGHT, py(v)); text(String(+v.toPrecision(3)), LEFT - 6, py(v) + 4, "right"); }
    for (let s = step(2 * far), v = -Math.floor(far / s) * s; v <= far; v += s) text(String(+v.toPrecision(3)), px(v), H - 6, "center");
    line(px(0), TOP, px(0), H - BOTTOM);
    ctx.setLineDash([5, 4]);
    ctx.strokeStyle = of("--dim");
    line(LEFT, py(d.limit), wide - RIGHT, py(d.limit));
    ctx.setLineDash([]);
    const ink = { a: of("--set-a"), b: of("--set-b"), "": of("--mark") };
    at = d.x.map((x, k) => [px(x), py(d.y[k])]);
    ctx.globalAlpha = 0.75;
    at.forEach(([x, y], k) => { ctx.fillStyle = ink[d.sides[k]]; ctx.beginPath(); ctx.arc(x, y, 3, 0, 7); ctx.fill(); });
    ctx.globalAlpha = 1;
    const k = d.latents.indexOf(model.get("selected"));
    if (k >= 0) { ctx.strokeStyle = css.color; ctx.lineWidth = 2; ctx.beginPath(); ctx.arc(...at[k], 6, 0, 7); ctx.stroke(); canvas.dataset.at = at[k].join(","); }
    else delete canvas.dataset.at;
    canvas.setAttribute("aria-label", `Log odds of firing, a against b, against minus log10 of q, for ${count(d.x.length)} latents. The table names them.`);
  };
  const nearest = (e) => { const r = canvas.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top;
    let best = -1, least = 100; // within ten pixels
    at.forEach(([a, b], k) => { const far = (a - x) ** 2 + (b - y) ** 2; if (far < least) { least = far; best = k; } });
    return best; };
  canvas.addEventListener("pointermove", (e) => { under = nearest(e); canvas.style.cursor = under < 0 ? "" : "pointer"; });
  canvas.addEventListener("click", (e) => { const k = nearest(e); if (k >= 0) set({ selected: model.get("dots").latents[k] }); });
  canvas._tip = () => { const d = model.get("dots");
    return under < 0 || !d.latents || under >= d.latents.length ? "" : `${d.latents[under]}\nAUC ${AUC(d.auc[under])}\nlog odds ${tiny(d.x[under])}, \u2212log10 q ${tiny(d.y[under])}`; };
  on("dots selected", draw);
  return redrawOnChange(root, canvas, draw);
}

function contrast(parts) {
  const { body, model, on, set, ask } = parts;
  const split = (text) => text.split(/\n\s*\n/.test(text.trim()) ? /\n\s*\n/ : /\n/).map((s) => s.trim()).filter(Boolean);
  const joined = (texts) => texts.join(texts.some((s) => s.includes("\n")) ? "\n\n" : "\n");
  const inputs = make("div", "inputs");
  const boxes = ["a", "b"].map((name) => {
    const label = make("label", "set " + name), head = make("span", "head"), area = make("textarea");
    area.rows = 6;
    area.placeholder = "a text on each line; an empty line between texts that have lines of their own";
    area.setAttribute("aria-label", `Texts of set ${name}`);
    area.addEventListener("change", () => set({ [name]: split(area.value) }));
    label.append(head, area);
    inputs.append(label);
    const show = () => { const texts = model.get(name);
      head.replaceChildren(make("b", "", name), ` ${count(texts.length)} texts`);
      area.readOnly = texts.some((s) => /\n\s*\n/.test(s));
      if (area.readOnly || JSON.stringify(split(area.value)) !== JSON.stringify(texts)) area.value = joined(texts); };
    on(name, show);
    show();
    return area;
  });
  const send = () => boxes.forEach((area, k) => { if (!area.readOnly) set({ [["a", "b"][k]]: split(area.value) }); });
  const line = make("div", "line"), pools = make("span", "choices"), sides = make("span", "choices");
  const choose = (box, options, trait, label) => { box.setAttribute("role", "group"); box.setAttribute("aria-label", label);
    box.append(...options.map(([value, text]) => { const b = button(text, "", () => set({ [trait]: value })); b.dataset.value = value; return b; }));
    const press = () => [...box.children].forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === model.get(trait))));
    on(trait, press);
    press(); };
  choose(pools, model.get("facts").pools.map((p) => [p, p]), "pool", "Pooling over the tokens of a text");
  choose(sides, Object.entries(model.get("facts").sides), "side", "Which latents are listed");
  const run = button("compare", "run", () => { send(); ask("compare"); }, "Compare the two sets of texts");
  const stale = make("span", "dim", "texts have changed");
  line.append(run, stale, pools, sides, make("span", "gap"), button("code", "", () => ask("code"), "Show the Python code for this"));
  const without = make("dl", "without"), plot = make("section", "card"), lists = make("div", "lists"), list = make("section", "card"), near = make("section", "card page");
  const title = make("h3", "", "Log odds of firing (a against b) and \u2212log10 q"), caption = make("p", "dim");
  plot.append(title);
  const stop = volcano(parts, plot);
  plot.append(caption);
  const rows = make("div", "rows"), table = make("table");
  rows.tabIndex = 0;
  rows.setAttribute("aria-label", "Latents, best first");
  rows.append(table);
  list.append(rows);
  lists.append(list, near);
  near.tabIndex = -1;
  body.append(inputs, line, without, plot, lists);

  const columns = model.get("facts").columns;
  const fill = () => {
    const had = rows.contains(document.activeElement), head = make("tr");
    head.append(make("th", "", "latent"), ...columns.map((c) => { const th = make("th", "", HEADS[c][0]); th.title = HEADS[c][1]; return th; }));
    const labels = model.get("rows").labels || [];
    if (labels.length) head.append(make("th", "name", "label"));
    table.replaceChildren(head, ...(model.get("rows").rows || []).map(([latent, ...values], n) => {
      const tr = make("tr"), first = make("td");
      tr.dataset.latent = latent;
      first.append(make("i", "side " + (values[0] > 0.5 ? "a" : values[0] < 0.5 ? "b" : "")), button(String(latent), "quiet link", () => set({ selected: latent }), `Latent ${latent} on the texts`));
      tr.append(first, ...values.map((v, k) => make("td", "", shownAs(columns[k], v))));
      if (labels.length) { const td = make("td", "name"); td.append(labelOf(labels[n])); tr.append(td); }
      return tr; }));
    list.hidden = plot.hidden = near.hidden = !(model.get("rows").rows || []).length;
    mark();
    if (had) rows.focus({ preventScroll: true }); };
  const mark = () => [...table.rows].forEach((tr) => tr.setAttribute("aria-current", String(+tr.dataset.latent === model.get("selected"))));
  const figures = () => without.replaceChildren(...model.get("baselines").map(([name, auc, note]) => { const e = make("div");
    e.append(make("dt", "", `${name} alone`), make("dd", "", AUC(auc)), make("small", "", note)); return e; }));
  const page = () => {
    const p = model.get("page"), had = near.contains(document.activeElement);
    near.replaceChildren(make("h3", "", p.latent === undefined ? "" : `Latent ${p.latent}`));
    if (p.label) near.firstChild.append(" ", labelOf(p.label));
    if (p.figures) { const f = p.figures, say = make("p", "dim");
      say.textContent = `AUC ${AUC(f.auc)}, held out ${AUC(f.auc_held_out)}${f.ci_low === null ? "" : ` (${AUC(f.ci_low)} to ${AUC(f.ci_high)})`}; mean ${tiny(f.mean_a)} in a, ${tiny(f.mean_b)} in b; fires on ${count(p.n_texts)} of the texts that choose`;
      near.append(say); }
    (p.texts || []).forEach((one) => { const e = make("div", "text"), words = make("span", "words");
      e.append(make("i", "side " + one.side), make("span", "num", tiny(one.value)), words);
      one.tokens.forEach((s, k) => { const w = make("span", "t", shown(s)); w.style.background = heat(one.shares[k]); words.append(w); });
      near.append(e); });
    if (p.texts && !p.texts.length) near.append(make("p", "dim", "fires on none of them"));
    if (had) near.focus({ preventScroll: true }); };
  const old = () => { stale.hidden = !model.get("stale"); };
  on("rows", fill);
  on("selected", mark);
  on("baselines", figures);
  on("page", page);
  on("stale", old);
  on("dots", () => { caption.textContent = model.get("dots").caption || ""; });
  for (const f of [fill, figures, page, old]) f();
  return stop;
}
export default { render: (context) => framed(context, "contrast", contrast) };
