const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg", svg = document.getElementById("graph"), side = document.getElementById("side");
const tip = document.getElementById("tip"), LEFT = 48, BOTTOM = 34, TOP = 26, RIGHT = 12, MOST = 3000;
const nodes = data.nodes, edges = data.edges.map(([source, target, effect, score]) => ({ source, target, effect, score }));
edges.sort((a, b) => b.score - a.score);
const layers = [...new Set(nodes.filter((n) => n.layer !== null).map((n) => n.layer))].sort((a, b) => a - b);
const rows = new Map(layers.map((layer, i) => [layer, i + 1]));
let picked = null;
const shown = { nodes: 1, edges: Math.min(edges.length, MOST) };

function make(tag, attributes, parent, text) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}
const short = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
const number = (x) => (x === null ? "" : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(2) : x.toPrecision(3));
const name = (n) => n.label || (n.kind === "latent" ? `layer ${n.layer}, latent ${n.latent}` : n.kind === "error" ? `error, layer ${n.layer}` : n.token);
const isShown = (n) => n.kind === "token" || n.kind === "target" || n.cumulative <= shown.nodes + 1e-9;

function place() {
  const width = Math.max(svg.clientWidth, 300), height = Math.max(svg.clientHeight, 240), n = data.tokens.length;
  const column = (width - LEFT - RIGHT) / n, row = (height - TOP - BOTTOM) / (layers.length + 1), cells = new Map();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const node of nodes) {
    node.row = node.kind === "token" ? 0 : node.kind === "target" ? layers.length + 1 : rows.get(node.layer);
    const key = `${node.row} ${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  for (const cell of cells.values()) {
    cell.sort((a, b) => b.influence - a.influence);
    const step = Math.min(15, (column - 4) / cell.length);
    cell.forEach((node, i) => {
      node.x = LEFT + column * node.position + 8 + step * i;
      node.y = height - BOTTOM - row * node.row;
      node.r = node.kind === "token" || node.kind === "target" ? 4 : Math.max(2, Math.min(7, 2 + 30 * Math.sqrt(node.influence) / 4));
    });
  }
  return { width, height, column, row };
}

const curve = (e) => {
  const a = nodes[e.source], b = nodes[e.target], middle = (a.y + b.y) / 2;
  return `M${a.x.toFixed(1)} ${a.y.toFixed(1)}C${a.x.toFixed(1)} ${middle.toFixed(1)} ${b.x.toFixed(1)} ${middle.toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
};

function draw() {
  const start = performance.now(), { height, column, row } = place();
  svg.replaceChildren();
  layers.forEach((layer, i) => make("text", { class: "axis", x: 4, y: height - BOTTOM - row * (i + 1) + 4 }, svg, `layer ${layer}`));
  data.tokens.forEach((token, i) => make("text", { x: LEFT + column * i + 2, y: height - 8 }, svg, short(token, Math.max(2, Math.floor(column / 7)))));
  const visible = edges.slice(0, shown.edges).filter((e) => isShown(nodes[e.source]) && isShown(nodes[e.target]));
  make("path", { class: "all", d: visible.map(curve).join("") }, svg);
  const strong = make("g", { id: "strong" }, svg);
  nodes.forEach((node, i) => {
    if (!isShown(node)) return;
    const circle = make("circle", { class: `node ${node.kind}`, cx: node.x, cy: node.y, r: node.r, tabindex: 0, role: "button", "data-i": i, "aria-label": `${name(node)} at ${data.tokens[node.position]}` }, svg);
    node.circle = circle;
    if (node.kind === "target") make("text", { x: node.x + 6, y: node.y - 6 - 11 * (i % 2) }, svg, short(node.token, 14));
  });
  pick(picked, strong);
  svg.dataset.drawn = String(nodes.filter(isShown).length);
  svg.dataset.milliseconds = String(performance.now() - start);
}

function list(title, found, end) {
  const heading = document.createElement("h3"), items = document.createElement("ol");
  heading.textContent = `${title} (${found.length})`;
  for (const e of found.slice(0, 100)) {
    const item = document.createElement("li"), button = document.createElement("button"), effect = document.createElement("span"), label = document.createElement("span");
    effect.className = `effect ${e.effect > 0 ? "up" : "down"}`;
    effect.textContent = number(e.effect);
    label.textContent = `${name(nodes[e[end]])} · ${data.tokens[nodes[e[end]].position]}`;
    button.append(effect, label);
    button.onclick = () => { picked = e[end]; draw(); };
    item.append(button);
    items.append(item);
  }
  side.append(heading, items);
}

function pick(i, strong) {
  side.replaceChildren();
  if (i === null) {
    const hint = document.createElement("p");
    hint.textContent = data.about + " Click a node: its strongest incoming and outgoing effects are drawn and listed. Errors are hollow.";
    side.append(hint);
    return;
  }
  const node = nodes[i], heading = document.createElement("h2"), facts = document.createElement("p");
  heading.textContent = name(node);
  facts.textContent = [`id ${node.id}`, `token ${JSON.stringify(data.tokens[node.position])}, position ${node.position}`, node.activation === null ? "" : `activation ${number(node.activation)}`, node.value === null ? "" : `value ${number(node.value)}`, `influence ${number(node.influence)}`].filter(Boolean).join(" · ");
  side.append(heading, facts);
  const by = (a, b) => Math.abs(b.effect) - Math.abs(a.effect);
  const incoming = edges.filter((e) => e.target === i).sort(by), outgoing = edges.filter((e) => e.source === i).sort(by);
  list("Incoming", incoming, "source");
  list("Outgoing", outgoing, "target");
  const most = Math.max(...[...incoming, ...outgoing].map((e) => Math.abs(e.effect)), 1e-12);
  for (const e of [...incoming.slice(0, 40), ...outgoing.slice(0, 40)])
    if (isShown(nodes[e.source]) && isShown(nodes[e.target]))
      make("path", { class: `one ${e.effect > 0 ? "up" : "down"}`, "stroke-width": (0.5 + 4 * Math.abs(e.effect) / most).toFixed(2), d: curve(e) }, strong);
  const linked = new Set([i, ...incoming.map((e) => e.source), ...outgoing.map((e) => e.target)]);
  nodes.forEach((n, j) => n.circle?.classList.toggle("dim", !linked.has(j)));
  node.circle?.classList.add("picked");
}

const nodeAt = (event) => event.target.closest?.("[data-i]")?.dataset.i;
svg.addEventListener("click", (event) => { const i = nodeAt(event); picked = i === undefined ? null : Number(i); draw(); });
svg.addEventListener("keydown", (event) => {
  if ((event.key === "Enter" || event.key === " ") && nodeAt(event) !== undefined) {
    event.preventDefault();
    picked = Number(nodeAt(event));
    draw();
    nodes[picked].circle?.focus();
  } else if (event.key === "Escape") { picked = null; draw(); }
});
svg.addEventListener("pointermove", (event) => {
  const i = nodeAt(event);
  tip.hidden = i === undefined;
  if (tip.hidden) return;
  const node = nodes[i];
  tip.textContent = `${name(node)}\n${JSON.stringify(data.tokens[node.position])}` + (node.activation === null ? "" : `, activation ${number(node.activation)}`) + `, influence ${number(node.influence)}`;
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 330)}px`;
  tip.style.top = `${event.clientY + 12}px`;
});
svg.addEventListener("pointerleave", () => { tip.hidden = true; });
for (const which of ["nodes", "edges"]) {
  const input = document.getElementById(which), value = document.getElementById(`${which}-value`);
  const read = () => {
    if (which === "nodes") shown.nodes = Number(input.value);
    else shown.edges = Math.round(Math.min(edges.length, MOST) * Number(input.value) ** 2);
    value.textContent = which === "nodes" ? shown.nodes.toFixed(2) : String(shown.edges);
  };
  input.oninput = () => { read(); draw(); };
  read();
}
addEventListener("resize", draw);
draw();
