const MODES = { add: "add to it", scale: "multiply it", clamp: "set it to" };
const RANGES = { add: (m) => [-2 * m, 2 * m], clamp: (m) => [0, 2 * m], scale: () => [-2, 5] };
const keyOf = (one) => `${one.sae}:${one.latent}`;
const token = (s) => { const t = shown(s); return t.trim() ? t : "\u2423"; };

function steering({ body, model, on, ask, set }) {
  const top = make("div", "top"), prompt = make("textarea"), bar = make("div", "line"), texts = make("div", "texts");
  const latents = make("section", "card latents"), odds = make("section", "card odds"), lists = make("div", "lists");
  prompt.rows = 2;
  prompt.placeholder = "Prompt that both texts continue";
  prompt.setAttribute("aria-label", "Prompt");
  top.append(prompt, bar);
  lists.append(latents, odds);
  body.append(top, texts, lists);

  // Inputs of the generation: prompt, positions, sampling.
  const commit = () => { if (prompt.value !== model.get("prompt")) set({ prompt: prompt.value }); };
  const later = settled(commit, 400);
  prompt.addEventListener("input", later);
  prompt.addEventListener("change", commit);
  const generate = () => { commit(); ask("generate"); };
  prompt.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey || e.shiftKey)) { e.preventDefault(); e.stopPropagation(); generate(); }
  });
  const number = (name, label, hint, attrs) => {
    const e = make("label", "field", label), i = make("input");
    i.type = "number";
    for (const [k, v] of Object.entries(attrs)) i.setAttribute(k, v);
    i.title = hint;
    i.addEventListener("change", () => { if (i.value !== "") set({ [name]: i.valueAsNumber }); else i.value = model.get(name); });
    const draw = () => { i.value = model.get(name); };
    on(name, draw);
    draw();
    e.append(i);
    return e;
  };
  const go = button("Generate", "go", generate, "Generate both texts"), stop = button("Stop", "", () => ask("stop"), "Stop generating");
  const where = make("select"), wheres = make("label", "field", "positions");
  model.get("facts").positions.forEach((p) => { const o = make("option", "", p); o.value = p; where.append(o); });
  where.addEventListener("change", () => set({ positions: where.value }));
  wheres.append(where);
  const live = make("label", "field"), tick = make("input");
  tick.type = "checkbox";
  tick.addEventListener("change", () => { commit(); set({ live: tick.checked }); });
  live.append(tick, "at each change");
  bar.append(go, stop, live, make("span", "gap"), wheres,
    number("max_new_tokens", "tokens", "Maximum number of new tokens", { min: 1, step: 1 }),
    number("temperature", "temperature", "0 takes the most probable token", { min: 0, step: 0.1 }),
    number("seed", "seed", "Seed of the sampling, if the temperature is not 0", { min: 0, step: 1 }),
    button("code", "", () => { commit(); ask("code"); }, "Show the Python code for this"));
  const controls = () => {
    stop.disabled = !model.get("running");
    where.value = model.get("positions");
    tick.checked = model.get("live");
    if (document.activeElement !== prompt && prompt.getRootNode().activeElement !== prompt) prompt.value = model.get("prompt");
  };

  // The two texts; the steered one is marked from the first character that differs.
  const column = (name, label) => {
    const e = make("section", "card"), h = make("h3", "", label), p = make("p", "text");
    p.setAttribute("aria-label", label + " text");
    e.append(h, p);
    texts.append(e);
    return { name, h, p, label };
  };
  const columns = [column("clean", "Clean"), column("steered", "Steered")];
  const write = () => {
    const clean = model.get("clean"), running = model.get("running");
    let same = 0;
    const other = model.get("steered");
    while (same < clean.length && clean[same] === other[same]) same++;
    texts.classList.toggle("stale", model.get("stale"));
    columns.forEach(({ name, h, p, label }) => {
      const text = model.get(name), at = name === "steered" ? same : text.length;
      h.replaceChildren(label);
      if (model.get("stale") && text) h.append(" ", make("small", "", "with earlier settings"));
      if (!text && !running) { p.replaceChildren(make("span", "none", "Not generated yet")); return; }
      p.replaceChildren(make("span", "given", model.get("begun_with")), make("span", "", text.slice(0, at)));
      if (text.length > at) p.append(make("mark", "", text.slice(at)));
      if (running) p.append(make("span", "caret"));
    });
  };

  // The latents, each with a slider; and a search for more.
  const rows = make("div", "rows"), find = make("input"), hits = make("div", "hits"), rowOf = new Map();
  find.type = "search";
  find.placeholder = model.get("facts").can_search ? "Add a latent: its number, or a word it fires on" : "Add a latent: its number";
  find.setAttribute("aria-label", "Find latents to add");
  find.addEventListener("input", settled(() => set({ query: find.value }), 250));
  find.addEventListener("keydown", (e) => {
    if (e.key !== "Enter") return;
    e.preventDefault();
    const first = hits.querySelector("button");
    if (first && model.get("results").query === find.value) first.click(); else set({ query: find.value });
  });
  latents.append(make("h3", "", "Latents"), rows, find, hits);
  const change = (key, values) => set({ latents: model.get("latents").map((o) => (keyOf(o) === key ? { ...o, ...values } : o)) });
  const several = () => model.get("facts").saes.length > 1;
  const row = (one) => {
    const key = keyOf(one), e = make("div", "latent"), slide = make("input"), exact = make("input"), mode = make("select");
    const name = make("span", "name"), label = make("span", "label"), values = make("div", "values");
    slide.type = "range";
    exact.type = "number";
    exact.step = "any";
    slide.setAttribute("aria-label", `Value of latent ${one.latent}`);
    exact.setAttribute("aria-label", `Exact value of latent ${one.latent}`);
    mode.setAttribute("aria-label", `How latent ${one.latent} is changed`);
    model.get("facts").how.forEach((h) => { const o = make("option", "", h); o.value = h; o.title = MODES[h]; mode.append(o); });
    name.append(make("b", "", String(one.latent)));
    if (several()) name.append(" ", make("small", "", model.get("facts").saes[one.sae]));
    const send = throttled(() => change(key, { value: slide.valueAsNumber }), 150);
    slide.addEventListener("input", () => { exact.value = slide.value; send(); });
    exact.addEventListener("change", () => { if (exact.value !== "") change(key, { value: exact.valueAsNumber }); });
    mode.addEventListener("change", () => change(key, { how: mode.value, value: mode.value === "scale" ? 2 : mode.dataset.max / 2 * 1 }));
    values.append(mode, slide, exact);
    e.append(name, label, button("\u00d7", "quiet", () => ask("remove", { latent: one.latent, sae: one.sae }), `Remove latent ${one.latent}`), values);
    const draw = (now, card) => {
      const m = Math.ceil(card.max || 20), [low, high] = RANGES[now.how](m);
      label.textContent = card.label;
      label._tip = () => (card.label ? card.label + (card.raises ? `\nPromotes: ${card.raises}` : "")
        + `\nLargest activation: ${digits(card.max)}` : "");
      mode.value = now.how;
      mode.dataset.max = m;
      slide.min = Math.min(low, now.value);
      slide.max = Math.max(high, now.value);
      slide.step = now.how === "scale" ? 0.1 : m > 10 ? 0.5 : m / 40;
      if (!slide.matches(":active")) slide.value = now.value;
      if (!exact.matches(":focus")) exact.value = +now.value.toPrecision(6);
    };
    return { e, draw };
  };
  const list = () => {
    const now = model.get("latents"), cards = model.get("cards");
    if (cards.length !== now.length) return; // labels are on their way
    const keys = new Set(now.map(keyOf));
    for (const [key, { e }] of rowOf) if (!keys.has(key)) { e.remove(); rowOf.delete(key); }
    now.forEach((one, i) => {
      const key = keyOf(one);
      if (!rowOf.has(key)) { rowOf.set(key, row(one)); rows.append(rowOf.get(key).e); }
      rowOf.get(key).draw(one, cards[i]);
    });
    rows.querySelector(".none")?.remove();
    if (!now.length) rows.append(make("p", "none", "None yet: both texts will be the same."));
  };
  const drawResults = () => {
    const { rows: matches } = model.get("results");
    hits.replaceChildren();
    (matches || []).forEach(([sae, latent, label]) => {
      const b = button("", "hit", () => { find.value = ""; set({ query: "" }); ask("add", { latent, sae, value: start(label.max) }); },
        `Add latent ${latent}`);
      b.append(make("b", "", String(latent)), make("span", "label", label.label || ""));
      if (several()) b.append(make("small", "", model.get("facts").saes[sae]));
      hits.append(b);
    });
    if (matches && !matches.length) hits.append(make("p", "none", "Nothing found"));
  };
  const start = (max) => Math.round(max || 8);

  // What the intervention does to the next token.
  const table = () => {
    const movers = model.get("movers").slice(0, 12), most = Math.max(1e-9, ...movers.flatMap((m) => [m[2], m[3]]));
    odds.replaceChildren(make("h3", "", "Next token after the prompt"));
    if (!movers.length) { odds.append(make("p", "none", "Add a latent to see what it does.")); return; }
    const t = make("div", "moved");
    t.setAttribute("role", "table");
    t.setAttribute("aria-label", "Next tokens whose probability changes most");
    movers.forEach(([id, text, p, q, d]) => {
      const r = make("div", "mover"), pair = make("span", "pair");
      r.setAttribute("role", "row");
      for (const [v, cls] of [[p, "clean"], [q, "steered"]]) { const b = make("i", cls); b.style.width = (100 * v) / most + "%"; pair.append(b); }
      const cells = [make("span", "t", token(text)), pair, make("span", "num", percent(p) + " \u2192 " + percent(q)),
        make("span", "num " + (d < 0 ? "minus" : "plus"), signed(100 * d))];
      cells.forEach((c) => { c.setAttribute("role", "cell"); r.append(c); });
      for (const c of r.querySelectorAll("*")) c._tip = () => `${JSON.stringify(text)}, id ${id}\nclean ${percent(p)}, steered ${percent(q)}`;
      t.append(r);
    });
    const key = make("div", "key");
    key.append(make("i", "clean"), "clean", make("i", "steered"), "steered", make("span", "gap"), "change in percentage points");
    odds.append(t, key);
  };
  on("running positions live prompt", controls);
  on("clean steered running stale begun_with", write);
  on("latents cards", list);
  on("results", drawResults);
  on("movers", table);
  for (const f of [controls, write, list, drawResults, table]) f();
}
export default { render: (context) => framed(context, "steering", (parts) => { steering(parts); }) };
