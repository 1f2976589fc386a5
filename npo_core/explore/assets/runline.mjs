import { s, h, number, path, ticks } from "./dom.mjs";

// The run line: pass rate and entropy on either clock, replays shaded, roll-backs as arrows, a second run laid over.

const LEFT = 44;
const RIGHT = 14;
const TOP = 30;
const HIGH = 92;
const GAP = 14;
const LOW = 44;
const BOTTOM = 34;

/** Draw the run line into `box`; `pick` is called with the line that was clicked. */
export function drawRunLine(box, context, pick) {
  const { runs, run, line: current, clock } = context;
  const width = Math.max(box.clientWidth || 1000, 320);
  const height = TOP + HIGH + GAP + LOW + BOTTOM;
  const of = (entry) => (clock === "policy" ? entry.s : entry.c);
  const all = runs.flatMap((each) => each.lines);
  const last = Math.max(1, ...all.map(of));
  const x = (value) => LEFT + ((width - LEFT - RIGHT) * value) / last;
  const first = (each) => each.lines.some((entry) => entry.p !== undefined) ? "p" : "r";
  const key = first(run);
  const rates = all.map((entry) => entry[key]).filter((value) => value !== undefined);
  const [rateLow, rateHigh] = key === "p" ? [0, Math.min(1, Math.max(0.2, ...rates) * 1.1)] : [Math.min(0, ...rates), Math.max(0.1, ...rates)];
  const entropyHigh = Math.max(1e-6, ...all.map((entry) => entry.e ?? 0)) * 1.08;
  const yRate = (value) => TOP + HIGH * (1 - (value - rateLow) / (rateHigh - rateLow || 1));
  const yEntropy = (value) => TOP + HIGH + GAP + LOW * (1 - value / entropyHigh);
  const bottom = TOP + HIGH + GAP + LOW;
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "runline", role: "img",
    "aria-label": `Pass rate and entropy of ${run.name} over ${clock} steps` });

  for (const segment of run.segments) {
    const replayed = run.lines.filter((entry) => entry.b === segment.branch && entry.replay);
    if (!replayed.length) continue;
    const from = x(of(replayed[0]) - 1);
    svg.append(s("rect", { x: from, y: TOP, width: Math.max(x(of(replayed[replayed.length - 1])) - from, 1), height: bottom - TOP, class: "replay" },
      s("title", {}, `Replay with guides, branch ${segment.branch}: policy steps ${segment.start + 1} to ${replayed[replayed.length - 1].s}`)));
  }
  for (const value of ticks(rateLow, rateHigh, 3)) {
    svg.append(s("line", { x1: LEFT, x2: width - RIGHT, y1: yRate(value), y2: yRate(value), class: "grid" }),
      s("text", { x: LEFT - 6, y: yRate(value) + 4, class: "tick end" }, number(value, value % 1 ? 1 : 0)));
  }
  for (const value of ticks(0, entropyHigh, 2)) {
    svg.append(s("line", { x1: LEFT, x2: width - RIGHT, y1: yEntropy(value), y2: yEntropy(value), class: "grid" }),
      s("text", { x: LEFT - 6, y: yEntropy(value) + 4, class: "tick end" }, number(value, 1)));
  }
  for (const value of ticks(0, last, Math.max(3, Math.floor(width / 130))).filter(Number.isInteger)) {
    svg.append(s("text", { x: x(value), y: bottom + 15, class: "tick middle" }, number(value, 0)));
  }
  svg.append(s("text", { x: LEFT, y: 12, class: "label" }, key === "p" ? "pass rate, on policy" : "reward"),
    s("text", { x: width - RIGHT, y: TOP + HIGH + GAP - 2, class: "label end" }, "entropy, nats per token"),
    s("text", { x: width - RIGHT, y: height - 2, class: "label end" }, `${clock} step`));

  for (const other of runs) {
    if (other === run) continue;
    svg.append(s("path", { d: path(other.lines.map((entry) => [x(of(entry)), yRate(entry[first(other)] ?? NaN)])), class: "curve other" },
      s("title", {}, other.name)), s("path", { d: path(other.lines.map((entry) => [x(of(entry)), yEntropy(entry.e ?? NaN)])), class: "curve other thin" }));
  }
  for (const stretch of stretches(run.lines)) {
    const gone = stretch.gone ? " gone" : "";
    svg.append(s("path", { d: path(stretch.lines.map((entry) => [x(of(entry)), yRate(entry[key] ?? NaN)])), class: `curve${gone}` }),
      s("path", { d: path(stretch.lines.map((entry) => [x(of(entry)), yEntropy(entry.e ?? NaN)])), class: `curve thin${gone}` }));
  }
  events(svg, context, { x, of, bottom });

  const cursor = s("g", { class: "cursor" });
  if (current) {
    const at = x(of(current));
    cursor.append(s("line", { x1: at, x2: at, y1: TOP - 4, y2: bottom }),
      s("circle", { cx: at, cy: yRate(current[key] ?? rateLow), r: 3.5 }));
  }
  const hover = s("line", { y1: TOP, y2: bottom, class: "hover", visibility: "hidden" });
  const note = s("text", { y: 12, x: width - RIGHT, class: "label end strong" });
  svg.append(cursor, hover, note);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * width) / box.width;
    let best = null;
    for (const entry of run.lines) {
      const apart = Math.abs(x(of(entry)) - at) + (entry.gone ? 0.01 : 0);
      if (best === null || apart <= best[0]) best = [apart, entry];
    }
    return best?.[1];
  };
  svg.addEventListener("pointermove", (event) => {
    const entry = nearest(event);
    if (!entry) return;
    for (const name of ["x1", "x2"]) hover.setAttribute(name, x(of(entry)));
    hover.setAttribute("visibility", "visible");
    note.textContent = describeLine(entry);
  });
  svg.addEventListener("pointerleave", () => {
    hover.setAttribute("visibility", "hidden");
    note.textContent = "";
  });
  svg.addEventListener("click", (event) => {
    const entry = nearest(event);
    if (entry) pick(entry);
  });
  box.replaceChildren(svg);
}

