const HIGH = 27, TALLEST = 12e6; // pixels: of a row; of what a browser scrolls

const heat = (share) => (share > 0 ? `rgba(var(--hot), ${(0.1 + 0.75 * Math.min(1, share)).toFixed(3)})` : "");
const piece = (text, share, special, peak) => {
  const e = make("span", "t" + (peak ? " peak" : "") + (special ? " mark" : ""), special ? " \u00b6 " : shown(text));
  if (share > 0) e.style.background = heat(share);
  return e;
};

function table({ body, model, on, set, ask }) {
  const side = make("div", "side"), find = make("div", "find"), input = make("input"), sort = make("select");
  const only = make("select"), line = make("div", "line"), total = make("span", "total"), turn = make("button", "quiet");
  const box = make("div", "rows"), inner = make("div", "inner"), columns = make("div", "columns");
  input.type = "search";
  input.placeholder = "Text, /pattern/, id:token, number";
  for (const [k, v] of Object.entries({ "aria-label": "Search latents", autocomplete: "off", spellcheck: "false" }))
    input.setAttribute(k, v);
  sort.setAttribute("aria-label", "Order");
  only.setAttribute("aria-label", "Which latents");
  for (const [value, text] of model.get("facts").sorts) sort.append(new Option(text, value));
  for (const s of ["all", "firing", "silent", "pinned", "noted"]) only.append(new Option(s === "all" ? "all latents" : s, s));
  turn.type = "button";
  find.append(input);
  line.append(only, sort, turn);
  const range = densityRange({ model, on, set });
  columns.append(make("span", "n", "latent"), make("span", "in", "where it is strongest"));
  for (const [key, text] of [["density", "fires on"], ["max", "largest"]])
    columns.append(button(text, "quiet num", () => set({ descending: model.get("sort") === key ? !model.get("descending") : true, sort: key }),
      `Sort by ${text}`));
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Latents");
  box.tabIndex = 0;
  inner.style.position = "relative";
  box.append(inner);
  side.append(find, line, range, total, columns, box);
  body.append(side);

  let known = new Map(), n = 0;
  const view = () => box.clientHeight || 300;
  const tall = () => Math.min(n * HIGH, TALLEST);
  // Place of the row at the upper edge, with its fraction; the same as scrollTop / HIGH unless rows are too many.
  const first = () => (tall() > view() ? (box.scrollTop / (tall() - view())) * Math.max(0, n - view() / HIGH) : 0);
  const scrollTo = (place) => {
    const top = first(), shows = view() / HIGH;
    if (place >= top && place + 1 <= top + shows) return;
    const want = place < top ? place : place + 1 - shows;
    box.scrollTop = (want / Math.max(1e-9, n - shows)) * (tall() - view());
  };
  const request = throttled(() => {
    const at = Math.floor(first()), to = Math.min(n, Math.ceil(at + view() / HIGH));
    for (let p = at; p < to; p++) if (!known.has(p)) {
      const back = Math.max(0, Math.floor(at - (model.get("facts").window - view() / HIGH) / 2));
      set({ offset: back });
      return;
    }
  }, 70);
  const draw = () => {
    const top = first(), from = Math.max(0, Math.floor(top) - 2), to = Math.min(n, Math.ceil(top + view() / HIGH) + 2);
    inner.style.height = tall() + "px";
    const made = [];
    let missing = false;
    for (let p = from; p < to; p++) {
      const r = known.get(p), e = make("div", "row");
      e.style.top = box.scrollTop + (p - top) * HIGH + "px";
      e.setAttribute("role", "option");
      e.setAttribute("aria-posinset", p + 1);
      e.setAttribute("aria-setsize", n);
      if (r) fill(e, r); else missing = true;
      made.push(e);
    }
    inner.replaceChildren(...made);
    if (!n) inner.replaceChildren(make("div", "none", "No latent is like that."));
    if (missing) request();
  };
  const fill = (e, r) => {
    const inside = make("span", "in"), chosen = r.latent === model.get("selected");
    const marks = (model.get("pins").includes(r.latent) ? "\u2691" : "") + (model.get("notes")[r.latent] ? "\u270e" : "");
    r.tokens.forEach(([s, share, special], j) => inside.append(piece(s, share, special, j === r.at)));
    if (!r.tokens.length) inside.append(make("span", "none", "never fires"));
    e.dataset.latent = r.latent;
    e.setAttribute("aria-selected", String(chosen));
    e.setAttribute("aria-label", `latent ${r.latent}, fires on ${percent(r.density)}`);
    const number = make("span", "n", String(r.latent));
    if (marks) number.append(make("i", "marks", marks));
    e.append(number, inside, make("span", "num", percent(r.density)), make("span", "num", digits(r.max)));
    e.addEventListener("click", () => { set({ selected: r.latent }); box.focus({ preventScroll: true }); });
  };
  const arrived = () => {
    const got = model.get("rows"), changed = got.list !== known.list;
    if (changed) { known = new Map(); known.list = got.list; n = got.total; inner.style.height = tall() + "px"; box.scrollTop = 0; }
    (got.rows || []).forEach((r, j) => known.set(got.offset + j, r));
    const all = model.get("facts").latents;
    total.textContent = n === all ? `${count(n)} latents` : `${count(n)} of ${count(all)} latents`;
    if (changed) place();
    draw();
  };
  const place = () => { const p = model.get("position"); if (p >= 0 && p < n) scrollTo(p); };
  const controls = () => {
    if (document.activeElement !== input && input.getRootNode().activeElement !== input) input.value = model.get("query");
    sort.value = model.get("sort");
    only.value = model.get("show_only");
    turn.textContent = model.get("descending") ? "\u2193" : "\u2191";
    turn.disabled = model.get("sort") === "best";
    turn.setAttribute("aria-label", model.get("descending") ? "Largest first" : "Smallest first");
    [...columns.querySelectorAll("button")].forEach((b, j) =>
      b.setAttribute("aria-current", String(model.get("sort") === ["density", "max"][j])));
  };
  const search = settled(() => { if (input.value !== model.get("query")) set({ query: input.value }); }, 250);
  input.addEventListener("input", search);
  input.addEventListener("keydown", (e) => {
    if (e.key === "Enter") { set({ query: input.value }); box.focus(); }
    if (e.key === "Escape") { input.value = ""; set({ query: "" }); }
    if (e.key === "ArrowDown") { e.preventDefault(); box.focus(); }
  });
  sort.addEventListener("change", () => set({ sort: sort.value, descending: sort.value !== "latent" }));
  only.addEventListener("change", () => set({ show_only: only.value }));
  turn.addEventListener("click", () => set({ descending: !model.get("descending") }));
  box.addEventListener("scroll", () => requestAnimationFrame(draw));
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, j: 1, k: -1 };
  box.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (steps[e.key]) ask("move", { by: steps[e.key] });
    else if (e.key === "Home") ask("move", { to: 0 });
    else if (e.key === "End") ask("move", { to: n - 1 });
    else if (e.key === "/") { input.focus(); input.select(); }
    else if (e.key === "p") ask("pin"); // whichever is selected once the keys before it are through
    else return;
    e.preventDefault();
  });
  on("rows", arrived);
  on("selected pins notes", draw);
  on("position", place);
  on("query sort descending show_only", controls);
  controls();
  arrived();
  const sized = new ResizeObserver(() => draw());
  sized.observe(box);
  return () => sized.disconnect();
}

