import { h, keepingFocus, number } from "./dom.mjs";
import { drawBoard, visible } from "./board.mjs";
import { decisionControls, decisionsOf, drawDecision, weighed } from "./decision.mjs";
import { drawGroup } from "./group.mjs";
import { FILTERS, findLine, groupsOf, prepare, readAddress } from "./model.mjs";
import { asJson, drawPool, drawPrompt } from "./pool.mjs";
import { describeLine, drawRunLine, legend } from "./runline.mjs";

// The explorer: state, layout, keys and address. `render({model, el})` is what a page and a notebook widget call.

const KEYS = [
  ["← →", "step"], ["↑ ↓", "group"], ["n p", "next, previous step with recorded rollouts"], ["g", "next guided group of the run"], ["f", "filter"], ["/", "search"],
  ["w", "without guide"], ["d", "next decision"], ["c", "clock"], ["r", "next run"], ["m", "Markdown"], ["y", "copy the group as JSON"], ["t", "theme"], ["?", "this list"],
];

export function render({ model, el }) {
  let mounted = mount(model, el, null);
  // a widget's Python side may read the run again while it is trained, or lead to a step
  model.on("change:data", () => {
    const kept = mounted.kept();
    mounted.stop();
    mounted = mount(model, el, kept);
  });
  model.on("change:wanted", () => mounted.go(model.get("wanted")));
  return () => mounted.stop();
}

