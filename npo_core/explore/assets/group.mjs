import { h, number } from "./dom.mjs";
import { asGated, right } from "./model.mjs";
import { completion } from "./text.mjs";
import { drawTokens } from "./tokens.mjs";

// A group: picture, question, answer, and its slots as they were, without the guide, or under another gate.

/** Draw the chosen group into `box`. */
export function drawGroup(box, context, pick) {
  const { run, line, chosen: entry } = context;
  if (!line) {
    box.replaceChildren(h("p", { class: "empty" }, "No step has been logged yet."));
    return;
  }
  if (!entry) {
    box.replaceChildren(h("p", { class: "empty" }, "Choose a group on the left."));
    return;
  }
  const { uid, question, answer, suite } = entry.prompt;
  const head = h("header", { class: "grouphead" },
    h("h2", {}, `Group ${entry.i}`), h("span", { class: "uid" }, uid), suite ? h("span", { class: "suite" }, suite) : null,
    h("span", { class: "stepname" }, `policy step ${line.s}, branch ${line.b}, compute step ${line.c}`));
  const about = h("div", { class: "about" }, picture(entry.prompt), h("div", { class: "asked" },
    question ? completion(question, { markdown: context.markdown, className: "question" }) : h("p", { class: "empty" }, "The question was not recorded at this step."),
    answer !== undefined ? h("p", { class: "answer" }, h("span", { class: "dim" }, "answer "), answer) : null));
  box.replaceChildren(head, about, ...(entry.group ? slots(context, pick) : [missing(context)]));
}

function picture(prompt) {
  if (prompt.left) return h("p", { class: "empty picture" }, "The picture is left out of this page.");
  if (!prompt.picture || !/^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$/.test(prompt.picture)) {
    return prompt.picture === "" ? h("p", { class: "empty picture" }, "The picture cannot be read.") : null;
  }
  const image = h("img", { src: prompt.picture, alt: "Picture of the question", class: "picture" });
  image.addEventListener("load", () => {
    const small = image.naturalWidth <= 96;
    image.classList.toggle("pixels", small);
    if (small) image.style.width = `${image.naturalWidth * Math.max(1, Math.floor(150 / image.naturalWidth))}px`;
  });
  return image;
}

function missing({ run, line, chosen }) {
  const words = [`Of this group only the pass rate was kept: ${number(chosen.rate, 3)}.`];
  const every = run.config.rollout_every;
  if (every) words.push(`Whole steps are recorded every ${every} steps, guided groups at every step.`);
  const box = h("div", { class: "empty" }, h("p", {}, words.join(" ")));
  if (chosen.guide) box.append(h("p", {}, `The cache of this replay holds a guide for the prompt: `), completion(chosen.guide[1]));
  if (chosen.refused) box.append(refusal(chosen.refused));
  return box;
}

function refusal(refused) {
  return h("div", { class: "refusal" }, h("p", {}, `A guide from step ${refused[1]} was refused: the verifier judged it wrong when it was to be injected.`),
    completion(refused[2]));
}

function slots(context, pick) {
  const { run, chosen: entry, tau, without, markdown } = context;
  const view = asGated(run, entry, { tau, without });
  const largest = Math.max(0.5, ...view.slots.map((slot) => Math.abs(slot.shown)));
  const rows = view.slots.map((slot, place) => {
    const guide = slot.guide !== undefined;
    const was = view.hypothetical ? entry.group.slots[place]?.a : null;
    const ok = right(run, slot);
    const label = guide ? h("p", { class: "origin" }, origin(slot)) : null;
    const lost = guide && slot.lost !== undefined
      ? h("div", { class: "lost" }, mark(slot.lostOk), h("del", {}, completion(slot.lost, { markdown })), h("span", { class: "dim" }, " replaced")) : null;
    return h("div", { class: `slot${guide ? " guideslot" : ""}`, role: "row" },
      h("span", { class: "place", role: "cell" }, String(place)), h("span", { role: "cell" }, run.kind === "trl" || lost ? "" : mark(ok)),
      h("div", { role: "cell", class: "said" }, lost, label, h("div", { class: lost ? "judged" : null }, lost ? mark(ok) : null, said(slot, markdown)),
        slot.cut ? h("span", { class: "dim" }, " (not ended: cut at the longest response)") : null),
      h("span", { class: "reward", role: "cell" }, number(slot.r, Number.isInteger(slot.r) ? 0 : 2)),
      h("span", { class: "advantage", role: "cell" }, bar(slot.shown, largest, guide), h("span", { class: "value" }, number(slot.shown, 2, true)),
        was !== null && was !== undefined && Math.abs(was - slot.shown) > 5e-3 ? h("span", { class: "was" }, `was ${number(was, 2, true)}`) : null));
  });
  const table = h("div", { class: "slots", role: "table", "aria-label": "Slots of the group" },
    h("div", { class: "slot slothead", role: "row" }, ...["slot", "", "completion", "reward", "advantage"].map((name) => h("span", { role: "columnheader" }, name))), ...rows);
  const out = [table];
  out.push(h("p", { class: "verdict", "aria-live": "polite" }, verdict(context, view)));
  if (entry.refused) out.push(refusal(entry.refused));
  const guideSlot = view.slots.find((slot) => slot.q);
  if (guideSlot) out.push(drawTokens(guideSlot, context, pick));
  return out;
}

