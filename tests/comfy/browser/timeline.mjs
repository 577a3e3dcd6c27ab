// Works the timeline of UniFusionSchedule in a browser, in both renderers, and writes screenshots.
//
//   node timeline.mjs http://127.0.0.1:8188 OUTPUT_FOLDER
//
// Exits with 1 and one line that says what went wrong.

import { mkdirSync } from "node:fs";
import { join } from "node:path";

import { placesOf } from "../../../js/timeline_canvas.mjs";
import { check, equal, openComfy, place, set, settle, view } from "./comfy.mjs";

const [, , url, folder] = process.argv;
const NODE = "UniFusionSchedule";
const SOURCE = "CLIPTextEncode";
const BOUNDARY_Y = 45;
const TRACKER = "app.extensionManager.workflow.activeWorkflow.changeTracker";
let renderer = "";
mkdirSync(folder, { recursive: true });

// What the page says

const findSchedule = (id) => {
  const node = globalThis.app.canvas.graph.getNodeById(id);
  return { node, widget: node.widgets.find((widget) => widget.name === "schedule") };
};

const text = (page, id) => page.evaluate(`(${findSchedule})(${JSON.stringify(id)}).widget.value`);
const undoLength = (page) => page.evaluate(`${TRACKER}.undoQueue.length`);
const canvasOf = (page, nth = 0) => page.locator(".unifusion-timeline:visible canvas").nth(nth);
const aria = (page, name, nth = 0) => canvasOf(page, nth).getAttribute(`aria-${name}`);
const status = (page, nth = 0) => page.locator(".unifusion-timeline:visible [role=status]").nth(nth).textContent();

/** Sets the text, as a script would, with the mouse out of the way. */
async function write(page, id, value) {
  await page.mouse.move(640, 780);
  await page.evaluate(`(${findSchedule})(${JSON.stringify(id)}).widget.value = ${JSON.stringify(value)}`);
  await settle(page);
}

/** Screen position of a step and a lane. */
async function spot(page, lanes, step, lane, steps = 20, nth = 0) {
  const box = await canvasOf(page, nth).boundingBox();
  const size = await canvasOf(page, nth).evaluate((canvas) => [canvas.offsetWidth, canvas.offsetHeight]);
  const places = placesOf({ width: size[0], height: size[1], steps, state: { lanes } });
  const zoom = box.width / size[0];
  const y = lane === null ? BOUNDARY_Y : places.yOf(lane) + places.lane / 2;
  return [box.x + places.xOf(step) * zoom, box.y + y * zoom];
}

async function drag(page, from, to, { alt = false } = {}) {
  await page.mouse.move(...from);
  await page.mouse.down();
  if (alt) await page.keyboard.down("Alt");
  await page.mouse.move((from[0] + to[0]) / 2, (from[1] + to[1]) / 2);
  await page.mouse.move(...to, { steps: 4 });
  await page.mouse.up();
  if (alt) await page.keyboard.up("Alt");
  await settle(page, 150);
}

/** Two prompts into a schedule. */
async function stage(page) {
  const [one, two, id] = await place(page, [[SOURCE, -480, 0], [SOURCE, -480, 260], [NODE, 0, 0]]);
  await page.evaluate(
    (ids) => {
      const [a, b, schedule] = ids.map((id) => globalThis.app.rootGraph.getNodeById(id));
      a.connect(0, schedule, 0);
      b.connect(0, schedule, 1);
      // The frontend keeps the values of a cleared graph for nodes with the same id.
      schedule.widgets.find((widget) => widget.name === "preview_steps").value = 20;
    },
    [one, two, id],
  );
  await view(page, 1, [560, 140]);
  await page.evaluate(`${TRACKER}.captureCanvasState()`);
  return id;
}

// What it must do

const LANES = ["image", "text", "a", "b"];
const START = "image:0-0.15, text:0.15-1";