function mount(model, el, kept) {
  const runs = model.get("data").runs.map(prepare);
  const state = { run: 0, clock: "compute", place: 0, group: null, filter: "all", search: "", tau: 0.6, without: false, ratioMode: "current",
    decision: 0, delta: 0, c: 3.3, prompt: null, poolSearch: "", markdown: true };
  const view = layout(el, runs);
  const decisions = runs.map(decisionsOf);
  const run = () => runs[state.run];
  const line = () => run().lines[state.place] ?? null;
  let entries = [];

  const context = () => ({ runs, run: run(), line: line(), clock: state.clock, entries, filter: state.filter, search: state.search, tau: state.tau, without: state.without,
    ratioMode: state.ratioMode, markdown: state.markdown, chosen: chosen(), decisions: decisions[state.run], decision: state.decision, delta: state.delta, c: state.c, prompt: state.prompt });
  const chosen = () => entries.find((entry) => entry.i === state.group) ?? null;

  // What is drawn again when something changes

  function pick(change) {
    keepingFocus(view.root, () => take(change));
  }

  function take(change) {
    view.said.textContent = "";
    if (change.line) Object.assign(change, { place: change.line.place });
    const moved = change.place !== undefined || change.run !== undefined;
    const { line: _, promptGroup, ...rest } = change;
    Object.assign(state, rest);
    if (change.run !== undefined) settle();
    if (change.group !== undefined && change.prompt === undefined) state.prompt = chosen()?.p ?? null;
    if (moved) {
      entries = line() ? groupsOf(run(), line()) : [];
      const kept = promptGroup !== undefined ? entries.find((entry) => entry.p === promptGroup) : visible(context()).find((entry) => entry.i === state.group);
      state.group = (kept ?? visible(context())[0] ?? entries[0])?.i ?? null;
      state.prompt = chosen()?.p ?? state.prompt;
    }
    if (change.filter !== undefined || change.search !== undefined) {
      const shown = visible(context());
      if (!shown.some((entry) => entry.i === state.group)) state.group = shown[0]?.i ?? state.group;
    }
    if (change.decision !== undefined) chooseDelta();
    const only = Object.keys(change);
    const touches = (...names) => moved || only.some((name) => names.includes(name));
    if (touches("clock")) drawRunLine(view.runline, context(), (to) => pick({ line: to }));
    if (moved) view.now.textContent = line() ? describeLine(line()) : "no step yet";
    if (touches("filter", "search", "tau", "group", "promptGroup")) drawBoard(view.board, context(), pick);
    if (touches("group", "filter", "search", "tau", "without", "ratioMode", "markdown")) drawGroup(view.group, context(), pick);
    if (touches("tau")) view.tauText.textContent = `τ = ${number(state.tau, 2)}`;
    if (touches("without", "markdown")) {
      view.without.setAttribute("aria-pressed", String(state.without));
      view.markdown.setAttribute("aria-pressed", String(state.markdown));
    }
    if (change.run !== undefined || touches("decision", "delta", "c") && !moved) drawDecision(view.decision, context(), pick);
    if (change.run !== undefined || only.some((name) => ["clock", "prompt", "group", "place", "line", "poolSearch"].includes(name))) drawPool(view.pool, { ...context(), search: state.poolSearch }, pick);
    if (moved || change.prompt !== undefined || change.group !== undefined) drawPrompt(view.prompt, context(), pick);
    for (const [name, choice] of Object.entries(view.clocks)) choice.setAttribute("aria-pressed", String(name === state.clock));
    tell();
  }

  function settle() {
    const { config, notes } = run();
    state.tau = config.tau_gate ?? 0.6;
    state.ratioMode = config.ratio_mode ?? "current";
    state.c = config.variance_c ?? 3.3;
    state.prompt = null;
    state.decision = 0;
    state.place = Math.min(state.place, Math.max(run().lines.length - 1, 0));
    view.tau.value = state.tau;
    view.tau.disabled = run().tau === null;
    chooseDelta();
    view.facts.replaceChildren(...runFacts(run()).map((text) => h("span", {}, text)));
    view.notes.replaceChildren(...notes.map((text) => h("p", {}, text)));
    view.legend.replaceChildren(legend(runs, run()));
    // TRL's log knows of no decisions and keeps no uids
    for (const section of [view.decision.section, view.poolSection]) section.hidden = run().kind === "trl";
    view.runs?.replaceChildren(...runs.map((each, number_) => h("option", { value: number_, selected: number_ === state.run }, each.name)));
  }

  function chooseDelta() {
    const decision = decisions[state.run][state.decision];
    const { candidates } = decision ? weighed(run(), decision, state.c) : { candidates: [] };
    const taken = candidates.findIndex((each) => each.distance === decision?.choice?.chosen);
    state.delta = Math.max(taken, 0);
  }

  function tell() {
    const [at, entry] = [line(), chosen()];
    const address = `#${new URLSearchParams({ ...(at ? { step: at.s, branch: at.b } : {}), ...(entry ? { group: entry.i } : {}), ...(state.run ? { run: state.run } : {}) })}`;
    // a page inside a frame without an address of its own has nothing to link to
    if (view.linked && window.location.hash !== address) window.history.replaceState(null, "", address);
    if (at) model.set("chosen", { run: run().name, policy_step: at.s, compute_step: at.c, branch: at.b, group: entry?.i ?? null, uid: entry?.prompt.uid ?? null });
    model.save_changes();
  }

  function follow(wanted) {
    if (wanted.run !== null && runs[wanted.run]) state.run = wanted.run;
    settle();
    const found = wanted.step === null ? null : findLine(run(), wanted.step, wanted.branch);
    const guided = run().lines.find((each) => each.recorded?.guided?.groups.length || each.recorded?.whole?.groups.some((g) => g.slots.some((slot) => slot.guide !== undefined)));
    const place = (found ?? guided ?? run().lines.find((each) => each.recorded) ?? run().lines[0])?.place ?? 0;
    pick({ run: state.run, place, clock: state.clock });
    if (wanted.group !== null) pick({ group: wanted.group });
    else if (!found) pick({ group: (entries.find((entry) => entry.guided) ?? entries[0])?.i ?? null });
    if (wanted.decision !== null && decisions[state.run][wanted.decision]) pick({ decision: wanted.decision });
  }

  // Moves

  const stepBy = (by) => pick({ place: Math.max(0, Math.min(run().lines.length - 1, state.place + by)) });
  const groupBy = (by) => {
    const shown = visible(context());
    const at = shown.findIndex((entry) => entry.i === state.group);
    const to = shown[Math.max(0, Math.min(shown.length - 1, at + by))];
    if (to) pick({ group: to.i });
  };
  const recordedBy = (by) => {
    const found = run().lines.filter((each) => each.recorded && (by > 0 ? each.place > state.place : each.place < state.place));
    if (found.length) pick({ line: by > 0 ? found[0] : found[found.length - 1] });
  };
  const nextGuided = () => {
    const here = entries.findIndex((entry) => entry.i === state.group);
    const later = entries.slice(here + 1).find((entry) => entry.guided);
    if (later) return pick({ group: later.i, filter: FILTERS[state.filter].test(later) ? state.filter : "all" });
    const { lines } = run();
    for (let away = 1; away <= lines.length; away += 1) {
      const at = lines[(state.place + away) % lines.length];
      const found = at.recorded ? groupsOf(run(), at).find((entry) => entry.guided) : null;
      if (found) {
        pick({ line: at, filter: "all", search: "" });
        return pick({ group: found.i });
      }
    }
    return undefined;
  };
  const cycle = (values, value) => values[(values.indexOf(value) + 1) % values.length];
  const theme = () => {
    const dark = view.root.dataset.theme ? view.root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
    view.root.dataset.theme = dark ? "light" : "dark";
    document.body.classList.contains("npo-page") && (document.documentElement.dataset.theme = view.root.dataset.theme);
  };
  const copy = async () => {
    if (!chosen()) return;
    const text = asJson(run(), line(), chosen());
    try {
      await navigator.clipboard.writeText(text);
      view.said.textContent = "Copied.";
    } catch {
      // a sandboxed frame may not write to the clipboard: the reader copies it by hand
      view.json.querySelector("textarea").value = text;
      view.json.showModal();
      view.json.querySelector("textarea").select();
    }
  };
  const help = () => (view.help.open ? view.help.close() : view.help.showModal());
  const actions = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), ArrowUp: () => groupBy(-1), ArrowDown: () => groupBy(1), k: () => groupBy(-1), j: () => groupBy(1),
    n: () => recordedBy(1), p: () => recordedBy(-1), g: nextGuided, f: () => pick({ filter: cycle(Object.keys(FILTERS), state.filter) }), w: () => pick({ without: !state.without }),
    d: () => { if (decisions[state.run].length) { pick({ decision: (state.decision + 1) % decisions[state.run].length }); view.decision.section.scrollIntoView({ block: "nearest" }); } },
    c: () => pick({ clock: cycle(["compute", "policy"], state.clock) }), r: () => runs.length > 1 && pick({ run: (state.run + 1) % runs.length }),
    m: () => pick({ markdown: !state.markdown }), y: copy, t: theme, "?": help, "/": () => view.search.focus() };

  // a page is all explorer; in a notebook the other cells have keys of their own
  const page = document.body.classList.contains("npo-page");
  const closing = new AbortController();
  (page ? document : view.root).addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], textarea, select");
    if (event.key === "Escape" && typing) return event.target.blur();
    const ranging = event.target.matches("input[type=range]") && event.key.startsWith("Arrow");
    if (typing || ranging || event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return undefined;
    event.preventDefault();
    actions[event.key]();
    return undefined;
  }, { signal: closing.signal });
  for (const [name, choice] of Object.entries(view.clocks)) choice.addEventListener("click", () => pick({ clock: name }));
  view.earlier.addEventListener("click", () => stepBy(-1));
  view.later.addEventListener("click", () => stepBy(1));
  view.guided.addEventListener("click", nextGuided);
  view.theme.addEventListener("click", theme);
  view.helpButton.addEventListener("click", help);
  view.without.addEventListener("click", actions.w);
  view.markdown.addEventListener("click", actions.m);
  view.copy.addEventListener("click", copy);
  view.tau.addEventListener("input", (event) => pick({ tau: Number(event.target.value) }));
  view.search.addEventListener("input", (event) => pick({ search: event.target.value }));
  view.poolSearch.addEventListener("input", (event) => pick({ poolSearch: event.target.value }));
  view.runs?.addEventListener("change", (event) => pick({ run: Number(event.target.value) }));
  view.board.list.addEventListener("click", () => view.board.list.focus({ preventScroll: true }));
  view.distanceParts(decisionControls(pick));
  if (view.linked) window.addEventListener("hashchange", () => follow(readAddress(window.location.hash)), { signal: closing.signal });
  let width = 0;
  const resized = new ResizeObserver(() => {
    if (Math.abs(view.root.clientWidth - width) < 2) return;
    width = view.root.clientWidth;
    pick({ clock: state.clock });
    drawDecision(view.decision, context(), pick);
  });
  if (kept) {
    const { step, branch, ...rest } = kept;
    Object.assign(state, rest, { run: Math.min(rest.run, runs.length - 1) });
    const tau = state.tau;
    follow({ ...readAddress(""), run: state.run, step, branch, group: rest.group });
    pick({ ...rest, tau });
  } else follow(view.linked ? readAddress(window.location.hash) : readAddress(""));
  width = view.root.clientWidth;
  resized.observe(view.root);
  performance.mark("npo-explorer");
  if (page) view.root.focus({ preventScroll: true });
  return {
    stop: () => { resized.disconnect(); closing.abort(); },
    go: (wanted) => follow({ ...readAddress(""), ...wanted }),
    kept: () => {
      const { place: _place, run: number_, ...rest } = state;
      return { ...rest, run: number_, step: line()?.s ?? null, branch: line()?.b ?? null };
    },
  };
}

