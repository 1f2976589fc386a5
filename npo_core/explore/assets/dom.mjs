// Elements. Text reaches the page through text nodes only, never as markup: what a policy wrote is data.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Draw anew inside of `root` without losing the reader's place: the button of the same name keeps the focus. */
export function keepingFocus(root, draw) {
  const held = root.getRootNode().activeElement;
  const name = held && root.contains(held) ? [...held.attributes].find((each) => each.name.startsWith("data-")) : null;
  draw();
  if (!held || !root.contains(held)) {
    if (held && held !== document.body && held.isConnected) return;
    const again = name ? root.querySelector(`[${name.name}="${CSS.escape(name.value)}"]`) : null;
    (again ?? root).focus({ preventScroll: true });
  }
}

/** An HTML element; strings among the children become text. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** A number for a reader: a real minus sign, a sign where asked for, a dash for nothing. */
export function number(value, digits = 2, signed = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  const zero = Number(text) === 0;
  return `${value < 0 && !zero ? "−" : signed && !zero ? "+" : ""}${text}`;
}

/** Three significant digits, without an exponent where a reader needs none. */
export function figures(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(digits - 1).replace("-", "−");
  return Number(value.toPrecision(digits)).toString().replace("-", "−");
}

/** A polyline through the finite points; a gap where there is none. */
export function path(points) {
  let text = "";
  let down = false;
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) { down = false; continue; }
    text += `${down ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    down = true;
  }
  return text;
}

/** Round numbers to write along an axis. */
export function ticks(low, high, count) {
  const span = high - low || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].map((f) => f * power).find((f) => f >= raw);
  const found = [];
  for (let value = Math.ceil(low / unit - 1e-9) * unit; value <= high + 1e-9 * span; value += unit) {
    found.push(Math.abs(value) < 1e-12 ? 0 : value);
  }
  return found;
}
