import { h, s, figures, number, path, ticks } from "./dom.mjs";
import { chooseDistance, interval, probeSums, resampleProbe, varianceCost } from "./maths.mjs";

// A decision: Q, V and S over the distances that were weighed, what was chosen, and what another c would have chosen.

/** Decisions of a run in their order: what was weighed, planned or dismissed at each compute step. */
export function decisionsOf(run) {
  const found = new Map();
  for (const event of run.events) {
    if (!["probe", "choice", "planned", "dismissed", "cache", "rollback", "ahead", "warning"].includes(event.event)) continue;
    const at = found.get(event.compute_step) ?? { c: event.compute_step, s: event.policy_step };
    at[event.event] = event;
    found.set(event.compute_step, at);
  }
  return [...found.values()].filter((at) => at.choice || at.planned || at.dismissed || at.rollback || at.ahead);
}

/** Candidates of a decision at a value of c, with intervals where outcomes by prompt were recorded. */
export function weighed(run, decision, c) {
  const { variance_proxy: proxy = "kl", variance_c: own = 3.3, quality_floor: floor = 0 } = run.config;
  const probe = probeOf(run, decision);
  const movable = proxy === "kl";
  const candidates = [...(decision.choice?.candidates ?? [])].sort((a, b) => a.distance - b.distance).map((given) => {
    const kl = Math.log(Math.max(given.variance, 1)) / own;
    const variance = movable ? varianceCost(kl, c) : given.variance;
    return { ...given, variance, signal: given.quality / variance };
  });
  let optimum = null;
  if (probe && candidates.length) {
    const draws = probe.draws;
    const places = candidates.map((each) => probe.candidates.findIndex((other) => other.distance === each.distance));
    candidates.forEach((each, number_) => {
      const own_ = draws.map((draw) => draw[places[number_]]);
      const cost = (sums) => (movable ? varianceCost(sums.kl, c) : each.variance);
      each.counts = probeSums(probe, probe.candidates[places[number_]]);
      each.qualityInterval = interval(own_.map((sums) => sums.quality));
      each.varianceInterval = movable ? interval(own_.map(cost)) : null;
      each.signalInterval = interval(own_.map((sums) => sums.quality / cost(sums)));
    });
    const best = draws.map((draw) => chooseDistance(candidates.map((each, number_) => {
      const sums = draw[places[number_]];
      return { distance: each.distance, prompts: sums.prompts, quality: sums.quality, variance: movable ? varianceCost(sums.kl, c) : each.variance };
    }), floor).chosen?.distance ?? NaN);
    optimum = interval(best);
  }
  return { candidates, movable, optimum, ...(candidates.length ? chooseDistance(candidates, floor) : { chosen: null, atEdge: false, eligible: 0 }) };
}

function probeOf(run, decision) {
  const found = run.probes.find((probe) => probe.c === decision.c);
  if (!found) return null;
  if (!found.draws) {
    found.prompts = found.prompts.map(([p, correct, failedAt]) => ({ p, correct, failedAt }));
    for (const candidate of found.candidates) candidate.policyStep = found.s - candidate.distance;
    found.draws = resampleProbe(found);
  }
  return found;
}

/** Controls of the decision panel, made once; `pick` is called with what a reader changes. */
export function decisionControls(pick) {
  const distance = h("input", { type: "range", id: "npo-delta", min: 0, max: 0, step: 1, oninput: (event) => pick({ delta: Number(event.target.value) }) });
  const constant = h("input", { type: "range", id: "npo-c", min: 0, max: 40, step: 0.1, oninput: (event) => pick({ c: Number(event.target.value) }) });
  return { distance, constant, distanceText: h("output", { for: "npo-delta" }), constantText: h("output", { for: "npo-c" }),
    list: h("div", { class: "choices", role: "group", "aria-label": "Decisions" }), sliders: h("div", { class: "sliders" }), plot: h("div", { class: "curves" }), words: h("p", { class: "aloud", "aria-live": "polite" }), facts: h("p", { class: "dim" }) };
}

