// Votes through the page of `unifusion evaluate ab` in headless Chromium, from a file and without a network.
//
//   node ab_page.mjs PAGE.html FOLDER '{"anna": {"0-1": "a", …}, …}'
//
// Each voter's choices are by prompt; which picture is whose is told by its colour: a is red, b blue. Of every voter
// the votes are saved in FOLDER; the first one stops on the way, loads the page again, and takes one vote back.
//
// PLAYWRIGHT_CORE, CHROMIUM: as in tests/comfy/browser/comfy.mjs

import { createRequire } from "node:module";
import { homedir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PLAYWRIGHT = process.env.PLAYWRIGHT_CORE ?? join(homedir(), ".cache/unifusion-js/node_modules/playwright-core");
const { chromium } = createRequire(import.meta.url)(PLAYWRIGHT);
const [, , path, folder, plan] = process.argv;
const url = pathToFileURL(path).href;
const KEYS = { left: "ArrowLeft", right: "ArrowRight", tie: "ArrowDown" };
const BUTTONS = { left: "#chooseLeft", right: "#chooseRight", tie: "#chooseTie" };

function check(condition, words) {
  if (!condition) throw new Error(words);
}

async function colorOf(page, id) {
  return page.evaluate(async (name) => {
    const image = document.getElementById(name);
    await image.decode();
    const canvas = document.createElement("canvas");
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const [red, , blue] = pen.getImageData(0, 0, 1, 1).data;
    return red > blue ? "a" : "b";
  }, id);
}

/** Votes on what is shown; returns what it was and which method stood left. */
async function vote(page, choices, how) {
  const prompt = await page.textContent("#prompt");
  const left = await colorOf(page, "left");
  check((await colorOf(page, "right")) !== left, "the same method on both sides");
  const choice = choices[prompt];
  const side = choice === "tie" ? "tie" : choice === left ? "left" : "right";
  if (how === "keys") await page.keyboard.press(KEYS[side]);
  else await page.click(BUTTONS[side]);
  return { prompt, left };
}

async function save(page, button, name) {
  const [download] = await Promise.all([page.waitForEvent("download"), page.click(button)]);
  check(download.suggestedFilename().endsWith(".json"), download.suggestedFilename());
  await download.saveAs(join(folder, name));
}

async function begin(page, voter) {
  await page.goto(url);
  await page.fill("#voter", voter);
  await page.keyboard.press("Enter");
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu"],
});
const problems = [];
const sides = [];
try {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, acceptDownloads: true });
  context.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) problems.push(`fetched ${request.url()}`);
  });
  const page = await context.newPage();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") problems.push(message.text());
  });
  const voters = Object.entries(JSON.parse(plan));
  for (const [number, [voter, choices]] of voters.entries()) {
    const pairs = Object.keys(choices).length;
    await page.goto(url);
    if (number === 0) await page.screenshot({ path: join(folder, "start.png") });
    await begin(page, voter);
    for (let done = 0; done < pairs; done += 1) {
      if (number === 0 && done === 2) {
        await save(page, "#saveSoFar", `half-${voter}.json`);
        const before = await page.textContent("#prompt");
        await page.click("#left"); // large, in which keys do not vote
        await page.keyboard.press("ArrowLeft");
        await page.keyboard.press("Escape");
        await begin(page, voter);
        check((await page.textContent("#prompt")) === before, "the page does not go on where it stopped");
        await page.screenshot({ path: join(folder, "vote.png") });
        await page.keyboard.press("Backspace");
        await vote(page, Object.fromEntries(Object.keys(choices).map((name) => [name, "tie"])), "keys"); // a slip
        await page.click("#back");
        await vote(page, choices, "buttons"); // and back
      }
      check((await page.textContent("#count")) === `${done + 1} / ${pairs}`, await page.textContent("#count"));
      sides.push({ voter, ...(await vote(page, choices, (done + number) % 2 ? "keys" : "buttons")) });
    }
    check(await page.isVisible("#done"), "the end is not shown");
    if (number === 0) await page.screenshot({ path: join(folder, "done.png") });
    const text = await page.innerText("body");
    check(!/secret/.test(text), "the page tells who is who");
    await save(page, "#save", `votes-${voter}.json`);
  }
} finally {
  await browser.close();
}
check(problems.length === 0, problems.join("\n"));
console.log(JSON.stringify(sides));
