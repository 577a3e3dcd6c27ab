// Style of the pack's elements. Their colours are those of ComfyUI's own widgets, in both renderers and any palette.

const CSS = `
.unifusion-timeline, .unifusion-rewrite {
  --unifusion-panel: var(--comfy-input-bg, #222);
  --unifusion-text: var(--input-text, #ddd);
  --unifusion-muted: var(--descrip-text, #999);
  display: flex;
  flex-direction: column;
  box-sizing: border-box;
  font: 11px/15px Inter, system-ui, sans-serif;
}
.lg-node .unifusion-timeline, .lg-node .unifusion-rewrite {
  --unifusion-panel: var(--component-node-widget-background, var(--comfy-input-bg, #222));
}
.unifusion-timeline {
  overflow: hidden;
  border: 1px solid transparent;
  border-radius: 8px;
  background: var(--unifusion-panel);
  color: var(--unifusion-text);
  user-select: none;
}
.unifusion-timeline:focus-within { border-color: var(--unifusion-muted); }
.unifusion-timeline .stage { position: relative; flex: 1 1 auto; min-height: 0; }
.unifusion-timeline canvas {
  position: absolute;
  inset: 0;
  width: 100%;
  height: 100%;
  outline: none;
  touch-action: none;
}
.unifusion-timeline footer { flex: none; height: 36px; padding: 2px 10px 4px; box-sizing: border-box; }
.unifusion-timeline footer > * { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.unifusion-timeline footer > .error { white-space: normal; max-height: 30px; }
.unifusion-timeline .hint { color: var(--unifusion-muted); }
.unifusion-rewrite { gap: 4px; }
.unifusion-rewrite textarea {
  flex: 1 1 auto;
  min-height: 0;
  width: 100%;
  padding: 6px 8px;
  resize: none;
  border: 0;
  border-radius: 8px;
  box-sizing: border-box;
  background: var(--unifusion-panel);
  color: var(--unifusion-text);
  font: var(--comfy-textarea-font-size, 12px)/1.45 Inter, system-ui, sans-serif;
}
.unifusion-rewrite button {
  flex: none;
  align-self: flex-end;
  padding: 2px 10px;
  border: 0;
  border-radius: 6px;
  background: var(--unifusion-panel);
  color: var(--unifusion-text);
  font: inherit;
  line-height: 18px;
  cursor: pointer;
}
.unifusion-rewrite button:disabled { opacity: 0.5; cursor: default; }
`;

/** Puts the style into the page, once. */
export function addStyle() {
  if (document.getElementById("unifusion-style")) return;
  document.head.append(Object.assign(document.createElement("style"), { id: "unifusion-style", textContent: CSS }));
}
