const HIGH = 26; // pixels of a row
const latents = (n) => (n === null || n === undefined ? "" : count(n));
// Long names may break after a slash.
const breakable = (e, text) => { text.split("/").forEach((part, j) => { if (j) e.append("/", make("wbr")); e.append(part); }); return e; };
const megabytes = (b) => (b === null || b === undefined ? "" : (b >= 1e8 ? count(Math.round(b / 1e6)) : (b / 1e6).toFixed(1)));
const mean = (v) => (v === null || v === undefined ? "" : v >= 100 ? count(Math.round(v)) : String(+v.toPrecision(3)));
const COLUMNS = [["release", "release", ""], ["id", "id", ""], ["layer", "layer", "num"], ["d_sae", "width", "num"],
  ["l0", "L0", "num"], ["bytes", "MB", "num"], ["neuronpedia", "NP", "np"]];

function filters({ model, on, set, ask }, box) {
  const top = make("div", "line"), names = make("div", "line names"), more = make("div", "line");
  const find = searchField({ model, set }, "Words in release, id, model, hook or repository", "Search the catalogue", box);
  top.append(find, button("clear", "", () => ask("clear"), "Remove all filters"),
    button("code", "", () => ask("code"), "Show the Python code for this"));
  const kinds = [["model", "model", "any model", names, (v) => v], ["release", "release", "any release", names, (v) => v],
    ["site", "site", "any site", more, (v) => v], ["layer", "layer", "any layer", more, (v) => "layer " + v],
    ["width", "d_sae", "any width", more, (v) => latents(v) + " latents"]];
  const selects = kinds.map(([trait, key, any, line, text]) => {
    const s = make("select");
    s.setAttribute("aria-label", trait);
    s.addEventListener("change", () => {
      const number = trait === "layer" || trait === "width";
      set({ [trait]: s.value === "" ? (number ? null : "") : number ? +s.value : s.value }); });
    line.append(s);
    const fill = () => {
      const left = model.get("left")[key] || [], now = model.get(trait), here = left.some(([v]) => v === now);
      s.replaceChildren(new Option(left.length > 1 ? `${any} (${count(left.length)})` : any, ""),
        ...left.map(([v, n]) => new Option(`${text(v)}  (${count(n)})`, v)));
      if (!here && now !== "" && now !== null) s.append(new Option(`${text(now)}  (0)`, now));
      s.value = now === null ? "" : String(now);
      s.classList.toggle("chosen", now !== "" && now !== null);
    };
    return fill;
  });
  const ends = ["least", "most"].map((which) => { const e = make("input", "l0");
    for (const [k, v] of Object.entries({ type: "number", min: 0, placeholder: which, "aria-label": `L0, ${which}` })) e.setAttribute(k, v);
    e.addEventListener("change", () => { const [a, b] = ends.map((x) => (x.value === "" ? null : +x.value)); set({ l0: [a, b] }); });
    return e; });
  const pages = make("input"), label = make("label", "pages");
  pages.type = "checkbox";
  pages.addEventListener("change", () => set({ on_neuronpedia: pages.checked ? true : null }));
  label.append(pages, " on Neuronpedia");
  const range = make("span", "range");
  range.append("L0", ends[0], "\u2013", ends[1]);
  more.append(range, label);
  const draw = () => {
    selects.forEach((f) => f());
    if (!active(find)) find.value = model.get("query");
    model.get("l0").forEach((v, j) => { if (!active(ends[j])) ends[j].value = v === null ? "" : v; });
    pages.checked = model.get("on_neuronpedia") === true;
    pages.indeterminate = model.get("on_neuronpedia") === false;
  };
  on("left model release site layer width l0 on_neuronpedia query", draw);
  draw();
  return [top, names, more];
}