const checks = {
  async "a fresh node shows its default"(page, id) {
    equal(await text(page, id), START, "default");
    equal(await status(page), "image 3 · text 17 of 20 steps", "summary");
    equal(await aria(page, "invalid"), "false", "aria-invalid");
    equal(await aria(page, "valuemax"), "20", "aria-valuemax");
  },

  async "a boundary follows the mouse in whole steps, and one undo takes it back"(page, id) {
    const before = await undoLength(page);
    await drag(page, await spot(page, LANES, 3, null), await spot(page, LANES, 8.3, null));
    equal(await text(page, id), "image:0-0.4, text:0.4-1", "dragged text");
    equal((await undoLength(page)) - before, 1, "undo entries of one drag");
    await page.keyboard.press("Control+z");
    await settle(page, 900);
    equal(await text(page, id), START, "text after undo");
    equal(await status(page), "image 3 · text 17 of 20 steps", "timeline after undo");
    await page.keyboard.press("Control+y");
    await settle(page, 900);
    equal(await text(page, id), "image:0-0.4, text:0.4-1", "text after redo");
  },

  async "Alt moves a boundary between the steps"(page, id) {
    await write(page, id, START);
    await drag(page, await spot(page, LANES, 3, null), await spot(page, LANES, 8.3, null), { alt: true });
    const share = Number(/image:0-([\d.]+)/.exec(await text(page, id))[1]);
    check(Math.abs(share - 0.415) < 0.01 && share !== 0.4, `Alt-dragged share is ${share} instead of about 0.415`);
  },

  async "Escape in a drag leaves everything as it was"(page, id) {
    await write(page, id, START);
    await page.mouse.move(...(await spot(page, LANES, 3, null)));
    await page.mouse.down();
    await page.mouse.move(...(await spot(page, LANES, 9, null)), { steps: 3 });
    await page.keyboard.press("Escape");
    await page.mouse.up();
    equal(await text(page, id), START, "text after Escape");
  },

  async "a double click opens a fade, its ends move, and it closes again"(page, id) {
    await write(page, id, "image:0-0.5, text:0.5-1");
    await page.mouse.dblclick(...(await spot(page, LANES, 10, null)));
    await settle(page, 150);
    equal(await text(page, id), "image:0-0.4 > text:0.6-1", "opened fade");
    await drag(page, await spot(page, LANES, 12, null), await spot(page, LANES, 16, null));
    equal(await text(page, id), "image:0-0.4 > text:0.8-1", "fade after its end moved");
    await page.screenshot({ path: join(folder, `timeline_fade_${renderer}.png`) });
    await settle(page, 400);
    await page.mouse.dblclick(...(await spot(page, LANES, 16, null)));
    await settle(page, 150);
    equal(await text(page, id), "image:0-0.6, text:0.6-1", "closed fade");
  },

  async "a stroke in a lane lets that track speak there"(page, id) {
    await write(page, id, START);
    await drag(page, await spot(page, LANES, 10.5, 2), await spot(page, LANES, 14.5, 2));
    equal(await text(page, id), "image:0-0.15, text:0.15-0.5, a:0.5-0.75, text:0.75-1", "painted");
  },

  async "a bar can be dragged onto another lane"(page, id) {
    await write(page, id, START);
    await drag(page, await spot(page, LANES, 12.5, 1), await spot(page, LANES, 12.5, 3));
    equal(await text(page, id), "image:0-0.15, b:0.15-1", "assigned");
  },

  async "the keyboard selects, moves, fades, assigns, inserts and removes"(page, id) {
    await write(page, id, "image:0-0.2, text:0.2-0.6, a:0.6-1");
    await canvasOf(page).focus();
    const press = async (key, wanted) => {
      await page.keyboard.press(key);
      await settle(page, 120);
      if (wanted) equal(await text(page, id), wanted, `text after ${key}`);
    };
    await press("Tab");
    await press("Tab");
    equal(await aria(page, "valuetext"), "text → a after step 12 of 20 (0.6)", "spoken selection");
    await press("ArrowRight", "image:0-0.2, text:0.2-0.65, a:0.65-1");
    await press("Shift+ArrowLeft", "image:0-0.2, text:0.2-0.4, a:0.4-1");
    await press("f", "image:0-0.2, text:0.2-0.3 > a:0.5-1");
    await press("f", "image:0-0.2, text:0.2-0.4, a:0.4-1");
    await press("ArrowDown", "image:0-0.2, text:0.2-0.4, b:0.4-1");
    await press("i", "image:0-0.2, text:0.2-0.4, b:0.4-0.7, image:0.7-1");
    await press("Shift+Tab");
    await press("Delete", "image:0-0.4, b:0.4-0.7, image:0.7-1");
    const before = await undoLength(page);
    await page.keyboard.press("Control+z");
    await settle(page, 900);
    equal(await text(page, id), "image:0-0.2, text:0.2-0.4, b:0.4-0.7, image:0.7-1", "text after undo of Delete");
    equal(before - (await undoLength(page)), 1, "undo entries of Delete");
    const nodes = await page.evaluate(() => globalThis.app.rootGraph.nodes.length);
    equal(nodes, 3, "nodes in the graph after Delete in the timeline");
  },

  async "the text box moves the timeline"(page, id) {
    await write(page, id, START);
    await type(page, "a:0-0.25, b:0.25-1");
    equal(await text(page, id), "a:0-0.25, b:0.25-1", "typed text");
    equal(await status(page), "a 5 · b 15 of 20 steps", "timeline of the typed text");
  },

  async "errors are shown in Python's words, and a broken schedule stays editable"(page, id) {
    await write(page, id, "a:0-0.3, b:0.5-1");
    equal(await aria(page, "invalid"), "true", "aria-invalid");
    equal(
      await status(page),
      "gap between 'a:0-0.3' and 'b:0.5-1'; let them meet, or write > for a fade",
      "message of a gap",
    );
    await page.screenshot({ path: join(folder, `timeline_gap_${renderer}.png`) });
    await drag(page, await spot(page, ["a", "b"], 10, null), await spot(page, ["a", "b"], 4, null));
    equal(await text(page, id), "a:0-0.3, b:0.3-1", "closed gap");
    await write(page, id, "a:0-0.5, z:0.5-1");
    const unknown = await status(page);
    check(unknown.startsWith("unknown track 'z' in the schedule; there is a, "), `unknown track: ${unknown}`);
    await write(page, id, "a:0-0.5,");
    const unreadable = await status(page);
    check(unreadable.startsWith("cannot read segment ''"), `unreadable text: ${unreadable}`);
  },

  async "the number of steps comes from preview_steps"(page, id) {
    await write(page, id, START);
    await page.evaluate((node) => {
      globalThis.app.rootGraph.getNodeById(node).widgets.find((w) => w.name === "preview_steps").value = 4;
    }, id);
    await settle(page);
    equal(await status(page), "image 1 · text 3 of 4 steps", "timeline of four steps");
  },

  async "the prompt and the saved workflow hold the text and no timeline"(page, id) {
    await write(page, id, "a:0-0.25 > b:0.5-1");
    const { output, workflow } = await page.evaluate(() => globalThis.app.graphToPrompt());
    equal(output[id].inputs.schedule, "a:0-0.25 > b:0.5-1", "prompt");
    check(!("timeline" in output[id].inputs), "the prompt has a timeline input");
    const saved = workflow.nodes.find((node) => node.id == id);
    equal(saved.widgets_values.slice(0, 3), ["a:0-0.25 > b:0.5-1", "prediction", 20], "saved values");
    await page.evaluate((graph) => globalThis.app.loadGraphData(JSON.parse(JSON.stringify(graph))), workflow);
    await settle(page, 900);
    equal(await text(page, id), "a:0-0.25 > b:0.5-1", "text after loading");
    equal(await status(page), "a 5 · fade 5 · b 10 of 20 steps", "timeline after loading");
  },

  async "a copy has its own timeline"(page, id) {
    await write(page, id, START);
    const copy = await page.evaluate((node) => {
      const { canvas, rootGraph } = globalThis.app;
      const before = new Set(rootGraph.nodes.map((n) => n.id));
      canvas.copyToClipboard([rootGraph.getNodeById(node)]);
      canvas.pasteFromClipboard({ position: [60, 560] });
      return rootGraph.nodes.find((n) => !before.has(n.id)).id;
    }, id);
    await view(page, 0.7, [560, 110]);
    equal(await text(page, copy), START, "text of the copy");
    equal(await page.locator(".unifusion-timeline:visible").count(), 2, "timelines on the screen");
    const boxes = await Promise.all([0, 1].map((nth) => canvasOf(page, nth).boundingBox()));
    const lower = boxes[1].y > boxes[0].y ? 1 : 0;
    const lanes = ["image", "text"];
    await drag(page, await spot(page, lanes, 3, null, 20, lower), await spot(page, lanes, 10, null, 20, lower));
    equal(await text(page, copy), "image:0-0.5, text:0.5-1", "text of the dragged copy");
    equal(await text(page, id), START, "text of the original");
  },

  async "it works inside a subgraph, also when the subgraph owns the text"(page, id) {
    await write(page, id, START);
    const inner = await page.evaluate((node) => {
      const { canvas, rootGraph } = globalThis.app;
      const { subgraph } = rootGraph.convertToSubgraph(new Set([rootGraph.getNodeById(node)]));
      canvas.openSubgraph(subgraph, rootGraph.nodes.find((n) => n.subgraph === subgraph));
      return subgraph.nodes[0].id;
    }, id);
    await view(page, 1, [560, 140]);
    await settle(page, 600);
    await drag(page, await spot(page, LANES, 3, null), await spot(page, LANES, 6, null));
    equal(await promptText(page), "image:0-0.3, text:0.3-1", "prompt after a drag inside the subgraph");
    await page.screenshot({ path: join(folder, `timeline_subgraph_${renderer}.png`) });
    await page.evaluate(`(() => {
      const { node, widget } = (${findSchedule})(${JSON.stringify(inner)});
      const slot = node.inputs.findIndex((input) => input.widget?.name === "schedule");
      const added = node.graph.addInput("words", "STRING");
      added.connect(node.inputs[slot], node);
    })()`);
    await settle(page, 600);
    equal(await promptText(page), "image:0-0.3, text:0.3-1", "prompt after the text was put on the subgraph's box");
    await drag(page, await spot(page, LANES, 6, null), await spot(page, LANES, 12, null));
    equal(await promptText(page), "image:0-0.6, text:0.6-1", "prompt after a drag that writes to the subgraph's box");
    await page.evaluate(() => globalThis.app.canvas.setGraph(globalThis.app.rootGraph));
  },

  async "a schedule from another node is shown and cannot be dragged"(page, id) {
    const linked = await page.evaluate((node) => {
      const { app, LiteGraph } = globalThis;
      const source = LiteGraph.createNode("PrimitiveString");
      if (!source) return false;
      source.pos = [-480, 500];
      app.rootGraph.add(source);
      source.widgets[0].value = "a:0-0.5, b:0.5-1";
      const schedule = app.rootGraph.getNodeById(node);
      source.connect(0, schedule, schedule.inputs.findIndex((input) => input.widget?.name === "schedule"));
      return true;
    }, id);
    check(linked, "core's PrimitiveString is missing");
    await settle(page);
    equal(await status(page), "the schedule comes from a connected input", "status");
    const lanes = ["a", "b"];
    await drag(page, await spot(page, lanes, 10, null), await spot(page, lanes, 5, null));
    equal(await promptSource(page), "a:0-0.5, b:0.5-1", "text of the other node");
  },
};

