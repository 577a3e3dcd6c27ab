// Shows on UniFusionRewrite what the VLM writes, while it writes; a button puts it into `text`, where it can be edited.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStyle } from "./style.mjs";

const NODE = "UniFusionRewrite";
// The frontend's name for the box it makes for progress text: under this name it fills ours and makes no second one.
const WIDGET = "$$node-text-preview";
const HEIGHT = 112;

app.registerExtension({
  name: "UniFusion.Rewrite",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addPreview(node);
  },
  setup() {
    api.addEventListener("progress_text", ({ detail }) => show(nodeAt(detail.nodeId), detail.text, true));
  },
  onNodeOutputsUpdated() {
    for (const graph of [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])]) {
      for (const node of graph.nodes) if (node.comfyClass === NODE) show(node, lastText(node));
    }
  },
});

function addPreview(node) {
  const { element, area, button } = build();
  let text = "";
  const widget = node.addDOMWidget(WIDGET, "unifusion_rewrite", element, {
    serialize: false,
    getMinHeight: () => HEIGHT + 20,
    getValue: () => text,
    setValue: (value) => {
      text = String(value ?? "");
      area.value = text;
      button.disabled = !text;
    },
  });
  widget.serialize = false;
  widget.value = "";
  button.addEventListener("click", () => adopt(node, text));
  chain(node, "onExecuted", (output) => show(node, textOf(output)));
  chain(node, "onConfigure", () => show(node, lastText(node)));
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

function build() {
  const element = Object.assign(document.createElement("div"), { className: "unifusion-rewrite" });
  element.style.minHeight = `${HEIGHT}px`;
  const area = document.createElement("textarea");
  Object.assign(area, { readOnly: true, placeholder: "the rewritten prompt appears here" });
  area.setAttribute("aria-label", "rewritten prompt");
  area.dataset.captureWheel = "true";
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: "edit this text", disabled: true });
  button.title = "copies the rewritten prompt into `text`, which is then used instead of a new rewrite";
  element.append(area, button);
  for (const type of ["pointerdown", "pointermove", "pointerup"]) {
    element.addEventListener(type, (event) => event.stopPropagation());
  }
  addStyle();
  return { element, area, button };
}

function adopt(node, text) {
  const target = node.widgets.find((widget) => widget.name === "text");
  if (!target || !text) return;
  app.canvas.emitBeforeChange();
  target.value = text;
  target.callback?.(text, app.canvas, node);
  app.canvas.emitAfterChange();
  node.setDirtyCanvas(true, true);
}

function show(node, text, writing = false) {
  const widget = node?.comfyClass === NODE && node.widgets?.find((candidate) => candidate.name === WIDGET);
  if (!widget || text === undefined) return;
  widget.value = text;
  const area = widget.element?.querySelector("textarea");
  if (writing && area) area.scrollTop = area.scrollHeight;
}

function textOf(output) {
  const text = output?.text;
  return Array.isArray(text) ? text.join("") : text;
}

/** What the node said when it last ran, which survives undo and a change of tabs. */
function lastText(node) {
  const id = node.graph && !node.graph.isRootGraph ? `${node.graph.id}:${node.id}` : node.id;
  return textOf(app.nodeOutputs?.[id]);
}

/** The node of an execution id: "5", or "2:7:5" for node 5 in a subgraph in a subgraph. */
function nodeAt(executionId) {
  const path = String(executionId ?? "").split(":");
  return path.reduce((graph, id, depth) => {
    const node = graph?.getNodeById(Number(id));
    return depth === path.length - 1 ? node : node?.subgraph;
  }, app.rootGraph);
}

function chain(target, method, then) {
  const before = target[method];
  target[method] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}