function listing({ model, on, set, ask }) {
  const box = make("div", "rows"), inner = make("div", "inner"), columns = make("div", "columns"), total = make("div", "total");
  total.setAttribute("role", "status");
  for (const [key, text, cls] of COLUMNS) columns.append(button(text, "quiet " + cls, () => {
    const here = model.get("sort") === key, down = model.get("descending");
    set(!here ? { sort: key, descending: false } : down ? { sort: "", descending: false } : { descending: true }); },
    `Sort by ${key === "neuronpedia" ? "Neuronpedia's pages" : key === "bytes" ? "size" : text}`));
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Published SAEs");
  box.tabIndex = 0;
  box.append(inner);
  let loaded = new Map(), n = 0;
  const view = () => box.clientHeight || 300;
  const request = throttled(() => {
    const at = Math.floor(box.scrollTop / HIGH), shows = Math.ceil(view() / HIGH);
    for (let p = at; p < Math.min(n, at + shows + 1); p++) if (!loaded.has(p)) {
      set({ offset: Math.max(0, Math.floor(at - (model.get("facts").window - shows) / 2)) });
      return;
    }
  }, 70);
  const fill = (e, r) => {
    const [release, id, name, , layer, width, l0, how, bytes, np] = r, [a, b] = model.get("selected");
    e.setAttribute("aria-selected", String(a === release && b === id));
    e.setAttribute("aria-label", `${release} ${id}, ${name}`);
    const dot = make("span", "np", np ? "\u25cf" : "");
    if (np) dot._tip = () => "pages on Neuronpedia: " + np;
    const l = make("span", "num", mean(l0));
    if (l0 !== null) l._tip = () => `${mean(l0)} latents active per token, ${how === "target" ? "the target of training" : "measured by its authors"}`;
    const rel = make("span", "name", release), of = make("span", "name", id);
    rel._tip = of._tip = () => `${release}\n${id}\n${name}`;
    e.append(rel, of, make("span", "num", layer === null ? "" : String(layer)), make("span", "num", latents(width)), l,
      make("span", "num", megabytes(bytes)), dot);
    e.addEventListener("click", () => { set({ selected: [release, id] }); box.focus({ preventScroll: true }); });
  };
  const draw = () => {
    const from = Math.max(0, Math.floor(box.scrollTop / HIGH) - 2), to = Math.min(n, from + Math.ceil(view() / HIGH) + 5);
    inner.style.height = n * HIGH + "px";
    let missing = false;
    const items = [];
    for (let p = from; p < to; p++) {
      const e = make("div", "row"), r = loaded.get(p);
      e.style.top = p * HIGH + "px";
      for (const [k, v] of Object.entries({ role: "option", "aria-posinset": p + 1, "aria-setsize": n })) e.setAttribute(k, v);
      if (r) fill(e, r); else missing = true;
      items.push(e);
    }
    inner.replaceChildren(...items);
    if (!n) inner.append(make("div", "none", "No published SAE matches."));
    if (missing) request();
  };
  const place = () => {
    const p = model.get("position"), top = p * HIGH;
    if (p < 0 || p >= n) return;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + HIGH > box.scrollTop + view()) box.scrollTop = top + HIGH - view();
  };
  const update = () => {
    const part = model.get("rows");
    if (part.list !== loaded.list) {
      loaded = new Map(); loaded.list = part.list; n = part.total;
      inner.style.height = n * HIGH + "px"; box.scrollTop = 0; place();
    }
    (part.rows || []).forEach((r, j) => loaded.set(part.offset + j, r));
    const all = model.get("facts").all, left = model.get("left"), names = (k, what) => { const m = (left[k] || []).length;
      return `${count(m)} ${what}${m === 1 ? "" : "s"}`; };
    total.textContent = (n === all ? `${count(n)} SAEs` : `${count(n)} of ${count(all)} SAEs`)
      + (n && !model.get("release") && !model.get("model") ? `, ${names("model", "model")}, ${names("release", "release")}` : "");
    draw();
  };
  const heads = () => [...columns.children].forEach((b, j) => {
    const here = model.get("sort") === COLUMNS[j][0];
    b.textContent = COLUMNS[j][1] + (here ? (model.get("descending") ? " \u2193" : " \u2191") : "");
    b.setAttribute("aria-current", String(here)); });
  box.addEventListener("scroll", () => requestAnimationFrame(draw));
  listKeys(box, ask, () => n);
  on("rows left", update);
  on("selected", draw);
  on("position", () => { place(); draw(); });
  on("sort descending", heads);
  heads();
  update();
  // The heads stand over their columns, however wide the scroll bar is.
  const sized = new ResizeObserver(() => { columns.style.paddingRight = 12 + box.offsetWidth - box.clientWidth + "px"; draw(); });
  sized.observe(box);
  return [total, columns, box, () => sized.disconnect()];
}