function promptSource(page) {
  return page.evaluate(() => {
    const source = globalThis.app.rootGraph.nodes.find((node) => node.type === "PrimitiveString");
    return source.widgets[0].value;
  });
}

async function promptText(page) {
  const { output } = await page.evaluate(() => globalThis.app.graphToPrompt());
  return Object.values(output).find((node) => node.class_type === NODE).inputs.schedule;
}

/** Types into the text box as a user does. */
async function type(page, words) {
  const box = page.locator("textarea").filter({ visible: true });
  const values = await box.evaluateAll((areas) => areas.map((area) => area.value));
  await box.nth(values.findIndex((value) => value.includes(":0-"))).fill(words);
  await settle(page);
}

/** Drags with one finger. */
async function swipe(page, from, to) {
  const session = await page.context().newCDPSession(page);
  const send = (kind, points) =>
    session.send("Input.dispatchTouchEvent", { type: kind, touchPoints: points.map(([x, y]) => ({ x, y })) });
  await send("touchStart", [from]);
  for (let part = 1; part <= 5; part++) {
    await send("touchMove", [[from[0] + ((to[0] - from[0]) * part) / 5, from[1] + ((to[1] - from[1]) * part) / 5]]);
    await settle(page, 30);
  }
  await send("touchEnd", []);
  await settle(page, 200);
}

