import { h, figures, number } from "./dom.mjs";
import { gradientWeight, RATIO_MODES } from "./maths.mjs";

// The tokens of a guide: how much likelier they were to the guide than to the policy, and what each ratio mode makes of it.

const FIRST = 240;

/** The guide's tokens, shaded by log q − log π, with the weight of the chosen mode under each. */
export function drawTokens(slot, context, pick) {
  const { run, ratioMode } = context;
  const { ratio_truncation: truncation = 2, ratio_gamma: gamma = 0.1, guide_behaviour: behaviour = "stored" } = run.config;
  const distance = slot.q.map((q, place) => q - slot.l[place]);
  // LUFFY takes q as 1: its weights know nothing of the stored log-probs
  const deltas = slot.l.map((l, place) => (behaviour === "one" ? l : l - slot.q[place]));
  const weights = Object.fromEntries(RATIO_MODES.map((mode) => [mode, deltas.map((delta) => gradientWeight(delta, mode, { truncation, gamma }))]));
  const largest = Math.max(0.5, ...distance.map(Math.abs));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const shown = weights[ratioMode];
  const ess = mean(shown) ** 2 / mean(shown.map((weight) => weight ** 2));
  const piece = (place) => {
    const every = RATIO_MODES.map((mode) => `${mode} ${figures(weights[mode][place])}`).join(", ");
    const share = Math.min(1, Math.abs(distance[place]) / largest);
    return h("span", { class: `token ${distance[place] < 0 ? "closer" : "farther"}`, style: { "--share": share },
      title: `log q − log π = ${number(distance[place], 3, true)} nats\nq ${figures(Math.exp(slot.q[place]))}, π ${figures(Math.exp(slot.l[place]))}\nweight: ${every}` },
      h("span", { class: "piece" }, slot.pieces ? visiblePiece(slot.pieces[place]) : `#${slot.ids[place]}`), h("span", { class: "weight" }, figures(shown[place], 2)));
  };
  const strip = h("div", { class: "tokens" }, ...slot.q.slice(0, FIRST).map((_, place) => piece(place)));
  if (slot.q.length > FIRST) {
    const open = h("button", { type: "button", class: "unfold", onclick: () => { open.remove(); strip.append(...slot.q.slice(FIRST).map((_, place) => piece(place + FIRST))); } },
      `… ${slot.q.length - FIRST} more tokens`);
    strip.append(open);
  }
  const used = run.config.ratio_mode;
  const modes = h("span", { class: "choices", role: "group", "aria-label": "Ratio mode" }, ...RATIO_MODES.map((mode) =>
    h("button", { type: "button", "aria-pressed": String(mode === ratioMode), "data-mode": mode, onclick: () => pick({ ratioMode: mode }) }, mode, mode === used ? h("span", { class: "dim" }, " (trained)") : null)));
  return h("section", { class: "guidetokens" }, h("header", {}, h("h3", {}, "Guide tokens"), modes),
    h("p", { class: "dim" }, h("i", { class: "chip farther" }), "likelier to the guide, ", h("i", { class: "chip closer" }), `likelier to the policy: log q − log π, mean ${number(mean(distance), 3, true)} nats per token over ${distance.length}. Under each token its weight in mode ${ratioMode}: mean ${figures(mean(shown))}, effective sample size ${number(100 * ess, 0)} %.`
      + (behaviour === "one" ? " The weights take q as 1." : "")), strip);
}

function visiblePiece(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "⏎") || "∅";
}
