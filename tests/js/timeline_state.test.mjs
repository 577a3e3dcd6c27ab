import assert from "node:assert/strict";
import { test } from "node:test";

import { edgeStep, formatSchedule, problemsOf, readSegments, resolve } from "../../js/schedule.mjs";
import { hitTest, placesOf } from "../../js/timeline_canvas.mjs";
import * as timeline from "../../js/timeline_state.mjs";

const START = "image:0-0.15, text:0.15-1";
const FADE = "a:0-0.4 > b:0.6-1";
const GAP = "a:0-0.3, b:0.5-1";
const OVERLAP = "a:0-0.6, b:0.4-1";
const both = (boundary) => ({ boundary, side: "both" });

/** Applies an edit to a written schedule and writes what comes out. */
function edited(text, edit, ...rest) {
  return formatSchedule(edit(readSegments(text), ...rest));
}

const moved = (text, handle, share, options = {}) =>
  edited(text, timeline.moveHandle, handle, share, { steps: 20, ...options });

test("a share has few digits and lands on its step, for every number of steps", () => {
  for (let steps = 1; steps <= 300; steps++) {
    for (let step = 0; step <= steps; step++) {
      const share = timeline.shareOf(step, steps);
      assert.equal(edgeStep(share, steps), step, `${step} of ${steps}`);
      assert.ok(String(share).length <= 6, `${share} for ${step} of ${steps}`);
    }
  }
  const shares = [[3, 20], [1, 3], [1, 8], [7, 12], [1, 4]].map((pair) => timeline.shareOf(...pair));
  assert.deepEqual(shares, [0.15, 0.33, 0.125, 0.58, 0.25]);
});

test("lanes are the connected sockets and the named tracks, in an order that edits keep", () => {
  const lanes = (text, ...rest) => timeline.laneNames(readSegments(text), ...rest);
  assert.deepEqual(lanes(START, ["a"]), ["image", "text", "a"]);
  assert.deepEqual(lanes("text:0-0.5, image:0.5-1", ["b", "a"]), ["image", "text", "a", "b"]);
  assert.deepEqual(lanes("b.image:0-0.5, zoo:0.5-1", ["a"]), ["a", "b.image", "zoo"]);
  assert.deepEqual(lanes("a:0-1", ["a"], ["image"]), ["image", "a"]);
});

test("unknown tracks are told where something is connected, and not before", () => {
  assert.equal(timeline.readTimeline(START, []).error, "");
  assert.equal(timeline.readTimeline("b:0-1", []).error, "");
  const { problems, error } = timeline.readTimeline("a:0-0.5, b:0.5-1", ["a"]);
  assert.deepEqual(problems.map((p) => [p.kind, p.segment]), [["unknown", 1]]);
  assert.equal(error, "unknown track 'b' in the schedule; there is a, a.all, a.image, a.text, all, image, text");
});

test("unreadable text is an error and keeps the lanes of what is connected", () => {
  const { segments, lanes, error } = timeline.readTimeline("a:0-", ["a", "b"]);
  assert.equal(segments, null);
  assert.deepEqual(lanes, ["a", "b"]);
  assert.match(error, /^cannot read segment 'a:0-'/);
});

test("every gap and overlap is told, with its place", () => {
  const all = problemsOf(readSegments("a:0.1-0.3, b:0.4-0.7, a:0.6-0.9"));
  assert.deepEqual(all.map((p) => [p.kind, p.from, p.to]), [
    ["start", 0, 0.1],
    ["end", 0.9, 1],
    ["gap", 0.3, 0.4],
    ["overlap", 0.6, 0.7],
  ]);
});

test("bars cover each step once, and a fade belongs to both of its tracks", () => {
  const bars = timeline.barsOf(readSegments(FADE), 20);
  assert.deepEqual(
    bars.map(({ track, from, to, kind }) => [track, from, to, kind]),
    [["a", 0, 8, "pure"], ["a", 8, 12, "out"], ["b", 8, 12, "in"], ["b", 12, 20, "pure"]],
  );
});

