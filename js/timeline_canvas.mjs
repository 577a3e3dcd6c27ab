// Draws a timeline on a canvas and says what lies under a point. Knows nothing of ComfyUI.
//
// view: {width, height, scale, state, steps, selection, hover, ghost, locked, focused, theme}
//   state      from readTimeline
//   selection  {boundary, side} | {segment} | null;  hover likewise, or {lane, step}
//   ghost      {track, from, to} in steps: a stroke that is being painted

import { barsOf, edgeStep, handlesOf } from "./timeline_state.mjs";

const RULER = 20;
const LANE = 28;
const TALLEST_LANE = 56;
const EDGE = 10;
const FONT = "Inter, system-ui, sans-serif";
const HUES = { image: 207, text: 32, all: 268, a: 172, b: 322, c: 88, d: 232, e: 130, f: 290, g: 56, h: 190 };
const LABEL_STEPS = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000];
const INK = "#10141a"; // on the bars, which are light in every theme

const brightnesses = new Map();

/** Height the lanes ask for, and the most they make use of. */
export function heights(laneCount) {
  const lanes = Math.max(laneCount, 1);
  return { least: RULER + lanes * LANE + 4, most: RULER + lanes * TALLEST_LANE + 4 };
}

/** Colours of the surroundings, from the style variables that style.mjs sets. */
export function readTheme(element) {
  const style = getComputedStyle(element);
  const [panel, text, muted] = ["panel", "text", "muted"].map((name) => style.getPropertyValue(`--unifusion-${name}`));
  const dark = brightness(panel) < 0.5;
  return { panel, text, muted, dark, error: dark ? "#f0646a" : "#b3242b" };
}

/** Colour of a track: by its name, so that it stays when lanes come and go. */
export function trackColour(name, dark) {
  const [socket, part] = name.split(".");
  const hue = HUES[socket] ?? [...socket].reduce((sum, char) => (sum * 31 + char.codePointAt(0)) % 360, 7);
  const shift = { image: 9, text: -9 }[part] ?? 0;
  return dark ? `hsl(${hue} 52% ${64 + shift}%)` : `hsl(${hue} 58% ${58 + shift}%)`;
}

/** Where things are: pixels of steps and lanes and back. */
export function placesOf({ width, height, state, steps }) {
  const longest = Math.max(...state.lanes.map((name) => [...name].length), 1);
  const left = Math.min(Math.max(EDGE + 18 + longest * 7, 44), width * 0.35);
  const span = Math.max(width - left - EDGE, 1);
  const lane = Math.min(Math.max((height - RULER - 4) / Math.max(state.lanes.length, 1), 8), TALLEST_LANE);
  return {
    left,
    right: left + span,
    lane,
    bottom: RULER + lane * Math.max(state.lanes.length, 1),
    xOf: (step) => left + (span * step) / steps,
    shareAt: (x) => (x - left) / span,
    yOf: (index) => RULER + lane * index,
    laneAt: (y) => Math.floor((y - RULER) / lane),
  };
}

/** What lies under a point: {handle} | {bar, lane, step} | {lane, step} | null. */
export function hitTest(view, x, y, slop = 6) {
  const { state, steps } = view;
  const places = placesOf(view);
  if (!state.segments?.length || x < places.left - slop || x > places.right + slop) return null;
  const away = (handle) => Math.abs(places.xOf(edgeStep(handle.share, steps)) - x);
  const near = handlesOf(state.segments).filter((handle) => away(handle) <= slop);
  if (near.length && y >= 0 && y <= places.bottom) return { handle: nearest(near, away, x, view, places) };
  const lane = places.laneAt(y);
  if (lane < 0 || lane >= state.lanes.length || x < places.left || x > places.right) return null;
  const step = Math.min(Math.max(Math.floor(places.shareAt(x) * steps), 0), steps - 1);
  const track = state.lanes[lane];
  const bar = barsOf(state.segments, steps).find((b) => b.track === track && b.from <= step && step < b.to);
  return { lane, step, ...(bar && { bar }) };
}

/** Of handles that lie on each other, the one that can move towards the pointer. */
function nearest(handles, away, x, { steps }, places) {
  const least = Math.min(...handles.map(away));
  const best = handles.filter((handle) => away(handle) < least + 1);
  const right = x > places.xOf(edgeStep(best[0].share, steps));
  return right ? best.at(-1) : best[0];
}

export function draw(ctx, view) {
  const { width, height, scale, state, theme } = view;
  const places = placesOf(view);
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.clearRect(0, 0, width, height);
  ctx.textBaseline = "middle";
  ctx.globalAlpha = view.locked ? 0.5 : 1;
  drawLanes(ctx, view, places);
  if (state.segments) {
    drawBars(ctx, view, places);
    drawGrid(ctx, view, places);
    drawProblems(ctx, view, places);
    drawCounts(ctx, view, places);
    if (view.ghost) drawGhost(ctx, view, places);
    drawHandles(ctx, view, places);
  } else {
    drawGrid(ctx, view, places);
    hatch(ctx, places.left, RULER + 2, places.right - places.left, places.bottom - RULER - 4, theme.error);
  }
  ctx.globalAlpha = 1;
}

