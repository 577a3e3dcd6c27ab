// The timeline as an element: canvas, status line, pointer, touch and keyboard. What it belongs to is behind `host`:
//
// host: {read() -> {text, connected, steps, locked}, write(text), begin(), end(), grown(), pass(event), wheel(event)}
//   begin and end enclose one edit, which undo takes back at once; pass gets the events that are not for the timeline.

import { formatSchedule, tracksOf } from "./schedule.mjs";
import { addStyle } from "./style.mjs";
import { draw, heights, hitTest, placesOf, readTheme } from "./timeline_canvas.mjs";
import * as timeline from "./timeline_state.mjs";

const FOOTER = 36;
const SLOP = { mouse: 6, pen: 10, touch: 16 };
const DOUBLE_PRESS_MS = 350;
const HINTS = {
  handle: "drag to move · Alt: between steps · double-click: fade",
  bar: "drag onto another lane · Del: remove",
  lane: "drag here to paint · double-click: the whole segment",
  idle: "drag a boundary, or paint in a lane",
  keys: "← → move · ↑ ↓ lane · F fade · Del remove · I insert",
};

export class TimelineWidget {
  constructor(host) {
    this.host = host;
    this.selection = null;
    this.hover = null;
    this.drag = null;
    this.remembered = new Set();
    this.lanes = 0;
    this.build();
    this.listen();
  }

  build() {
    const make = (tag, className, ...children) => {
      const element = Object.assign(document.createElement(tag), { className });
      element.append(...children);
      return element;
    };
    this.canvas = Object.assign(make("canvas", ""), { tabIndex: 0 });
    this.canvas.setAttribute("role", "slider");
    this.canvas.setAttribute("aria-label", "schedule timeline");
    this.status = make("div", "");
    this.status.setAttribute("role", "status");
    this.hint = make("div", "hint");
    this.stage = make("div", "stage", this.canvas);
    this.element = make("div", "unifusion-timeline", this.stage, make("footer", "", this.status, this.hint));
    addStyle();
  }

  listen() {
    const on = (type, handler) => this.canvas.addEventListener(type, handler.bind(this));
    on("pointerdown", this.press);
    on("pointermove", this.move);
    on("pointerup", this.release);
    on("pointercancel", this.cancel);
    on("lostpointercapture", this.release);
    on("pointerleave", () => this.setHover(null));
    on("keydown", this.key);
    on("keyup", (event) => event.stopPropagation());
    on("focus", () => this.refresh(true));
    on("blur", () => this.refresh(true));
    on("contextmenu", (event) => event.preventDefault());
    this.canvas.addEventListener("wheel", (event) => this.host.wheel(event), { passive: false });
    for (const type of ["touchstart", "touchmove", "touchend"]) {
      this.canvas.addEventListener(type, (event) => event.stopPropagation(), { passive: true });
    }
    new ResizeObserver(() => this.refresh(true)).observe(this.stage);
  }

  leastHeight() {
    return heights(this.lanes).least + FOOTER;
  }

  mostHeight() {
    return heights(this.lanes).most + FOOTER;
  }

  /** Reads the host and draws, if anything changed. */
  refresh(always = false) {
    const { text, connected, steps, locked } = this.host.read();
    const box = this.canvas.getBoundingClientRect();
    const zoom = this.canvas.offsetWidth ? box.width / this.canvas.offsetWidth : 1;
    const scale = Math.min(Math.max(zoom, 1) * devicePixelRatio, 4);
    const theme = readTheme(this.element);
    const seen = JSON.stringify([text, connected, steps, locked, scale, theme]);
    if (!always && seen === this.seen) return;
    if (text !== this.text && !this.drag) this.selection = null;
    Object.assign(this, { seen, text, connected, steps, locked, scale, theme });
    this.state = timeline.readTimeline(text, connected, this.rememberedNow());
    this.fit();
    this.paint();
  }

  /** Lanes that an edit has emptied: they stay, so that it can be taken back by hand. */
  rememberedNow() {
    const known = timeline.knownTracks(this.connected);
    return [...this.remembered].filter((track) => known.includes(track));
  }

  /** Another schedule has been loaded. */
  forget() {
    this.remembered.clear();
    this.selection = null;
    this.refresh(true);
  }

  fit() {
    if (this.lanes === this.state.lanes.length) return;
    this.lanes = this.state.lanes.length;
    this.element.style.minHeight = `${this.leastHeight()}px`;
    this.host.grown();
  }

  view() {
    const { state, steps, selection, theme, scale, locked, canvas } = this;
    const [width, height] = [canvas.offsetWidth, canvas.offsetHeight];
    const focused = document.activeElement === canvas || Boolean(this.drag);
    const [hover, ghost] = [this.hover?.handle, this.ghost()];
    return { width, height, scale, state, steps, selection, hover, ghost, locked, focused, theme };
  }

