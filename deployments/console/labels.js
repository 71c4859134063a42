// Puts names beside points so that none covers another, or a point.

import { shape } from "./dom.js";

const CHAR_WIDTH = 6.3; // of the map's font, on average and a little more
const HEIGHT = 14;

export class Labels {
  /** `points`: circles {x, y, r} that no name may cover. */
  constructor(width, height, points) {
    this.width = width;
    this.height = height;
    this.taken = points.map(({ x, y, r }) => ({ left: x - r, right: x + r, top: y - r, bottom: y + r }));
  }

  /** A text at one of four sides of (x, y), or null where none is free; `always` takes the first that is in view. */
  put(text, x, y, distance, { always, kind }) {
    const length = text.length * CHAR_WIDTH, half = HEIGHT / 2;
    const sides = [
      { left: x + distance, top: y - half },
      { left: x - distance - length, top: y - half },
      { left: x - length / 2, top: y - distance - HEIGHT },
      { left: x - length / 2, top: y + distance },
    ].map(({ left, top }) => ({ left, top, right: left + length, bottom: top + HEIGHT }));
    const inView = sides.filter((box) => box.left >= 0 && box.right <= this.width && box.top >= 0 && box.bottom <= this.height);
    const free = inView.find((box) => !this.taken.some((other) => overlap(box, other)));
    const box = free ?? (always ? inView[0] ?? this.shifted(sides[0]) : null);
    if (!box) return null;
    this.taken.push(box);
    return shape("text", { class: kind, x: box.left, y: box.top + HEIGHT - 3.5 }, text);
  }

  shifted(box) {
    const by = Math.min(0, this.width - box.right) || Math.max(0, -box.left);
    return { ...box, left: Math.max(0, box.left + by), right: box.right + by };
  }
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}