// How many latents fire how often; drag over it to list those only, click to take that back.
function densityRange({ model, on, set }) {
  const e = make("div", "density");
  let from = null;
  const edge = (x) => 10 ** (x / 4 - 6);
  const draw = () => {
    const { counts, silent } = model.get("densities"), [low, high] = model.get("density"), all = low === 0 && high === 1;
    e.replaceChildren();
    e.hidden = !counts;
    if (!counts) return;
    const inside = (x) => !all && edge(x + 1) > low * 1.0001 && edge(x) < high * 0.9999;
    const svg = bars(counts.map((c) => Math.sqrt(c)), { cls: "grey small", on: (x) => inside(x),
      label: `How often latents fire: ${silent} never`,
      tip: (x) => `fires on ${percent(edge(x))} to ${percent(edge(x + 1))} of tokens: ${count(counts[x])} latents` });
    const at = (ev) => { const b = svg.getBoundingClientRect();
      return Math.max(0, Math.min(counts.length - 1, Math.floor(((ev.clientX - b.left) / b.width) * counts.length))); };
    svg.addEventListener("pointerdown", (ev) => { from = at(ev); svg.setPointerCapture(ev.pointerId); ev.preventDefault(); });
    svg.addEventListener("pointerup", (ev) => {
      const a = Math.min(from, at(ev)), b = Math.max(from, at(ev));
      set({ density: !all && a === b ? [0, 1] : [a === 0 ? 0 : edge(a), b === counts.length - 1 ? 1 : edge(b + 1)] });
    });
    const axis = make("div", "axis");
    axis.append(make("span", "", "rare"), make("span", "", all ? "drag to choose by how often they fire"
      : `${percent(low)} to ${percent(high)}`), make("span", "", "often"));
    e.append(svg, axis);
  };
  on("densities density", draw);
  draw();
  return e;
}

