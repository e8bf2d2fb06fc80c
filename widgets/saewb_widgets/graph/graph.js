function graph(parts) {
  const { root, body, model, on, set, ask } = parts;
  const field = (label, attributes) => { const e = make("label", "field", label + " "), input = make("input");
    for (const [k, v] of Object.entries(attributes)) input.setAttribute(k, v);
    e.append(input);
    return [e, input]; };
  const line = make("div", "line"), facts = model.get("facts");
  for (const [trait, label] of [["nodes", "nodes' influence"], ["edges", "edges"]]) {
    const [e, input] = field(label, { type: "range", min: 0, max: 1, step: 0.01 }), value = make("output");
    const show = () => { input.value = model.get(trait); value.textContent = model.get(trait).toFixed(2); };
    input.disabled = !facts.can_prune;
    input.addEventListener("input", () => { value.textContent = (+input.value).toFixed(2); });
    input.addEventListener("change", () => { set({ [trait]: +input.value }); show(); });
    e.append(value);
    on(trait + " error_message", show);
    show();
    line.append(e);
  }
  const size = make("span", "dim");
  line.append(size, make("span", "gap"), button("group similar", "", () => ask("group_similar"), "Group latents whose edges have a cosine of 0.7 and more"), button("code", "", () => ask("code"), "Show the Python code for this"));

  const view = make("div", "view"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), side = make("section", "card effects");
  svg.setAttribute("class", "attribution");
  svg.setAttribute("role", "group");
  side.tabIndex = -1;
  side.setAttribute("aria-live", "polite");
  view.append(svg, side);
  const indexOf = (id) => { const i = id ? model.get("drawing").nodes.findIndex((n) => n.id === id) : -1; return i < 0 ? null : i; };
  const idAt = (i) => (i === null ? "" : model.get("drawing").nodes[i].id);
  const isPinned = (id) => model.get("pins").includes(id);
  const drawing = graphDrawing(svg, side, {
    data: () => model.get("drawing"),
    isShown: () => true,
    lines: () => 3000,
    picked: () => indexOf(model.get("selected")),
    pick: (i) => set({ selected: idAt(i) }),
    marks: (i) => (isPinned(idAt(i)) ? ["pinned"] : []),
    key: (event, i) => { if (event.key !== "p" || model.get("drawing").nodes[i].kind === "group") return false; ask("pin", { node: idAt(i) }); return true; },
    hint: "Click a node: its strongest incoming and outgoing effects are drawn and listed. Arrows move between nodes, Enter selects, p pins, Escape deselects. Errors are hollow.",
    more: (node) => {
      const e = make("div", "actions");
      if (node.kind === "group") e.append(button("ungroup", "", () => ask("ungroup", { name: node.id }), `Take the group ${node.id} apart`));
      else { const pin = button(isPinned(node.id) ? "\u2691 pinned" : "\u2691 pin", "", () => ask("pin", { node: node.id }), "Pin this node");
        pin.setAttribute("aria-pressed", String(isPinned(node.id)));
        e.append(pin); }
      return [e]; },
  });

  // Pinned nodes, and what makes a group of them.
  const pinned = make("div", "line pins"), chips = make("span", "choices"), [naming, name] = field("as", { placeholder: "name of a group", "aria-label": "Name of the group" });
  const make_group = button("group", "", () => { ask("group", { name: name.value }); name.value = ""; }, "Group the pinned nodes");
  name.addEventListener("keydown", (e) => { if (e.key === "Enter") { e.preventDefault(); make_group.click(); } });
  pinned.append(make("span", "dim", "pinned"), chips, make_group, naming);
  const label = (id) => { const i = indexOf(id), n = i === null ? null : model.get("drawing").nodes[i];
    return n === null ? `${id} (not shown)` : n.label || (n.kind === "token" || n.kind === "target" ? `${n.kind} ${n.token}` : id); };
  const pins = () => {
    const had = pinned.contains(document.activeElement) && document.activeElement !== name;
    pinned.hidden = !model.get("pins").length;
    chips.replaceChildren(...model.get("pins").map((id) => { const e = make("span", "chip"), go = button(label(id), "quiet link", () => { if (indexOf(id) !== null) set({ selected: id }); });
      e.append(go, button("\u00d7", "quiet", () => ask("pin", { node: id }), `Unpin ${id}`));
      return e; }));
    if (had && !pinned.hidden) name.focus(); else if (had) svg.querySelector("[tabindex='0']")?.focus({ preventScroll: true }); };

  // Scale the selected latents.
  const trial = make("section", "card trial"), [scaling, factor] = field("multiply the selected latents by", { type: "number", step: 0.5, "aria-label": "Factor" });
  const run = button("try", "run", () => { set({ factor: +factor.value }); ask("intervene"); }, "Run the model with the selected latents multiplied by this factor");
  const controls = make("div", "line"), caption = make("p", "dim"), table = make("table");
  controls.append(scaling, run, make("span", "dim", facts.can_try ? "attention held at the clean run; norms, MLPs and later latents respond" : "needs a model and transcoders"));
  trial.append(controls, caption, table);
  const scale = () => { factor.value = model.get("factor"); };
  const effect = () => {
    const { rows = [], caption: text = "" } = model.get("tried"), head = make("tr");
    caption.textContent = text;
    head.append(...["target", "p before", "p after", "predicted", "measured"].map((h) => make("th", "", h)));
    table.hidden = caption.hidden = !text;
    table.replaceChildren(head, ...rows.map(([token, ...values]) => { const tr = make("tr");
      tr.append(make("td", "", shown(token)), ...values.map((v, k) => make("td", "", k < 2 ? v.toFixed(3) : signed(v))));
      return tr; })); };
  body.append(line, view, pinned, trial);

  const draw = () => { const d = model.get("drawing");
    svg.style.height = `${Math.min(900, Math.max(320, 56 + 54 * ((d.layers || []).length + 1)))}px`;
    svg.setAttribute("aria-label", d.about || "");
    size.textContent = d.nodes ? `${count(d.nodes.filter((n) => n.kind !== "group").length)} of ${count(facts.n_nodes)} nodes, ${count(d.edges.length)} edges` : "";
    if (d.nodes) drawing.draw();
    pins(); };
  on("drawing", draw);
  on("selected pins", () => { if (side.contains(document.activeElement)) side.focus({ preventScroll: true }); drawing.highlight(); pins(); });
  on("factor", scale);
  on("tried", effect);
  for (const f of [draw, scale, effect]) f();
  let wide = svg.clientWidth;
  const resized = new ResizeObserver(() => { if (svg.clientWidth !== wide) { wide = svg.clientWidth; draw(); } });
  resized.observe(svg);
  return () => resized.disconnect();
}
export default { render: (context) => framed(context, "graph", graph) };
