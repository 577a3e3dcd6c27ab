// Opens every template of the pack in the real frontend.
//
//   node workflows.mjs URL [--shots FOLDER] [--run] [--vue] [--only NAME]
//
// Prints {name: {prompt, errors, missing, overlaps}} as JSON. --run queues each and waits for its end before the picture.

import { mkdirSync } from "node:fs";
import { join } from "node:path";

import { openComfy, set, settle } from "./comfy.mjs";

const PACK = "UniFusion";
const [url, ...rest] = process.argv.slice(2);
const option = (name) => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : "");
const [shots, only, vue, queue] = [option("--shots"), option("--only"), rest.includes("--vue"), rest.includes("--run")];
if (shots) mkdirSync(shots, { recursive: true });

const { browser, page, errors } = await openComfy(url);
await page.setViewportSize({ width: 1920, height: 1080 });
page.on("console", (message) => {
  if (message.type() === "error") errors.push(`${message.text()} (${message.location().url})`);
});
await set(page, "Comfy.VueNodes.Enabled", vue);
await settle(page, 2500); // what the default workflow misses is none of ours
const names = await page.evaluate(async (pack) => (await (await fetch("/workflow_templates")).json())[pack], PACK);
const found = {};
for (const name of names.filter((candidate) => candidate.includes(only)).sort()) found[name] = await visit(name);
await browser.close();
console.log(JSON.stringify(found));

async function visit(name) {
  errors.length = 0;
  const opened = await page.evaluate(open, [PACK, name]);
  await settle(page, 900);
  if (queue) await page.evaluate(run);
  await page.evaluate(fit);
  await settle(page, queue ? 2500 : 900);
  if (shots) await page.screenshot({ path: join(shots, `${name}${vue ? "_vue" : ""}.png`) });
  const overlaps = await page.evaluate(crowded);
  return { ...opened, overlaps, errors: [...errors] };
}

async function open([pack, name]) {
  const { app, LiteGraph } = globalThis;
  const workflow = await (await fetch(`/api/workflow_templates/${pack}/${name}.json`)).json();
  await app.loadGraphData(workflow, true, true, name, { openSource: "template" });
  await new Promise((done) => setTimeout(done, 500));
  const missing = app.rootGraph.nodes
    .filter((node) => !LiteGraph.registered_node_types[node.type] || node.has_errors)
    .map((node) => node.type);
  return { prompt: (await app.graphToPrompt()).output, missing };
}

async function run() {
  const { app } = globalThis;
  const api = app.api;
  const ended = new Promise((done) => {
    for (const kind of ["execution_success", "execution_error"]) {
      api.addEventListener(kind, ({ detail }) => done(kind + (detail.exception_message ?? "")), { once: true });
    }
  });
  await app.queuePrompt(0);
  return ended;
}

function fit() {
  const { canvas, rootGraph } = globalThis.app;
  const boxes = [...rootGraph.nodes.map((node) => node.boundingRect), ...rootGraph.groups.map((g) => g.boundingRect ?? g._bounding)];
  const left = Math.min(...boxes.map((box) => box[0]));
  const top = Math.min(...boxes.map((box) => box[1]));
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  const [width, height] = [globalThis.innerWidth - 130, globalThis.innerHeight - 110];
  canvas.ds.scale = Math.min(width / (right - left), height / (bottom - top), 1);
  canvas.ds.offset = [90 / canvas.ds.scale - left, 70 / canvas.ds.scale - top];
  canvas.setDirty(true, true);
}

/** Pairs of nodes that cover each other. */
function crowded() {
  const nodes = globalThis.app.rootGraph.nodes.map((node) => [node.title, ...node.boundingRect]);
  const over = [];
  nodes.forEach(([name, x, y, w, h], index) => {
    for (const [other, X, Y, W, H] of nodes.slice(index + 1)) {
      if (x < X + W && X < x + w && y < Y + H && Y < y + h) over.push(`${name} / ${other}`);
    }
  });
  return over;
}