function contexts(page, list, wrap) {
  const e = make("div", wrap ? "contexts plain" : "contexts");
  list.forEach((c) => {
    const row = make("div", "context"), left = make("span", "left"), right = make("span", "right");
    const special = new Set(c.special);
    row.append(make("span", "value", digits(c.acts[c.at])), left, right);
    c.words.forEach((w, j) => {
      const text = page.words[w], a = c.acts[j], t = piece(text, Math.abs(a) / page.scale, special.has(j), j === c.at);
      t._tip = () => `${JSON.stringify(text)}   activation ${digits(a)}\ntoken ${c.ids[j]}, position ${c.position - c.at + j} of text ${c.row}`
        + (c.loss ? `\nloss without it ${signed(c.loss[j])} nats` : "");
      (j <= c.at ? left : right).append(t);
    });
    e.append(row);
  });
  return e;
}

function pageOf({ body, model, on, set, ask }) {
  const main = make("div", "main");
  main.tabIndex = -1;
  body.append(main);
  let wrap = false;
  const card = (title, note) => { const e = make("section", "card"), h = make("h3", "", title);
    if (note) h.append(" ", make("small", "", note)); e.append(h); return e; };
  const axis = (...labels) => { const e = make("div", "axis"); labels.forEach((l) => e.append(make("span", "", l))); return e; };
  const words = (list, cls) => { const e = make("div", cls); list.slice(0, 8).forEach(([text, id, v]) => {
    const r = make("div", "word"), w = make("span", "", shown(text) || "\u2205");
    w._tip = () => `${JSON.stringify(text)}   token ${id}\nlogits ${signed(v)} per unit of activation`;
    r.append(w, make("i", "", signed(v))); e.append(r); }); return e; };
  const cosine = (v) => v.toFixed(2).replace("-", "\u2212");
  const near = (title, list, text, tip) => { const e = make("div", "nears");
    e.hidden = !list.length;
    const line = make("div", "line-of");
    e.append(make("h3", "", title), line);
    list.slice(0, 8).forEach((x) => { const r = make("span", "near");
      const b = button(String(x[0]), "quiet link", () => set({ selected: x[0] }));
      b._tip = () => tip(x); r.append(b, make("span", "", text(x))); line.append(r); }); return e; };
  const between = (h, x) => { const w = (h.high - h.low) / h.counts.length;
    return `${digits(h.low + x * w)} to ${digits(h.low + (x + 1) * w)}: ${count(h.counts[x])}`; };

  const top = (p) => {
    const e = make("div", "top"), pinned = model.get("pins").includes(p.latent);
    const pin = button(pinned ? "\u2691 pinned" : "\u2691 pin", "", () => ask("pin", { latent: p.latent }), "Pin this latent");
    pin.setAttribute("aria-pressed", String(pinned));
    const whole = button("whole text", "", () => { wrap = !wrap; draw(); }, "Show whole contexts");
    whole.setAttribute("aria-pressed", String(wrap));
    e.append(make("h2", "", "Latent " + p.latent), make("span", "gap"), pin, whole,
      button("code", "", () => ask("code"), "The Python that gives this"),
      button("save page", "", () => ask("save", { path: "features.html" }), "Save the table's first 500 latents to features.html"));
    if (p.url) { const a = make("a", "out", "Neuronpedia \u2197"); a.href = p.url; a.target = "_blank"; a.rel = "noopener"; e.append(a); }
    return e;
  };
  const facts = (p) => { const e = make("div", "facts");
    for (const [name, value] of [["fires on", `${percent(p.density)} of tokens`], ["largest", digits(p.max)],
      ["mean", digits(p.mean)], ["decoder norm", p.norm === null ? "" : digits(p.norm)]]) {
      if (value === "") continue;
      const s = make("span", "", name + " "); s.append(make("b", "", value)); e.append(s); }
    return e; };
  const note = (p) => {
    const e = make("input", "note");
    e.placeholder = "What is it? Write a note";
    e.setAttribute("aria-label", `Note on latent ${p.latent}`);
    e.value = model.get("notes")[p.latent] || "";
    e.addEventListener("change", () => ask("note", { latent: p.latent, text: e.value }));
    return e;
  };
  const cards = (p) => {
    const e = make("div", "cards"), acts = card("Activations", `${count(p.n_active)} tokens`);
    if (p.histogram.counts.length) acts.append(bars(p.histogram.counts, { label: "Histogram of activations",
      tip: (x) => between(p.histogram, x) + " tokens" }), axis("0", digits(p.histogram.high)));
    else acts.append(make("p", "none", "It never fired."));
    acts.append(make("h3", "below", "Fires by position in the text"), bars(p.positions.density, { cls: "grey small",
      label: "How often it fires by position", tip: (x) => `from position ${p.positions.starts[x]} on: ${percent(p.positions.density[x])}` }),
      axis("0", p.positions.starts.at(-1) + "+"));
    e.append(acts);
    if (p.raised.length) {
      const c = card("Makes likelier, unlikelier", "logits per unit"), pair = make("div", "pair");
      pair.append(words(p.raised, "up"), words(p.lowered, "down"));
      c.append(pair);
      if (p.logits) c.append(make("h3", "below", "All words, on a log scale"), bars(p.logits.counts.map((n) => Math.log1p(n)),
        { cls: "grey small", label: "Histogram of logit effects", tip: (x) => between(p.logits, x) + " words" }),
        axis(digits(p.logits.low), digits(p.logits.high)));
      e.append(c);
    }
    if (p.by_decoder.length || p.by_encoder.length || p.coactive.length) {
      const c = card("Neighbours");
      c.classList.add("wide");
      c.append(near("write alike", p.by_decoder, (x) => cosine(x[1]), (x) => `cosine of decoder rows ${cosine(x[1])}`),
        near("read alike", p.by_encoder, (x) => cosine(x[1]), (x) => `cosine of encoder columns ${cosine(x[1])}`),
        near("fire with it", p.coactive, (x) => percent(x[1]),
          (x) => `fires on ${percent(x[1])} of its tokens (${x[3]} sampled)\ncorrelation ${cosine(x[2])}`));
      e.append(c);
    }
    return e;
  };
  const group = (p, title, list, open) => {
    const e = make("details", "group"), s = make("summary", "", title);
    e.open = open;
    s.append(" ", make("small", "", list.length ? `${digits(list.at(-1).acts[list.at(-1).at])} to ${digits(list[0].acts[list[0].at])}` : ""));
    e.append(s, contexts(p, list, wrap));
    return e;
  };
  const part = (k, of) => (k === 0 ? `strongest 1/${of} of its firings` : k === of - 1 ? `weakest 1/${of}` : `${k + 1} of ${of}`);
  let last = null;
  const draw = () => {
    const p = model.get("page"), at = main.scrollTop;
    if (p.latent === undefined) return;
    const tried = tryOut({ model, set, page: p });
    main.replaceChildren(top(p), facts(p), note(p), ...(tried ? [tried] : []), cards(p));
    if (p.top.length) main.append(group(p, "Where it is strongest", p.top, true));
    p.groups.forEach((g, k) => { if (g.length) main.append(group(p, `Sampled: ${part(k, p.groups.length)}`, g, true)); });
    main.scrollTop = last === p.latent ? at : 0;
    last = p.latent;
  };
  on("page tried", draw);
  // A note being typed is not to be drawn over.
  on("pins notes", () => { if (!main.querySelector(".note:focus")) draw(); });
  draw();
}