/** Draw a decision into its controls. */
export function drawDecision(parts, context, pick) {
  const { run, decisions, decision: place, delta, c } = context;
  const decision = decisions[place];
  parts.list.replaceChildren(...decisions.map((each, number_) =>
    h("button", { type: "button", "aria-pressed": String(number_ === place), "data-decision": number_, onclick: () => pick({ decision: number_ }) }, title(each))));
  if (!decision) {
    parts.plot.replaceChildren();
    parts.sliders.hidden = true;
    parts.words.textContent = run.events.some((event) => event.event === "warning") ? "No decision was taken: this run only watches." : "No decision was taken in this run.";
    parts.facts.textContent = "";
    return null;
  }
  const found = weighed(run, decision, c);
  const { candidates } = found;
  const at = candidates[Math.min(delta ?? 0, candidates.length - 1)];
  parts.distance.max = Math.max(candidates.length - 1, 0);
  parts.sliders.hidden = !candidates.length;
  parts.distance.value = delta ?? 0;
  parts.distance.disabled = candidates.length < 2;
  parts.distanceText.textContent = at ? `Δ = ${at.distance}` : "–";
  parts.constant.value = c;
  parts.constant.disabled = !found.movable || !candidates.length;
  parts.constantText.textContent = found.movable ? `c = ${number(c, 1)}` : `V̂ by ${run.config.variance_proxy}: c plays no part`;
  parts.plot.replaceChildren(...(candidates.length ? [
    panel("Q̂, pass rate on failed prompts", candidates, "quality", at, decision, found, parts.plot.clientWidth, pick),
    panel("V̂, variance cost", candidates, "variance", at, decision, found, parts.plot.clientWidth, pick),
    panel("Ŝ = Q̂ / V̂", candidates, "signal", at, decision, found, parts.plot.clientWidth, pick)] : []));
  parts.words.textContent = aloud(run, decision, found, at, c);
  parts.facts.textContent = facts(decision, Boolean(at?.qualityInterval));
  return decision;
}

function title(decision) {
  const what = decision.rollback ? `back ${decision.rollback.distance}` : decision.ahead ? `ahead until ${decision.ahead.until}` : decision.dismissed ? "dismissed" : "considered";
  return `step ${decision.s}: ${what}`;
}

function span(values, digits = 3) {
  return values ? ` (95 %: ${figures(values[0], digits)} to ${figures(values[1], digits)})` : "";
}

function aloud(run, decision, found, at, c) {
  if (!at) {
    if (decision.dismissed) return `Dismissed: ${decision.dismissed.reason}.`;
    if (decision.planned) return `Planned, ${decision.planned.stage} stage: roll back to policy step ${decision.planned.to}, guided until step ${decision.planned.guide_until}. Nothing was weighed.`;
    if (decision.ahead) return `Guided ahead until policy step ${decision.ahead.until}, without a roll-back: no distance was weighed.`;
    return "Nothing was weighed.";
  }
  const words = [`Δ = ${at.distance}, back to policy step ${at.policy_step}: Q̂ = ${figures(at.quality)}${span(at.qualityInterval)} over ${at.prompts} prompts, V̂ = ${figures(at.variance)}${span(at.varianceInterval)}, Ŝ = ${figures(at.signal)}${span(at.signalInterval)}.`];
  const moved = found.movable && Math.abs(c - (run.config.variance_c ?? 3.3)) > 0.049;
  if (!found.chosen) words.push(`No distance reaches the quality floor of ${figures(run.config.quality_floor ?? 0)}.`);
  else {
    words.push(`${moved ? `With c = ${number(c, 1)} the` : "The"} largest signal of ${found.eligible} eligible is at Δ = ${found.chosen.distance}${span(found.optimum, 4)}.`);
    if (found.atEdge) words.push(`That is the edge of the range ${found.ends[0]} to ${found.ends[1]}: the optimum is not bracketed and may lie outside.`);
  }
  if (moved && decision.choice.chosen !== null) words.push(`The run, with c = ${figures(run.config.variance_c)}, chose Δ = ${decision.choice.chosen}.`);
  return words.join(" ");
}

