// Makes js/docs/images/<NodeId>.jpg: every node of the pack as it looks in the frontend.
//
//   node node_pictures.mjs http://127.0.0.1:8188 OUTPUT_FOLDER [NodeId …]
//
// The server wants a LoRA in models/loras and a LAP adapter in models/unifusion, so that their loaders show a name.

import { mkdirSync } from "node:fs";
import { join } from "node:path";

import { check, openComfy, place, set, settle, view } from "./comfy.mjs";

const [, , url, folder, ...wanted] = process.argv;
const MARGIN = 14;
const LEAST = 300; // a shorter node would cut its title
const SCENE = "two shapes on a white background : a large red heart at top-left , a small blue star at bottom-right";
const PROMPT = "the shape with three sides in the color of grass and a red heart";

/** Node id → how its picture is staged; each returns the ids of the nodes to show. */
const STAGES = {
  UniFusionLoadVLM: alone,
  UniFusionVLMFromCLIP: alone,
  UniFusionLoadModel: alone,
  UniFusionFusionFromModel: (page, id) => alone(page, id, {}, 350),
  UniFusionLoadLoRA: alone,
  UniFusionLoadAdapter: alone,
  UniFusionRewrite: rewriting,
  UniFusionLAPEncode: alone,
  UniFusionRefine: alone,
  UniFusionEmptyConditioning: alone,
  UniFusionEncodeForModel: (page, id) => alone(page, id, { profile: "boogu-edit", tokens: "image + rewrite" }),
  UniFusionSelectTokens: alone,
  UniFusionMixConditioning: (page, id) => alone(page, id, { mode: "average" }),
  UniFusionSchedule: scheduling,
  UniFusionScheduleModel: alone,
  UniFusionScheduleToRanges: alone,
  UniFusionEmptyLatent: alone,
  UniFusionSampler: alone,
  UniFusionVAEDecode: decoding,
  UniFusionLayerInspector: inspecting,
  UniFusionLayerDropout: (page, id) => alone(page, id, { layers: "2, 8" }),
  UniFusionMicroScene: drawing,
};

async function alone(page, id, values = {}, least = LEAST) {
  const [node] = await place(page, [[id, 0, 0]]);
  await write(page, node, values);
  await resize(page, node, [least, 0]);
  return [node];
}

async function drawing(page, id) {
  const [scene, picture] = await place(page, [[id, 0, 0], ["PreviewImage", 440, 0]]);
  await write(page, scene, { caption: SCENE, seed: 1, control_after_generate: "fixed" });
  await link(page, [[scene, 0, picture, 0]]);
  await run(page);
  await resize(page, picture, [250, 250]);
  return [scene, picture];
}

async function rewriting(page, id) {
  const [vlm, rewrite, text] = await place(page, [["UniFusionLoadVLM", -400, 0], [id, 0, 0], ["PreviewAny", 600, 0]]);
  await write(page, rewrite, { prompt: PROMPT });
  await link(page, [[vlm, 0, rewrite, "vlm"], [rewrite, 1, text, 0]]);
  await run(page);
  return [rewrite];
}

async function inspecting(page, id) {
  const nodes = [["UniFusionLoadVLM", -900, 0], ["UniFusionLoadModel", -900, 300], ["UniFusionRewrite", -500, 0]];
  const placed = await place(page, [...nodes, [id, 0, 0], ["PreviewImage", 340, 0]]);
  const [vlm, model, rewrite, figure, picture] = placed;
  await write(page, rewrite, { prompt: PROMPT });
  await link(page, [
    [vlm, 0, rewrite, "vlm"],
    [model, 1, figure, "fusion"],
    [rewrite, 0, figure, "hidden"],
    [figure, 0, picture, 0],
  ]);
  await run(page);
  await resize(page, picture, [420, 340]);
  return [figure, picture];
}

