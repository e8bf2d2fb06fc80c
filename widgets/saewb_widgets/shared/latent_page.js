// The page about one latent, and tokens with activations as their background.

const heat = (share) => (share > 0 ? `rgba(var(--hot), ${(0.1 + 0.75 * Math.min(1, share)).toFixed(3)})` : "");
const piece = (text, share, special, peak) => {
  const e = make("span", "t" + (peak ? " peak" : "") + (special ? " mark" : ""), special ? " \u00b6 " : shown(text));
  if (share > 0) e.style.background = heat(share);
  return e;
};

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

// `pinned(latent)`: whether it is; `browsing`: with notes, and a page to save.
function pageOf({ body, model, on, set, ask }, { pinned = (i) => model.get("pins").includes(i), browsing = true } = {}) {
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
    const e = make("div", "top"), is = pinned(p.latent);
    const pin = button(is ? "\u2691 pinned" : "\u2691 pin", "", () => ask("pin", { latent: p.latent }), "Pin this latent");
    pin.setAttribute("aria-pressed", String(is));
    const whole = button("whole text", "", () => { wrap = !wrap; draw(); }, "Show whole contexts");
    whole.setAttribute("aria-pressed", String(wrap));
    e.append(make("h2", "", "Latent " + p.latent), make("span", "gap"), pin, whole);
    if (browsing) e.append(button("code", "", () => ask("code"), "The Python that gives this"),
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
    acts.append(make("h3", "below", "Fires by position in the text"), bars(p.positions.density, { cls: "gray small",
      label: "How often it fires by position", tip: (x) => `from position ${p.positions.starts[x]} on: ${percent(p.positions.density[x])}` }),
      axis("0", p.positions.starts.at(-1) + "+"));
    e.append(acts);
    if (p.raised.length) {
      const c = card("Makes likelier, unlikelier", "logits per unit"), pair = make("div", "pair");
      pair.append(words(p.raised, "up"), words(p.lowered, "down"));
      c.append(pair);
      if (p.logits) c.append(make("h3", "below", "All words, on a log scale"), bars(p.logits.counts.map((n) => Math.log1p(n)),
        { cls: "gray small", label: "Histogram of logit effects", tip: (x) => between(p.logits, x) + " words" }),
        axis(digits(p.logits.low), digits(p.logits.high)));
      e.append(c);
    }
    if (p.by_decoder.length || p.by_encoder.length || p.coactive.length) {
      const c = card("Neighbors");
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
    main.hidden = p.latent === undefined;
    if (p.latent === undefined) return;
    const tried = browsing ? tryOut({ model, set, page: p }) : null;
    main.replaceChildren(top(p), facts(p), ...(browsing ? [note(p)] : []), ...(tried ? [tried] : []), cards(p));
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
