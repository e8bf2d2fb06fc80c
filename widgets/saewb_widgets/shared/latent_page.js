// The page about one latent in a panel: what latent.js draws, with what a reader does to it.

// `pinned(latent)`: whether it is; `browsing`: with notes, and a page to save.
function pageOf({ body, model, on, set, ask }, { pinned = (i) => model.get("pins").includes(i), browsing = true } = {}) {
  const main = make("div", "main");
  main.tabIndex = -1;
  body.append(main);
  let wrap = false;
  const top = (p) => {
    const e = make("div", "top"), is = pinned(p.latent);
    const pin = button(is ? "\u2691 pinned" : "\u2691 pin", "", () => ask("pin", { latent: p.latent }), "Pin this latent");
    pin.setAttribute("aria-pressed", String(is));
    const whole = button("whole text", "", () => { wrap = !wrap; draw(); }, "Show whole contexts");
    whole.setAttribute("aria-pressed", String(wrap));
    e.append(make("h2", "", "Latent " + p.latent), labelOf(p.label, p.explained), make("span", "gap"), pin, whole);
    if (browsing) e.append(button("code", "", () => ask("code"), "Show the Python code for this"),
      button("save page", "", () => ask("save", { path: "features.html" }), "Save the table's first 500 latents to features.html"));
    if (p.url) { const a = make("a", "out", "Neuronpedia \u2197"); a.href = p.url; a.target = "_blank"; a.rel = "noopener"; e.append(a); }
    return e;
  };
  const note = (p) => {
    const e = make("input", "note");
    e.placeholder = "What is it? Write a note";
    e.setAttribute("aria-label", `Note on latent ${p.latent}`);
    e.value = model.get("notes")[p.latent] || "";
    e.addEventListener("change", () => ask("note", { latent: p.latent, text: e.value }));
    return e;
  };
  const link = (latent) => button(String(latent), "quiet link", () => set({ selected: latent }));
  let last = null;
  const draw = () => {
    const p = model.get("page"), at = main.scrollTop;
    main.hidden = p.latent === undefined;
    if (p.latent === undefined) return;
    const tried = browsing ? tryOut({ model, set, page: p }) : null;
    main.replaceChildren(top(p), latentFacts(p), ...(browsing ? [note(p)] : []), ...(tried ? [tried] : []),
      latentCards(p, link), ...contextGroups(p, (list) => contexts(p, list, wrap)));
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
  const e = make("section", "card try"), input = make("input"), { tokens, special, latents, labels } = model.get("tried");
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
  latents.slice(0, 16).forEach(([i]) => who.append(
    button(String(i), "quiet link", () => set({ selected: i })), labelOf(labels[i] || ""), " "));
  e.append(line, who);
  return e;
}
