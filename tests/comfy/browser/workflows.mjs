// Opens every template of the pack in the real frontend.
//
//   node workflows.mjs URL [--shots FOLDER] [--run] [--vue] [--only NAME] [--graph]
//
// Prints {name: {prompt, errors, unknown, marked, links, overlaps}} as JSON: types of nodes that are not there, and of
// those marked as wrong; addresses of weights that the frontend asked about, which the network must not answer. --run
// queues each and waits for its end before the picture; --graph cuts the graph out of it.

import { mkdirSync } from "node:fs";
import { join } from "node:path";

import { openComfy, set, settle } from "./comfy.mjs";

const PACK = "UniFusion";
const [url, ...rest] = process.argv.slice(2);
const option = (name) => (rest.includes(name) ? rest[rest.indexOf(name) + 1] : "");
const [shots, only] = [option("--shots"), option("--only")];
const [vue, queue, graph] = ["--vue", "--run", "--graph"].map((name) => rest.includes(name));
if (shots) mkdirSync(shots, { recursive: true });

const { browser, page, errors } = await openComfy(url);
await page.setViewportSize(graph ? { width: 2600, height: 1500 } : { width: 1920, height: 1080 });
const links = new Set();
page.on("console", (message) => {
  if (message.type() !== "error") return;
  const words = `${message.text()} (${message.location().url})`;
  const [link] = words.match(/https:\/\/huggingface\.co\/[^\s')]+\.safetensors/) ?? [];
  if (link) links.add(link);
  else errors.push(words);
});
await set(page, "Comfy.VueNodes.Enabled", vue);
if (graph) await set(page, "Comfy.Graph.CanvasInfo", false);
await settle(page, 2500); // what the default workflow misses is none of ours
const names = await page.evaluate(async (pack) => (await (await fetch("/workflow_templates")).json())[pack], PACK);
const found = {};
for (const name of names.filter((candidate) => candidate.includes(only)).sort()) found[name] = await visit(name);
await browser.close();
console.log(JSON.stringify(found));

async function visit(name) {
  errors.length = 0;
  links.clear();
  const opened = await page.evaluate(open, [PACK, name]);
  await settle(page, 900);
  if (queue) await page.evaluate(run);
  const covered = await page.evaluate(fit);
  await settle(page, queue ? 2500 : 900);
  const clip = graph ? covered : undefined;
  if (shots) await page.screenshot({ path: join(shots, `${name}${vue ? "_vue" : ""}.png`), clip });
  const overlaps = await page.evaluate(crowded);
  return { ...opened, overlaps, errors: [...errors], links: [...links].sort() };
}

async function open([pack, name]) {
  const { app, LiteGraph } = globalThis;
  const workflow = await (await fetch(`/api/workflow_templates/${pack}/${name}.json`)).json();
  await app.loadGraphData(workflow, true, true, name, { openSource: "template" });
  await new Promise((done) => setTimeout(done, 500));
  const types = (wrong) => app.rootGraph.nodes.filter(wrong).map((node) => node.type);
  const unknown = types((node) => !LiteGraph.registered_node_types[node.type]);
  const marked = types((node) => node.has_errors);
  return { prompt: (await app.graphToPrompt()).output, unknown, marked };
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

/** Puts the whole graph into view, below the bars and beside the icons; returns the part of the page that it covers. */
function fit() {
  const { canvas, rootGraph } = globalThis.app;
  const boxes = [...rootGraph.nodes.map((node) => node.boundingRect), ...rootGraph.groups.map((g) => g.boundingRect ?? g._bounding)];
  const left = Math.min(...boxes.map((box) => box[0]));
  const top = Math.min(...boxes.map((box) => box[1]));
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  const [width, height] = [globalThis.innerWidth - 130, globalThis.innerHeight - 180];
  const scale = Math.min(width / (right - left), height / (bottom - top), 1);
  canvas.ds.scale = scale;
  canvas.ds.offset = [90 / scale - left, 110 / scale - top];
  canvas.setDirty(true, true);
  const origin = canvas.canvas.getBoundingClientRect();
  return { x: origin.left + 84, y: origin.top + 104, width: (right - left) * scale + 12, height: (bottom - top) * scale + 12 };
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