function drawLanes(ctx, { state, theme }, places) {
  const used = new Set(state.segments?.map((s) => s.track));
  const unknown = unknownTracks(state);
  ctx.textAlign = "left";
  ctx.font = `12px ${FONT}`;
  state.lanes.forEach((name, index) => {
    const middle = places.yOf(index) + places.lane / 2;
    const top = places.yOf(index) + 2;
    fillRound(ctx, places.left, top, places.right - places.left, places.lane - 4, 4, theme.text, 0.07);
    ctx.fillStyle = unknown.has(name) ? theme.error : trackColour(name, theme.dark);
    ctx.beginPath();
    ctx.arc(EDGE, middle, 3.5, 0, 7);
    ctx.fill();
    ctx.fillStyle = unknown.has(name) ? theme.error : used.has(name) ? theme.text : theme.muted;
    ctx.fillText(fitted(ctx, name, places.left - EDGE - 16), EDGE + 9, middle + 0.5);
  });
}

function drawGrid(ctx, { steps, theme }, places) {
  const pixels = (places.right - places.left) / steps;
  const every = LABEL_STEPS.find((n) => n * pixels >= 34) ?? steps;
  ctx.font = `10px ${FONT}`;
  ctx.textAlign = "center";
  for (let step = 0; step <= steps; step++) {
    const x = places.xOf(step);
    const labelled = step % every === 0 ? steps - step >= every * 0.6 || step === steps : step === steps;
    if (labelled) {
      ctx.fillStyle = theme.muted;
      ctx.fillText(step, x, RULER / 2 - 2);
    }
    if (step === 0 || step === steps || (pixels < 4 && !labelled)) continue;
    ctx.fillStyle = theme.panel;
    ctx.globalAlpha *= labelled ? 0.55 : 0.3;
    ctx.fillRect(x - 0.5, RULER + 2, 1, places.bottom - RULER - 4);
    ctx.globalAlpha /= labelled ? 0.55 : 0.3;
  }
}

function drawBars(ctx, view, places) {
  const { state, steps, theme } = view;
  const unknown = unknownTracks(state);
  for (const bar of barsOf(state.segments, steps)) {
    const top = places.yOf(state.lanes.indexOf(bar.track)) + 2;
    const size = places.lane - 4;
    const colour = unknown.has(bar.track) ? theme.error : trackColour(bar.track, theme.dark);
    if (bar.kind !== "pure") {
      drawRamp(ctx, bar, top, size, colour, places);
      continue;
    }
    const [x, width] = [places.xOf(bar.from), places.xOf(bar.to) - places.xOf(bar.from)];
    if (width <= 0) continue;
    fillRound(ctx, x, top, width, size, 4, colour, unknown.has(bar.track) ? 0.35 : 1);
    if (unknown.has(bar.track)) strokeRound(ctx, x, top, width, size, 4, colour);
    if (view.selection?.segment === bar.index && view.focused) strokeRound(ctx, x, top, width, size, 4, theme.text);
  }
}

/** A fade: each step a column as high as its share, under the line of the ramp. */
function drawRamp(ctx, { from, to, kind }, top, size, colour, { xOf }) {
  const level = (part) => top + size * (kind === "in" ? 1 - part : part);
  ctx.fillStyle = colour;
  for (let step = from; step < to; step++) {
    const y = level((step + 0.5 - from) / (to - from));
    ctx.globalAlpha *= 0.55;
    ctx.fillRect(xOf(step), y, xOf(step + 1) - xOf(step), top + size - y);
    ctx.globalAlpha /= 0.55;
  }
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  ctx.moveTo(xOf(from), level(0));
  ctx.lineTo(xOf(to), level(1));
  ctx.stroke();
}

/** How many steps each segment has, where there is room for it. */
function drawCounts(ctx, { state, steps, theme }, places) {
  const unknown = unknownTracks(state);
  ctx.font = `600 11px ${FONT}`;
  ctx.textAlign = "center";
  for (const { index, track, from, to, kind } of barsOf(state.segments, steps)) {
    if (kind !== "pure" || from === to) continue;
    const width = places.xOf(to) - places.xOf(from);
    const axis = state.segments[index].axis === "sigma" ? " (σ)" : "";
    const long = `${to - from} step${to - from === 1 ? "" : "s"}${axis}`;
    const text = [long, `${to - from}`].find((words) => ctx.measureText(words).width + 6 <= width);
    const middle = places.yOf(state.lanes.indexOf(track)) + places.lane / 2;
    ctx.fillStyle = unknown.has(track) ? theme.text : INK;
    if (text) ctx.fillText(text, places.xOf(from) + width / 2, middle + 0.5);
  }
}

