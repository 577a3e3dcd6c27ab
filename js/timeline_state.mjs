// What the timeline knows and how it edits, without a DOM. Segments are those of schedule.mjs; edits return new ones.
// Boundary i lies between segments i and i + 1; -1 and the last index are the two ends, where a gap may need closing.

import { edgeStep, problemsOf, readSegments, tracksOf, written, writtenShare } from "./schedule.mjs";

export { edgeStep } from "./schedule.mjs";

const PARTS = ["image", "text", "all"]; // tracks that are made from one conditioning

/** Everything the drawing needs: {segments, problems, error, lanes}. Unreadable text gives an error and no segments. */
export function readTimeline(text, connected, remembered = []) {
  const known = connected.length ? knownTracks(connected) : null;
  try {
    const segments = readSegments(text);
    const problems = problemsOf(segments, known);
    return { segments, problems, error: problems[0]?.message ?? "", lanes: laneNames(segments, connected, remembered) };
  } catch (error) {
    return { segments: null, problems: [], error: error.message, lanes: laneNames([], connected, remembered) };
  }
}

/** Names a schedule may use: the sockets, the parts of the first, and the parts of each. */
export function knownTracks(connected) {
  return [...PARTS, ...connected.flatMap((socket) => [socket, ...PARTS.map((part) => `${socket}.${part}`)])];
}

/** One lane per connected socket and per named track, in an order that editing does not change. */
export function laneNames(segments, connected, remembered = []) {
  const rank = (name) => (PARTS.includes(name) ? `0${PARTS.indexOf(name)}` : `1${name}`);
  const names = new Set([...tracksOf(segments), ...connected, ...remembered]);
  return [...names].sort((a, b) => (rank(a) < rank(b) ? -1 : 1));
}

/** Step ranges to draw: [{index, track, from, to, kind: "pure" | "in" | "out"}]; a fade is one "out" and one "in". */
export function barsOf(segments, steps) {
  const bars = [];
  segments.forEach(({ track, start, stop }, index) => {
    bars.push({ index, track, from: edgeStep(start, steps), to: edgeStep(stop, steps), kind: "pure" });
    const next = segments[index + 1];
    if (!next?.fade || next.start <= stop) return;
    const range = { from: edgeStep(stop, steps), to: edgeStep(next.start, steps) };
    bars.push({ index, track, ...range, kind: "out" });
    bars.push({ index: index + 1, track: next.track, ...range, kind: "in" });
  });
  return bars;
}

/** What can be grabbed: [{boundary, side: "both" | "left" | "right", share}]; "left" moves the left segment's end. */
export function handlesOf(segments) {
  const handles = [];
  if (segments[0]?.start > 0) handles.push({ boundary: -1, side: "right", share: segments[0].start });
  segments.slice(1).forEach((right, boundary) => {
    const left = segments[boundary];
    if (left.stop === right.start) handles.push({ boundary, side: "both", share: left.stop });
    else {
      handles.push({ boundary, side: "left", share: left.stop }, { boundary, side: "right", share: right.start });
    }
  });
  const last = segments.length - 1;
  if (segments[last]?.stop < 1) handles.push({ boundary: last, side: "left", share: segments[last].stop });
  return handles;
}

/** A share with few digits that lands on this step: exact where three digits do, else near enough not to slip. */
export function shareOf(step, steps) {
  const exact = step / steps;
  for (let digits = 0; digits <= 3; digits++) {
    if (Number(exact.toFixed(digits)) === exact) return exact;
  }
  for (let digits = 2; digits < 8; digits++) {
    const share = Number(exact.toFixed(digits));
    if (Math.abs(share * steps - step) <= 0.2) return share;
  }
  return exact;
}

/** Moves a boundary to a share: onto a step, or freely. It stops at its neighbours and leaves each a step. */
export function moveHandle(segments, { boundary, side }, share, { steps, free = false }) {
  const left = segments[boundary];
  const right = segments[boundary + 1];
  const overlap = left && right && right.start < left.stop;
  const low = !left ? 0 : side === "right" && !overlap ? left.stop : left.start;
  const high = !right ? 1 : side === "left" && !overlap ? right.start : right.stop;
  const target = free ? clamp(Number(share.toFixed(4)), low, high) : snapped();
  const moved = segments.map((s) => ({ ...s }));
  if (left && side !== "right") moved[boundary].stop = target;
  if (right && side !== "left") moved[boundary + 1].start = target;
  return met(moved, boundary);

  function snapped() {
    const length = ({ start, stop }) => edgeStep(stop, steps) - edgeStep(start, steps);
    const kept = (segment, fades) => (side === "both" && !fades && length(segment) > 0 ? 1 : 0);
    const from = edgeStep(low, steps) + (left ? kept(left, left.fade) : 0);
    const to = edgeStep(high, steps) - (right ? kept(right, segments[boundary + 2]?.fade) : 0);
    const step = clamp(edgeStep(share, steps), Math.min(from, to), Math.max(from, to));
    if (step === edgeStep(low, steps)) return low;
    return step === edgeStep(high, steps) ? high : clamp(shareOf(step, steps), low, high);
  }
}