function facts(decision, byPrompt) {
  const words = [];
  if (decision.warning) words.push(`Warning at policy step ${decision.s}: reward ${number(decision.warning.reward_change, 3, true)} over the window, entropy ${number(100 * decision.warning.entropy_change, 0, true)} %.`);
  if (decision.probe) words.push(`Probe: ${decision.probe.prompts} of ${decision.probe.pool} mistakes, ${decision.probe.rollouts} rollouts, pass rate ${figures(decision.probe.pass_rate)}.`);
  if (decision.cache) words.push(`Cache: guides for ${decision.cache.cached} of ${decision.cache.prompts} prompts, ${decision.cache.rollouts} rollouts.`);
  if (decision.rollback) words.push(`Rolled back by ${decision.rollback.distance} to policy step ${decision.rollback.to}.`);
  if (decision.dismissed && decision.choice) words.push(`Dismissed: ${decision.dismissed.reason}.`);
  if (decision.choice) words.push(byPrompt ? "Intervals: bootstrap over the probed prompts, the same draw at every distance." : "No intervals: this run did not record the probe's outcomes by prompt.");
  return words.join(" ");
}

function panel(name, candidates, key, at, decision, found, room, pick) {
  const width = Math.max(220, Math.floor(((room || 900) - 32) / (room && room < 700 ? 1 : 3)));
  const [left, right_, top, high, bottom] = [44, 12, 22, 110, 36];
  const intervals = candidates.flatMap((each) => each[`${key}Interval`] ?? []);
  const values = [...candidates.map((each) => each[key]), ...intervals].filter(Number.isFinite);
  const low = key === "variance" ? 1 : 0;
  const peak = Math.max(low + (key === "variance" ? 0.01 : 1e-3), ...values);
  const reach = low + (peak - low) * 1.08;
  const ends = [candidates[0].distance, candidates[candidates.length - 1].distance];
  const margin = Math.max((ends[1] - ends[0]) * 0.05, 0.5);
  const x = (value) => left + ((width - left - right_) * (value - ends[0] + margin)) / (ends[1] - ends[0] + 2 * margin);
  const y = (value) => top + high * (1 - (value - low) / (reach - low));
  const svg = s("svg", { viewBox: `0 0 ${width} ${top + high + bottom}`, width, height: top + high + bottom, class: "panel", role: "img", "aria-label": `${name} over distances` });
  svg.append(s("text", { x: left, y: 12, class: "label" }, name));
  for (const value of ticks(low, reach, 3)) svg.append(s("line", { x1: left, x2: width - right_, y1: y(value), y2: y(value), class: "grid" }), s("text", { x: left - 5, y: y(value) + 4, class: "tick end" }, figures(value)));
  for (const value of ticks(ends[0], ends[1], 4)) svg.append(s("text", { x: x(value), y: top + high + 15, class: "tick middle" }, figures(value)));
  svg.append(s("text", { x: width - right_, y: top + high + 32, class: "label end" }, "Δ, policy steps"));
  if (at) svg.append(s("line", { x1: x(at.distance), x2: x(at.distance), y1: top, y2: top + high, class: "hand" }));
  svg.append(s("path", { d: path(candidates.map((each) => [x(each.distance), y(each[key])])), class: "curve thin" }));
  candidates.forEach((each, number_) => {
    const ends_ = each[`${key}Interval`];
    if (ends_) svg.append(s("line", { x1: x(each.distance), x2: x(each.distance), y1: y(ends_[0]), y2: y(ends_[1]), class: "whisker" }));
    const chosen = decision.choice.chosen === each.distance;
    svg.append(s("circle", { cx: x(each.distance), cy: y(each[key]), r: chosen ? 5 : 3.2, class: `dot${chosen ? " chosen" : ""}${found.chosen?.distance === each.distance ? " best" : ""}`, onclick: () => pick({ delta: number_ }) },
      s("title", {}, `Δ = ${each.distance}: ${figures(each[key])} (${each.prompts} prompts)${chosen ? ", chosen by the run" : ""}`)));
  });
  return svg;
}