async function touchChecks(page) {
  const id = await stage(page);
  const offset = await page.evaluate(() => [...globalThis.app.canvas.ds.offset]);
  const before = await undoLength(page);
  const [x, y] = await spot(page, LANES, 3, null);
  await swipe(page, [x + 9, y], await spot(page, LANES, 10.4, null));
  equal(await text(page, id), "image:0-0.5, text:0.5-1", "text after a swipe");
  equal((await undoLength(page)) - before, 1, "undo entries of one swipe");
  await swipe(page, await spot(page, LANES, 12.5, 3), await spot(page, LANES, 15.5, 3));
  equal(await text(page, id), "image:0-0.5, text:0.5-0.6, b:0.6-0.8, text:0.8-1", "text after a painted swipe");
  equal(await page.evaluate(() => [...globalThis.app.canvas.ds.offset]), offset, "place of the graph after swipes");
}

async function lookAround(page, id) {
  await write(page, id, "image:0-0.15, text:0.15-0.5 > b:0.8-1");
  for (const palette of ["light", "dark"]) {
    await set(page, "Comfy.ColorPalette", palette);
    await settle(page, 900);
    await page.screenshot({ path: join(folder, `timeline_${palette}_${renderer}.png`) });
  }
}

/** Without the script the text box does the same job. */
async function withoutScript() {
  const { browser, page } = await openComfy(url, { blocked: /timeline\.js/ });
  try {
    await set(page, "Comfy.VueNodes.Enabled", false);
    const id = await stage(page);
    equal(await page.locator(".unifusion-timeline").count(), 0, "timelines without the script");
    await write(page, id, "a:0-0.5, b:0.5-1");
    equal(await promptText(page), "a:0-0.5, b:0.5-1", "prompt without the script");
  } finally {
    await browser.close();
  }
}

