const HIGH = 27, TALLEST = 12e6; // pixels: of a row; of what a browser scrolls

function table({ body, model, on, set, ask }) {
  const side = make("div", "side"), find = make("div", "find"), sort = make("select");
  const only = make("select"), line = make("div", "line"), total = make("span", "total"), turn = make("button", "quiet");
  const box = make("div", "rows"), inner = make("div", "inner"), columns = make("div", "columns");
  const input = searchField({ model, set }, "Text, /pattern/, id:token, number", "Search latents", () => box);
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

  let cached = new Map(), n = 0;
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
    for (let p = at; p < to; p++) if (!cached.has(p)) {
      const back = Math.max(0, Math.floor(at - (model.get("facts").window - view() / HIGH) / 2));
      set({ offset: back });
      return;
    }
  }, 70);
  const draw = () => {
    const top = first(), from = Math.max(0, Math.floor(top) - 2), to = Math.min(n, Math.ceil(top + view() / HIGH) + 2);
    inner.style.height = tall() + "px";
    const rows = [];
    let missing = false;
    for (let p = from; p < to; p++) {
      const r = cached.get(p), e = make("div", "row");
      e.style.top = box.scrollTop + (p - top) * HIGH + "px";
      e.setAttribute("role", "option");
      e.setAttribute("aria-posinset", p + 1);
      e.setAttribute("aria-setsize", n);
      if (r) fill(e, r); else missing = true;
      rows.push(e);
    }
    inner.replaceChildren(...rows);
    if (!n) inner.replaceChildren(make("div", "none", "No latent matches."));
    if (missing) request();
  };
  const fill = (e, r) => {
    const inside = make("span", "in"), chosen = r.latent === model.get("selected");
    const marks = (model.get("pins").includes(r.latent) ? "\u2691" : "") + (model.get("notes")[r.latent] ? "\u270e" : "");
    if (r.label) inside.append(labelOf(r.label, true));
    r.tokens.forEach(([s, share, special], j) => inside.append(piece(s, share, special, j === r.at)));
    if (!r.tokens.length) inside.append(make("span", "none", "never fires"));
    e.dataset.latent = r.latent;
    e.setAttribute("aria-selected", String(chosen));
    e.setAttribute("aria-label", `latent ${r.latent}${r.label ? " " + r.label : ""}, fires on ${percent(r.density)}`);
    const number = make("span", "n", String(r.latent));
    if (marks) number.append(make("i", "marks", marks));
    e.append(number, inside, make("span", "num", percent(r.density)), make("span", "num", digits(r.max)));
    e.addEventListener("click", () => { set({ selected: r.latent }); box.focus({ preventScroll: true }); });
  };
  const arrived = () => {
    const sent = model.get("rows"), changed = sent.list !== cached.list;
    if (changed) { cached = new Map(); cached.list = sent.list; n = sent.total; inner.style.height = tall() + "px"; box.scrollTop = 0; }
    (sent.rows || []).forEach((r, j) => cached.set(sent.offset + j, r));
    const all = model.get("facts").latents;
    total.textContent = n === all ? `${count(n)} latents` : `${count(n)} of ${count(all)} latents`;
    if (changed) place();
    draw();
  };
  const place = () => { const p = model.get("position"); if (p >= 0 && p < n) scrollTo(p); };
  const controls = () => {
    if (!active(input)) input.value = model.get("query");
    sort.value = model.get("sort");
    only.value = model.get("show_only");
    turn.textContent = model.get("descending") ? "\u2193" : "\u2191";
    turn.disabled = model.get("sort") === "best";
    turn.setAttribute("aria-label", model.get("descending") ? "Largest first" : "Smallest first");
    [...columns.querySelectorAll("button")].forEach((b, j) =>
      b.setAttribute("aria-current", String(model.get("sort") === ["density", "max"][j])));
  };
  sort.addEventListener("change", () => set({ sort: sort.value, descending: sort.value !== "latent" }));
  only.addEventListener("change", () => set({ show_only: only.value }));
  turn.addEventListener("click", () => set({ descending: !model.get("descending") }));
  box.addEventListener("scroll", () => requestAnimationFrame(draw));
  listKeys(box, ask, () => n, { "/": () => { input.focus(); input.select(); },
    p: () => ask("pin") }); // whichever is selected once the keys before it are through
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
    const svg = bars(counts.map((c) => Math.sqrt(c)), { cls: "gray small", on: (x) => inside(x),
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

function render(context) {
  return framed(context, "browser", (parts) => {
    const stop = table(parts);
    pageOf(parts);
    return stop;
  });
}
export default { render };
