const NS = "http://www.w3.org/2000/svg";
const draw = (tag, at, text) => { const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(at)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e; };
const W = 320, H = 150, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const figure = (v) => (v < 0 ? "\u2212" : "") + (Number.isInteger(v) && Math.abs(v) < 1e6 ? count(Math.abs(v)) : digits(Math.abs(v)));
// Labels of an axis, all with the same number of digits, so that no two are equal.
const tickLabels = (values, log) => {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0]) || 1, most = Math.max(...values.map(Math.abs));
  const places = Math.max(0, Math.min(6, Math.ceil(-Math.log10(step) - 1e-9))), power = (v) => Math.floor(Math.log10(v) + 1e-9);
  return values.map((v) => (log ? (v > -4 && v < 5 ? count(+(10 ** v).toPrecision(2)) : "1e" + +v.toPrecision(3)) : v === 0 ? "0"
    : most < 1e-3 || most >= 1e6 ? v.toExponential(Math.max(0, Math.min(4, power(most) - power(step)))) : v.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places })));
};
const short = (n) => (n >= 1e9 ? +(n / 1e9).toPrecision(3) + "B" : n >= 1e6 ? +(n / 1e6).toPrecision(3) + "M"
  : n >= 1e4 ? +(n / 1e3).toPrecision(3) + "k" : count(n));
const rate = (v) => (v >= 1e-3 ? +(100 * v).toPrecision(2) + " %" : v.toExponential(1).replace(".0e", "e"));
const DASHES = ["", " dashed", " dotted", " mixed"]; // after every eight colors
const color = (i) => `s${i % 8}` + DASHES[Math.floor(i / 8) % 4];
const swatch = (i) => { const e = draw("svg", { viewBox: "0 0 22 4", class: "swatch" });
  e.append(draw("polyline", { points: "0,2 22,2", class: color(i) })); return e; };
