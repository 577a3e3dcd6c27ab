import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { formatSchedule, parseSchedule, resolve, silentSegments, written } from "../../js/schedule.mjs";

const cases = JSON.parse(readFileSync(new URL("schedule_cases.json", import.meta.url)));

test("JavaScript reads, refuses and resolves every schedule as Python does", () => {
  for (const { text, tracks, error, written: expected, mixes, starts, silent } of cases) {
    if (error) {
      assert.throws(() => parseSchedule(text, tracks), { message: error }, JSON.stringify(text));
      continue;
    }
    const segments = parseSchedule(text, tracks);
    assert.equal(formatSchedule(segments), expected);
    assert.deepEqual(parseSchedule(expected, tracks), segments);
    for (const [steps, wanted] of Object.entries(mixes)) {
      const found = resolve(segments, Number(steps)).map((mix) => Object.fromEntries(mix));
      assert.deepEqual(found, wanted, `${text} in ${steps} steps`);
    }
    for (const [steps, wanted] of Object.entries(starts)) {
      const found = resolve(segments, Number(steps)).map((mix) => JSON.stringify(mix));
      assert.deepEqual(found.flatMap((mix, k) => (k && mix !== found[k - 1] ? [k] : [])), wanted, text);
    }
    for (const [steps, wanted] of Object.entries(silent)) {
      assert.deepEqual(silentSegments(segments, Number(steps)).map(written), wanted, `${text} in ${steps} steps`);
    }
  }
});

test("uneven sigmas move a boundary to the nearest edge", () => {
  const segments = parseSchedule("a:0-0.5@sigma, b:0.5-1@sigma");
  assert.deepEqual(resolve(segments, 3, [1, 0.9, 0.55, 0]).map(([[track]]) => track), ["a", "a", "b"]);
});

test("a step count below one is refused", () => {
  const message = "steps must be a whole number of at least 1, got 0";
  assert.throws(() => resolve(parseSchedule("a:0-1"), 0), { message });
});
