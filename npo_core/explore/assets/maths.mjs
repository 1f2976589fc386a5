// The method's small maths, as npo_core.method has it: advantages, gate, ratio weights, Q, V, S and the choice of a distance.
// The tests compare every function with its Python original.

const RATE_SLACK = 1e-6;
const MAX_LOG_WEIGHT = 20;

/** Mean of a group's verdicts. */
export function passRate(correct) {
  return correct.reduce((sum, ok) => sum + (ok ? 1 : 0), 0) / correct.length;
}

/** Whether a group gets a guide: its pass rate is at most tau, and there is a guide for its prompt. */
export function gate(rate, hasGuide, tau) {
  return hasGuide && rate <= tau + RATE_SLACK;
}

/** (r - mean) / (std + eps) with the unbiased std; scale "none" only centres. A NaN or null reward is left out and gets 0. */
export function groupAdvantages(rewards, scale = "group", eps = 1e-4) {
  const scored = rewards.filter((reward) => reward !== null && !Number.isNaN(reward));
  if (!scored.length) return rewards.map(() => 0);
  const mean = scored.reduce((sum, reward) => sum + reward, 0) / scored.length;
  let divisor = 1;
  if (scale === "group") {
    const variance = scored.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / (scored.length - 1);
    divisor = Math.sqrt(variance) + eps;
  }
  return rewards.map((reward) => {
    const advantage = reward === null ? NaN : (reward - mean) / divisor;
    return Number.isNaN(advantage) ? 0 : advantage;
  });
}

export const RATIO_MODES = ["current", "exact", "truncated", "shaped"];

/** Gradient coefficient of a guide token; delta = log pi - log q in nats. */
export function gradientWeight(delta, mode, { truncation = 2, gamma = 0.1 } = {}) {
  if (mode === "current") return 1;
  if (mode === "exact") return Math.exp(Math.min(delta, MAX_LOG_WEIGHT));
  if (mode === "truncated") return Math.exp(Math.min(delta, Math.log(truncation)));
  const centred = delta - Math.log(gamma);
  return 1 / (1 + Math.exp(-centred)) / (1 + Math.exp(centred));
}

/** The candidate with the largest signal among those that reach the floor; ties go to the smaller distance. */
export function chooseDistance(candidates, floor) {
  const ordered = [...candidates].sort((a, b) => a.distance - b.distance);
  let chosen = null;
  for (const candidate of ordered) {
    if (candidate.prompts <= 0 || candidate.quality < floor) continue;
    if (chosen === null || candidate.quality / candidate.variance > chosen.quality / chosen.variance) chosen = candidate;
  }
  const measured = ordered.filter((c) => c.prompts > 0);
  const ends = measured.length ? [measured[0], measured[measured.length - 1]] : [];
  return { chosen, ends: ends.map((c) => c.distance), atEdge: ends.includes(chosen), eligible: ordered.filter((c) => c.prompts > 0 && c.quality >= floor).length };
}

/** V = exp(c KL), KL held at 0 from below. */
export function varianceCost(kl, c) {
  return Math.exp(Math.min(c * Math.max(kl, 0), 700));
}

/** A small seeded generator of numbers in [0, 1): the same page shows the same interval every time. */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/**
 * Sums of a probe resampled over its prompts: the same draw serves every distance, as a comparison of distances needs.
 * @param {{k: number, prompts: {correct: number, failedAt: number}[], candidates: {policyStep: number, sums: number[], tokens: number[]}[]}} probe
 * @returns {{quality: number, kl: number}[][]} resamples x candidates; NaN quality where no prompt of a draw counts
 */
export function resampleProbe(probe, resamples = 500, seed = 1) {
  const random = generator(seed);
  const n = probe.prompts.length;
  return Array.from({ length: resamples }, () => {
    const drawn = Array.from({ length: n }, () => Math.floor(random() * n));
    return probe.candidates.map((candidate) => probeSums(probe, candidate, drawn));
  });
}

/** Quality and KL of one distance over some prompts (all if not given). */
export function probeSums(probe, candidate, places = probe.prompts.keys()) {
  let right = 0, prompts = 0, sum = 0, tokens = 0;
  for (const place of places) {
    const prompt = probe.prompts[place];
    if (prompt.failedAt > candidate.policyStep) {
      right += prompt.correct;
      prompts += 1;
    }
    sum += candidate.sums[place];
    tokens += candidate.tokens[place];
  }
  return { quality: prompts ? right / (prompts * probe.k) : 0, prompts, kl: tokens ? sum / tokens : 0 };
}

/** The 2.5 % and 97.5 % quantiles of finite values, or null where there are none. */
export function interval(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const at = (share) => {
    const place = share * (sorted.length - 1);
    const low = Math.floor(place);
    const high = Math.min(low + 1, sorted.length - 1);
    return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
  };
  return [at(0.025), at(0.975)];
}
