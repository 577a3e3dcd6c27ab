// The written schedule, read, checked and resolved as unifusion_core/diffusion/schedule.py does it: same rounding, same
// error texts. tests/js/schedule_cases.json, made by the Python module, holds the two together.
//
// A segment is {track, start, stop, axis: "steps" | "sigma", fade}; fade says that `>` stands before it.

export const MAX_LENGTH = 4096; // characters of a written schedule

// Python's white space and word characters, which differ from JavaScript's \s and \w.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const NAME = `[^${SPACE}:,>@]+`;
const WORD = "[+\\-]?[\\p{L}\\p{N}_.]+";
const GAP = `[${SPACE}]*`;
const SEGMENT = new RegExp(`^(${NAME})${GAP}:${GAP}(${WORD})${GAP}-${GAP}(${WORD})${GAP}(@${GAP}sigma)?$`, "u");
const STRIP = new RegExp(`^${GAP}|${GAP}$`, "gu");
const SHARE = /^([0-9]+\.?[0-9]*|\.[0-9]+)$/;

/** Reads the segments; throws where a segment cannot be read. Gaps and overlaps pass: see `problemsOf`. */
export function readSegments(text) {
  const length = [...text].length;
  if (length > MAX_LENGTH) throw new Error(`the schedule has ${length} characters; at most ${MAX_LENGTH} are accepted`);
  if (!strip(text)) return [];
  const pieces = text.split(/([,>])/);
  const segments = [];
  for (let i = 0; i < pieces.length; i += 2) segments.push(readSegment(pieces[i], i > 0 && pieces[i - 1] === ">"));
  return segments;
}

/** What makes the segments invalid, in the order in which Python looks: [{kind, message, segment, from, to}]. */
export function problemsOf(segments, tracks = null) {
  if (!segments.length) {
    const message = "the schedule is empty; write for example 'image:0-0.15, text:0.15-1'";
    return [{ kind: "empty", message, segment: 0, from: 0, to: 1 }];
  }
  const problems = [];
  const add = (kind, segment, from, to, message) => problems.push({ kind, message, segment, from, to });
  const [first, last] = [segments[0], segments.at(-1)];
  if (first.start !== 0 || first.fade) {
    add("start", 0, 0, first.start, `the first segment must start at 0 and not fade in, got '${written(first)}'`);
  }
  if (last.stop !== 1) {
    add("end", segments.length - 1, last.stop, 1, `the last segment must end at 1, got '${written(last)}'`);
  }
  segments.slice(1).forEach((right, i) => {
    const left = segments[i];
    const pair = `'${written(left)}' and '${written(right)}'`;
    if (right.start < left.stop) {
      const message = `segments ${pair} overlap; the second must not start before the first stops`;
      add("overlap", i + 1, right.start, left.stop, message);
    } else if (right.start > left.stop && !right.fade) {
      add("gap", i + 1, left.stop, right.start, `gap between ${pair}; let them meet, or write > for a fade`);
    }
  });
  if (tracks) {
    const there = [...tracks].sort().join(", ") || "none";
    for (const track of tracksOf(segments)) {
      if (tracks.includes(track)) continue;
      const segment = segments.findIndex((s) => s.track === track);
      const message = `unknown track ${quoted(track)} in the schedule; there is ${there}`;
      add("unknown", segment, segments[segment].start, segments[segment].stop, message);
    }
  }
  return problems;
}

/** Reads and checks; throws what Python's parse_schedule raises. */
export function parseSchedule(text, tracks = null) {
  const segments = readSegments(text);
  const [problem] = problemsOf(segments, tracks);
  if (problem) throw new Error(problem.message);
  return segments;
}

export function formatSchedule(segments) {
  return segments.map((s, i) => (i ? (s.fade ? " > " : ", ") : "") + written(s)).join("");
}

/** Names of the tracks, each once, in order of appearance. */
export function tracksOf(segments) {
  return [...new Set(segments.map((s) => s.track))];
}

