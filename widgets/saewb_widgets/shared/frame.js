// What all panels share. Text reaches the page as textContent only, so that no token is ever markup.

const make = (tag, cls, text) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
};
const button = (label, cls, press, hint) => {
  const b = make("button", cls, label);
  b.type = "button";
  if (hint) { b.title = hint; b.setAttribute("aria-label", hint); }
  b.addEventListener("click", press);
  return b;
};
const shown = (s) => s.replace(/\r?\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const digits = (v) => {
  const a = Math.abs(v);
  return a === 0 ? "0" : a >= 100 ? v.toFixed(0) : a >= 10 ? v.toFixed(1) : a >= 0.01 ? v.toFixed(2) : v.toExponential(1);
};
const signed = (v) => (v < 0 ? "\u2212" : "+") + digits(Math.abs(v));
const percent = (v) => (v === 0 ? "0" : v >= 0.1 ? (100 * v).toFixed(0) : v >= 0.001 ? (100 * v).toFixed(2)
  : (100 * v).toPrecision(1)) + " %";
const count = (n) => n.toLocaleString("en");

// Calls at most every `ms`, the last one for sure.
const throttled = (f, ms) => {
  let timer = null, again = false;
  return function run() {
    if (timer) { again = true; return; }
    f();
    timer = setTimeout(() => { timer = null; if (again) { again = false; run(); } }, ms);
  };
};
// Calls once nothing has happened for `ms`.
const settled = (f, ms) => { let timer; return () => { clearTimeout(timer); timer = setTimeout(f, ms); }; };

const active = (e) => e.getRootNode().activeElement === e;
// A field that sets `query` when typing pauses; Enter and arrow down move the focus to `next()`, the list of results.
const searchField = ({ model, set }, hint, label, next) => {
  const find = make("input");
  find.type = "search";
  find.placeholder = hint;
  for (const [k, v] of Object.entries({ "aria-label": label, autocomplete: "off", spellcheck: "false" })) find.setAttribute(k, v);
  find.addEventListener("input", settled(() => { if (find.value !== model.get("query")) set({ query: find.value }); }, 250));
  find.addEventListener("keydown", (e) => {
    if (e.key === "Enter") { set({ query: find.value }); next().focus(); }
    if (e.key === "Escape") { find.value = ""; set({ query: "" }); }
    if (e.key === "ArrowDown") { e.preventDefault(); next().focus(); }
  });
  return find;
};
// Keys of a list of `size()` rows: arrows, j and k, pages, both ends; `more` has further ones.
const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, j: 1, k: -1 };
const listKeys = (box, ask, size, more = {}) => box.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (STEPS[e.key]) ask("move", { by: STEPS[e.key] });
  else if (e.key === "Home") ask("move", { to: 0 });
  else if (e.key === "End") ask("move", { to: size() - 1 });
  else if (more[e.key]) more[e.key]();
  else return;
  e.preventDefault();
});

// Messages to the kernel. `late` is shown while it has not answered for a while: it is busy in a cell, or gone. In a
// front end that reports no answers, `late` stays hidden.
const post = (model, late) => {
  const open = new Set();
  let answers = false;
  const look = () => { late.hidden = !(answers && [...open].some((since) => Date.now() - since.at > 700)); };
  const send = (what) => {
    const sent = { at: Date.now() }, status = (m) => {
      answers = true;
      if (m.content.execution_state === "idle") { open.delete(sent); look(); } };
    open.add(sent);
    model.send(what, { iopub: { status } });
    setTimeout(look, 750);
  };
  if (model.widget_manager) send({ do: "collect" }); // to learn whether this front end reports answers
  return { send, hasAnswers: () => answers, isWaiting: () => answers && [...open].some((since) => Date.now() - since.at < 10000) };
};

// Dark or light, by the background around the panel: notebooks mark their theme in different ways, but all paint it.
const isDark = (el) => {
  for (let e = el; e; e = e.parentElement) {
    const rgba = getComputedStyle(e).backgroundColor.match(/[\d.]+/g);
    if (rgba && (rgba.length < 4 || +rgba[3] > 0.5)) return 0.3 * rgba[0] + 0.6 * rgba[1] + 0.1 * rgba[2] < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
};

const bars = (counts, { label, tip, cls = "", on = () => false, most = Math.max(1e-12, ...counts) }) => {
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length || 1} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  svg.setAttribute("class", "bars " + cls);
  counts.forEach((n, x) => {
    const r = document.createElementNS(ns, "rect"), height = n ? Math.max(0.015, n / most) : 0;
    for (const [k, v] of Object.entries({ x: x + 0.06, y: 1 - height, width: 0.88, height })) r.setAttribute(k, v);
    if (on(x)) r.setAttribute("class", "on");
    const hit = document.createElementNS(ns, "rect");
    for (const [k, v] of Object.entries({ x, y: 0, width: 1, height: 1, class: "hit" })) hit.setAttribute(k, v);
    hit._tip = () => tip(x);
    svg.append(r, hit);
  });
  return svg;
};

// Draw anew when a canvas changes its size or the panel its theme; gives what ends that.
function redrawOnChange(root, canvas, draw) {
  const size = new ResizeObserver(draw), themed = new MutationObserver(draw);
  size.observe(canvas);
  themed.observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  return () => { size.disconnect(); themed.disconnect(); };
}

