// The part of the map that is shown: zoomed and moved by wheel, drag, pinch, buttons and keys.

const MAX_ZOOM = 64;
const STEP = 1.6; // of a button or key
const NEAREST = 40; // pixels of the whole map that are never made larger than the window
const DRAG = 5; // pixels that tell a drag from a click
const ARROWS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const pointers = new Map(); // those that are down: their places by id
let zoom = 1, left = 0, top = 0; // a place of the whole map is shown at zoom * place + (left, top)
let dragged = 0; // pixels since the pointer went down
let map = null;
let onMove = () => {};

export function start(node, callback) {
  [map, onMove] = [node, callback];
  map.addEventListener("wheel", (event) => {
    if (zoom === 1 && document.activeElement !== map && !event.ctrlKey) return; // the page scrolls
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 300), placeOf(event));
  }, { passive: false });
  map.addEventListener("pointerdown", (event) => {
    if (!pointers.size) dragged = 0;
    pointers.set(event.pointerId, placeOf(event));
  });
  map.addEventListener("pointermove", drag);
  for (const end of ["pointerup", "pointercancel", "pointerleave"]) map.addEventListener(end, ({ pointerId }) => pointers.delete(pointerId));
}

export const transform = () => `translate(${left} ${top}) scale(${zoom})`;
export const shown = ({ px, py }) => ({ x: zoom * px + left, y: zoom * py + top });

/** Returns a function that says whether a place of the whole map is shown. */
export function sight() {
  const { width, height } = size();
  return (spot) => { const { x, y } = shown(spot); return x >= 0 && x <= width && y >= 0 && y <= height; };
}

export const isDragged = () => dragged > DRAG;
export const size = () => map.getBoundingClientRect();

/** Returns the place of the whole map at the pointer, and how long a pixel is there. */
export function findPlace(event) {
  const { x, y } = placeOf(event);
  return { px: (x - left) / zoom, py: (y - top) / zoom, pixel: 1 / zoom };
}

function placeOf(event) {
  const box = size();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

const middle = () => ({ x: size().width / 2, y: size().height / 2 });
export const zoomIn = () => zoomBy(STEP, middle());
export const zoomOut = () => zoomBy(1 / STEP, middle());
export const showAll = () => { zoom = 1; move(); };

/** Shows these places of the whole map, as large as they fit. */
export function showThese(places) {
  const { width, height } = size(), xs = places.map(({ px }) => px), ys = places.map(({ py }) => py);
  const across = Math.max(...xs) - Math.min(...xs), up = Math.max(...ys) - Math.min(...ys);
  zoom = bounded(0.8 * Math.min(width / Math.max(across, NEAREST), height / Math.max(up, NEAREST)));
  left = width / 2 - zoom * (Math.min(...xs) + across / 2);
  top = height / 2 - zoom * (Math.min(...ys) + up / 2);
  move();
}

/** Zooms or moves by a key. Returns whether it was one for that: with Control or Command it zooms the page. */
export function press(event) {
  if (event.ctrlKey || event.metaKey) return false;
  const work = { "+": zoomIn, "=": zoomIn, "-": zoomOut, 0: showAll }[event.key];
  const [right, down] = (event.shiftKey && ARROWS[event.key]) || [0, 0];
  if (!work && !right && !down) return false;
  if (work) work();
  else move(right * size().width / 5, down * size().height / 5);
  return true;
}

function drag(event) {
  if (!pointers.has(event.pointerId)) return;
  const before = grip();
  pointers.set(event.pointerId, placeOf(event));
  const after = grip();
  dragged += Math.hypot(after.x - before.x, after.y - before.y) + Math.abs(after.apart - before.apart);
  move(after.x - before.x, after.y - before.y);
  if (before.apart > 0) zoomBy(after.apart / before.apart, after);
}

/** Returns the middle of the pointers that are down, and how far apart the first two are. */
function grip() {
  const all = [...pointers.values()], [one, other = one] = all;
  return { x: (one.x + other.x) / 2, y: (one.y + other.y) / 2, apart: Math.hypot(one.x - other.x, one.y - other.y) };
}

const bounded = (value) => Math.min(MAX_ZOOM, Math.max(1, value));

/** Zooms so that the place `at` of the window stays where it is. */
function zoomBy(factor, at) {
  const before = zoom;
  zoom = bounded(zoom * factor);
  move((at.x - left) * (1 - zoom / before), (at.y - top) * (1 - zoom / before));
}

/** Moves what is shown, but not beyond the edge of the map. */
function move(right = 0, down = 0) {
  const { width, height } = size();
  left = Math.min(0, Math.max(width * (1 - zoom), left + right));
  top = Math.min(0, Math.max(height * (1 - zoom), top + down));
  map.classList.toggle("zoomed", zoom > 1);
  onMove();
}