  paint() {
    const view = this.view();
    const { status, hint, canvas } = this;
    const size = [Math.round(view.width * view.scale), Math.round(view.height * view.scale)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    if (view.width) draw(canvas.getContext("2d"), view);
    const words = this.words(view);
    status.textContent = status.title = words.status;
    status.className = words.error ? "error" : "";
    status.style.color = words.error ? this.theme.error : "";
    hint.textContent = words.hint ?? "";
    hint.hidden = Boolean(words.error);
    this.speak(view);
  }

  words({ focused }) {
    const { state, steps, hover, selection, drag } = this;
    const handle = drag?.handle ?? hover?.handle ?? (focused && this.handles().find((h) => same(h, selection)));
    const kind = hover && (hover.handle ? "handle" : hover.bar ? "bar" : "lane");
    const hint = HINTS[kind] ?? (focused ? HINTS.keys : HINTS.idle);
    if (this.locked) return { status: "the schedule comes from a connected input", hint: "" };
    if (!state.segments) return { status: state.error, error: true };
    if (handle) return { status: timeline.describeHandle(state.segments, this.current(handle), steps), hint };
    const more = state.problems.length > 1 ? ` (and ${state.problems.length - 1} more)` : "";
    if (state.error) return { status: state.error + more, error: true };
    if (focused && selection?.segment !== undefined && state.segments[selection.segment]) {
      return { status: timeline.describeSegment(state.segments, selection.segment, steps), hint };
    }
    return { status: timeline.summary(state.segments, steps), hint };
  }

  /** Accessible text of what is selected. */
  speak() {
    const { state, steps, canvas, selection } = this;
    const handle = this.handles().find((h) => same(h, selection));
    const index = selection?.segment;
    const described = handle
      ? timeline.describeHandle(state.segments, handle, steps)
      : state.segments?.[index]
        ? timeline.describeSegment(state.segments, index, steps)
        : state.error || timeline.summary(state.segments, steps);
    canvas.setAttribute("aria-valuemin", 0);
    canvas.setAttribute("aria-valuemax", steps);
    canvas.setAttribute("aria-valuenow", handle ? timeline.edgeStep(handle.share, steps) : 0);
    canvas.setAttribute("aria-valuetext", described);
    canvas.setAttribute("aria-disabled", Boolean(this.locked));
    canvas.setAttribute("aria-invalid", Boolean(state.error));
  }

  handles() {
    return this.state?.segments ? timeline.handlesOf(this.state.segments) : [];
  }

  /** A handle as it is now: a fade that was dragged shut has become a switch. */
  current(handle) {
    const handles = this.handles();
    return handles.find((h) => same(h, handle)) ?? handles.find((h) => h.boundary === handle.boundary) ?? handle;
  }

  write(segments) {
    const text = formatSchedule(segments);
    if (text === this.text) return;
    for (const track of tracksOf(this.state.segments)) this.remembered.add(track);
    this.host.write(text);
    const { selection } = this;
    this.refresh(true);
    this.selection = selection;
  }

  // Pointer

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const factor = this.canvas.offsetWidth / box.width;
    return [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
  }

  press(event) {
    event.stopPropagation();
    if (event.button !== 0) return this.host.pass(event);
    if (this.drag) return;
    this.canvas.focus({ preventScroll: true });
    if (this.locked) return;
    const [x, y] = this.at(event);
    const hit = hitTest(this.view(), x, y, SLOP[event.pointerType] ?? SLOP.mouse);
    const twice = event.timeStamp - (this.pressed?.time ?? -1e9) < DOUBLE_PRESS_MS && near(this.pressed, x, y);
    this.pressed = twice ? null : { time: event.timeStamp, x, y };
    this.selection = !hit ? null : hit.handle ? { ...hit.handle } : hit.bar ? { segment: hit.bar.index } : null;
    if (hit && twice) this.double(hit);
    else if (hit) {
      this.canvas.setPointerCapture(event.pointerId);
      const offset = hit.handle ? x - placesOf(this.view()).xOf(timeline.edgeStep(hit.handle.share, this.steps)) : 0;
      this.drag = { ...hit, offset, x, y, origin: this.state.segments, started: false };
    }
    this.paint();
  }

  double(hit) {
    const { segments } = this.state;
    if (hit.handle) this.edit(timeline.toggleFade(segments, hit.handle.boundary, this.steps));
    else if (!hit.bar) {
      const index = timeline.segmentAt(segments, (hit.step + 0.5) / this.steps);
      this.edit(timeline.assignSegment(segments, index, this.state.lanes[hit.lane]));
    }
  }

  move(event) {
    event.stopPropagation();
    const [x, y] = this.at(event);
    const { drag } = this;
    if (!drag) {
      if (event.buttons) this.host.pass(event);
      return this.setHover(this.locked ? null : hitTest(this.view(), x, y, SLOP[event.pointerType] ?? SLOP.mouse));
    }
    if (!drag.started && Math.hypot(x - drag.x, y - drag.y) < 3) return;
    if (!drag.started) this.host.begin();
    drag.started = true;
    const places = placesOf(this.view());
    if (drag.handle) {
      const options = { steps: this.steps, free: event.altKey };
      this.write(timeline.moveHandle(drag.origin, drag.handle, places.shareAt(x - drag.offset), options));
    } else {
      drag.lane2 = Math.min(Math.max(places.laneAt(y), 0), this.state.lanes.length - 1);
      drag.step2 = Math.min(Math.max(Math.floor(places.shareAt(x) * this.steps), 0), this.steps - 1);
    }
    this.paint();
  }

  /** The stroke that a drag would leave, in steps. */
  ghost() {
    const { drag, steps, state } = this;
    if (!drag?.started || drag.handle) return null;
    if (!drag.bar) {
      const [from, to] = [Math.min(drag.step, drag.step2), Math.max(drag.step, drag.step2) + 1];
      return { track: state.lanes[drag.lane], from, to };
    }
    if (drag.lane2 === drag.lane) return null;
    const { start, stop } = state.segments[drag.bar.index];
    const [from, to] = [start, stop].map((share) => timeline.edgeStep(share, steps));
    return { track: state.lanes[drag.lane2], from, to };
  }

  release(event) {
    event.stopPropagation();
    if (!this.drag) return event.type === "pointerup" ? this.host.pass(event) : undefined;
    const [{ started, bar, origin, handle }, ghost] = [this.drag, this.ghost()];
    this.drag = null;
    if (ghost) {
      const [from, to] = [ghost.from, ghost.to].map((step) => timeline.shareOf(step, this.steps));
      const { track } = ghost;
      this.write(bar ? timeline.assignSegment(origin, bar.index, track) : timeline.paint(origin, track, from, to));
    }
    if (handle) this.selection = this.current(handle);
    if (started) this.host.end();
    this.refresh(true);
  }

  /** Leaves the schedule as it was before the drag. */
  cancel() {
    const { drag } = this;
    this.drag = null;
    if (!drag?.started) return;
    this.write(drag.origin);
    this.host.end();
    this.refresh(true);
  }

  setHover(hover) {
    this.hover = hover;
    const cursor = !hover ? "default" : hover.handle ? "ew-resize" : hover.bar ? "grab" : "crosshair";
    this.canvas.style.cursor = this.locked ? "not-allowed" : cursor;
    this.paint();
  }

  // Keyboard

  key(event) {
    if (event.ctrlKey || event.metaKey || this.locked || !this.state.segments?.length) return;
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (name === "Tab" ? this.tab(event.shiftKey ? -1 : 1) : this.command(name, event)) {
      event.preventDefault();
      event.stopPropagation();
      this.paint();
    }
  }

  /** Selects the next boundary; false past the last one, so that the focus moves on. */
  tab(direction) {
    const handles = this.handles();
    const index = handles.findIndex((h) => same(h, this.selection));
    const next = index < 0 ? (direction > 0 ? 0 : handles.length - 1) : index + direction;
    this.selection = handles[next] ?? null;
    return Boolean(this.selection);
  }

  command(name, { shiftKey }) {
    const { segments, lanes } = this.state;
    const { steps } = this;
    const handle = this.handles().find((h) => same(h, this.selection));
    const index = this.selection?.segment ?? Math.min((handle?.boundary ?? -1) + 1, segments.length - 1);
    const boundary = handle?.boundary ?? (index > 0 ? index - 1 : 0);
    const onLane = (by) => lanes[(lanes.indexOf(segments[index].track) + by + lanes.length) % lanes.length];
    const to = (share) => handle && timeline.moveHandle(segments, handle, share, { steps });
    const by = (count) => handle && to((timeline.edgeStep(handle.share, steps) + count) / steps);
    const stride = shiftKey ? 5 : 1;
    const commands = {
      ArrowLeft: () => by(-stride),
      ArrowRight: () => by(stride),
      Home: () => to(0),
      End: () => to(1),
      ArrowUp: () => timeline.assignSegment(segments, index, onLane(-1)),
      ArrowDown: () => timeline.assignSegment(segments, index, onLane(1)),
      f: () => timeline.toggleFade(segments, boundary, steps),
      i: () => timeline.insertSegment(segments, index, onLane(1), steps),
      Delete: () => timeline.removeSegment(segments, index),
      Escape: () => (this.drag ? this.cancel() : this.canvas.blur()),
    };
    const command = commands[{ Enter: "f", Insert: "i", Backspace: "Delete" }[name] ?? name];
    if (!command) return false;
    const edited = command();
    if (edited) this.edit(edited);
    if (handle && this.handles().length) this.selection = this.current(handle);
    return true;
  }

  /** One edit, one entry for undo. */
  edit(segments) {
    this.host.begin();
    this.write(segments);
    this.host.end();
  }

  dispose() {
    if (this.drag?.started) this.host.end();
    this.drag = null;
  }
}

function same(handle, other) {
  return Boolean(other) && handle.boundary === other.boundary && handle.side === other.side;
}

function near(point, x, y) {
  return Boolean(point) && Math.hypot(point.x - x, point.y - y) < 12;
}
