import { h, s, number, ticks } from "./dom.mjs";
import { promptHistory } from "./model.mjs";
import { completion } from "./text.mjs";

// The mistake pool: prompts that the run failed, over its steps; and one prompt's course, in two runs side by side.

const ROW = 16;
const NAMES = 190;
const AHEAD = 12;

/** Prompts of a run that failed at least once, most often failed first. */
export function failedPrompts(run, search) {
  const cutoff = run.config.pool_cutoff ?? 0.125;
  const wanted = search.toLowerCase();
  const found = [];
  for (const [p, seen] of promptHistory(run)) {
    const fails = seen.filter((each) => each.rate <= cutoff + 1e-6).length;
    const { uid, suite = "", question = "" } = run.prompts[p];
    if (fails && (!wanted || `${uid} ${suite} ${question}`.toLowerCase().includes(wanted))) found.push({ p, uid, seen, fails, solved: seen[seen.length - 1].rate > cutoff });
  }
  return found.sort((a, b) => b.fails - a.fails || a.seen[0].line.c - b.seen[0].line.c);
}

/** Draw the pool; only the rows in sight are elements. */
export function drawPool(parts, context, pick) {
  const { run, clock, prompt, search } = context;
  const rows = failedPrompts(run, search);
  const cutoff = run.config.pool_cutoff ?? 0.125;
  const of = (line) => (clock === "policy" ? line.s : line.c);
  const last = Math.max(1, ...run.lines.map(of));
  const open = rows.filter((row) => !row.solved).length;
  parts.summary.textContent = rows.length
    ? `${rows.length} prompts failed at least once (pass rate at most ${number(cutoff, 3)}); ${open} of them were still failing when last seen.`
    : "No failed prompt.";
  parts.spacer.style.height = `${rows.length * ROW}px`;
  const draw = () => {
    const width = Math.max(parts.scroll.clientWidth, 300);
    const names = Math.min(NAMES, width * 0.32);
    const x = (value) => names + ((width - names - 16) * value) / last;
    const now = context.line ? x(of(context.line)) : null;
    parts.axis.replaceChildren(s("svg", { width, height: 18, "aria-hidden": "true" }, ...ticks(0, last, 6).filter(Number.isInteger).map((value) => s("text", { x: x(value), y: 12, class: "tick middle" }, number(value, 0)))));
    const first = Math.max(0, Math.floor(parts.scroll.scrollTop / ROW) - AHEAD);
    const until = Math.min(rows.length, first + Math.ceil(parts.scroll.clientHeight / ROW) + 2 * AHEAD);
    parts.window.style.transform = `translateY(${first * ROW}px)`;
    parts.window.replaceChildren(...rows.slice(first, until).map((row) => {
      const svg = s("svg", { width, height: ROW, class: "poolrow" }, s("text", { x: 4, y: 12, class: "poolname" }, row.uid.length > 26 ? `${row.uid.slice(0, 25)}…` : row.uid));
      if (now !== null) svg.append(s("line", { x1: now, x2: now, y1: 0, y2: ROW, class: "poolnow" }));
      row.seen.forEach((each, place) => {
        const failed = each.rate <= cutoff + 1e-6;
        const next = row.seen[place + 1];
        if (failed && clock === "compute") svg.append(s("line", { x1: x(of(each.line)), x2: x(next ? of(next.line) : last), y1: ROW / 2, y2: ROW / 2, class: "inpool" }));
      });
      for (const each of row.seen) {
        const failed = each.rate <= cutoff + 1e-6;
        const at = x(of(each.line));
        const words = s("title", {}, `step ${each.line.s} (compute ${each.line.c}): pass rate ${number(each.rate, 3)}${each.guided ? ", guided" : ""}`);
        if (each.guided) svg.append(s("rect", { x: at - 4, y: ROW / 2 - 4, width: 8, height: 8, class: "poolmark guide" }, words));
        else if (failed) svg.append(s("path", { d: `M${at - 3} ${ROW / 2 - 3}l6 6m0 -6l-6 6`, class: "poolmark failed" }, words));
        else svg.append(s("circle", { cx: at, cy: ROW / 2, r: 3, class: "poolmark solved" }, words));
      }
      return h("div", { class: `poolline${row.p === prompt ? " on" : ""}`, "data-uid": row.uid, onclick: () => pick({ prompt: row.p }) }, svg);
    }));
  };
  parts.scroll.onscroll = draw;
  draw();
}

/** One prompt: when it came, what became of it, its guides; beside it the same prompt in the other runs. */
export function drawPrompt(box, context, pick) {
  const { runs, run, prompt } = context;
  const record = run.prompts[prompt];
  if (!record) {
    box.replaceChildren(h("p", { class: "empty" }, "Choose a prompt to see its course and its guides."));
    return;
  }
  const columns = runs.map((each) => {
    const p = each === run ? prompt : each.prompts.findIndex((other) => other.uid === record.uid);
    const seen = promptHistory(each).get(p) ?? [];
    const guides = each.caches.flatMap((cache) => cache.guides.filter((guide) => guide[0] === p).map((guide) => ({ cache, guide })));
    return h("div", { class: "course" }, runs.length > 1 ? h("h4", {}, each.name) : null,
      seen.length ? h("ul", {}, ...seen.map((seenAt) => h("li", {},
        h("button", { type: "button", class: "link", disabled: each !== run, onclick: () => pick({ line: seenAt.line, promptGroup: prompt }) }, `step ${seenAt.line.s}`),
        h("span", { class: "dim" }, ` compute ${seenAt.line.c} `), `${number(seenAt.rate, 3)}`, seenAt.guided ? h("span", { class: "origin" }, " guided") : null,
        seenAt.line.gone ? h("span", { class: "dim" }, " rolled back") : null))) : h("p", { class: "empty" }, "Not seen in this run."),
      ...guides.map(({ cache, guide }) => h("div", { class: "cached" }, h("p", { class: "origin" }, `guide from policy step ${cache.s}`, h("span", { class: "dim" }, ` ${cache.file}, ${guide[2]} tokens, log q ${number(guide[3], 2, true)}`)), completion(guide[1]))),
      guides.length ? null : h("p", { class: "dim" }, "No guide in any cache."));
  });
  const parts = [h("h3", {}, record.uid), record.question ? completion(record.question, { markdown: context.markdown, className: "question" }) : null,
    record.answer !== undefined ? h("p", { class: "answer" }, h("span", { class: "dim" }, "answer "), record.answer) : null, h("div", { class: "courses" }, ...columns)];
  box.replaceChildren(...parts.filter(Boolean));
}

/** What a group is as JSON: for a reader's own notes. */
export function asJson(run, line, entry) {
  const { picture, ...prompt } = entry.prompt;
  return JSON.stringify({ run: run.name, policy_step: line.s, compute_step: line.c, branch: line.b, group: entry.i, prompt, pass_rate: entry.rate, guided: entry.guided,
    slots: entry.group?.slots.map(({ t, ok, r, a, guide, lost, lostOk }) => ({ text: t, correct: ok, reward: r, advantage: a, guide_step: guide, overwritten_text: lost, overwritten_correct: lostOk })) ?? null }, null, 1);
}