function details({ model, on, ask }, main) {
  const head = make("div", "head"), loader = make("div", "loader"), facts = make("dl"), more = make("div", "more");
  main.append(head, loader, facts, more);
  const same = (x, p) => x.release === p.release && x.id === p.id;
  const load = () => {
    const p = model.get("page"), going = model.get("progress"), loaded = model.get("loaded"), busy = going.release !== undefined;
    const focused = loader.contains(loader.getRootNode().activeElement);
    loader.replaceChildren();
    if (busy) {
      const bar = make("progress"), text = make("span", "came");
      const whole = going.total > 0 && going.done >= going.total;
      if (going.total && !whole) { bar.max = going.total; bar.value = going.done; }
      bar.setAttribute("aria-label", `Loading ${going.id}`);
      text.textContent = whole ? `${megabytes(going.total)} MB downloaded; checking and reading` : going.total
        ? `${megabytes(going.done) || 0} of ${megabytes(going.total)} MB` : "asking the hub";
      const stop = button("Cancel", "", () => ask("cancel"), "Stop loading");
      loader.append(bar, text, stop);
      if (!same(going, p)) loader.append(make("div", "which", `${going.release}, ${going.id}`));
      if (focused) stop.focus({ preventScroll: true });
    } else if (p.release !== undefined) {
      const go = button(p.bytes === undefined ? "Load" : `Load ${megabytes(p.bytes)} MB`, "go", () => ask("load"),
        `Load ${p.release}, ${p.id}`);
      loader.append(go);
      if (focused) go.focus({ preventScroll: true });
    }
    if (loaded.text) {
      const e = make("div", "loaded");
      e.append(make("b", "", "panel.sae"), ` is ${loaded.release}, ${loaded.id}`, make("div", "none", loaded.text));
      loader.append(e);
    }
  };
  const fact = (name, value) => { if (value === undefined || value === "") return;
    const v = breakable(make("dd"), String(value));
    facts.append(make("dt", "", name), v); };
  const draw = () => {
    const p = model.get("page");
    head.replaceChildren();
    facts.replaceChildren();
    more.replaceChildren();
    if (p.release === undefined) { head.append(make("p", "none", "Choose an SAE to see its details and to load it.")); load(); return; }
    head.append(breakable(make("h2"), p.id), make("div", "none", p.release));
    fact("model", p.model);
    fact("reads", p.hook);
    fact("writes", p.hook_out);
    fact("latents", p.d_sae === undefined ? undefined : `${count(p.d_sae)}, of ${count(p.d_in)} dimensions`);
    fact("L0", p.l0 === undefined ? "not known" : `${mean(p.l0)}, ${p.l0_is === "target" ? "the target of training" : "measured by its authors"}`);
    fact("variance explained", p.variance_explained === undefined ? undefined : `${+(100 * p.variance_explained).toPrecision(3)} %`);
    fact("architecture", p.architecture);
    fact("size", p.bytes === undefined ? "not known" : `${megabytes(p.bytes)} MB as ${p.dtype}, estimated`);
    fact("format", p.format);
    fact("repository", p.repo);
    fact("path", p.path);
    fact("input factor", p.norm_factor === undefined ? undefined : digits(p.norm_factor));
    fact("license", "not in the catalogue: see the repository's card");
    p.links.forEach(([name, address]) => { const a = make("a", "out", name + " \u2197");
      a.href = address; a.target = "_blank"; a.rel = "noopener"; more.append(a); });
    if (p.note) more.append(make("p", "none", p.note));
    load();
  };
  on("page", draw);
  on("progress loaded", load);
  draw();
}

function render(context) {
  return framed(context, "picker", (parts) => {
    const side = make("div", "side"), main = make("div", "main"), [total, columns, box, stop] = listing(parts);
    side.append(...filters(parts, () => box), total, columns, box);
    parts.body.append(side, main);
    details(parts, main);
    return stop;
  });
}
export default { render };