// The frame of a panel: title, current job, errors, notices, and the tip at the mouse. `build(parts)` fills its body.
function framed({ model, el }, name, build) {
  const root = make("div", "saewb " + name), frame = root.appendChild(make("div", "frame")), undo = new AbortController(), listeners = [];
  root.setAttribute("role", "group");
  // Turns JupyterLab's shortcuts, such as d d for "delete the cell", off: it reads this of the element in focus only.
  root.addEventListener("focusin", (e) => { e.target.dataset.lmSuppressShortcuts = "true"; });
  const on = (names, f) => names.split(" ").forEach((n) => { model.on("change:" + n, f); listeners.push(["change:" + n, f]); });
  const head = make("header"), title = make("h2"), about = make("p"), busy = make("span", "busy");
  const late = make("span", "busy late", "waiting for the kernel, which is busy\u2026");
  for (const e of [busy, late]) e.setAttribute("role", "status");
  late.hidden = true;
  head.append(title, busy, late, about);
  const kernel = post(model, late), collectLater = settled(() => kernel.send({ do: "collect" }), 300);
  const ask = (what, how = {}) => kernel.send({ do: what, ...how });
  const set = (values) => { for (const [k, v] of Object.entries(values)) model.set(k, v); model.save_changes();
    if (kernel.hasAnswers()) collectLater(); };
  const errors = make("div", "error_message"), notice = make("div", "notice"), body = make("div", "body"), tip = make("div", "tip");
  errors.setAttribute("role", "alert");
  notice.setAttribute("role", "status");
  frame.append(head, errors, notice, body);
  root.append(tip);
  el.append(root);

  const keepFocus = () => { // of an element that is removed, or the notebook would receive the next key
    root.tabIndex = -1;
    root.focus({ preventScroll: true });
    root.addEventListener("blur", () => root.removeAttribute("tabindex"), { once: true }); };
  const showMessage = (box, text) => {
    if (box.contains(document.activeElement)) keepFocus();
    box.replaceChildren();
    box.hidden = !text;
    if (text) box.append(make("pre", "", text), button("\u00d7", "quiet", () => ask("dismiss"), "Dismiss"));
  };
  const draw = () => {
    title.textContent = model.get("title");
    about.textContent = model.get("about");
    root.setAttribute("aria-label", model.get("title"));
    showMessage(errors, model.get("error_message"));
    showMessage(notice, model.get("notice"));
  };
  on("title about error_message notice", draw);
  draw();

  let timer = null;
  const wait = () => {
    const what = model.get("busy");
    busy.textContent = what ? what + "\u2026" : "";
    root.setAttribute("aria-busy", String(!!what));
    if (what && !timer) timer = setInterval(() => { if (!kernel.isWaiting()) ask("collect"); }, 250);
    if (!what && timer) { clearInterval(timer); timer = null; }
  };
  on("busy", wait);
  wait();

  // The snapshot, which is shown where no kernel runs, is hidden beside the panel, and renewed after changes.
  const hideStyle = document.createElement("style"), renew = settled(() => { if (model.get("snapshot_id")) ask("snapshot"); }, 1500);
  const hide = () => { const of = ".saewb-snapshot-" + model.get("snapshot_id");
    hideStyle.textContent = `${of} { display: none } .jp-OutputArea-child:has(${of}) { display: none }`; };
  document.head.append(hideStyle);
  model.on("change", renew);
  on("snapshot_id", hide);
  hide();

  const paint = () => { root.dataset.theme = isDark(el) ? "dark" : "light"; };
  const watch = new MutationObserver(paint), scheme = matchMedia("(prefers-color-scheme: dark)");
  for (const e of [document.documentElement, document.body])
    watch.observe(e, { attributes: true, attributeFilter: ["class", "style", "theme", "data-jp-theme-light", "data-theme"] });
  scheme.addEventListener("change", paint, { signal: undo.signal });
  paint();
  requestAnimationFrame(paint);

  const point = (e) => {
    let owner = e.target;
    while (owner && owner !== root && !owner._tip) owner = owner.parentElement;
    const text = owner && owner._tip && owner._tip();
    tip.style.display = text ? "block" : "none";
    if (!text) return;
    tip.textContent = text;
    // Positioned inside the panel: an ancestor may clip, or be the reference of "fixed".
    const r = root.getBoundingClientRect(), x = e.clientX - r.left + 14, y = e.clientY - r.top + 18;
    tip.style.left = Math.max(4, Math.min(x, r.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y + tip.offsetHeight > r.height ? y - tip.offsetHeight - 26 : y) + "px";
  };
  root.addEventListener("mousemove", point);
  root.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  // In JupyterLab Enter does not end the edit of a field, as it does elsewhere.
  root.addEventListener("keydown", (e) => {
    if (e.key !== "Enter" || e.isComposing || e.defaultPrevented || !e.target.matches("input:not([type]), input[type=number]")) return;
    e.preventDefault();
    e.target.dispatchEvent(new Event("change"));
  });
  const stop = build({ root, body, model, on, ask, set, signal: undo.signal });
  return () => {
    undo.abort();
    hideStyle.remove();
    model.off("change", renew);
    watch.disconnect();
    if (timer) clearInterval(timer);
    listeners.forEach(([n, f]) => model.off(n, f));
    if (stop) stop();
    root.remove();
  };
}