test("bars agree with the mixes that Python resolves", () => {
  for (const text of [START, FADE, "a:0-0.29, b:0.29-0.5 > a:0.77-1", "a:0-0 > b:1-1", "a:0-0.01, b:0.01-1"]) {
    for (const steps of [1, 3, 4, 20, 50]) {
      const segments = readSegments(text);
      const mixes = resolve(segments, steps);
      const bars = timeline.barsOf(segments, steps);
      mixes.forEach((mix, step) => {
        const drawn = bars.filter((bar) => bar.from <= step && step < bar.to).map((bar) => bar.track);
        assert.deepEqual(drawn, mix.map(([track]) => track), `${text}, step ${step} of ${steps}`);
      });
    }
  }
});

test("there is a handle per switch, two per fade, gap and overlap, and one at an open end", () => {
  const sides = (text) => timeline.handlesOf(readSegments(text)).map((h) => `${h.boundary}${h.side}`).join(" ");
  assert.equal(sides("a:0-1"), "");
  assert.equal(sides(START), "0both");
  for (const text of [FADE, GAP, OVERLAP]) assert.equal(sides(text), "0left 0right");
  assert.equal(sides("a:0.1-0.5, b:0.5-0.9"), "-1right 0both 1left");
});

test("a boundary snaps to steps, moves freely with Alt, and leaves each side a step", () => {
  assert.equal(moved(START, both(0), 0.42), "image:0-0.4, text:0.4-1");
  assert.equal(moved(START, both(0), 0.42341, { free: true }), "image:0-0.4234, text:0.4234-1");
  assert.equal(moved(START, both(0), -1), "image:0-0.05, text:0.05-1");
  assert.equal(moved(START, both(0), 2), "image:0-0.95, text:0.95-1");
  assert.equal(moved(START, both(0), 2, { free: true }), "image:0-1, text:1-1");
  assert.equal(moved(START, both(0), 0.5, { steps: 3 }), "image:0-0.67, text:0.67-1");
});

test("a boundary stays between its neighbours", () => {
  const three = "a:0-0.2, b:0.2-0.6, a:0.6-1";
  assert.equal(moved(three, both(0), 0.9), "a:0-0.55, b:0.55-0.6, a:0.6-1");
  assert.equal(moved(three, both(1), 0), "a:0-0.2, b:0.2-0.25, a:0.25-1");
});

test("the ends of a fade move by themselves and close it where they meet", () => {
  assert.equal(moved(FADE, { boundary: 0, side: "left" }, 0.2), "a:0-0.2 > b:0.6-1");
  assert.equal(moved(FADE, { boundary: 0, side: "left" }, 0), "a:0-0 > b:0.6-1");
  assert.equal(moved(FADE, { boundary: 0, side: "right" }, 1), "a:0-0.4 > b:1-1");
  assert.equal(moved(FADE, { boundary: 0, side: "left" }, 0.9), "a:0-0.6, b:0.6-1");
  assert.equal(moved("a:0-0.333 > b:0.6-1", { boundary: 0, side: "right" }, 0), "a:0-0.333, b:0.333-1");
});

test("gaps, overlaps and open ends can be dragged shut", () => {
  assert.equal(moved(GAP, { boundary: 0, side: "left" }, 0.8), "a:0-0.5, b:0.5-1");
  assert.equal(moved(OVERLAP, { boundary: 0, side: "left" }, 0.4), "a:0-0.4, b:0.4-1");
  assert.equal(moved("a:0.2-1", { boundary: -1, side: "right" }, 0), "a:0-1");
  assert.equal(moved("a:0-0.7", { boundary: 0, side: "left" }, 1), "a:0-1");
});

