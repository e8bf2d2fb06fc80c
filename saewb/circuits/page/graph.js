const data = JSON.parse(document.getElementById("data").textContent), MOST = 3000;
const svg = document.getElementById("graph"), side = document.getElementById("side"), tip = document.getElementById("tip");
let picked = null;
const shown = { nodes: 1, edges: Math.min(data.edges.length, MOST) };
const { draw, highlight } = graphDrawing(svg, side, {
  data: () => data,
  isShown: (n) => n.cumulative <= shown.nodes + 1e-9,
  lines: () => shown.edges,
  picked: () => picked,
  pick: (i) => { picked = i; highlight(); },
  hint: data.about + " Click a node: its strongest incoming and outgoing effects are drawn and listed. Errors are hollow.",
});
svg.addEventListener("pointermove", (event) => {
  tip.hidden = !event.target._tip;
  if (tip.hidden) return;
  tip.textContent = event.target._tip();
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 330)}px`;
  tip.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4))}px`;
});
svg.addEventListener("pointerleave", () => { tip.hidden = true; });
for (const which of ["nodes", "edges"]) {
  const input = document.getElementById(which), value = document.getElementById(`${which}-value`);
  const read = () => {
    if (which === "nodes") shown.nodes = Number(input.value);
    else shown.edges = Math.round(Math.min(data.edges.length, MOST) * Number(input.value) ** 2);
    value.textContent = which === "nodes" ? shown.nodes.toFixed(2) : String(shown.edges);
  };
  input.oninput = () => { read(); draw(); };
  read();
}
addEventListener("resize", draw);
draw();