/** A step in words. */
export function describeLine(line) {
  const parts = [`policy step ${line.s}`, `compute ${line.c}`];
  if (line.p !== undefined) parts.push(`pass rate ${number(line.p, 3)}`);
  else if (line.r !== undefined) parts.push(`reward ${number(line.r, 3)}`);
  if (line.e !== undefined) parts.push(`entropy ${number(line.e, 3)}`);
  if (line.k) parts.push(`${line.k} guide${line.k === 1 ? "" : "s"}`);
  if (line.gone) parts.push("rolled back");
  return parts.join(" · ");
}

/** Lines in stretches of one branch, kept or rolled back; neighbours share a point so that no gap is drawn. */
function stretches(lines) {
  const found = [];
  for (const line of lines) {
    const open = found[found.length - 1];
    if (open && open.branch === line.b && open.gone === line.gone) open.lines.push(line);
    else {
      const joined = open && open.branch === line.b ? [open.lines[open.lines.length - 1]] : [];
      found.push({ branch: line.b, gone: line.gone, lines: [...joined, line] });
    }
  }
  return found;
}

function events(svg, { run, clock }, { x, of, bottom }) {
  const place = (event) => (clock === "policy" ? event.policy_step : event.compute_step);
  for (const event of run.events) {
    if (event.event === "warning") {
      const at = x(place(event));
      svg.append(s("path", { d: `M${at - 4.5} ${TOP + HIGH + 1}h9l-4.5 -8z`, class: "warning" },
        s("title", {}, `Warning at policy step ${event.policy_step}: reward flat (${number(event.reward_change, 3, true)}), entropy falling (${number(100 * event.entropy_change, 0, true)} %)`)));
    } else if (event.event === "dismissed") {
      const at = x(place(event));
      svg.append(s("path", { d: `M${at - 3} ${TOP - 8}l6 6m0 -6l-6 6`, class: "dismissed" }, s("title", {}, `Dismissed: ${event.reason}`)));
    } else if (event.event === "rollback") {
      const from = x(place(event));
      // on the compute clock the arrow ends where the step that training goes back to was executed
      const back = run.lines.filter((line) => line.s === event.to && line.c <= event.compute_step).pop();
      const to = clock === "policy" ? x(event.to) : x(back ? of(back) : 0);
      const lift = Math.min(18, 6 + Math.abs(from - to) / 12);
      const y = TOP - 2;
      svg.append(s("path", { d: `M${from} ${y}C${from} ${y - lift} ${to} ${y - lift} ${to} ${y}`, class: "arrow" },
        s("title", {}, `Roll-back by ${event.distance}: policy step ${event.policy_step} to ${event.to}`)),
        s("path", { d: `M${to - 3.5} ${y - 5}L${to} ${y + 1}L${to + 3.5} ${y - 5}z`, class: "arrowhead" }));
    }
  }
}

/** What the line shows, for those who cannot see it. */
export function legend(runs, run) {
  const key = (kind, text) => h("span", { class: "key" }, h("i", { class: `swatch ${kind}` }), text);
  const other = runs.filter((each) => each !== run);
  return h("div", { class: "legend" }, key("line", run.name), ...other.map((each) => key("otherline", each.name)),
    run.lines.some((line) => line.gone) ? key("goneline", "rolled back") : null,
    run.lines.some((line) => line.replay) ? key("replay", "guided") : null,
    run.events.some((event) => event.event === "warning") ? key("warn", "warning") : null,
    run.events.some((event) => event.event === "rollback") ? h("span", { class: "key" }, "↶ roll-back") : null);
}