test("a switch opens into a fade and closes again where it was", () => {
  for (const [text, steps] of [["a:0-0.5, b:0.5-1", 20], ["a:0-0.5, b:0.5-1", 4], ["a:0-0.5, b:0.5-1", 100]]) {
    const open = edited(text, timeline.toggleFade, 0, steps);
    assert.match(open, / > /);
    assert.equal(edited(open, timeline.toggleFade, 0, steps), text);
  }
  assert.equal(edited("a:0-0.5, b:0.5-1", timeline.toggleFade, 0, 20), "a:0-0.4 > b:0.6-1");
  assert.equal(edited("a:0-0.05, b:0.05-1", timeline.toggleFade, 0, 20), "a:0-0.05 > b:0.15-1");
  assert.equal(edited("a:0-0.5, b:0.5-1", timeline.toggleFade, 0, 2), "a:0-0 > b:1-1");
});

test("a gap becomes a fade, an overlap a switch, and an open end is closed", () => {
  assert.equal(edited(GAP, timeline.toggleFade, 0, 20), "a:0-0.3 > b:0.5-1");
  assert.equal(edited(OVERLAP, timeline.toggleFade, 0, 20), "a:0-0.5, b:0.5-1");
  assert.equal(edited("a:0.2-1", timeline.toggleFade, -1, 20), "a:0-1");
  assert.equal(edited("a:0-0.5", timeline.toggleFade, 0, 20), "a:0-1");
});

test("a segment can be given to another track, and neighbours of one track join", () => {
  assert.equal(edited(START, timeline.assignSegment, 0, "b"), "b:0-0.15, text:0.15-1");
  assert.equal(edited("a:0-0.2, b:0.2-0.5, a:0.5-1", timeline.assignSegment, 1, "a"), "a:0-1");
  assert.equal(edited("a:0-0.2 > b:0.4-1", timeline.assignSegment, 1, "a"), "a:0-0.2 > a:0.4-1");
});

test("painting takes what it covers and closes the fades it cuts", () => {
  assert.equal(edited("a:0-1", timeline.paint, "b", 0.2, 0.4), "a:0-0.2, b:0.2-0.4, a:0.4-1");
  assert.equal(edited(START, timeline.paint, "a", 0, 0.3), "a:0-0.3, text:0.3-1");
  assert.equal(edited(START, timeline.paint, "a", 0.1, 1), "image:0-0.1, a:0.1-1");
  assert.equal(edited(START, timeline.paint, "a", 0, 1), "a:0-1");
  assert.equal(edited(START, timeline.paint, "image", 0.1, 0.4), "image:0-0.4, text:0.4-1");
  assert.equal(edited(FADE, timeline.paint, "c", 0.45, 0.5), "a:0-0.45, c:0.45-0.5, b:0.5-1");
  assert.equal(edited(GAP, timeline.paint, "c", 0.2, 0.6), "a:0-0.2, c:0.2-0.6, b:0.6-1");
  const cut = edited("a:0-0.5@sigma, b:0.5-1", timeline.paint, "c", 0.2, 0.3);
  assert.equal(cut, "a:0-0.2@sigma, c:0.2-0.3, a:0.3-0.5@sigma, b:0.5-1");
});

test("a segment can be inserted and removed", () => {
  assert.equal(edited("a:0-1", timeline.insertSegment, 0, "b", 20), "a:0-0.5, b:0.5-1");
  assert.equal(edited("a:0-0.05, b:0.05-1", timeline.insertSegment, 0, "b", 20), "a:0-0.05, b:0.05-1");
  assert.equal(edited("a:0-0.2 > b:0.4-1", timeline.insertSegment, 1, "c", 20), "a:0-0.2 > b:0.4-0.7, c:0.7-1");
  assert.equal(edited("a:0-0.2, b:0.2-0.6 > c:0.8-1", timeline.removeSegment, 1), "a:0-0.6 > c:0.8-1");
  assert.equal(edited("a:0-0.2 > b:0.4-1", timeline.removeSegment, 0), "b:0-1");
  assert.equal(edited("a:0-0.2, b:0.2-0.6, a:0.6-1", timeline.removeSegment, 1), "a:0-1");
  assert.equal(edited("a:0-1", timeline.removeSegment, 0), "a:0-1");
});