async function run() {
  for (const [name, vue] of [["litegraph", false], ["nodes2", true]]) {
    renderer = name;
    for (const hasTouch of [false, true]) {
      const { browser, page, errors } = await openComfy(url, { hasTouch });
      try {
        await set(page, "Comfy.ColorPalette", "dark");
        await set(page, "Comfy.VueNodes.Enabled", vue);
        if (hasTouch) await named("one finger drags and paints", () => touchChecks(page));
        else {
          for (const [words, body] of Object.entries(checks)) {
            await named(words, async () => body(page, await stage(page)));
          }
          await lookAround(page, await stage(page));
        }
        equal(errors, [], "errors in the console");
      } catch (error) {
        await page.screenshot({ path: join(folder, `failed_${renderer}.png`) });
        throw error;
      } finally {
        await browser.close();
      }
    }
  }
  renderer = "no script";
  await named("without the script the text box remains", withoutScript);
}

async function named(words, body) {
  try {
    await body();
    console.log(`ok  ${renderer}: ${words}`);
  } catch (error) {
    throw new Error(`${renderer}: ${words}: ${error.message.split("\n")[0]}`);
  }
}

run().catch((error) => {
  console.error(`FAILED ${error.message.split("\n")[0]}`);
  process.exitCode = 1;
});
