"""How the page looks."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --panel: #ffffff; --ink: #23211e; --dim: #8a857c; --line: #e9e5de;
  --hot: 240, 148, 40; --up: #2f7d62; --down: #b3543c; --bar: #c9bfae; --pick: #f3eee5; --focus: #b9771f; }
:root[data-theme="light"] { color-scheme: light; }
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) { --bg: #16171a; --panel: #1c1e22; --ink: #e4e1da;
  --dim: #8d8a84; --line: #2b2e34; --hot: 232, 140, 44; --up: #6cc3a0; --down: #e08a70; --bar: #4d4a45;
  --pick: #26292f; --focus: #e2a24c; } }
:root[data-theme="dark"] { color-scheme: dark; --bg: #16171a; --panel: #1c1e22; --ink: #e4e1da; --dim: #8d8a84;
  --line: #2b2e34; --hot: 232, 140, 44; --up: #6cc3a0; --down: #e08a70; --bar: #4d4a45; --pick: #26292f;
  --focus: #e2a24c; }
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; }
body { background: var(--bg); color: var(--ink); font: 14px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  display: grid; grid-template-columns: 318px minmax(0, 1fr); }
button, input { font: inherit; color: inherit; }
aside { border-right: 1px solid var(--line); display: flex; flex-direction: column; height: 100vh; }
.head { padding: 18px 18px 12px; }
.head h1 { font-size: 15px; font-weight: 600; margin: 0 0 2px; }
.head p { margin: 0; color: var(--dim); font-size: 12px; overflow-wrap: anywhere; }
.find { display: flex; gap: 8px; padding: 0 18px 10px; }
.find input { flex: 1; min-width: 0; border: 1px solid var(--line); background: var(--panel); border-radius: 7px;
  padding: 6px 10px; }
.find button, .theme { border: 1px solid var(--line); background: var(--panel); border-radius: 7px; padding: 4px 10px;
  cursor: pointer; color: var(--dim); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.count { padding: 0 18px 8px; color: var(--dim); font-size: 12px; display: flex; justify-content: space-between; }
ol { list-style: none; margin: 0; padding: 0 8px 16px; overflow: auto; flex: 1; }
li { padding: 5px 10px; border-radius: 7px; cursor: pointer; display: grid; grid-template-columns: 46px minmax(0, 1fr);
  content-visibility: auto; contain-intrinsic-height: 31px; }
li:hover { background: var(--pick); }
li[aria-selected="true"] { background: var(--pick); box-shadow: inset 2px 0 0 rgb(var(--hot)); }
li b { font-weight: 500; color: var(--dim); font-variant-numeric: tabular-nums; }
li span.in { display: flex; justify-content: flex-start; overflow: hidden; white-space: pre; }
main { overflow: auto; height: 100vh; padding: 22px 30px 60px; }
main:focus { outline: none; }
.top { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; }
.top h2 { font-size: 24px; font-weight: 600; margin: 0; letter-spacing: -0.01em; }
.top .gap { flex: 1; }
.facts { color: var(--dim); display: flex; gap: 18px; flex-wrap: wrap; margin: 2px 0 20px; }
.facts b { color: var(--ink); font-weight: 500; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px; margin-bottom: 24px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px 14px; }
h3 { font-size: 12px; font-weight: 600; margin: 0 0 8px; color: var(--dim); }
h3 small { font-weight: 400; }
svg { display: block; width: 100%; height: 92px; overflow: visible; }
svg rect { fill: rgb(var(--hot)); opacity: 0.85; }
svg.small { height: 38px; } h3.below { margin: 14px 0 6px; }
.t.mark { color: var(--dim); }
svg.gray rect { fill: var(--bar); opacity: 1; }
.axis { display: flex; justify-content: space-between; color: var(--dim); font-size: 11px; margin-top: 3px;
  font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.logit { position: relative; display: flex; justify-content: space-between; gap: 8px; line-height: 1.62; }
.logit span { white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.logit i { font-style: normal; font-variant-numeric: tabular-nums; font-size: 12px; }
.up i { color: var(--up); } .down i { color: var(--down); }
.near { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
.near + .near { margin-top: 4px; }
.near a.off { border: 0; cursor: default; }
.near a { color: inherit; text-decoration: none; border-bottom: 1px solid var(--bar); cursor: pointer;
  line-height: 1.3; }
.near span { color: var(--dim); font-size: 12px; }
section { margin-bottom: 22px; }
.row { display: grid; grid-template-columns: 56px minmax(0, 1.5fr) minmax(0, 1fr); align-items: baseline;
  border-bottom: 1px solid var(--line); padding: 3px 0; cursor: default; }
.row.plain { display: block; padding-left: 56px; text-indent: -56px; line-height: 1.75; }
.row.plain .value { display: inline-block; width: 56px; text-indent: 0; }
.row .value { color: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
.row .left { display: flex; justify-content: flex-end; overflow: hidden; }
.row .right { display: flex; overflow: hidden; }
.row.plain .left, .row.plain .right { display: inline; }
.t { white-space: pre; flex: none; border-radius: 3px; padding: 1px 0; }
.row.plain .t { white-space: pre-wrap; overflow-wrap: anywhere; }
.t.peak { font-weight: 600; }
.t.hit { text-decoration: underline; text-decoration-color: var(--focus); text-underline-offset: 3px; }
#tip { position: fixed; display: none; pointer-events: none; background: var(--ink); color: var(--bg); font-size: 12px;
  padding: 4px 9px; border-radius: 6px; z-index: 9; max-width: 340px; white-space: pre-wrap; }
.keys { color: var(--dim); font-size: 12px; } kbd { font: inherit; border: 1px solid var(--line); border-radius: 4px;
  padding: 0 5px; background: var(--panel); }
.none { color: var(--dim); }
@media (max-width: 760px) { body { display: block; } aside { height: 42vh; border-right: 0;
  border-bottom: 1px solid var(--line); } main { height: auto; padding: 18px; } }
"""