function origin(slot) {
  const from = slot.guide >= 0 ? `from policy step ${slot.guide}` : "from the cache";
  return slot.begun ? `beginning of a guide ${from}: ${slot.begun[0]} of ${slot.begun[1]} tokens were given, the policy went on` : `guide, ${from}`;
}

/** A completion; of one that a guide began, what was given and what the policy wrote apart. */
function said(slot, markdown) {
  const given = slot.begun?.[2];
  if (!given || !slot.t.startsWith(given)) return completion(slot.t, { markdown });
  return h("div", { class: "begun" },
    h("div", { class: "given" }, h("span", { class: "tag" }, "prefix given"), completion(given)),
    h("div", { class: "wenton" }, h("span", { class: "tag" }, "policy's own"), completion(slot.t.slice(given.length))));
}

function verdict(context, view) {
  const { run, chosen: entry, tau } = context;
  const all = view.slots.every((slot) => Math.abs(slot.shown) < 5e-3);
  const words = [];
  if (run.kind === "trl") words.push(view.agrees ? "Advantages as logged." : "Advantages as logged; they are not (reward − mean) / std of these rewards.");
  else if (view.unknown) words.push(`Pass rate ${number(entry.rate, 3)} ≤ τ = ${number(tau, 2)}: the policy would go on from the beginning of a guide; what it would write is not known, so the group is shown as it was.`);
  else if (view.gated && entry.begun) words.push(`Pass rate ${number(entry.rate, 3)} ≤ τ = ${number(tau, 2)} and there is a guide: the last slot is begun with it, and what was given is kept out of the loss.`);
  else if (view.gated) words.push(`Pass rate ${number(entry.rate, 3)} ≤ τ = ${number(tau, 2)} and there is a guide: the last slot is replaced.`);
  else if (context.without && entry.guided) words.push("Without its guide the policy's own rollout stays in the slot.");
  else if (entry.hasGuide) words.push(`Pass rate ${number(entry.rate, 3)} with τ = ${number(tau, 2)}: no guide takes a slot.`);
  else words.push(`Pass rate ${number(entry.rate, 3)}; there is no guide for this prompt.`);
  if (all) words.push("All advantages are 0: this group teaches nothing.");
  if (view.hypothetical) words.push("Recomputed, not what the run did.");
  if (!view.agrees && run.kind !== "trl") words.push("The recorded advantages are not those of the rewards alone.");
  return words.join(" ");
}

/** ✓ or ✗, with a word for those who cannot see it; nothing where there is no verdict. */
export function mark(ok) {
  if (ok === null || ok === undefined) return h("span", { class: "mark" });
  return h("span", { class: ok ? "mark good" : "mark bad", role: "img", "aria-label": ok ? "right" : "wrong" }, ok ? "✓" : "✗");
}

function bar(value, largest, guide) {
  const half = 50 * Math.min(1, Math.abs(value) / largest);
  return h("span", { class: "bar", "aria-hidden": "true" },
    h("i", { class: `${value < 0 ? "minus" : "plus"}${guide ? " ofguide" : ""}`, style: { left: value < 0 ? `${50 - half}%` : "50%", width: `${half}%` } }));
}
