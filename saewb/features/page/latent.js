// Draws one latent, `Latent.to_dict()` with its token texts in `page.words`. The HTML page and the panels share this;
// both have make, shown, digits, signed, percent, count and bars.

const heat = (share) => (share > 0 ? `rgba(var(--hot), ${(0.1 + 0.75 * Math.min(1, share)).toFixed(3)})` : "");
const piece = (text, share, special, peak) => {
  const e = make("span", "t" + (peak ? " peak" : "") + (special ? " mark" : ""), special ? " \u00b6 " : shown(text));
  if (share > 0) e.style.background = heat(share);
  return e;
};

// Contexts, one a row: up to the peak on the left, the rest on the right. `hits(context)`: positions to underline.
function contexts(page, list, wrap, hits = () => new Set()) {
  const e = make("div", wrap ? "contexts plain" : "contexts");
  list.forEach((c) => {
    const row = make("div", "context"), left = make("span", "left"), right = make("span", "right");
    const special = new Set(c.special), underlined = hits(c);
    row.append(make("span", "value", digits(c.acts[c.at])), left, right);
    c.words.forEach((w, j) => {
      const text = page.words[w], a = c.acts[j], t = piece(text, Math.abs(a) / page.scale, special.has(j), j === c.at);
      if (underlined.has(j)) t.classList.add("hit");
      t._tip = () => `${JSON.stringify(text)}   activation ${digits(a)}\ntoken ${c.ids[j]}, position ${c.position - c.at + j} of text ${c.row}`
        + (c.loss ? `\nloss without it ${signed(c.loss[j])} nats` : "");
      (j <= c.at ? left : right).append(t);
    });
    e.append(row);
  });
  return e;
}

// The top contexts and each group of sampled ones, to be folded; `draw(list)` makes the contexts.
function contextGroups(p, draw) {
  const part = (k, of) => (k === 0 ? `strongest 1/${of} of its firings` : k === of - 1 ? `weakest 1/${of}` : `${k + 1} of ${of}`);
  const group = (title, list) => {
    const e = make("details", "group"), s = make("summary", "", title), value = (c) => digits(c.acts[c.at]);
    e.open = true;
    s.append(" ", make("small", "", `${value(list.at(-1))} to ${value(list[0])}`));
    e.append(s, draw(list));
    return e;
  };
  const groups = p.groups.map((g, k) => [`Sampled: ${part(k, p.groups.length)}`, g]);
  return [["Where it is strongest", p.top], ...groups].filter(([, g]) => g.length).map((g) => group(...g));
}

// The label of a latent beside its number; an explanation stands out from a mere token.
const labelOf = (label, explained = false) => {
  const e = make("em", explained ? "label explained" : "label", shown(label || ""));
  if (label) e.title = label;
  return e;
};

function latentFacts(p) {
  const e = make("div", "facts");
  for (const [name, value] of [["fires on", `${percent(p.density)} of tokens`], ["largest", digits(p.max)],
    ["mean", digits(p.mean)], ["decoder norm", p.norm === null ? "" : digits(p.norm)]]) {
    if (value === "") continue;
    const s = make("span", "", name + " ");
    s.append(make("b", "", value));
    e.append(s);
  }
  return e;
}

// Histograms, logit effects and neighbors; `link(latent)` makes what leads to another latent.
function latentCards(p, link) {
  const card = (title, note) => { const e = make("section", "card"), h = make("h3", "", title);
    if (note) h.append(" ", make("small", "", note)); e.append(h); return e; };
  const axis = (...labels) => { const e = make("div", "axis"); labels.forEach((l) => e.append(make("span", "", l))); return e; };
  const between = (h, x) => { const w = (h.high - h.low) / h.counts.length;
    return `${digits(h.low + x * w)} to ${digits(h.low + (x + 1) * w)}: ${count(h.counts[x])}`; };
  const words = (list, cls) => { const e = make("div", cls); list.slice(0, 8).forEach(([text, id, v]) => {
    const r = make("div", "word"), w = make("span", "", shown(text) || "\u2205");
    w._tip = () => `${JSON.stringify(text)}   token ${id}\nlogits ${signed(v)} per unit of activation`;
    r.append(w, make("i", "", signed(v))); e.append(r); }); return e; };
  const cosine = (v) => v.toFixed(2).replace("-", "\u2212");
  const near = (title, list, text, tip) => { const e = make("div", "nears"), line = make("div", "line-of");
    e.hidden = !list.length;
    e.append(make("h3", "", title), line);
    list.slice(0, 8).forEach((x) => { const r = make("span", "near");
      r._tip = () => tip(x);
      r.append(link(x[0]), labelOf(x.at(-1)), make("span", "", text(x))); line.append(r); }); return e; };

  const e = make("div", "cards"), acts = card("Activations", `${count(p.n_active)} tokens`);
  if (p.histogram.counts.length) acts.append(bars(p.histogram.counts, { label: "Histogram of activations",
    tip: (x) => between(p.histogram, x) + " tokens" }), axis("0", digits(p.histogram.high)));
  else acts.append(make("p", "none", "It never fired."));
  acts.append(make("h3", "below", "Fires by position in the text"), bars(p.positions.density, { cls: "gray small",
    label: "How often it fires by position", tip: (x) => `from position ${p.positions.starts[x]} on: ${percent(p.positions.density[x])}` }),
    axis("0", p.positions.starts.at(-1) + "+"));
  e.append(acts);
  const pair = (raised, lowered) => { const e = make("div", "pair"); e.append(words(raised, "up"), words(lowered, "down")); return e; };
  if (p.raised.length || p.jacobian_raised.length) {
    const c = card("Makes likelier, unlikelier", "logits per unit");
    if (p.raised.length) c.append(pair(p.raised, p.lowered));
    if (p.logits) c.append(make("h3", "below", "All words, on a log scale"), bars(p.logits.counts.map((n) => Math.log1p(n)),
      { cls: "gray small", label: "Histogram of logit effects", tip: (x) => between(p.logits, x) + " words" }),
      axis(digits(p.logits.low), digits(p.logits.high)));
    if (p.jacobian_raised.length) { const h = make("h3", p.raised.length ? "below" : "", "Through later layers");
      h.append(" ", make("small", "", "Jacobian lens"));
      c.append(h, pair(p.jacobian_raised, p.jacobian_lowered)); }
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
}
