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
  const chat = make("div", "chat"), sweep = make("section", "card sweep");
  top.append(prompt, chat, bar);
  lists.append(latents, odds);
  body.append(top, texts, sweep, lists);

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
  const offered = () => {
    const names = [...model.get("facts").positions, ...(model.get("chat") ? model.get("facts").roles : [])];
    if (where.length !== names.length) where.replaceChildren(...names.map((p) => new Option(p, p)));
    where.value = model.get("positions");
  };
  where.addEventListener("change", () => set({ positions: where.value }));
  wheres.append(where);
  const live = make("label", "field"), tick = make("input");
  tick.type = "checkbox";
  tick.addEventListener("change", () => { commit(); set({ live: tick.checked }); });
  live.append(tick, "at each change");
  const talk = make("label", "field"), talks = make("input");
  talks.type = "checkbox";
  talks.addEventListener("change", () => { commit(); set({ chat: talks.checked }); });
  talk.append(talks, "chat");
  talk.title = 'The prompt is a chat in the model\'s template: lines that begin with "system:", "user:" or "assistant:" begin a message';
  if (!model.get("facts").can_chat) talk.hidden = true;
  bar.append(go, stop, live, talk, make("span", "gap"), wheres,
    number("max_new_tokens", "tokens", "Maximum number of new tokens", { min: 1, step: 1 }),
    number("temperature", "temperature", "0 takes the most probable token", { min: 0, step: 0.1 }),
    number("seed", "seed", "Seed of the sampling, if the temperature is not 0", { min: 0, step: 1 }),
    button("code", "", () => { commit(); ask("code"); }, "Show the Python code for this"));
  const controls = () => {
    stop.disabled = !model.get("running");
    offered();
    talks.checked = model.get("chat");
    tick.checked = model.get("live");
    if (document.activeElement !== prompt && prompt.getRootNode().activeElement !== prompt) prompt.value = model.get("prompt");
  };

  // A chat, token by token, with the role of each run of tokens.
  const talkers = () => {
    const runs = [];
    model.get("spans").forEach(([text, role]) => {
      if (!runs.length || runs.at(-1).role !== role) runs.push({ role, text: "" });
      runs.at(-1).text += text;
    });
    chat.hidden = !runs.length;
    chat.replaceChildren(...runs.map(({ role, text }) => {
      const e = make("div", "turn"), said = make("span", role ? "said" : "said next", shown(text));
      e.append(make("small", "role", role || "assistant"), said);
      e.classList.toggle("steers", model.get("positions") === role);
      if (!role && model.get("positions") === "assistant") said.append(" ", make("small", "", "what follows is steered"));
      return e;
    }));
  };

  // The two texts; the steered one is marked from the first character that differs.
  const column = (name, label) => {
    const e = make("section", "card"), h = make("h3", "", label), p = make("p", "text");
    p.setAttribute("aria-label", label + " text");
    const costs = make("p", "costs");
    e.append(h, p, costs);
    texts.append(e);
    return { name, h, p, label, costs };
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

  // What the steered text costs.
  const COSTS = {
    kl: ["KL", "How far steering moves the next token's probabilities, on the prompt's end and the clean text: KL(steered || clean), nats"],
    fluency: ["fluency", "Nats per token by which the unsteered model finds the steered text less likely than its own"],
    repetition: ["repetition", "1 \u2212 distinct trigrams / trigrams"],
  };
  const figure = (name, v) => (v === null ? "\u2013" : name === "fluency" ? signed(v) : digits(v));
  const costs = () => {
    const f = model.get("figures"), [clean, steered] = columns;
    const line = (e, pairs) => e.replaceChildren(...pairs.map(([name, v]) => {
      const cell = make("span", "cost", COSTS[name][0] + " ");
      cell.append(make("b", "", figure(name, v)));
      cell._tip = () => COSTS[name][1];
      return cell;
    }));
    const is = f.kl !== undefined && !model.get("stale");
    line(clean.costs, is ? [["repetition", f.repetition_clean]] : []);
    line(steered.costs, is ? [["kl", f.kl], ["fluency", f.fluency], ["repetition", f.repetition]] : []);
  };

  // The text at several multiples of the values; a row sets them.
  const scaled = (one, f) => (one.how === "scale" ? 1 + f * (one.value - 1) : f * one.value);
  const rowsOfSweep = () => {
    const rows = model.get("swept"), head = make("div", "head"), h = make("h3", "", "At other strengths");
    const run = button("Sweep", "", () => { commit(); ask("sweep"); }, "Write the steered text at several strengths");
    run.disabled = !model.get("latents").length;
    head.append(h, run, make("span", "none", rows.length ? "" : "the steered text at \u00bc to 2 times these values, and what each costs"));
    sweep.replaceChildren(head);
    if (!rows.length) return;
    const t = make("div", "swept"), most = Math.max(1e-9, ...rows.map((r) => r.kl));
    t.setAttribute("role", "table");
    t.setAttribute("aria-label", "Steered texts by strength");
    const names = make("div", "strength names");
    names.append(make("span", "", "times"), ...Object.values(COSTS).map(([label, hint]) => { const e = make("span", "num", label); e._tip = () => hint; return e; }),
      make("span", "", "text"));
    t.append(names);
    rows.forEach((r) => {
      const e = make("div", "strength"), kl = make("span", "num"), fill = make("i");
      e.setAttribute("role", "row");
      fill.style.width = (100 * r.kl) / most + "%";
      kl.append(digits(r.kl), fill);
      const use = r.factor && r.factor !== 1 ? button("\u00d7" + r.factor, "quiet", () => set({ latents: model.get("latents").map((o) => ({ ...o, value: scaled(o, r.factor) })) }),
        `Steer ${r.factor} times as much`) : make("span", "", "\u00d7" + r.factor);
      e.append(use, kl, make("span", "num", figure("fluency", r.fluency)), make("span", "num", figure("repetition", r.repetition)), make("span", "said", shown(r.text).replace(/^ /, "")));
      t.append(e);
    });
    sweep.append(t);
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
  on("running positions live prompt chat", controls);
  on("spans positions", talkers);
  on("figures stale", costs);
  on("swept latents", rowsOfSweep);
  on("clean steered running stale begun_with", write);
  on("latents cards", list);
  on("results", drawResults);
  on("movers", table);
  for (const f of [controls, talkers, costs, rowsOfSweep, write, list, drawResults, table]) f();
}
export default { render: (context) => framed(context, "steering", (parts) => { steering(parts); }) };