test("every edit of a valid schedule leaves a valid schedule", () => {
  const more = ["a:0-0.1 > b:0.3-0.5, a:0.5-0.9 > c:1-1", "a:0-0.5@sigma > b:0.7-1", "a:0-0, b:0-0.3, c:0.3-1"];
  for (const text of [START, FADE, ...more]) {
    const segments = readSegments(text);
    const results = [];
    for (const steps of [1, 3, 4, 20, 33]) {
      for (const handle of timeline.handlesOf(segments)) {
        for (let part = -1; part <= 11; part++) {
          for (const free of [false, true]) {
            results.push(timeline.moveHandle(segments, handle, part / 10, { steps, free }));
          }
        }
        results.push(timeline.toggleFade(segments, handle.boundary, steps));
      }
      segments.forEach((_, index) => {
        results.push(timeline.removeSegment(segments, index), timeline.assignSegment(segments, index, "z"));
        results.push(timeline.insertSegment(segments, index, "z", steps));
      });
      for (let from = 0; from < steps; from++) {
        for (let to = from + 1; to <= steps; to++) {
          const shares = [from, to].map((step) => timeline.shareOf(step, steps));
          const painted = timeline.paint(segments, "z", ...shares);
          results.push(painted);
          const heard = resolve(painted, steps).filter(([[track]]) => track === "z").length;
          assert.equal(heard, to - from, `${text}, painted ${from} to ${to} of ${steps}`);
        }
      }
    }
    for (const result of results) assert.deepEqual(problemsOf(result), [], `${text} became ${formatSchedule(result)}`);
    assert.equal(formatSchedule(segments), formatSchedule(readSegments(text)), "an edit changed its input");
  }
});

test("the summary and the spoken texts say what there is", () => {
  assert.equal(timeline.summary(readSegments(START), 20), "image 3 · text 17 of 20 steps");
  assert.equal(timeline.summary(readSegments(FADE), 20), "a 8 · fade 4 · b 8 of 20 steps");
  assert.equal(timeline.summary(readSegments("a:0-1"), 1), "a 1 of 1 step");
  const said = (text) => {
    const segments = readSegments(text);
    return timeline.handlesOf(segments).map((handle) => timeline.describeHandle(segments, handle, 20));
  };
  assert.deepEqual(said(START), ["image → text after step 3 of 20 (0.15)"]);
  const [begins, ends] = said(FADE);
  assert.equal(begins, "a → b fade begins after step 8 of 20 (0.4)");
  assert.equal(ends, "a → b fade ends after step 12 of 20 (0.6)");
  assert.deepEqual(said(GAP), ["a stops after step 6 of 20 (0.3)", "b starts after step 10 of 20 (0.5)"]);
  assert.equal(timeline.describeSegment(readSegments(START), 1, 20), "text:0.15-1, 17 of 20 steps");
});

test("a point on the canvas is a handle, a bar or an empty place in a lane", () => {
  const steps = 20;
  const view = { width: 400, height: 140, steps, state: timeline.readTimeline(FADE, ["a", "b"]) };
  const { xOf, yOf, lane } = placesOf(view);
  const at = (step, row) => hitTest(view, xOf(step), yOf(row) + lane / 2);
  assert.equal(at(8, 0).handle.side, "left");
  assert.equal(at(12, 0).handle.side, "right");
  assert.equal(at(4.5, 0).bar.track, "a");
  assert.equal(at(10.5, 1).bar.kind, "in");
  assert.deepEqual(at(4.5, 1), { lane: 1, step: 4 });
  assert.equal(hitTest(view, 2, 2), null);
  assert.equal(hitTest(view, xOf(4.5), 2000), null);
});

test("of two handles on one step, the pointer takes the one that can follow it", () => {
  const view = { width: 400, height: 140, steps: 4, state: timeline.readTimeline("a:0-0.45 > b:0.55-1", ["a", "b"]) };
  const { xOf } = placesOf(view);
  assert.equal(hitTest(view, xOf(2) - 3, 40).handle.side, "left");
  assert.equal(hitTest(view, xOf(2) + 3, 40).handle.side, "right");
});
