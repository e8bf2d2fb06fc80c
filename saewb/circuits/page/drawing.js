// Draws an attribution graph into an svg, and lists the effects of a node. The page of a graph and GraphPanel share this.
// `view`: data(), what graph_data gives; isShown(node), lines(), how many edges; picked(), pick(index or null); and, if
// there are any, hint, marks(index), classes of a node; more(node), elements below its facts; key(event, index).

function graphDrawing(svg, side, view) {
  const NS = "http://www.w3.org/2000/svg", LEFT = 48, BOTTOM = 34, TOP = 26, RIGHT = 12;
  let data, nodes, edges, layers, strong;
  const make = (tag, attributes, parent, text) => {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent?.append(element);
    return element;
  };
  const short = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const number = (x) => (x === null ? "" : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(2) : x.toPrecision(3));
  const name = (n) => n.label || (n.kind === "latent" ? `layer ${n.layer}, latent ${n.latent}` : n.kind === "error" ? `error, layer ${n.layer}` : n.token);
  const at = (n) => (n.kind === "group" ? `group of ${n.members.length}` : n.kind === "token" ? `position ${n.position}` : data.tokens[n.position]);
  const isShown = (n) => n.group === undefined && (n.kind === "group" || n.kind === "token" || n.kind === "target" || view.isShown(n));
  const known = (label, x) => (x === null || x === undefined ? [] : [`${label} ${number(x)}`]);
  const figures = (n) => [...known("activation", n.activation), ...known("value", n.value), ...(n.kind === "group" ? [] : known("influence", n.influence))];
  const members = (n) => (n.members || []).map((i) => `${name(nodes[i])} · ${data.tokens[nodes[i].position]}`);
  const describe = (n) => (n.kind === "group" ? [n.label, ...members(n).slice(0, 12)].join("\n")
    : [name(n), ...(n.kind === "latent" && n.label ? [`layer ${n.layer}, latent ${n.latent}`] : []), `${JSON.stringify(data.tokens[n.position])}, ${figures(n).join(", ")}`, ...(n.card || [])].join("\n"));

  function read() {
    if (data === view.data()) return;
    data = view.data();
    ({ nodes, layers } = data);
    edges = data.edges.map(([source, target, effect]) => ({ source, target, effect }));
  }
  function place() {
    const width = Math.max(svg.clientWidth, 300), height = Math.max(svg.clientHeight, 240);
    const left = (p) => LEFT + (width - LEFT - RIGHT) * data.ends[p], column = (p) => left(p + 1) - left(p), row = (height - TOP - BOTTOM) / (layers.length + 1);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const node of nodes) {
      if (node.kind === "group") continue;
      node.x = left(node.position) + 8 + Math.min(15, (column(node.position) - 4) / node.slots) * node.slot;
      node.y = height - BOTTOM - row * node.row;
    }
    const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
    for (const node of nodes) if (node.kind === "group") for (const axis of ["x", "y"]) node[axis] = mean(node.members.map((i) => nodes[i][axis]));
    return { height, left, column, row };
  }
  const curve = (e) => {
    const a = nodes[e.source], b = nodes[e.target], middle = (a.y + b.y) / 2;
    return `M${a.x.toFixed(1)} ${a.y.toFixed(1)}C${a.x.toFixed(1)} ${middle.toFixed(1)} ${b.x.toFixed(1)} ${middle.toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
  };

  function draw() {
    const start = performance.now(), had = svg.contains(svg.getRootNode().activeElement);
    read();
    const { height, left, column, row } = place();
    svg.replaceChildren();
    layers.forEach((layer, i) => make("text", { class: "axis", x: 4, y: height - BOTTOM - row * (i + 1) + 4 }, svg, `layer ${layer}`));
    data.tokens.forEach((token, i) => make("text", { x: left(i) + 2, y: height - 8 }, svg, short(token, Math.max(2, Math.floor(column(i) / 7)))));
    const visible = edges.slice(0, view.lines()).filter((e) => isShown(nodes[e.source]) && isShown(nodes[e.target]));
    make("path", { class: "all", d: visible.map(curve).join("") }, svg);
    strong = make("g", { class: "strong" }, svg);
    nodes.forEach((node, i) => {
      node.circle = null;
      if (!isShown(node)) return;
      node.circle = make("circle", { cx: node.x, cy: node.y, r: node.r, tabindex: -1, role: "button", "data-i": i, "aria-label": `${name(node)} at ${at(node)}` }, svg);
      node.circle._tip = () => describe(node);
      if (node.kind === "target") make("text", { x: node.x + 6, y: node.y - 6 - 11 * (i % 2) }, svg, short(node.token, 14));
      if (node.kind === "group") make("text", { x: node.x + 11, y: node.y + [4, -8, 16][i % 3] }, svg, short(node.label, 24));
    });
    highlight();
    if (had) svg.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
    svg.dataset.lines = String(visible.length);
    svg.dataset.drawn = String(nodes.filter(isShown).length);
    svg.dataset.milliseconds = String(performance.now() - start);
  }

  function list(title, some, end) {
    const heading = document.createElement("h3"), items = document.createElement("ol");
    heading.textContent = `${title} (${some.length})`;
    for (const e of some.slice(0, 100)) {
      const item = document.createElement("li"), button = document.createElement("button"), effect = document.createElement("span"), label = document.createElement("span");
      button.type = "button";
      effect.className = `effect ${e.effect > 0 ? "up" : "down"}`;
      effect.textContent = number(e.effect);
      label.textContent = `${name(nodes[e[end]])} · ${at(nodes[e[end]])}`;
      button.append(effect, label);
      button.onclick = () => view.pick(e[end]);
      item.append(button);
      items.append(item);
    }
    side.append(heading, items);
  }

  // The node that was picked: its effects as thick lines and as lists.
  function highlight() {
    read();
    const picked = view.picked(), first = picked ?? nodes.findLastIndex((n) => n.circle);
    const by = (a, b) => Math.abs(b.effect) - Math.abs(a.effect);
    const incoming = edges.filter((e) => e.target === picked).sort(by), outgoing = edges.filter((e) => e.source === picked).sort(by);
    const linked = new Set([picked, ...incoming.map((e) => e.source), ...outgoing.map((e) => e.target)]);
    nodes.forEach((n, i) => {
      n.circle?.setAttribute("class", ["node", n.kind, ...(i === picked ? ["picked"] : picked !== null && !linked.has(i) ? ["dim"] : []), ...(view.marks?.(i) || [])].join(" "));
      n.circle?.setAttribute("tabindex", i === first ? 0 : -1);
    });
    strong.replaceChildren();
    const most = Math.max(...[...incoming, ...outgoing].map((e) => Math.abs(e.effect)), 1e-12);
    for (const e of [...incoming.slice(0, 40), ...outgoing.slice(0, 40)])
      if (isShown(nodes[e.source]) && isShown(nodes[e.target]))
        make("path", { class: `one ${e.effect > 0 ? "up" : "down"}`, "stroke-width": (0.5 + 4 * Math.abs(e.effect) / most).toFixed(2), d: curve(e) }, strong);
    side.replaceChildren();
    if (picked === null) {
      const hint = document.createElement("p");
      hint.textContent = view.hint || "";
      side.append(hint);
      return;
    }
    const node = nodes[picked], heading = document.createElement("h2"), facts = document.createElement("p");
    heading.textContent = name(node);
    facts.textContent = node.kind === "group" ? members(node).join("; ")
      : [`id ${node.id}`, `token ${JSON.stringify(data.tokens[node.position])}, position ${node.position}`, ...figures(node)].join(" · ");
    const card = (node.card || []).map((line) => { const p = document.createElement("p"); p.className = "about"; p.textContent = line; return p; });
    side.append(heading, facts, ...card, ...(view.more?.(node) || []));
    list("Incoming", incoming, "source");
    list("Outgoing", outgoing, "target");
  }

  // Arrows go to the next node in their direction.
  const STEP = { ArrowUp: ["y", -1], ArrowDown: ["y", 1], ArrowLeft: ["x", -1], ArrowRight: ["x", 1] };
  function move(i, key) {
    const [axis, sign] = STEP[key], from = nodes[i], other = axis === "x" ? "y" : "x";
    const cost = (n) => (axis === "x" ? Math.abs(n.x - from.x) + 1e3 * Math.abs(n.y - from.y) : 1e3 * Math.abs(n.y - from.y) + Math.abs(n[other] - from[other]));
    const ahead = nodes.filter((n) => n.circle && (n[axis] - from[axis]) * sign > 0.5 && (axis === "y" || Math.abs(n.y - from.y) < 0.5));
    ahead.sort((a, b) => cost(a) - cost(b))[0]?.circle.focus({ preventScroll: true });
  }
  const nodeAt = (event) => { const i = event.target.closest?.("[data-i]")?.dataset.i; return i === undefined ? null : Number(i); };
  svg.addEventListener("click", (event) => view.pick(nodeAt(event)));
  svg.addEventListener("keydown", (event) => {
    const i = nodeAt(event);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") view.pick(null);
    else if (i === null) return;
    else if (event.key === "Enter" || event.key === " ") view.pick(i);
    else if (STEP[event.key]) move(i, event.key);
    else if (!view.key?.(event, i)) return;
    event.preventDefault();
  });
  return { draw, highlight };
}
