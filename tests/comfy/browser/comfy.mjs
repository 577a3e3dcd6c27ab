// A ComfyUI page in headless Chromium, and what the checks do with it.
//
// PLAYWRIGHT_CORE  folder of the playwright-core package (default: ~/.cache/unifusion-js/node_modules/playwright-core)
// CHROMIUM         the browser (default: /usr/bin/chromium)

import { createRequire } from "node:module";
import { homedir } from "node:os";
import { join } from "node:path";

const PLAYWRIGHT = process.env.PLAYWRIGHT_CORE ?? join(homedir(), ".cache/unifusion-js/node_modules/playwright-core");
const { chromium } = createRequire(import.meta.url)(PLAYWRIGHT);

const SIZE = { width: 1280, height: 800 };
const LOADED = { timeout: 120_000 }; // ms

export async function openComfy(url, { hasTouch = false, scale = 1, blocked = null } = {}) {
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  try {
    const context = await browser.newContext({ viewport: SIZE, hasTouch, deviceScaleFactor: scale });
    const page = await context.newPage();
    return { browser, page, errors: await load(page, url, blocked) };
  } catch (error) {
    await browser.close();
    throw error;
  }
}

/** Opens the page and returns the list that errors in its console go to. */
async function load(page, url, blocked) {
  if (blocked) await page.route(blocked, (route) => route.abort());
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error" && /unifusion|extensions\//i.test(message.text())) errors.push(message.text());
  });
  await page.goto(url, LOADED);
  await page.waitForFunction(() => globalThis.app?.canvas && globalThis.app.extensionManager?.setting, null, LOADED);
  await set(page, "Comfy.TutorialCompleted", true);
  await set(page, "Comfy.Graph.CanvasMenu", false);
  await set(page, "Comfy.Minimap.Visible", false);
  return errors;
}

export function set(page, name, value) {
  return page.evaluate(([n, v]) => globalThis.app.extensionManager.setting.set(n, v), [name, value]);
}

/** Clears the graph and puts nodes on it: [[type, x, y], …]; returns their ids. */
export async function place(page, nodes) {
  await page.evaluate(() => {
    globalThis.app.canvas.setGraph(globalThis.app.rootGraph);
    globalThis.app.rootGraph.clear();
  });
  const ids = await page.evaluate((list) => {
    const { app, LiteGraph } = globalThis;
    return list.map(([type, x, y]) => {
      const node = LiteGraph.createNode(type);
      node.pos = [x, y];
      app.rootGraph.add(node);
      return node.id;
    });
  }, nodes);
  await view(page);
  return ids;
}

/** The part of the graph that is seen. */
export async function view(page, scale = 1, offset = [60, 60]) {
  await page.evaluate(
    ([zoom, [x, y]]) => {
      const { canvas } = globalThis.app;
      canvas.ds.scale = zoom;
      canvas.ds.offset = [x, y];
      canvas.setDirty(true, true);
    },
    [scale, offset],
  );
  await settle(page);
}

export async function settle(page, ms = 450) {
  await page.waitForTimeout(ms);
}

export function check(condition, words) {
  if (!condition) throw new Error(words);
}

export function equal(found, wanted, words) {
  const [a, b] = [found, wanted].map((value) => JSON.stringify(value));
  check(a === b, `${words}: ${a} instead of ${b}`);
}
