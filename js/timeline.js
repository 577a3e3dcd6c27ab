// Puts the timeline under the `schedule` text of UniFusionSchedule. Without this file the text box does the same job.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { TimelineWidget } from "./timeline_widget.mjs";

const NODE = "UniFusionSchedule";
const SOCKETS = "conditionings.";
const LEAST_WIDTH = 380;
const LOOK_MS = 250; // text, links, theme and zoom can change without an event

const timelines = new Set();

app.registerExtension({
  name: "UniFusion.Timeline",
  nodeCreated(node) {
    if (node.comfyClass === NODE && findWidget(node, "schedule")) addTimeline(node);
  },
  setup() {
    setInterval(() => {
      for (const timeline of timelines) if (timeline.element.isConnected && !timeline.drag) timeline.refresh();
    }, LOOK_MS);
    api.addEventListener("graphChanged", () => timelines.forEach((timeline) => timeline.refresh()));
  },
});

function addTimeline(node) {
  const timeline = new TimelineWidget({
    read: () => readNode(node),
    write: (text) => writeSchedule(node, text),
    begin: () => app.canvas.emitBeforeChange(),
    end: () => app.canvas.emitAfterChange(),
    grown: () => grow(node),
    pass: forward,
    wheel: zoom,
  });
  const widget = node.addDOMWidget("timeline", "unifusion_timeline", timeline.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => timeline.leastHeight() + 20,
    getMaxHeight: () => timeline.mostHeight() + 20,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  const refresh = () => timeline.refresh();
  for (const name of ["schedule", "preview_steps"]) {
    const source = findWidget(node, name);
    if (source) chain(source, "callback", refresh);
  }
  chain(node, "onConfigure", () => timeline.forget());
  chain(node, "onConnectionsChange", () => requestAnimationFrame(refresh));
  chain(node, "onAdded", () => timelines.add(timeline));
  chain(node, "onRemoved", () => {
    timelines.delete(timeline);
    timeline.dispose();
  });
  timeline.refresh();
  node.setSize([Math.max(node.size[0], LEAST_WIDTH), Math.max(node.size[1], node.computeSize()[1])]);
}

function readNode(node) {
  const slots = node.inputs?.filter((slot) => slot.link != null && slot.name.startsWith(SOCKETS)) ?? [];
  const schedule = sourceOf(node, "schedule");
  const steps = Math.round(Number(sourceOf(node, "preview_steps")?.value));
  return {
    text: String(schedule?.value ?? ""),
    connected: slots.map((slot) => slot.name.slice(SOCKETS.length)),
    steps: Number.isFinite(steps) ? Math.min(Math.max(steps, 1), 1000) : 20,
    locked: schedule !== findWidget(node, "schedule") && !schedule?.hosted,
  };
}

function writeSchedule(node, text) {
  const source = sourceOf(node, "schedule");
  const widget = source.hosted ?? source;
  widget.value = text;
  widget.callback?.(text, app.canvas, node);
  node.setDirtyCanvas(true, true);
}

/** The widget that holds an input's value: the node's own, that on its subgraph's box, or a connected primitive's. */
function sourceOf(node, name) {
  const own = findWidget(node, name);
  const index = node.inputs?.findIndex((slot) => slot.widget?.name === name) ?? -1;
  const id = node.inputs?.[index]?.link;
  if (id == null) return own;
  const input = node.graph?.inputNode?.slots?.find((slot) => slot.linkIds?.includes(id));
  const hosts = input ? boxesOf(node.graph) : [];
  const hosted = hosts.length === 1 ? findWidget(hosts[0], input.name) : null;
  if (hosted) return { value: hosted.value, hosted };
  const origin = input ? null : node.getInputNode(index);
  return { value: origin?.widgets?.[0]?.value ?? own?.value };
}

/** The nodes that stand for a subgraph, wherever they are. */
function boxesOf(subgraph) {
  const graphs = [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph.nodes.filter((node) => node.subgraph === subgraph));
}

function findWidget(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function grow(node) {
  const [width, height] = node.size;
  const least = node.computeSize()[1];
  if (least > height) node.setSize([width, least]);
  node.setDirtyCanvas(true, true);
}

/** Hands the middle button, which pans, on to the graph. */
function forward(event) {
  if (event.type === "pointerdown" && event.button === 1) app.canvas.processMouseDown(event);
  if (event.type === "pointermove" && event.buttons & 4) app.canvas.processMouseMove(event);
  if (event.type === "pointerup" && event.button === 1) app.canvas.processMouseUp(event);
}

/** The wheel zooms the graph; in Nodes 2.0 the node itself sees to that. */
function zoom(event) {
  if (globalThis.LiteGraph?.vueNodesMode) return;
  event.preventDefault();
  event.stopPropagation();
  app.canvas.processMouseWheel(event);
}

function chain(target, method, then) {
  const before = target[method];
  target[method] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}
