import { h } from "./dom.mjs";

// Texts that a policy wrote: folded where they are long, with the little Markdown that models use. Text nodes only.

const FOLD = 320;

/** A completion, folded at `FOLD` characters: its beginning and its end, where the answer is. */
export function completion(text, { markdown = false, className = "completion" } = {}) {
  const box = h("div", { class: className });
  const whole = () => (markdown ? rendered(text) : [h("span", { class: "plain" }, text || "(empty)")]);
  if (text.length <= FOLD) {
    box.append(...whole());
    return box;
  }
  const fold = () => {
    const hidden = text.length - FOLD;
    const open = h("button", { type: "button", class: "unfold", onclick: () => box.replaceChildren(...whole(), close()) },
      `… ${hidden.toLocaleString("en")} more characters …`);
    return [h("span", { class: "plain" }, text.slice(0, FOLD / 2)), open, h("span", { class: "plain" }, text.slice(-FOLD / 2))];
  };
  const close = () => h("button", { type: "button", class: "unfold", onclick: () => box.replaceChildren(...fold()) }, "fold");
  box.append(...fold());
  return box;
}

/** Markdown's headings, lists, fences, bold and code; everything else stays as it was written. */
export function rendered(text) {
  const blocks = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at];
    if (line.startsWith("```")) {
      const end = lines.findIndex((later, place) => place > at && later.startsWith("```"));
      const stop = end === -1 ? lines.length : end;
      blocks.push(h("pre", {}, lines.slice(at + 1, stop).join("\n")));
      at = stop;
    } else if (/^#{1,6} /.test(line)) {
      blocks.push(h("p", { class: "heading" }, ...inline(line.replace(/^#+ /, ""))));
    } else if (/^\s*([-*]|\d+\.) /.test(line)) {
      blocks.push(h("p", { class: "item" }, ...inline(line.trim())));
    } else if (line.trim()) {
      blocks.push(h("p", {}, ...inline(line)));
    }
  }
  return blocks.length ? blocks : ["(empty)"];
}

function inline(line) {
  return line.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) => {
    if (part.startsWith("**") && part.length > 4) return h("strong", {}, part.slice(2, -2));
    if (part.startsWith("`") && part.length > 2) return h("code", {}, part.slice(1, -1));
    return part;
  });
}
