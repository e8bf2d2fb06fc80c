const cosine = (v) => (v < 0 ? "\u2212" : "") + Math.abs(v).toFixed(3);

function crowd({ body, model, on, set, ask }) {
  const line = make("div", "line"), figures = make("dl", "figures"), hists = make("div", "hists"), lists = make("div", "lists");
  const sides = make("div", "sides"), list = make("section", "card"), near = make("section", "card near");
  lists.append(list, near);
  line.append(sides, make("span", "gap"), button("code", "", () => ask("code"), "The Python that gives this"));
  body.append(line, figures, hists, lists);

  const card = (title, note) => { const e = make("section", "card"), h = make("h3", "", title);
    if (note) h.append(" ", make("small", "", note)); e.append(h); return e; };
  const axis = (...labels) => { const e = make("div", "axis"); labels.forEach((l) => e.append(make("span", "", l))); return e; };
  // What is in focus stays there: what is drawn anew takes the focus along, or the notebook would hear the next key.
  const tabs = () => { const had = sides.contains(document.activeElement);
    sides.replaceChildren(...model.get("facts").sides.map((s) => button(s, "", () => set({ side: s }), s === "decoder" ? "What latents write" : "What latents read")));
    chosen();
    if (had) sides.querySelector("[aria-pressed=true]")?.focus(); };
  const chosen = () => [...sides.children].forEach((b) => b.setAttribute("aria-pressed", String(b.textContent === model.get("side"))));
  const overview = () => {
    const f = model.get("figures");
    figures.replaceChildren();
    hists.replaceChildren();
    if (!f.figures) return;
    f.figures.forEach(([name, value, note]) => { const e = make("div");
      e.append(make("dt", "", name), make("dd", "", digits(value)), make("small", "", note)); figures.append(e); });
    const n = f.cosines.length, at = (x) => -1 + (2 * x) / n;
    const all = card("Cosines of all pairs", "on a log scale");
    all.append(bars(f.cosines.map((c) => Math.log1p(c)), { label: "Histogram of cosines between all pairs",
      tip: (x) => `${cosine(at(x))} to ${cosine(at(x + 1))}: ${count(f.cosines[x])} pairs` }), axis("\u22121", "0", "1"));
    const m = f.largest.length, one = card("Largest |cos| of each direction");
    one.append(bars(f.largest, { cls: "grey", label: "Histogram of the largest absolute cosine of each direction",
      tip: (x) => `${(x / m).toFixed(2)} to ${((x + 1) / m).toFixed(2)}: ${count(f.largest[x])} directions` }), axis("0", "1"));
    hists.append(all, one);
  };
  const link = (i) => button(String(i), "quiet link", () => set({ selected: i }), `Neighbours of ${i}`);
  const bar = (v) => { const e = make("span", "bar"), b = make("i");
    b.style.width = 100 * Math.abs(v) + "%";
    if (v < 0) b.className = "minus";
    e.append(b); return e; };
  const head = make("h3"), name = make("span"), rows = make("div", "rows");
  head.append(name, button("turn round", "quiet", () => set({ closest_first: !model.get("closest_first") }), "Turn the order round"));
  rows.tabIndex = 0;
  list.append(head, rows);
  let first = null;
  const table = () => { const had = rows.contains(document.activeElement), at = first === model.get("closest_first") ? rows.scrollTop : 0;
    first = model.get("closest_first");
    name.textContent = first ? "Closest to another" : "With the most room";
    rows.setAttribute("aria-label", name.textContent);
    rows.replaceChildren(...(model.get("rows").rows || []).map(([i, , j, c]) => { const e = make("div", "row");
      e.dataset.direction = i;
      e.append(link(i), bar(c), make("span", "num", cosine(c)), link(j));
      return e; }));
    rows.scrollTop = at;
    marked();
    if (had) rows.focus({ preventScroll: true }); };
  const marked = () => [...rows.children].forEach((e) => e.setAttribute("aria-current", String(+e.dataset.direction === model.get("selected"))));
  const page = () => {
    const p = model.get("page"), had = near.contains(document.activeElement);
    near.replaceChildren(make("h3", "", p.direction === undefined ? "" : `Nearest to ${p.direction}`));
    (p.neighbours || []).forEach(([j, c]) => { const e = make("div", "row");
      e.append(link(j), bar(c), make("span", "num", cosine(c))); near.append(e); });
    if (had) near.focus({ preventScroll: true });
  };
  near.tabIndex = -1;
  on("facts", tabs);
  on("side", chosen);
  on("figures", overview);
  on("rows closest_first", table);
  on("selected", marked);
  on("page", page);
  for (const f of [tabs, overview, table, page]) f();
}
export default { render: (context) => framed(context, "crowd", (parts) => { crowd(parts); }) };