function drawProblems(ctx, { state, steps, theme }, places) {
  for (const { kind, from, to } of state.problems) {
    const [x, end] = [places.xOf(edgeStep(from, steps)), places.xOf(edgeStep(to, steps))];
    const height = places.bottom - RULER - 4;
    if (kind !== "unknown") hatch(ctx, x - 1, RULER + 2, Math.max(end - x, 2) + 2, height, theme.error);
  }
}

function drawGhost(ctx, { ghost, state, theme }, places) {
  const top = places.yOf(state.lanes.indexOf(ghost.track)) + 2;
  const [x, width] = [places.xOf(ghost.from), places.xOf(ghost.to) - places.xOf(ghost.from)];
  const colour = trackColour(ghost.track, theme.dark);
  fillRound(ctx, x, top, width, places.lane - 4, 4, colour, 0.5);
  ctx.setLineDash([4, 3]);
  strokeRound(ctx, x, top, width, places.lane - 4, 4, theme.text);
  ctx.setLineDash([]);
}

function drawHandles(ctx, { state, steps, selection, hover, focused, theme }, places) {
  for (const handle of handlesOf(state.segments)) {
    const x = places.xOf(edgeStep(handle.share, steps));
    const chosen = same(handle, selection) && focused;
    const raised = chosen || same(handle, hover);
    ctx.globalAlpha *= raised ? 1 : 0.75;
    ctx.fillStyle = theme.text;
    ctx.fillRect(x - (raised ? 1 : 0.5), RULER - 2, raised ? 2 : 1, places.bottom - RULER);
    drawGrip(ctx, x, handle.side, raised);
    ctx.globalAlpha /= raised ? 1 : 0.75;
    if (chosen) strokeRound(ctx, x - 9, RULER - 12, 18, 16, 5, theme.text);
  }
}

/** A drop that points at the boundary; half of one where a fade begins or ends. */
function drawGrip(ctx, x, side, raised) {
  const wide = raised ? 6 : 5;
  const [from, to] = [side === "right" ? 0 : -wide, side === "left" ? 0 : wide];
  ctx.beginPath();
  ctx.roundRect(x + from, RULER - 9, to - from, 7, [side === "right" ? 0 : 2, side === "left" ? 0 : 2, 0, 0]);
  ctx.moveTo(x + from, RULER - 2);
  ctx.lineTo(x, RULER + 3);
  ctx.lineTo(x + to, RULER - 2);
  ctx.fill();
}

function same(handle, other) {
  return Boolean(other) && handle.boundary === other.boundary && handle.side === other.side;
}

function unknownTracks({ segments, problems }) {
  return new Set(problems.filter((p) => p.kind === "unknown").map((p) => segments[p.segment].track));
}

function fillRound(ctx, x, y, width, height, radius, colour, alpha = 1) {
  ctx.globalAlpha *= alpha;
  ctx.fillStyle = colour;
  ctx.beginPath();
  ctx.roundRect(x, y, width, height, Math.min(radius, width / 2));
  ctx.fill();
  ctx.globalAlpha /= alpha;
}

function strokeRound(ctx, x, y, width, height, radius, colour) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  ctx.roundRect(x, y, width, height, Math.min(radius, width / 2));
  ctx.stroke();
}

function hatch(ctx, x, y, width, height, colour) {
  ctx.save();
  ctx.beginPath();
  ctx.roundRect(x, y, width, height, 3);
  ctx.clip();
  ctx.fillStyle = ctx.strokeStyle = colour;
  ctx.globalAlpha *= 0.22;
  ctx.fillRect(x, y, width, height);
  ctx.globalAlpha *= 3;
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  for (let at = x - height; at < x + width; at += 7) {
    ctx.moveTo(at, y + height);
    ctx.lineTo(at + height, y);
  }
  ctx.stroke();
  ctx.restore();
}

function fitted(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  let cut = [...text];
  while (cut.length > 1 && ctx.measureText(`${cut.join("")}…`).width > width) cut = cut.slice(0, -1);
  return `${cut.join("")}…`;
}

/** 0 for black to 1 for white, of any colour that a canvas understands. */
function brightness(colour) {
  if (!brightnesses.has(colour)) {
    const ctx = new OffscreenCanvas(1, 1).getContext("2d");
    ctx.fillStyle = colour;
    ctx.fillRect(0, 0, 1, 1);
    const [red, green, blue] = ctx.getImageData(0, 0, 1, 1).data;
    brightnesses.set(colour, (0.3 * red + 0.59 * green + 0.11 * blue) / 255);
  }
  return brightnesses.get(colour);
}
