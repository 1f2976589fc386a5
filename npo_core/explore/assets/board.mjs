import { h, number } from "./dom.mjs";
import { gate } from "./maths.mjs";
import { FILTERS, matches, right } from "./model.mjs";

// The group board of a step: a row of squares for each group.

/** Squares of a group: its slots where they were recorded, else as many right ones as its pass rate says. */
export function squares(run, entry) {
  const box = h("span", { class: entry.group ? "squares" : "squares counted" });
  if (entry.group) {
    for (const slot of entry.group.slots) {
      const guide = slot.guide !== undefined;
      const shade = run.kind === "trl" ? ` level${Math.round(4 * share(run, slot))}` : "";
      const kind = slot.begun ? `begun ${right(run, slot) ? "right" : "wrong"}` : guide ? "guide" : right(run, slot) ? "right" : "wrong";
      box.append(h("i", { class: `sq ${kind}${shade}` }));
    }
    if (entry.refused) box.lastChild.classList.add("refused");
    return box;
  }
  if (entry.rate === null || entry.rate === undefined) return box;
  const correct = Math.round(entry.rate * run.n);
  for (let place = 0; place < run.n; place += 1) box.append(h("i", { class: `sq ${place < correct ? "right" : "wrong"}` }));
  if (entry.refused) box.lastChild.classList.add("refused");
  return box;
}

function share(run, slot) {
  return run.best > 0 && slot.r !== null ? Math.max(0, Math.min(1, slot.r / run.best)) : 0;
}

/** Draw the board: filters with counts, and the groups that pass filter and search. */
export function drawBoard(parts, context, pick) {
  const { run, entries, filter, search, tau, chosen } = context;
  parts.filters.replaceChildren(...Object.entries(FILTERS).map(([name, { name: words, test }]) =>
    h("button", { type: "button", class: "filter", "aria-pressed": String(filter === name), "data-filter": name, onclick: () => pick({ filter: name }) },
      words, h("span", { class: "count" }, String(entries.filter(test).length)))));
  const shown = visible(context);
  parts.list.replaceChildren(...shown.map((entry) => {
    const selected = chosen && entry.i === chosen.i && entry.p === chosen.p;
    const gated = run.tau !== null && gate(entry.rate ?? 1, entry.hasGuide, tau);
    return h("div", { role: "option", id: `group-${entry.i}`, class: "row", "aria-selected": String(Boolean(selected)), "data-group": entry.i,
      onclick: () => pick({ group: entry.i }) },
      h("span", { class: "place" }, String(entry.i)), squares(run, entry),
      h("span", { class: `gate${gated ? " on" : ""}${gated !== entry.guided && run.tau !== null ? " moved" : ""}`, title: gated ? "gated at this τ" : "" }, gated ? "τ" : ""),
      h("span", { class: "rate" }, number(entry.rate, 2)), h("span", { class: "uid" }, entry.prompt.uid));
  }));
  if (!shown.length) parts.list.append(h("p", { class: "empty" }, entries.length ? "No group of this step passes filter and search." : "No groups were logged at this step."));
  const gatedCount = entries.filter((entry) => gate(entry.rate ?? 1, entry.hasGuide, tau)).length;
  const recorded = entries.some((entry) => entry.group);
  const words = [`${entries.length} groups`];
  if (run.tau !== null && entries.some((entry) => entry.hasGuide)) {
    words.push(`gate at τ = ${number(tau, 2)}: ${gatedCount} (recorded: ${entries.filter((entry) => entry.guided).length})`);
  }
  if (!recorded && entries.length) words.push("pass rates only: no rollouts of this step were recorded");
  parts.summary.textContent = words.join(" · ");
  const selected = parts.list.querySelector('[aria-selected="true"]');
  parts.list.setAttribute("aria-activedescendant", selected ? selected.id : "");
  selected?.scrollIntoView({ block: "nearest" });
}

/** Groups that pass filter and search, in their order. */
export function visible({ entries, filter, search }) {
  return entries.filter((entry) => FILTERS[filter].test(entry) && matches(entry, search));
}