/** The mix of tracks at each step: [[[track, weight], …], …]. Without sigmas they are taken to fall evenly. */
export function resolve(segments, steps, sigmas = evenSigmas(steps)) {
  const mixes = [];
  for (const { start, stop, left, right } of spansOf(segments, steps, sigmas)) {
    for (let step = start; step < stop; step++) {
      const weight = (step + 0.5 - start) / (stop - start);
      const pure = left.track === right.track;
      mixes.push(pure ? [[left.track, 1]] : [[left.track, 1 - weight], [right.track, weight]]);
    }
  }
  return mixes;
}

/** Segments that round to no step at all and take no part in a fade. */
export function silentSegments(segments, steps, sigmas = evenSigmas(steps)) {
  const heard = new Set();
  for (const { start, stop, left, right } of spansOf(segments, steps, sigmas)) {
    if (start < stop) for (const s of [left, right]) heard.add(written(s) + s.fade);
  }
  return segments.filter((s) => !heard.has(written(s) + s.fade));
}

/** After how many of the steps a boundary at this share falls: halves up, and 0.29 * 50 counts as 14.5. */
export function edgeStep(share, steps) {
  return Math.floor(share * steps + 0.5 + 1e-9);
}

/** Step ranges in order, each with the segments at its two ends: one segment twice where pure, two in a fade. */
export function spansOf(segments, steps, sigmas = evenSigmas(steps)) {
  const whole = Number.isInteger(steps) && steps > 0;
  if (!whole) throw new Error(`steps must be a whole number of at least 1, got ${steps}`);
  const progress = sigmas.map((sigma) => 1 - sigma);
  const edge = (share, ...around) => {
    if (around.every((s) => s.axis === "steps")) return edgeStep(share, steps);
    const nearest = Math.min(...progress.map((p) => Math.abs(p - share)));
    return progress.findLastIndex((p) => Math.abs(p - share) <= nearest + 1e-6);
  };
  const spans = [];
  let start = 0;
  segments.slice(1).forEach((right, i) => {
    const left = segments[i];
    const meet = left.stop === right.start;
    const stop = Math.max(start, meet ? edge(left.stop, left, right) : edge(left.stop, left));
    const until = meet ? stop : Math.max(stop, edge(right.start, right));
    spans.push({ start, stop, left, right: left }, { start: stop, stop: until, left, right });
    start = until;
  });
  const last = segments.at(-1);
  return [...spans, { start, stop: steps, left: last, right: last }];
}

function evenSigmas(steps) {
  return Array.from({ length: steps + 1 }, (_, k) => 1 - k / steps);
}

function readSegment(piece, fade) {
  const text = strip(piece);
  const match = SEGMENT.exec(text);
  if (!match) throw new Error(`cannot read segment '${text}'; write track:start-stop, for example image:0-0.15`);
  const [, track, from, to, sigma] = match;
  for (const share of [from, to]) {
    if (!SHARE.test(share) || Number(share) > 1) {
      throw new Error(`share ${quoted(share)} in '${text}' must be a number from 0 to 1, as 0.15`);
    }
  }
  const segment = { track, start: Number(from), stop: Number(to), axis: sigma ? "sigma" : "steps", fade };
  if (segment.start > segment.stop) {
    throw new Error(`segment '${written(segment)}' runs backwards; the smaller share comes first`);
  }
  return segment;
}

/** `track:start-stop`, as it stands in the text. */
export function written({ track, start, stop, axis }) {
  return `${track}:${writtenShare(start)}-${writtenShare(stop)}${axis === "sigma" ? "@sigma" : ""}`;
}

/** Shortest digits that read back the same, without an exponent. */
export function writtenShare(share) {
  const [digits, exponent] = String(Math.abs(share)).split("e-");
  return exponent ? `0.${"0".repeat(exponent - 1)}${digits.replace(".", "")}` : digits;
}

function strip(text) {
  return text.replace(STRIP, "");
}

/** As Python's repr of a str. */
function quoted(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const named = { "\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r" };
  const escaped = (char) => {
    const code = char.codePointAt(0);
    if (named[char]) return named[char];
    if (char === quote) return `\\${quote}`;
    if (char === " " || !/[\p{C}\p{Z}]/u.test(char)) return char;
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
  };
  return quote + [...text].map(escaped).join("") + quote;
}