async function decoding(page, id) {
  const [model, scene, encode, decode, picture] = await place(page, [
    ["UniFusionLoadModel", -900, 0],
    ["UniFusionMicroScene", -900, 300],
    ["VAEEncode", -400, 0],
    [id, 0, 0],
    ["PreviewImage", 340, 0],
  ]);
  await write(page, scene, { caption: SCENE, seed: 1, control_after_generate: "fixed" });
  await link(page, [
    [scene, 0, encode, "pixels"],
    [model, 2, encode, "vae"],
    [model, 2, decode, "vae"],
    [encode, 0, decode, "samples"],
    [decode, 0, picture, 0],
  ]);
  await run(page);
  await resize(page, decode, [LEAST, 0]);
  await resize(page, picture, [250, 250]);
  return [decode, picture];
}

async function scheduling(page, id) {
  const nodes = [["UniFusionLoadModel", -700, 0], ["UniFusionLAPEncode", -300, 0]];
  const [model, pooled, schedule] = await place(page, [...nodes, [id, 0, 0]]);
  await link(page, [[model, 1, schedule, "fusion"], [pooled, 0, schedule, "conditionings.a"]]);
  return [schedule];
}

/** Connects [from, output, to, input by name or place]. */
function link(page, links) {
  return page.evaluate((list) => {
    for (const [from, output, to, input] of list) {
      const [source, target] = [from, to].map((id) => globalThis.app.rootGraph.getNodeById(id));
      const slot = typeof input === "string" ? target.inputs.findIndex((one) => one.name === input) : input;
      source.connect(output, target, slot);
    }
  }, links);
}

function write(page, id, values) {
  return page.evaluate(
    ([node, given]) => {
      const widgets = globalThis.app.rootGraph.getNodeById(node).widgets ?? [];
      for (const [name, value] of Object.entries(given)) widgets.find((one) => one.name === name).value = value;
    },
    [id, values],
  );
}

/** At least this width and height. */
function resize(page, id, least) {
  return page.evaluate(
    ([name, size]) => {
      const node = globalThis.app.rootGraph.getNodeById(name);
      node.setSize(size.map((value, axis) => Math.max(value, node.size[axis])));
    },
    [id, least],
  );
}

/** Queues the graph and waits for its end. */
async function run(page) {
  const ended = page.evaluate(
    () =>
      new Promise((done) => {
        const { api } = globalThis.app;
        for (const kind of ["execution_success", "execution_error"])
          api.addEventListener(kind, ({ detail }) => done(detail.exception_message ?? ""), { once: true });
      }),
  );
  await page.evaluate(() => globalThis.app.queuePrompt(0, 1));
  const words = await ended;
  check(words === "", `a graph failed: ${words}`);
  await settle(page, 1500);
}

/** The part of the page that these nodes cover. */
async function frame(page, ids) {
  const box = await page.evaluate((list) => {
    const { canvas, rootGraph } = globalThis.app;
    const boxes = list.map((id) => rootGraph.getNodeById(id).getBounding());
    const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((one) => one[axis])));
    const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((one) => one[axis] + one[axis + 2])));
    const { scale, offset } = canvas.ds;
    const origin = canvas.canvas.getBoundingClientRect();
    const at = (value, axis) => (value + offset[axis]) * scale + (axis ? origin.top : origin.left);
    return { x: at(left, 0), y: at(top, 1), width: (right - left) * scale, height: (bottom - top) * scale };
  }, ids);
  const { x, y, width, height } = box;
  return { x: x - MARGIN, y: y - MARGIN, width: width + 2 * MARGIN, height: height + 2 * MARGIN };
}

mkdirSync(folder, { recursive: true });
const { browser, page } = await openComfy(url);
try {
  await page.setViewportSize({ width: 1500, height: 1100 });
  await set(page, "Comfy.NodeBadge.NodeSourceBadgeMode", "None");
  for (const [id, stage] of Object.entries(STAGES)) {
    if (wanted.length && !wanted.includes(id)) continue;
    const shown = await stage(page, id);
    await page.evaluate(() => globalThis.app.canvas.deselectAll());
    await page.mouse.move(1400, 1050);
    await view(page, 1, [160, 220]);
    await settle(page, 800);
    const clip = await frame(page, shown);
    await page.screenshot({ path: join(folder, `${id}.jpg`), type: "jpeg", quality: 80, clip });
    console.log(id, Math.round(clip.width), "x", Math.round(clip.height));
  }
} finally {
  await browser.close();
}
