// Runs UniFusionRewrite in a browser, in both renderers: its text streams onto the node and can be taken over.
//
//   node rewrite.mjs http://127.0.0.1:8188 OUTPUT_FOLDER

import { mkdirSync } from "node:fs";
import { join } from "node:path";

import { check, equal, openComfy, place, set, settle, view } from "./comfy.mjs";

const [, , url, folder] = process.argv;
const PREVIEW = "$$node-text-preview";
mkdirSync(folder, { recursive: true });

const shown = (page) => page.locator(".unifusion-rewrite:visible textarea").inputValue();

async function stage(page, prompt) {
  const [vlm, rewrite, out] = await place(page, [
    ["UniFusionLoadVLM", -420, 0],
    ["UniFusionRewrite", 0, 0],
    ["PreviewAny", 520, 0],
  ]);
  await page.evaluate(
    ([ids, words]) => {
      const [a, b, c] = ids.map((id) => globalThis.app.rootGraph.getNodeById(id));
      a.connect(0, b, b.inputs.findIndex((input) => input.name === "vlm"));
      b.connect(1, c, 0);
      b.widgets.find((widget) => widget.name === "prompt").value = words;
      b.widgets.find((widget) => widget.name === "text").value = "";
    },
    [[vlm, rewrite, out], prompt],
  );
  await view(page, 0.8, [520, 120]);
  return rewrite;
}

/** Queues the graph; returns what the node showed after each message of progress, and at last. */
async function run(page) {
  return page.evaluate(async () => {
    const { app } = globalThis;
    const seen = [];
    const look = () => seen.push(document.querySelector(".unifusion-rewrite textarea").value);
    app.api.addEventListener("progress_text", look);
    const done = new Promise((resolve, reject) => {
      const fail = ({ detail }) => reject(new Error(detail.exception_message));
      app.api.addEventListener("execution_success", resolve, { once: true });
      app.api.addEventListener("execution_error", fail, { once: true });
    });
    await app.queuePrompt(0, 1);
    await done;
    app.api.removeEventListener("progress_text", look);
    await new Promise((resolve) => setTimeout(resolve, 300));
    look();
    return seen;
  });
}

/** Above the text stands how many tokens there are, until it is finished; each text continues the one before it. */
function checkStream(states) {
  check(states.length > 3, `the text did not stream: it had ${states.length} states`);
  const heading = /^\d+ tokens: [^\n]*\n*/;
  check(heading.test(states.at(-2)) && !heading.test(states.at(-1)), `no count of tokens: '${states.at(-2)}'`);
  const texts = states.map((state) => state.replace(heading, ""));
  texts.slice(1).forEach((text, index) => {
    check(text.startsWith(texts[index].trimEnd()), `the text jumped from '${texts[index]}' to '${text}'`);
  });
}

async function checkRenderer(page, name) {
  const id = await stage(page, `a red circle left of a blue square ${name}`);
  equal(await shown(page), "", "text before the first run");
  checkStream(await run(page));
  const text = await shown(page);
  const [said, names] = await page.evaluate((node) => {
    const { rootGraph } = globalThis.app;
    const preview = rootGraph.nodes.find((n) => n.type === "PreviewAny");
    return [preview.widgets[0].value, rootGraph.getNodeById(node).widgets.map((widget) => widget.name)];
  }, id);
  equal(text, said, "text on the node, against core's preview of it");
  equal(names.filter((widget) => widget === PREVIEW).length, 1, "boxes for progress text");
  await page.screenshot({ path: join(folder, `rewrite_${name}.png`) });

  await page.locator(".unifusion-rewrite:visible button").click();
  await settle(page);
  const { output, workflow } = await page.evaluate(() => globalThis.app.graphToPrompt());
  equal(output[id].inputs.text, text, "text input after the button");
  check(!(PREVIEW in output[id].inputs), "the prompt holds the preview");
  await page.evaluate((graph) => globalThis.app.loadGraphData(JSON.parse(JSON.stringify(graph))), workflow);
  await settle(page, 800);
  const again = await page.evaluate(() => globalThis.app.graphToPrompt());
  equal(again.output[id].inputs, output[id].inputs, "inputs after saving and loading");
  return id;
}

async function checkSubgraph(page, name) {
  const id = await stage(page, `a green triangle above a yellow circle ${name}`);
  await page.evaluate((node) => {
    const { canvas, rootGraph } = globalThis.app;
    const { subgraph } = rootGraph.convertToSubgraph(new Set([rootGraph.getNodeById(node)]));
    canvas.openSubgraph(subgraph, rootGraph.nodes.find((n) => n.subgraph === subgraph));
  }, id);
  await view(page, 0.8, [520, 120]);
  checkStream(await run(page));
  await page.screenshot({ path: join(folder, `rewrite_subgraph_${name}.png`) });
  await page.evaluate(() => globalThis.app.canvas.setGraph(globalThis.app.rootGraph));
}

async function main() {
  for (const [name, vue] of [["litegraph", false], ["nodes2", true]]) {
    const { browser, page, errors } = await openComfy(url);
    try {
      await set(page, "Comfy.ColorPalette", "dark");
      await set(page, "Comfy.VueNodes.Enabled", vue);
      await checkRenderer(page, name);
      console.log(`ok  ${name}: the rewrite streams, stays and is taken over`);
      await checkSubgraph(page, name);
      console.log(`ok  ${name}: it streams inside a subgraph`);
      equal(errors, [], "errors in the console");
    } catch (error) {
      await page.screenshot({ path: join(folder, `failed_rewrite_${name}.png`) });
      throw new Error(`${name}: ${error.message.split("\n")[0]}`);
    } finally {
      await browser.close();
    }
  }
}

main().catch((error) => {
  console.error(`FAILED ${error.message.split("\n")[0]}`);
  process.exitCode = 1;
});