// A text of one's own: where this latent fires in it, and which latents do.
function tryOut({ model, set, page }) {
  if (!model.get("facts").can_try) return null;
  const e = make("section", "card try"), input = make("input"), { tokens, special, latents } = model.get("tried");
  input.placeholder = "Try a text of your own";
  input.setAttribute("aria-label", "Text to run the model on");
  input.value = model.get("prompt");
  input.addEventListener("change", () => set({ prompt: input.value }));
  e.append(input);
  if (!tokens) return e;
  const acts = new Map((latents.find(([i]) => i === page.latent) || [0, []])[1]), line = make("div", "tried");
  const scale = Math.max(Math.abs(page.max), 1e-9);
  tokens.forEach((s, j) => { const a = acts.get(j) || 0, t = piece(s, Math.abs(a) / scale, special.includes(j), false);
    t._tip = () => `${JSON.stringify(s)}   activation ${digits(a)}\nposition ${j}`; line.append(t); });
  const who = make("div", "who");
  who.append(make("span", "none", "fire here: "));
  latents.slice(0, 16).forEach(([i]) => who.append(button(String(i), "quiet link", () => set({ selected: i }))));
  e.append(line, who);
  return e;
}

function render(context) {
  return framed(context, "browser", (parts) => {
    const stop = table(parts);
    pageOf(parts);
    return stop;
  });
}
export default { render };