function runFacts(run) {
  const steps = Math.max(0, ...run.lines.map((line) => line.c));
  const back = run.events.filter((event) => event.event === "rollback").length;
  const guides = run.lines.reduce((sum, line) => sum + (line.k ?? 0), 0);
  const words = [[run.method, run.preset, run.seed === null ? null : `seed ${run.seed}`].filter((part) => part !== null && part !== "").join(" "), `${steps} compute steps`];
  if (run.kind === "npo") words.push(`${back} roll-back${back === 1 ? "" : "s"}`, `${guides} guides`);
  if (run.scores.base !== undefined && run.scores.final !== undefined) words.push(`test ${number(run.scores.base, 3)} → ${number(run.scores.final, 3)}`);
  return words;
}

function poolLegend() {
  const key = (mark, text) => h("span", { class: "key" }, h("span", { class: "poolkey" }, mark), text);
  return h("p", { class: "legend" }, key("×", "failed"), key("○", "solved above the cutoff"), h("span", { class: "key" }, h("i", { class: "sq guide" }), " guided"), h("span", { class: "key" }, h("i", { class: "swatch inthepool" }), "in the pool"));
}

function layout(el, runs) {
  const button = (text, title, attributes = {}) => h("button", { type: "button", title, ...attributes }, text);
  const view = {
    linked: /^(file|https?):$/.test(window.location.protocol) && window === window.top,
    facts: h("div", { class: "facts" }), notes: h("div", { class: "notes" }), legend: h("div"), now: h("output", { class: "now" }),
    clocks: { compute: button("compute", "Steps that were executed (c)", { "data-clock": "compute" }), policy: button("policy", "Place on the trajectory; goes back at a roll-back (c)", { "data-clock": "policy" }) },
    earlier: button("‹", "Step before (←)", { "aria-label": "Step before" }), later: button("›", "Next step (→)", { "aria-label": "Next step" }), guided: button("next guided", "Next guided group of the run (g)"),
    theme: button("theme", "Light or dark (t)", { "data-action": "theme" }), helpButton: button("?", "Keys (?)", { "aria-label": "Keys" }),
    runline: h("div", { class: "runlinebox" }),
    search: h("input", { type: "search", placeholder: "search uid, suite, text", "aria-label": "Search groups" }),
    board: { filters: h("div", { class: "filters", role: "group", "aria-label": "Filter groups" }), list: h("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "Groups of the step" }), summary: h("p", { class: "dim" }) },
    group: h("div", { class: "groupbody" }),
    without: button("without guide", "Show the group as it would have been without its guide (w)", { "aria-pressed": "false", "data-action": "without" }),
    markdown: button("Markdown", "Read completions as Markdown (m)", { "aria-pressed": "true" }), copy: button("copy JSON", "Copy the group as JSON (y)", { "data-action": "copy" }), said: h("span", { class: "dim", "aria-live": "polite" }),
    tau: h("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": "Gate τ: largest pass rate that is guided" }), tauText: h("output"),
    prompt: h("div", { class: "promptbody" }), poolSearch: h("input", { type: "search", placeholder: "search prompts", "aria-label": "Search failed prompts" }),
    runs: runs.length > 1 ? h("select", { "aria-label": "Run that is shown" }) : null,
  };
  view.pool = { axis: h("div", { class: "poolaxis" }), summary: h("p", { class: "dim" }), window: h("div", { class: "poolwindow" }), spacer: h("div", { class: "poolspacer" }) };
  view.pool.spacer.append(view.pool.window);
  view.pool.scroll = h("div", { class: "poolscroll", tabindex: 0, "aria-label": "Failed prompts over steps" }, view.pool.spacer);
  view.help = h("dialog", { class: "help" }, h("h2", {}, "Keys"), h("dl", {}, ...KEYS.flatMap(([key, text]) => [h("dt", {}, key), h("dd", {}, text)])), h("form", { method: "dialog" }, h("button", {}, "close")));
  view.json = h("dialog", { class: "json" }, h("textarea", { readonly: true, rows: 18, cols: 80, "aria-label": "The group as JSON" }), h("form", { method: "dialog" }, h("button", {}, "close")));
  const decision = h("section", { class: "decision", "aria-label": "Decisions" });
  view.distanceParts = (parts) => {
    view.decision = { ...parts, section: decision };
    decision.append(h("header", {}, h("h2", {}, "Why this Δ"), parts.list), parts.words,
      parts.sliders, parts.plot, parts.facts);
    parts.sliders.append(h("label", {}, "Δ", parts.distance, parts.distanceText), h("label", {}, "c", parts.constant, parts.constantText));
  };
  // in JupyterLab its own theme decides
  const lab = document.body.dataset.jpThemeLight;
  view.poolSection = h("section", { class: "pool", "aria-label": "Mistake pool" }, h("header", {}, h("h2", {}, "Mistake pool"), view.poolSearch), view.pool.summary, h("div", { class: "poolgrid" }, h("div", {}, view.pool.axis, view.pool.scroll, poolLegend()), view.prompt));
  view.root = h("div", { class: "npo-explorer", tabindex: -1, "data-theme": lab === undefined ? null : lab === "true" ? "light" : "dark" },
    h("header", { class: "top" }, h("div", { class: "title" }, h("h1", {}, runs[0].name), view.facts), h("div", { class: "tools" }, view.runs, h("span", { class: "joined", role: "group", "aria-label": "Clock" }, Object.values(view.clocks)), view.theme, view.helpButton)), view.notes,
    h("section", { class: "run", "aria-label": "Run line" }, view.runline, h("div", { class: "underline" }, view.legend, h("span", { class: "moves" }, view.now, view.earlier, view.later, view.guided))),
    h("div", { class: "middle" },
      h("section", { class: "board", "aria-label": "Group board" }, h("header", {}, h("h2", {}, "Groups of the step"), view.search), view.board.filters, view.board.list, view.board.summary),
      h("section", { class: "groupdetail", "aria-label": "Group" }, h("div", { class: "grouptools" }, view.without, h("label", {}, "gate", view.tau, view.tauText), view.markdown, view.copy, view.said), view.group)),
    decision,
    view.poolSection,
    view.help, view.json);
  el.replaceChildren(view.root);
  return view;
}
