const NO = "\u2205"; // a token without text: a part of a character that is whole at a later one
const quoted = (s) => "\u201c" + shown(s || NO) + "\u201d";
const minus = (v) => (v < 0 ? "\u2212" : "") + digits(Math.abs(v));

// A token as the model sees it: its spaces as dots, its line breaks as arrows.
const seen = (e, text) => {
  if (!text) e.append(make("i", "unseen", NO));
  for (const part of text.split(/( +|\r?\n|\t)/)) {
    if (!part) continue;
    if (/^[ \n\r\t]/.test(part)) e.append(make("i", "unseen", part[0] === " " ? "\u00b7".repeat(part.length) : shown(part)));
    else e.append(part);
  }
  return e;
};

function asking({ body, model, on, set, ask }) {
  const top = make("div", "asking"), text = make("textarea"), go = button("Read", "go", () => (model.get("busy") && text.value === model.get("prompt") ? ask("stop") : send()), "Read the prompt");
  const line = make("div", "line"), waiting = make("span", "waiting");
  text.rows = 1;
  text.placeholder = "Type a prompt; Enter reads it, Shift+Enter is a new line";
  text.setAttribute("aria-label", "Prompt");
  text.spellcheck = false;
  waiting.setAttribute("role", "status");
  const send = () => {
    if (text.value !== model.get("prompt")) set({ prompt: text.value });
    else if (text.value && !model.get("busy") && !model.get("words").prompt) ask("read"); // it was stopped, or failed
    name();
  };
  const name = () => {
    const stops = model.get("busy") && text.value === model.get("prompt");
    go.textContent = stops ? "Stop" : "Read";
    go.title = stops ? "Stop the model" : "Read the prompt";
    go.setAttribute("aria-label", go.title);
  };
  const grow = () => { text.style.height = "auto"; text.style.height = Math.min(180, text.scrollHeight + 2) + "px"; };
  text.addEventListener("input", () => { grow(); name(); });
  text.addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } });

  const f = model.get("facts"), sae = make("select"), special = make("input"), label = make("label"), dense = make("select");
  sae.setAttribute("aria-label", "Which SAE");
  sae.append(new Option("all SAEs", -1));
  f.saes.forEach((name, k) => sae.append(new Option(name, k)));
  sae.hidden = f.saes.length < 2;
  const chat = make("input"), chats = make("label");
  chat.type = "checkbox";
  chats.append(chat, " chat");
  chats.title = 'The prompt is a chat in the model\'s template: lines that begin with "system:", "user:" or "assistant:" begin a message';
  chats.hidden = !f.can_chat;
  chat.addEventListener("change", () => set({ prompt: text.value, chat: chat.checked }));
  special.type = "checkbox";
  label.append(special, " special tokens too");
  dense.setAttribute("aria-label", "Hide dense latents");
  dense.append(new Option("latents of any density", 1));
  for (const d of [0.3, 0.1, 0.03, 0.01, 0.003, 0.001]) dense.append(new Option(`hide those on over ${100 * d} % of tokens`, d));
  dense.hidden = !f.has_index;
  sae.addEventListener("change", () => set({ shown: +sae.value }));
  special.addEventListener("change", () => set({ special_tokens: special.checked }));
  dense.addEventListener("change", () => set({ max_density: +dense.value }));
  line.append(sae, chats, label, dense, waiting, make("span", "gap"), button("code", "", () => ask("code"), "Show the Python code for this"));
  top.append(text, go);
  body.append(top, line);

  const draw = () => {
    if (text.getRootNode().activeElement !== text) text.value = model.get("prompt");
    const d = model.get("max_density");
    if (![...dense.options].some((o) => +o.value === d)) dense.append(new Option(`hide those on over ${percent(d)} of tokens`, d));
    [sae.value, dense.value, special.checked, chat.checked] = [model.get("shown"), d, model.get("special_tokens"), model.get("chat")];
    grow();
    name();
  };
  // The kernel answers at once, unless a cell keeps it busy: say so.
  let late = null;
  const wait = () => {
    clearTimeout(late);
    waiting.textContent = "";
    if ((model.get("words").prompt || "") === model.get("prompt") || model.get("busy") || model.get("error_message")
      || model.get("notice").startsWith("Stopped")) return;
    late = setTimeout(() => { waiting.textContent = "waiting for the kernel, which is running a cell\u2026"; }, 700);
  };
  on("prompt chat shown special_tokens max_density", draw);
  on("prompt words busy error_message notice", wait);
  on("busy", name);
  draw();
  requestAnimationFrame(grow);
  return () => clearTimeout(late);
}