const clock = (s) => { const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60, two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`; };
// Two to five round numbers in a range.
const ticks = (low, high, log) => {
  if (log) {
    const out = [];
    for (let p = Math.ceil(low - 1e-9); p <= high + 1e-9; p += Math.max(1, Math.ceil((high - low) / 4))) out.push(p);
    if (out.length > 1) return out;
  }
  const span = high - low || Math.abs(high) || 1, raw = span / 4.5, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw), out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return out;
};

function training({ body, model, on, set, ask }) {
  const form = make("section", "form"), runs = make("div", "runs"), line = make("div", "line"), charts = make("div", "charts");
  body.append(form, runs, line, charts);

  // -- the runs
  const rows = new Map();
  const row = (name) => {
    const e = make("section", "run"), head = make("div", "head"), bar = make("div", "bar"), fill = bar.appendChild(make("i"));
    const title = make("b", "", name), state = make("span", "state"), where = make("span", "where"), acts = make("span", "acts");
    e.setAttribute("aria-label", `Run ${name}`);
    bar.setAttribute("role", "progressbar");
    bar.setAttribute("aria-label", `Progress of ${name}`);
    const act = (what, hint) => button(what, "", () => ask(what, { run: name }), hint);
    const buttons = { pause: act("pause", `Pause ${name} after this step`), resume: act("resume", `Resume ${name}`),
      stop: act("stop", `Stop ${name} after this step, with a checkpoint if it has a folder`),
      again: button("refresh", "", () => ask("refresh"), `Check whether ${name} has continued`) };
    acts.append(...Object.values(buttons), act("code", `Show the Python code of a run equal to ${name}`));
    const more = make("div", "more");
    head.append(title, state, where, acts);
    e.append(head, bar, more);
    return { e, state, where, bar, fill, buttons, more };
  };
  const statuses = () => {
    const runsNow = model.get("status"), names = new Set(runsNow.map((s) => s.name));
    for (const [name, r] of rows) if (!names.has(name)) { r.e.remove(); rows.delete(name); }
    runsNow.forEach((s) => {
      if (!rows.has(s.name)) { rows.set(s.name, row(s.name)); runs.append(rows.get(s.name).e); }
      const r = rows.get(s.name), parts = [s.before || `${count(s.n_tokens)} of ${count(s.total)} tokens`];
      if (s.speed) parts.push(`${count(s.speed)} tokens/s`);
      if (s.state === "running" && s.left !== null && s.left !== undefined) parts.push(`${clock(s.left)} left`);
      r.state.textContent = s.state;
      r.e.dataset.state = s.state;
      r.e.classList.toggle("before", !!s.before);
      r.where.textContent = parts.join(" \u00b7 ");
      r.fill.style.width = 100 * s.frac + "%";
      r.bar.setAttribute("aria-valuenow", Math.round(100 * s.frac));
      r.bar.setAttribute("aria-valuetext", parts[0]);
      r.buttons.pause.hidden = !(s.here && s.state === "running");
      r.buttons.resume.hidden = !(s.here && s.state === "paused");
      r.buttons.stop.hidden = !(s.here && (s.state === "running" || s.state === "paused"));
      r.buttons.again.hidden = s.here || s.state === "running" || s.state === "finished";
      const details = JSON.stringify([s.error, s.notes, s.resume]);
      if (r.details === details) return;
      r.details = details;
      r.more.replaceChildren();
      if (s.error) r.more.append(make("pre", "bad", s.error));
      (s.notes || []).forEach((n) => r.more.append(make("p", "", n)));
      if (s.resume) r.more.append(make("p", "", s.here ? "To resume it:" : "If it is not running elsewhere, to resume it:"),
        make("pre", "code", s.resume));
    });
  };

  // -- the curves
  const shownSeries = () => { const hidden = new Set(model.get("hidden"));
    return model.get("series").map((s, i) => ({ ...s, i })).filter((s) => !hidden.has(s.label)); };
  const legend = () => {
    const all = model.get("series"), hidden = model.get("hidden");
    const focused = line.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    line.replaceChildren();
    if (!all.length) return;
    if (all.length > 1) all.forEach((s, i) => {
      const off = hidden.includes(s.label), b = button("", "key", () =>
        set({ hidden: off ? hidden.filter((l) => l !== s.label) : [...hidden, s.label] }), `Show or hide ${s.label}`);
      b.append(swatch(i), make("span", "", s.label));
      b.setAttribute("aria-pressed", String(!off));
      b.dataset.key = s.label;
      line.append(b);
    });
    const scale = make("select");
    for (const [value, text] of [["auto", "scale: auto"], ["linear", "scale: linear"], ["log", "scale: log"]]) scale.append(new Option(text, value));
    scale.value = model.get("scale");
    scale.setAttribute("aria-label", "Scale of loss, L0 and FVU");
    scale.addEventListener("change", () => set({ scale: scale.value }));
    scale.dataset.key = "";
    line.append(make("span", "gap"), scale);
    if (focused !== undefined) [...line.querySelectorAll("[data-key]")].find((b) => b.dataset.key === focused)?.focus();
  };
  const cardOf = (name, title, note, last, summary) => {
    const card = make("section", "card"), head = make("h3", "", title), svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", class: "curves" });
    card.dataset.figure = name;
    head.append(make("span", "last", last));
    head._tip = () => note;
    svg.setAttribute("aria-label", `${title}: ${summary || "no data yet"}`);
    card.append(head, svg);
    if (!summary) svg.append(draw("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "no data yet"));
    return [card, svg];
  };
  const chart = ([name, title, note, may]) => {
    let series = shownSeries().filter((s) => s.lines[name]).map((s) => {
      const [k, values] = s.lines[name];
      return { ...s, pairs: s.tokens[k].map((x, j) => [x, values[j]]) };
    }).filter((s) => s.pairs.length);
    const every = series.flatMap((s) => s.pairs.map((p) => p[1])), lowest = Math.min(...every), scale = model.get("scale");
    const log = may && (scale === "log" || (scale === "auto" && lowest > 0 && Math.max(...every) > 30 * lowest));
    if (log) series = series.map((s) => ({ ...s, pairs: s.pairs.filter(([, v]) => v > 0) })).filter((s) => s.pairs.length);
    const summary = series.map((s) => `${s.label} ${figure(s.pairs.at(-1)[1])} at ${count(s.pairs.at(-1)[0])} tokens`).join("; ");
    const [card, svg] = cardOf(name, title, note, series.length === 1 ? figure(series[0].pairs.at(-1)[1]) : "", summary);
    if (!series.length) return card;
    card.dataset.scale = log ? "log" : "linear";
    const of = (v) => (log ? Math.log10(v) : v), ys = series.flatMap((s) => s.pairs.map((p) => of(p[1])));
    let low = Math.min(...ys), high = Math.max(...ys);
    const minSpan = log ? 0.1 : 0.04 * Math.abs(high), lacks = (minSpan - (high - low)) / 2; // an axis of at least this span, so that a flat curve looks flat
    if (lacks > 0) { low -= lacks; high += lacks; }
    const right = Math.max(...series.map((s) => s.pairs.at(-1)[0])), pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    if (!log && low >= 0 && low < 0.35 * high) low = 0; else low = low >= 0 && !log ? Math.max(0, low - pad) : low - pad;
    high += pad;
    const px = (x) => LEFT + ((W - LEFT - RIGHT) * x) / right, py = (v) => TOP + ((H - TOP - BOTTOM) * (high - v)) / (high - low);
    const at = ticks(low, high, log), labels = tickLabels(at, log);
    at.forEach((v, j) => svg.append(draw("line", { x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v), class: "grid" }),
      draw("text", { x: LEFT - 5, y: py(v) + 3.5, "text-anchor": "end" }, labels[j])));
    ticks(0, right).forEach((v) => svg.append(draw("text", { x: px(v), y: H - 6,
      "text-anchor": px(v) > W - 28 ? "end" : v === 0 ? "start" : "middle" }, short(Math.round(v)))));
    series.forEach((s) => {
      const cls = color(s.i), at = s.pairs.map(([x, v]) => [px(x), py(of(v))]);
      if (at.length < 25) at.forEach(([cx, cy]) => svg.append(draw("circle", { cx, cy, r: 2, class: cls })));
      if (at.length > 1) svg.append(draw("polyline", { points: at.map((p) => p.map((c) => c.toFixed(1)).join()).join(" "), class: cls }));
    });
    const rule = draw("line", { y1: TOP, y2: H - BOTTOM, class: "rule", visibility: "hidden" });
    const hit = draw("rect", { x: LEFT, y: 0, width: W - LEFT, height: H, class: "hit" });
    let here = right;
    hit.addEventListener("mousemove", (e) => {
      const box = svg.getBoundingClientRect(), x = ((e.clientX - box.left) * W) / box.width;
      here = Math.max(0, Math.min(right, (right * (x - LEFT)) / (W - LEFT - RIGHT)));
      rule.setAttribute("x1", px(here)); rule.setAttribute("x2", px(here)); rule.setAttribute("visibility", "visible");
    });
    hit.addEventListener("mouseleave", () => rule.setAttribute("visibility", "hidden"));
    hit._tip = () => series.slice(0, 12).map((s) => {
      const [x, v] = s.pairs.reduce((a, b) => (Math.abs(b[0] - here) < Math.abs(a[0] - here) ? b : a));
      return `${series.length > 1 ? s.label + ": " : ""}${figure(v)} at ${count(x)} tokens`; }).join("\n");
    svg.append(rule, hit);
    return card;
  };
  // Histogram of the densities of latents, as outlines; the bin of silent ones stands apart at the left.
  const densities = () => {
    const series = shownSeries().filter((s) => s.density), share = (s) => s.density.counts.map((c) => c / s.d);
    series.forEach((s) => { s.d = s.density.counts.reduce((a, b) => a + b, 0); s.shares = share(s); });
    const summary = series.map((s) => `${s.label} at ${count(s.density.at)} tokens, ${count(s.density.counts[0])} of ${count(s.d)} latents silent`).join("; ");
    const silent = series.length === 1 ? `${count(series[0].density.counts[0])} silent` : "";
    const [card, svg] = cardOf("density", "density", "number of latents by density, the fraction of recent tokens on which a latent is active; four bins per factor of ten", silent, summary);
    if (!series.length) return card;
    const edges = series[0].density.edges.map(Math.log10), low = edges[0], wide = (W - LEFT - RIGHT) / (edges.length + 1.5);
    const most = Math.max(0.02, ...series.flatMap((s) => s.shares)), left = (i) => LEFT + (i === 0 ? 0 : (i + 0.5) * wide);
    const py = (v) => TOP + (H - TOP - BOTTOM) * (1 - v / (1.06 * most)), floor = H - BOTTOM;
    ticks(0, most).forEach((v) => svg.append(draw("line", { x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v), class: "grid" }),
      draw("text", { x: LEFT - 5, y: py(v) + 3.5, "text-anchor": "end" }, +(100 * v).toPrecision(2) + " %")));
    const at = (e) => left(1 + (e - low) * 4);
    for (let e = Math.ceil(low) + 1; e <= 0; e += 2) svg.append(draw("text", { x: at(e), y: H - 6, "text-anchor": e === 0 ? "end" : "middle" }, rate(10 ** e)));
    svg.append(draw("text", { x: LEFT, y: H - 6 }, "silent"));
    series.forEach((s) => {
      const corner = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`, cls = color(s.i);
      const line = s.shares.slice(1).flatMap((v, j) => [corner(left(j + 1), py(v)), corner(left(j + 2), py(v))]);
      const lone = [corner(left(0), floor), corner(left(0), py(s.shares[0])), corner(left(0) + wide, py(s.shares[0])), corner(left(0) + wide, floor)];
      const whole = [corner(left(1), floor), ...line, corner(left(edges.length + 1), floor)];
      for (const points of [lone, whole]) svg.append(draw("polyline", { points: points.join(" "), class: cls + (series.length < 3 ? " filled" : "") }));
    });
    for (let i = 0; i <= edges.length; i++) {
      const hit = draw("rect", { x: left(i), y: 0, width: i === 0 ? 1.5 * wide : wide, height: H, class: "hit" });
      const where = i === 0 ? `active on less than ${rate(10 ** low)} of tokens, or never` : i === edges.length ? "active on every token"
        : `active on ${rate(10 ** edges[i - 1])} to ${rate(10 ** edges[i])} of tokens`;
      hit._tip = () => [where, ...series.slice(0, 12).map((s) => `${series.length > 1 ? s.label + ": " : ""}${count(s.density.counts[i])} of ${count(s.d)} latents`)].join("\n");
      svg.append(hit);
    }
    return card;
  };
  const curves = () => {
    const all = model.get("series"), kinds = model.get("facts").charts || [];
    charts.replaceChildren(...(all.length ? kinds.filter(([n]) => all.some((s) => s.lines[n])).map(chart) : []));
    if (all.some((s) => s.density)) charts.append(densities());
    if (all.length && !charts.children.length) charts.append(make("p", "none", "No step has been logged yet."));
  };

  // -- the form
  const inputs = new Map(), errors = new Map(), estimate = make("div", "estimate");
  let values = { ...model.get("typed") };
  const send = settled(() => set({ typed: { ...values } }), 250);
  const typed = (key, text) => { if (text.trim()) values[key] = text; else delete values[key]; send(); };
  const field = (f) => {
    const e = make("label", "field"), input = make(f.choices ? "select" : "input"), error = make("span", "wrong");
    if (f.choices) f.choices.forEach((c) => input.append(make("option", "", c)));
    else { input.placeholder = f.default; input.spellcheck = false; input.autocomplete = "off"; }
    input.setAttribute("aria-label", f.name);
    input.value = values[f.key] ?? (f.choices ? f.default : "");
    input.addEventListener(f.choices ? "change" : "input", () => typed(f.key, f.choices && input.value === f.default ? "" : input.value));
    error.setAttribute("role", "alert");
    e.dataset.key = f.key;
    inputs.set(f.key, [input, f]);
    errors.set(f.key, error);
    e.append(make("span", "name", f.name), input, make("span", "note", f.note), error);
    return e;
  };
  const group = (g) => {
    const e = make(g.folded ? "details" : "section", "group"), grid = make("div", "fields");
    const head = make(g.folded ? "summary" : "h3", "", g.title);
    if (g.kind) { const pick = make("select"); pick.setAttribute("aria-label", "Objective");
      model.get("facts").kinds.forEach((k) => pick.append(make("option", "", k)));
      pick.value = model.get("kind");
      pick.addEventListener("change", () => set({ kind: pick.value }));
      head.replaceChildren(pick); }
    grid.append(...g.fields.map(field));
    e.append(head, grid);
    return e;
  };
  const start = button("start", "start", () => { set({ typed: { ...values } }); ask("start"); }, "Start the training");
  const build = () => {
    const f = model.get("form"), folded = form.querySelector("details"), wide = folded && folded.open;
    form.hidden = !f.groups;
    form.replaceChildren();
    inputs.clear(); errors.clear();
    if (!f.groups) return;
    values = { ...model.get("typed") };
    const open = model.get("form_open"), turn = button(open ? "hide the form" : "new run", "",
      () => set({ form_open: !open }), open ? "Hide the form" : "Show the form for a new run");
    const foot = make("div", "foot");
    turn.setAttribute("aria-expanded", String(open));
    if (open) { form.append(...f.groups.map(group)); foot.append(start, estimate, make("span", "gap"),
      button("code", "", () => { set({ typed: { ...values } }); ask("code"); }, "Show the Python code of this training")); }
    if (wide && form.querySelector("details")) form.querySelector("details").open = true;
    if (model.get("status").length) foot.append(turn);
    form.append(foot);
    showProblems();
  };
  const fill = () => {
    values = { ...model.get("typed"), ...pending() };
    for (const [key, [input, f]] of inputs)
      if (!active(input)) input.value = values[key] ?? (f.choices ? f.default : "");
  };
  // The text of the field in focus is newer than the value from the kernel.
  const pending = () => { const out = {};
    for (const [key, [input]] of inputs) if (active(input) && input.value.trim()) out[key] = input.value;
    return out; };
  const showProblems = () => {
    const p = model.get("problems");
    for (const [key, e] of errors) {
      e.textContent = p[key] || "";
      inputs.get(key)[0].setAttribute("aria-invalid", String(key in p));
      const folded = key in p && e.closest("details");
      if (folded) folded.open = true;
    }
    start.disabled = Object.keys(p).length > 0;
    const m = model.get("estimate");
    estimate.replaceChildren();
    estimate.classList.toggle("bad", !!m.error || m.fits === false);
    if (m.error) estimate.append(make("pre", "", m.error));
    if (!m.rows) return;
    const by = Object.fromEntries(m.rows);
    const size = (v) => (v === undefined ? "?" : +v.replace(/,/g, "") >= 1024 ? (v.replace(/,/g, "") / 1024).toFixed(1) + " GiB" : v + " MiB");
    const lead = `memory: about ${size(by.total)}` + (by.available ? ` of ${size(by.available)} free` : "");
    estimate.append(make("b", "", lead + (m.weights_fit ? m.fits ? "" : ", which may not fit" : ", which cannot fit")),
      make("span", "", m.rows.filter(([n]) => n !== "total" && n !== "available").map(([n, v]) => `${n} ${size(v)}`).join(" \u00b7 ")));
  };

  // -- updates
  let timer = null, waiting = 0;
  const look = () => { if (waiting && Date.now() - waiting < 10000) return; waiting = Date.now(); ask("look"); };
  const poll = () => {
    if (model.get("alive") && !timer) { waiting = 0; timer = setInterval(look, 1000); }
    if (!model.get("alive") && timer) { clearInterval(timer); timer = null; }
  };
  on("looked", () => { waiting = 0; });
  // The snapshot for readers without a kernel is renewed when the state of a run changes. Not at every update: each marks
  // the notebook as changed, and JupyterLab asks before it closes such a one.
  let lastStates = "";
  on("status", () => { const states = model.get("status").map((s) => s.name + s.state).join();
    if (states !== lastStates && model.get("snapshot_id")) ask("snapshot");
    lastStates = states; });
  on("alive", poll);
  on("status", statuses);
  on("series hidden scale", legend);
  on("series hidden scale facts", curves);
  on("form form_open", build);
  on("typed", fill);
  on("problems estimate", showProblems);
  for (const f of [statuses, legend, curves, build, poll]) f();
  return () => { if (timer) clearInterval(timer); };
}
export default { render: (context) => framed(context, "train", training) };
