// Places labels next to points so that they cover neither each other nor a point.

import { shape } from "./dom.js";

const CHAR_WIDTH = 6.3; // average character of the map's font, plus a margin
const BOLD_CHAR_WIDTH = 7.2;
const HEIGHT = 14;

export class Labels {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.taken = [];
  }

  /** `points`: circles {x, y, r} that no further label may cover. */
  avoid(points) {
    this.taken.push(...points.map(({ x, y, r }) => ({ left: x - r, right: x + r, top: y - r, bottom: y + r })));
  }

  /** Returns a label next to (x, y), with `isOver` on it, or null if no side is free. `always`: use the side with the least overlap. */
  put(text, x, y, distance, { always = false, isOver = false, kind }) {
    const length = text.length * (always || isOver ? BOLD_CHAR_WIDTH : CHAR_WIDTH), half = HEIGHT / 2;
    const right = x + distance, left = x - distance - length, middle = x - length / 2;
    const sides = (isOver ? [[middle, y - half], [middle, y - distance - HEIGHT], [middle, y + distance]] : [
      [right, y - half], [left, y - half], [middle, y - distance - HEIGHT], [middle, y + distance],
      [right, y - HEIGHT - 2], [right, y + 2], [left, y - HEIGHT - 2], [left, y + 2],
    ]).map(([from, top]) => ({ left: from, top, right: from + length, bottom: top + HEIGHT })).map((box) => (isOver ? this.shifted(box) : box));
    const inView = sides.filter((box) => box.left >= 0 && box.right <= this.width && box.top >= 0 && box.bottom <= this.height);
    const best = inView.reduce((found, box) => (!found || this.covered(box) < this.covered(found) ? box : found), null);
    const box = best && (always || this.covered(best) === 0) ? best : always ? this.shifted(sides[0]) : null;
    if (!box) return null;
    this.taken.push(box);
    return shape("text", { class: kind, x: box.left, y: box.top + HEIGHT - 3.5 }, text);
  }

  /** Returns the area of existing labels and points that the box would cover. */
  covered(box) {
    return this.taken.reduce((sum, other) => sum + overlap(box, other), 0);
  }

  shifted(box) {
    const by = Math.min(0, this.width - box.right) || Math.max(0, -box.left);
    return { ...box, left: Math.max(0, box.left + by), right: box.right + by };
  }
}

function overlap(a, b) {
  const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  return Math.max(0, across) * Math.max(0, down);
}
