import { gate, groupAdvantages } from "./maths.mjs";

// What the page knows of its runs: steps with their groups, the trajectory that was kept, guides by prompt, and the
// state that a reader changes.

/** Data of the page from its compressed text. */
export async function unpack(text) {
  if (typeof DecompressionStream === "undefined") throw new Error("it has no DecompressionStream (browsers before 2023).");
  const signs = atob(text.trim());
  const bytes = new Uint8Array(signs.length); // by hand: Uint8Array.from takes 0.3 s of a page of 2 MB
  for (let place = 0; place < signs.length; place += 1) bytes[place] = signs.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** A run with what is derived from it once; the data itself is never changed, and so needs no copy. */
export function prepare(run) {
  const segments = run.events.filter((event) => event.event === "segment");
  const abandoned = (line) => segments.some((s) => s.branch > line.b && line.s > s.start);
  const recorded = new Map();
  for (const step of run.steps) {
    const key = `${step.b}:${step.s}`;
    const there = recorded.get(key) ?? { whole: null, guided: null };
    there[step.whole ? "whole" : "guided"] = step;
    recorded.set(key, there);
  }
  const lines = run.lines.map((line, place) => {
    const segment = segments.find((s) => s.branch === line.b);
    const replay = Boolean(segment?.guidance) && line.s > segment.start && line.s <= segment.guide_until;
    return { ...line, place, replay, gone: abandoned(line), segment, recorded: recorded.get(`${line.b}:${line.s}`) };
  });
  const caches = new Map(run.caches.map((cache) => [cache.file, new Map(cache.guides.map((g) => [g[0], g]))]));
  const n = run.config.num_generations ?? Math.max(2, ...run.steps.flatMap((s) => s.groups.map((g) => g.slots.length)));
  const rewards = run.kind === "trl" ? run.steps.flatMap((s) => s.groups.flatMap((g) => g.slots.map((slot) => slot.r))) : [];
  const best = Math.max(...rewards.filter((reward) => reward !== null));
  return { ...run, segments, lines, cachesByFile: caches, n, best, tau: run.config.tau_gate ?? null, seen: null };
}

/** Number of the guide for a prompt that a line's replay could have used, or undefined. */
export function guideFor(run, line, prompt) {
  return line.replay ? run.cachesByFile.get(line.segment.guidance)?.get(prompt) : undefined;
}

/** Whether a slot's rollout is right: the verdict, or in TRL's logs the largest reward of the run. */
export function right(run, slot) {
  return slot.ok === null || slot.ok === undefined ? run.kind === "trl" && slot.r === run.best && slot.r > 0 : slot.ok;
}

/** Groups of a step: recorded ones with their slots, the others with their pass rate only. */
export function groupsOf(run, line) {
  const whole = line.recorded?.whole;
  const guided = line.recorded?.guided;
  const refused = new Map((guided?.refused ?? []).map((entry) => [entry[0], entry]));
  const listed = whole
    ? whole.groups.map((group) => ({ i: group.i, p: group.p, rate: null }))
    : line.g.map(([p, rate], i) => ({ i, p, rate }));
  for (const group of guided?.groups ?? []) {
    if (!whole && !listed.some((entry) => entry.p === group.p)) listed.push({ i: group.i, p: group.p, rate: null });
  }
  const rates = new Map(line.g);
  const times = new Map();
  for (const { p } of listed) times.set(p, (times.get(p) ?? 0) + 1);
  return listed.map((entry) => {
    // each process numbers its guided groups from 0, so the prompt tells which one it is, where it comes once in the step
    const group = guided?.groups.find((g) => g.p === entry.p && (times.get(entry.p) === 1 || g.i === entry.i))
      ?? whole?.groups.find((g) => g.i === entry.i && g.p === entry.p);
    const own = group ? ownSlots(group) : null;
    const rate = own ? own.filter((slot) => right(run, slot)).length / own.length : rates.get(entry.p) ?? entry.rate;
    const guide = guideFor(run, line, entry.p);
    return {
      ...entry,
      prompt: run.prompts[entry.p],
      group,
      rate,
      guided: Boolean(group?.slots.some((slot) => slot.guide !== undefined)),
      begun: Boolean(group?.slots.some((slot) => slot.begun)),
      refused: refused.get(entry.p) ?? null,
      hasGuide: Boolean(guide) || Boolean(group?.slots.some((slot) => slot.guide !== undefined)),
      guide,
    };
  });
}

/** The n rollouts of the policy, the overwritten one in the guide's slot; appended guides are left out. */
export function ownSlots(group) {
  return group.slots
    .filter((slot) => slot.guide === undefined || slot.lost !== undefined)
    .map((slot) =>
      slot.guide === undefined ? slot : { t: slot.lost, ok: slot.lostOk, r: slot.lostOk ? 1 : 0, a: null, wasLost: true },
    );
}

/** Slots, rewards and advantages of a group as they were, without its guide, or as another gate would have them. */
export function asGated(run, entry, { tau, without }) {
  const recorded = entry.group.slots;
  const scale = run.config.advantage_scale ?? "group";
  const gated = !without && gate(entry.rate, entry.hasGuide, tau);
  if (gated === entry.guided) {
    const computed = groupAdvantages(recorded.map((slot) => slot.r), scale);
    const agrees = recorded.every((slot, i) => slot.a === null || Math.abs(slot.a - computed[i]) < 2e-3);
    return { slots: recorded.map((slot, i) => ({ ...slot, shown: slot.a ?? computed[i] })), gated, hypothetical: false, agrees };
  }
  let slots = ownSlots(entry.group);
  // how the policy would end what a guide begins nobody has sampled
  const unknown = gated && (run.config.guide_prefix ?? 1) < 1;
  if (gated && entry.guide && !unknown) {
    const last = slots[slots.length - 1];
    const guide = { t: entry.guide[1], ok: true, r: 1, a: null, guide: -1, lost: last.t, lostOk: right(run, last) };
    slots = run.config.placement === "append" ? [...slots, { ...guide, lost: undefined }] : [...slots.slice(0, -1), guide];
  }
  const advantages = groupAdvantages(slots.map((slot) => slot.r), scale);
  return { slots: slots.map((slot, i) => ({ ...slot, shown: advantages[i] })), gated, unknown, hypothetical: !unknown, agrees: true };
}

export const FILTERS = {
  all: { name: "all", test: () => true },
  wrong: { name: "all wrong", test: (entry) => entry.rate === 0 },
  mixed: { name: "mixed", test: (entry) => entry.rate > 0 && entry.rate < 1 },
  solved: { name: "solved", test: (entry) => entry.rate === 1 },
  guided: { name: "guided", test: (entry) => entry.guided },
  refused: { name: "guide refused", test: (entry) => entry.refused !== null },
};

/** Whether a group matches a search for its uid, suite, question or any of its texts. */
export function matches(entry, search) {
  if (!search) return true;
  const wanted = search.toLowerCase();
  const { uid, suite, question } = entry.prompt;
  const texts = entry.group ? entry.group.slots.flatMap((slot) => [slot.t, slot.lost]) : [];
  return [uid, suite, question, ...texts].some((text) => text && text.toLowerCase().includes(wanted));
}

/** What happened to each prompt at each step: [place of line, pass rate, guided]. */
export function promptHistory(run) {
  if (run.seen) return run.seen;
  run.seen = new Map();
  for (const line of run.lines) {
    const guided = new Set((line.recorded?.guided ?? line.recorded?.whole)?.groups
      .filter((g) => g.slots.some((slot) => slot.guide !== undefined)).map((g) => g.p));
    for (const [p, rate] of line.g) {
      if (rate === null) continue;
      if (!run.seen.has(p)) run.seen.set(p, []);
      run.seen.get(p).push({ line, rate, guided: guided.has(p) });
    }
  }
  return run.seen;
}

/** State of the page from its address, `#step=21&group=5&branch=1`; null where it says nothing. */
export function readAddress(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const whole = (name) => (/^\d+$/.test(found.get(name) ?? "") ? Number(found.get(name)) : null);
  return { step: whole("step"), group: whole("group"), branch: whole("branch"), run: whole("run"), decision: whole("decision") };
}

/** The line of a policy step: of a branch, or of the newest branch that has it; null if there is none. */
export function findLine(run, step, branch) {
  const found = run.lines.filter((line) => line.s === step && (branch === null || line.b === branch));
  return found.length ? found[found.length - 1] : null;
}