/** Opens a switch into a fade, or closes a fade, a gap or an overlap into a switch; a gap becomes a fade first. */
export function toggleFade(segments, boundary, steps) {
  const moved = segments.map((s) => ({ ...s }));
  const [left, right] = [moved[boundary], moved[boundary + 1]];
  if (!left || !right) {
    if (left) left.stop = 1;
    if (right) right.start = 0;
    return moved;
  }
  if (left.stop < right.start && !right.fade) {
    right.fade = true;
    return moved;
  }
  if (left.stop !== right.start) {
    const middle = shareOf(edgeStep((left.stop + right.start) / 2, steps), steps);
    left.stop = right.start = clamp(middle, left.start, right.stop);
    return met(moved, boundary);
  }
  const edge = edgeStep(left.stop, steps);
  const width = Math.max(1, Math.round(steps * 0.1));
  const room = [edge - edgeStep(left.start, steps), edgeStep(right.stop, steps) - edge];
  let [before, after] = room.map((steps) => Math.min(width, Math.max(steps - 1, 0)));
  if (before + after === 0) [before, after] = room.map((steps) => Math.min(1, steps));
  if (before + after === 0) return moved;
  if (before) left.stop = Math.max(left.start, shareOf(edge - before, steps));
  if (after) right.start = Math.min(right.stop, shareOf(edge + after, steps));
  right.fade = true;
  return moved;
}

/** Gives a segment to another track. */
export function assignSegment(segments, index, track) {
  return joined(segments.map((s, i) => (i === index ? { ...s, track } : { ...s })));
}

/** Lets a track speak from one share to another; what it covers gives way, and a fade it cuts becomes a switch. */
export function paint(segments, track, from, to) {
  if (to <= from) return segments;
  const before = segments.filter((s) => s.start < from).map((s) => ({ ...s, stop: Math.min(s.stop, from) }));
  const after = segments.filter((s) => s.stop > to).map((s) => ({ ...s, start: Math.max(s.start, to) }));
  if (before.length) before.at(-1).stop = from;
  if (after.length) Object.assign(after[0], { start: to, fade: false });
  const stroke = { track, start: before.length ? from : 0, stop: after.length ? to : 1, axis: "steps", fade: false };
  return joined([...before, stroke, ...after]);
}

/** Puts a segment of a track into the second half of another one. */
export function insertSegment(segments, index, track, steps) {
  const { start, stop } = segments[index];
  const [from, to] = [edgeStep(start, steps), edgeStep(stop, steps)];
  if (to - from < 2) return segments;
  const middle = shareOf(Math.floor((from + to) / 2), steps);
  const halves = [{ ...segments[index], stop: middle }, { ...segments[index], start: middle, track, fade: false }];
  return [...segments.slice(0, index), ...halves, ...segments.slice(index + 1)];
}

/** Takes a segment out; the one before it, else the one after it, speaks there instead. */
export function removeSegment(segments, index) {
  if (segments.length < 2) return segments;
  const { start, stop } = segments[index];
  const rest = segments.filter((_, i) => i !== index).map((s) => ({ ...s }));
  if (index > 0) rest[index - 1].stop = Math.max(stop, rest[index - 1].start);
  else Object.assign(rest[0], { start, fade: false });
  return joined(rest);
}

/** The segment that speaks at a share; in a fade the louder one. */
export function segmentAt(segments, share) {
  const distance = (s) => Math.max(s.start - share, share - s.stop, 0);
  return segments.reduce((best, s, i) => (distance(s) < distance(segments[best]) ? i : best), 0);
}

/** One line for the eye: "image 3 · fade 4 · text 13 of 20 steps". */
export function summary(segments, steps) {
  const parts = barsOf(segments, steps).filter((bar) => bar.kind !== "in" && bar.to > bar.from);
  const words = parts.map((bar) => `${bar.kind === "out" ? "fade" : bar.track} ${bar.to - bar.from}`);
  return `${words.join(" · ")} of ${steps} step${steps === 1 ? "" : "s"}`;
}

/** A line for a boundary, for the eye and for screen readers. */
export function describeHandle(segments, { boundary, side, share }, steps) {
  const [left, right] = [segments[boundary], segments[boundary + 1]];
  const step = `${edgeStep(share, steps)} of ${steps}`;
  const names = left && right ? `${left.track} → ${right.track}` : (left ?? right).track;
  if (side === "both") return `${names} after step ${step} (${writtenShare(share)})`;
  const fades = left && right?.fade && left.stop < right.start;
  if (fades) return `${names} fade ${side === "left" ? "begins" : "ends"} after step ${step} (${writtenShare(share)})`;
  const verb = side === "left" ? "stops" : "starts";
  return `${(side === "left" ? left : right).track} ${verb} after step ${step} (${writtenShare(share)})`;
}

export function describeSegment(segments, index, steps) {
  const segment = segments[index];
  const count = edgeStep(segment.stop, steps) - edgeStep(segment.start, steps);
  return `${written(segment)}, ${count} of ${steps} steps`;
}

/** A fade that has lost its width is a switch. */
function met(segments, boundary) {
  const [left, right] = [segments[boundary], segments[boundary + 1]];
  if (left && right && left.stop === right.start) right.fade = false;
  return segments;
}

/** Joins neighbours of one track that meet. */
function joined(segments) {
  return segments.reduce((done, s) => {
    const last = done.at(-1);
    const same = last && !s.fade && last.track === s.track && last.axis === s.axis && last.stop === s.start;
    return same ? [...done.slice(0, -1), { ...last, stop: s.stop }] : [...done, s];
  }, []);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