function strip({ body, model, on, set, ask }) {
  const card = make("section", "card strip"), line = make("div", "tokens"), below = make("div", "below");
  line.setAttribute("role", "listbox");
  line.setAttribute("aria-label", "Tokens of the prompt");
  line.tabIndex = 0;
  card.append(line, below);
  body.append(card);
  let spans = [];
  const draw = () => {
    const w = model.get("window");
    card.hidden = !w.tokens;
    spans = [];
    line.replaceChildren();
    const roles = w.roles || [];
    let into = line;
    (w.tokens || []).forEach((text, k) => {
      if (roles.length && (k === 0 || roles[k] !== roles[k - 1])) {
        let end = k;
        while (end + 1 < roles.length && roles[end + 1] === roles[k]) end++;
        const turn = make("div", "turn");
        into = make("div");
        turn.append(button(roles[k] || "assistant", "role", () => { set({ everywhere: false, position: w.offset + end }); line.focus({ preventScroll: true }); },
          `Last token of this ${roles[k] || "opening of the assistant's"} part`), into);
        line.append(turn);
      }
      const at = w.offset + k, e = seen(make("span", w.special[k] ? "t token mark" : "t token"), text);
      e.dataset.position = at;
      e.setAttribute("role", "option");
      e.setAttribute("aria-label", `token ${at}: ${text || "no text"}`);
      e._tip = () => { const a = (model.get("trace").acts || [])[k] || 0;
        return `${JSON.stringify(text)}   token ${w.ids[k]}, position ${at}\n${w.special[k] ? "left out" : `${w.active[k]} latents active`}`
          + (model.get("selected") >= 0 ? `\nlatent ${model.get("selected")}: ${minus(a)}` : ""); };
      e.addEventListener("click", () => { set({ everywhere: false, position: at }); line.focus({ preventScroll: true }); });
      into.append(e);
      if (/\n$/.test(text)) into.append(make("br"));
      spans.push(e);
    });
    color();
    mark();
  };
  const color = () => {
    const { acts, largest } = model.get("trace"), size = Math.max(1e-9, Math.abs(largest || 0));
    spans.forEach((e, k) => { const a = acts ? acts[k] : 0; e.style.background = a ? heat(Math.abs(a) / size) : "";
      e.classList.toggle("minus", a < 0); });
    say();
  };
  const mark = () => {
    const at = model.get("everywhere") ? -1 : model.get("words").at;
    spans.forEach((e) => e.setAttribute("aria-selected", String(+e.dataset.position === at)));
  };
  const page = (offset, text, hint) => button(text, "quiet", () => set({ offset }), hint);
  const say = () => {
    const w = model.get("window"), tr = model.get("trace"), i = model.get("selected"), n = w.tokens ? w.tokens.length : 0, size = 400;
    below.replaceChildren();
    if (tr.acts && i >= 0) {
      const s = make("span", "", `latent ${i}`);
      s.prepend(make("i", "swatch"));
      below.append(s, make("span", "none", tr.active ? `active on ${count(tr.active)} of ${count(w.total)} tokens, largest ${minus(tr.largest)} at ${tr.at}`
        : "is not active on this prompt"));
    } else if (n) below.append(make("span", "none", "Click a token to see its latents, a latent to see it here."));
    if (n < w.total) {
      const pages = make("span", "pages");
      if (w.offset > 0) pages.append(page(Math.max(0, w.offset - size), "\u2039 earlier", "Earlier tokens"));
      pages.append(`tokens ${count(w.offset)} to ${count(w.offset + n - 1)} of ${count(w.total)}`);
      if (w.offset + n < w.total) pages.append(page(w.offset + size, "later \u203a", "Later tokens"));
      below.append(make("span", "gap"), pages);
    }
  };
  const steps = { ArrowRight: 1, ArrowLeft: -1, l: 1, h: -1, Home: -1e9, End: 1e9 };
  line.addEventListener("keydown", (e) => {
    if (!steps[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
    ask("move", { by: steps[e.key] });
    e.preventDefault();
  });
  on("window", draw);
  on("trace selected", color);
  on("words everywhere", mark);
  draw();
}

function latents({ model, on, set, ask }) {
  const card = make("section", "card latents"), head = make("div", "head"), title = make("h3"), all = button("whole prompt", "", () =>
    set({ everywhere: !model.get("everywhere") }), "Latents of the whole prompt");
  const rank = make("select"), method = make("select"), word = make("div", "word-of"), rows = make("div", "rows"), more = make("div", "more");
  const f = model.get("facts");
  rank.setAttribute("aria-label", "Sort by");
  method.setAttribute("aria-label", "Method of attribution");
  for (const [value, text] of f.ranks) rank.append(new Option("by " + text, value));
  for (const m of f.methods) method.append(new Option(m + (m === "integrated" ? ", slower" : ""), m));
  rank.addEventListener("change", () => set({ rank: rank.value }));
  method.addEventListener("change", () => set({ method: method.value }));
  rows.setAttribute("role", "listbox");
  rows.setAttribute("aria-label", "Active latents");
  rows.tabIndex = 0;
  head.append(title, make("span", "gap"), all, rank, method);
  card.append(head, word, rows, more);

  const toward = () => {
    const w = model.get("words"), on = f.targeted.includes(model.get("rank"));
    word.hidden = !on;
    word.replaceChildren();
    if (!on) return;
    const targetInput = make("input"), auto = !model.get("target");
    targetInput.value = auto ? "" : w.target ?? model.get("target");
    targetInput.placeholder = w.target ? shown(w.target) + "  (the likeliest)" : "the likeliest";
    targetInput.setAttribute("aria-label", "Next token that effects are on");
    targetInput.addEventListener("change", () => set({ target: targetInput.value }));
    word.append(make("span", "", "effects on the next token "), targetInput);
    if (!auto) word.append(button("\u00d7", "quiet", () => set({ target: "" }), "The likeliest again"));
  };
  const names = { activation: "activation", of_max: "of largest", logit_effect: "on logit", attribution: "attribution" };
  const value = (c, v) => (v === null || v === undefined ? "" : c === "of_max" ? percent(v) : c === "activation" ? minus(v) : signed(v));
  const row = (r, by, columns, largest, pinned) => {
    const e = make("div", "row"), chosen = r.sae === model.get("selected_sae") && r.latent === model.get("selected");
    const is = model.get("pins").some(([k, i]) => k === r.sae && i === r.latent), v = r[by] ?? 0;
    const number = make("span", "n", String(r.latent)), inside = make("span", "in"), bar = make("span", "bar"), fill = make("i", v < 0 ? "minus" : "");
    const pin = button("\u2691", "quiet pin", (ev) => { ev.stopPropagation(); ask("pin", { latent: r.latent, sae: r.sae }); }, is ? "Unpin" : "Pin");
    pin.setAttribute("aria-pressed", String(is));
    pin.tabIndex = -1;
    if (f.saes.length > 1) { const s = make("small", "", String(r.sae)); s._tip = () => f.saes[r.sae]; number.append(" ", s); }
    if (model.get("everywhere") && !pinned) inside.append(seen(make("span", "t where"), r.token));
    if (r.hint && r.hint.label) inside.append(labelOf(r.hint.label, true));
    if (r.hint) r.hint.tokens.forEach(([s, share, special], j) => inside.append(piece(s, share, special, j === r.hint.at)));
    if (r.hint && r.hint.word !== undefined) { const g = make("span", "gives", "\u2192 " + shown(r.hint.word)); inside.append(g); }
    fill.style.width = `${(100 * Math.abs(v)) / Math.max(1e-12, largest[by] || 0)}%`;
    bar.append(fill);
    e.append(pin, number, inside, bar, ...columns.map((c) => make("span", "num" + (c === by ? " by" : ""), value(c, r[c]))));
    e.style.gridTemplateColumns = columnsOf(columns);
    e.dataset.latent = r.latent;
    e.dataset.sae = r.sae;
    e.setAttribute("role", "option");
    e.setAttribute("aria-selected", String(chosen));
    e.setAttribute("aria-label", `latent ${r.latent}, ${names[by]} ${value(by, r[by])}` + (r.density ? `, fires on ${percent(r.density)}` : ""));
    e._tip = () => f.saes[r.sae] + (r.density === undefined || r.density === null ? "" : `\nfires on ${percent(r.density)} of tokens`)
      + (r.token === undefined ? "" : `\nat ${r.position} ${JSON.stringify(r.token)}`);
    e.addEventListener("click", () => { pick(r); rows.focus({ preventScroll: true }); });
    return e;
  };
  const columnsOf = (columns) => `18px ${f.saes.length > 1 ? 74 : 54}px minmax(0, 1fr) 56px ${"62px ".repeat(columns.length)}`;
  const pick = (r) => set({ selected_sae: r.sae, selected: r.latent });
  const draw = () => {
    const l = model.get("listing"), w = model.get("words"), by = model.get("rank"), elements = [], everywhere = model.get("everywhere");
    card.hidden = !l.rows;
    if (!l.rows) return;
    const columns = [by, ...l.columns.filter((c) => c !== by)].slice(0, 3).filter((c) => l.columns.includes(c));
    title.textContent = everywhere ? "Latents of the whole prompt" : `Latents at ${w.at} `;
    if (!everywhere) title.append(seen(make("span", "t where"), w.token || ""));
    all.setAttribute("aria-pressed", String(everywhere));
    rank.value = by;
    method.value = model.get("method");
    method.hidden = by !== "attribution";
    const pinned = model.get("pinned");
    if (pinned.length) {
      elements.push(make("div", "sub", everywhere ? `Pinned, at ${w.at}` : "Pinned"));
      pinned.forEach((r) => elements.push(row(r, "activation", ["activation"], { activation: Math.max(l.largest.activation || 0, ...pinned.map((k) => Math.abs(k.activation))) }, true)));
    }
    const names_ = make("div", "sub row");
    names_.style.gridTemplateColumns = columnsOf(columns);
    names_.append(make("span"), make("span", "", "latent"), make("span", "", f.has_index ? "where it is strongest \u2192 makes likelier" : ""), make("span"),
      ...columns.map((c) => make("span", c === by ? "num by" : "num", names[c])));
    elements.push(names_);
    l.rows.forEach((r) => elements.push(row(r, by, columns, l.largest, false)));
    if (!l.rows.length) elements.push(make("div", "none", "No latent is active here."));
    const at = rows.scrollTop;
    rows.replaceChildren(...elements);
    rows.scrollTop = at;
    more.replaceChildren();
    more.append(make("span", "none", `${count(Math.min(l.rows.length, l.total))} of ${count(l.total)}`));
    if (l.rows.length < l.total) more.append(button("more", "", () => set({ n_rows: l.rows.length + f.n_rows }), "More latents"));
  };
  rows.addEventListener("keydown", (e) => {
    const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[e.key], l = model.get("listing").rows || [];
    if (e.key === "p" && model.get("selected") >= 0) ask("pin");
    else if (!step || e.ctrlKey || e.metaKey || e.altKey || !l.length) return;
    else {
      const now = l.findIndex((r) => r.sae === model.get("selected_sae") && r.latent === model.get("selected"));
      const next = Math.max(0, Math.min(l.length - 1, now + step));
      pick(l[next]);
      rows.querySelectorAll(".row[data-position], .row[role=option]")[next + model.get("pinned").length]?.scrollIntoView({ block: "nearest" });
    }
    e.preventDefault();
  });
  on("listing pinned selected selected_sae words", draw);
  on("words rank target", toward);
  toward();
  draw();
  return card;
}

function next({ model, on, set, ask }) {
  const card = make("section", "card next");
  const bar = (p, most, cls) => { const e = make("span", "bar"), i = make("i", cls); i.style.width = `${(100 * p) / most}%`; e.append(i); return e; };
  const share = (p) => (p >= 0.0005 ? (100 * p).toFixed(1) : "<0.1");
  const draw = () => {
    const w = model.get("words");
    card.hidden = !w.words;
    card.replaceChildren();
    if (!w.words) return;
    const h = make("h3", "", "Next after "), most = Math.max(...w.words.flatMap(([, , p, q]) => [p, q || 0])), box = make("div", "rows");
    h.append(seen(make("span", "t where"), w.token));
    const legend = make("div", "sub");
    legend.append(make("i", "key"), "the model ");
    if (!w.compared && w.comparable) {
      if (w.comparing) legend.append(make("i", "key gray"), "with the SAEs in place: soon");
      else legend.append(button("compare", "quiet", () => ask("compare"), "Next tokens with the SAEs in place"));
    }
    if (w.compared) { const kl = make("span", "kl", `KL ${digits(w.kl)} nats`); kl._tip = () => "How far the predictions move here: divergence of those with the SAEs from the model's";
      legend.append(make("i", "key gray"), "with the SAEs in place", make("span", "gap"), kl); }
    w.words.slice(0, 14).forEach(([text, id, p, q]) => {
      const e = button("", "quiet word", () => set({ target: "id:" + id, ...(model.get("facts").targeted.includes(model.get("rank")) ? {} : { rank: "logit_effect" }) }),
        `Effects on ${text || "token " + id}: ${share(p)} %`);
      const two = make("span", "two");
      two.append(bar(p, most, ""));
      if (q !== null) two.append(bar(q, most, "gray"));
      e.append(seen(make("span", "t"), text), two, make("span", "num", share(p)), make("span", "num dim", q === null ? "" : share(q)));
      e.setAttribute("aria-pressed", String(id === w.target_id && model.get("facts").targeted.includes(model.get("rank"))));
      e._tip = () => `${JSON.stringify(text)}   token ${id}\n${(100 * p).toPrecision(3)} %` + (q === null ? "" : `, with the SAEs ${(100 * q).toPrecision(3)} %`) + "\nclick: which latents make it likelier";
      box.append(e);
    });
    card.append(h, legend);
    if (!w.comparable) card.append(make("div", "sub", "Two of the SAEs write to the same point: choose one to compare."));
    card.append(box);
  };
  on("words rank", draw);
  draw();
  return card;
}

function render(context) {
  return framed(context, "browser prompt", (parts) => {
    const { body, model, on } = parts, stop = asking(parts), pair = make("div", "pairs"), under = make("div", "under");
    strip(parts);
    pair.append(latents(parts), next(parts));
    body.append(pair, under);
    const about = make("p", "none about-index");
    under.append(about);
    pageOf({ ...parts, body: under }, { pinned: (i) => model.get("pins").some(([k, j]) => k === model.get("selected_sae") && j === i), browsing: false });
    const say = () => {
      const i = model.get("selected"), none = i < 0 || model.get("page").latent !== undefined || !model.get("window").tokens;
      about.hidden = none;
      about.textContent = none ? "" : `What latent ${i} is about elsewhere, an index knows: PromptExplorer(model, sae, saewb.build_index(model, sae, texts)).`;
      under.hidden = i < 0 || !model.get("window").tokens;
    };
    on("selected page window", say);
    say();
    return stop;
  });
}
export default { render };
