/* A recorded run: frames of new values, put into arrays; and what the page shows of them. Needs map.js. */
(async () => {
"use strict";
const CACHED = 1, COPIED = 4, NULL = 8, KEEP_EVERY = 64, MOST_ROWS = 48, MOST_CHIPS = 40, MOST_TEXT = 420;
const by = id => document.getElementById(id);
const packed = Uint8Array.from(atob(by("run").textContent.trim()), c => c.charCodeAt(0));
const run = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
const frames = run.frames, last = frames.length - 1, size = Math.max(1, run.block_size);
const made = (tag, text, name) => { const e = document.createElement(tag); if (text != null) e.textContent = text; if (name) e.className = name; return e; };
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/* ---- the state at a frame */

const pool = count => ({ owner: new Int32Array(count).fill(-1), refs: new Int32Array(count), fill: new Int32Array(count), flags: new Uint8Array(count) });
const copyPool = p => ({ owner: p.owner.slice(), refs: p.refs.slice(), fill: p.fill.slice(), flags: p.flags.slice() });
const letters = new Map(); // of every sequence, also of those that are forgotten
const pieces = new Map(); // sequence -> its tokens' numbers, of the whole run
for (const f of frames) {
  for (const s of f.sequences ?? []) letters.set(s[0], s[1]);
  for (const [seq, tokens] of Object.entries(f.written ?? {})) {
    if (!pieces.has(+seq)) pieces.set(+seq, []);
    for (const token of tokens) pieces.get(+seq).push(token);
  }
}
const letter = seq => letters.get(seq) ?? "?";
let state = { at: -1, device: pool(run.blocks), host: pool(run.host_blocks), tables: new Map(), hostTables: new Map(), sequences: new Map(), queues: [[], [], []], gauges: {} };
const kept = new Map();
const copyOf = s => ({ ...s, device: copyPool(s.device), host: copyPool(s.host), tables: new Map(s.tables), hostTables: new Map(s.hostTables), sequences: new Map(s.sequences) });

function put(p, values = []) {
  for (let i = 0; i < values.length; i += 5) {
    const block = values[i];
    p.owner[block] = values[i + 1]; p.refs[block] = values[i + 2]; p.fill[block] = values[i + 3]; p.flags[block] = values[i + 4];
  }
}
function edit(tables, changes = {}) {
  for (const [seq, [keep, ...more]] of Object.entries(changes)) {
    const table = [...(tables.get(+seq) ?? []).slice(0, keep), ...more];
    if (table.length) tables.set(+seq, table); else tables.delete(+seq);
  }
}
function apply(f) {
  put(state.device, f.blocks); put(state.host, f.host);
  edit(state.tables, f.tables); edit(state.hostTables, f.host_tables);
  const change = (seq, values) => state.sequences.set(seq, { seq, computed: 0, count: 0, ...state.sequences.get(seq), ...values });
  for (const [seq, name, hue, request, parent, status, prompt, cached, reason] of f.sequences ?? [])
    change(seq, { name, hue, request, parent, status, prompt, cached, reason });
  for (let i = 0; i < (f.computed ?? []).length; i += 2) change(f.computed[i], { computed: f.computed[i + 1] });
  for (const [seq, tokens] of Object.entries(f.written ?? {})) change(+seq, { count: (state.sequences.get(+seq)?.count ?? 0) + tokens.length });
  for (const seq of f.gone ?? []) state.sequences.delete(seq);
  if (f.queues) state.queues = f.queues;
  if (f.stats) state.gauges = Object.fromEntries(run.gauges.map((name, i) => [name, f.stats[i]]));
  state.at += 1;
}
function seek(target) {
  target = Math.max(0, Math.min(last, target));
  if (target < state.at) {
    const before = Math.max(...[...kept.keys()].filter(at => at <= target));
    state = copyOf(kept.get(before));
  }
  while (state.at < target) {
    apply(frames[state.at + 1]);
    if (state.at % KEEP_EVERY === 0 && !kept.has(state.at)) kept.set(state.at, copyOf(state));
  }
}

/* ---- what is read from it */

let chosen = -1, only = -1, playing = null, moved = false;
const holdersOf = (tables, block) => [...tables].flatMap(([seq, table]) => table.flatMap((b, i) => b === block ? [[seq, i]] : []));
function look(p, i, { away = false, cursor = chosen } = {}) {
  const flags = p.flags[i], refs = p.refs[i], seq = state.sequences.get(p.owner[i]);
  const kind = flags & NULL ? "null" : refs ? (away ? "away" : "held") : flags & CACHED ? "cached" : "free";
  return { state: kind, hue: seq?.hue ?? 0, letter: letter(p.owner[i]), refs, fill: p.fill[i] / size, copied: Boolean(flags & COPIED), dim: only >= 0 && p.owner[i] !== only, chosen: i === cursor };
}
function counts(p) {
  const found = { held: 0, shared: 0, cached: 0, free: 0 };
  for (let i = 0; i < p.refs.length; i++) {
    if (p.flags[i] & NULL) continue;
    if (p.refs[i]) { found.held++; if (p.refs[i] > 1) found.shared++; } else if (p.flags[i] & CACHED) found.cached++; else found.free++;
  }
  return found;
}
/* What the map says, in words. */
function mapWords() {
  const c = counts(state.device), sharing = c.shared ? `, ${c.shared} of them shared` : "";
  const parts = [`${plural(c.held + c.cached + c.free, "block")} of ${plural(size, "token")}: ${c.held} held${sharing}, ${c.cached} cached, ${c.free} free.`];
  const copied = [...state.device.flags.keys()].filter(i => state.device.flags[i] & COPIED);
  if (copied.length) parts.push(`Copied in this step: ${copied.join(", ")}.`);
  for (const [seq, table] of [...state.tables].sort((a, b) => a[0] - b[0])) {
    const lastBlock = table[table.length - 1], fill = state.device.fill[lastBlock];
    const tail = lastBlock && fill < size ? `, the last ${fill} of ${size} full` : "";
    parts.push(`${letter(seq)} holds ${table.map(b => b ? (state.device.refs[b] > 1 ? `${b} (shared)` : b) : "none").join(", ")}${tail}.`);
  }
  for (const [seq, table] of [...state.hostTables].sort((a, b) => a[0] - b[0])) parts.push(`${letter(seq)} is on the CPU: ${plural(table.filter(b => b >= 0).length, "block")}.`);
  return parts.join(" ");
}
const tokensOf = (seq, from, to) => (pieces.get(seq) ?? []).slice(from, to).map(n => run.tokens[n]).join("").replace(/\n+/g, "↵ ");
/* Without a cursor: the block of what happened last that is most telling. */
function watched() {
  for (let at = state.at; at >= 0; at--) {
    const events = frames[at].events ?? [];
    for (const [, kind] of [["", "copy"], ...run.ticks, ["", "alloc"]]) {
      const found = events.find(e => run.kinds[e[0]] === kind && (kind === "copy" ? e[3] : e[2]) > 0);
      if (found) return kind === "copy" ? found[3] : found[2];
    }
  }
  return -1;
}
/* The events that name a block, up to the frame: [frame, words]. */
function pastOf(block) {
  const holders = new Set(), found = [];
  for (let at = 0; at <= state.at; at++)
    for (const [code, seq, b, other] of frames[at].events ?? []) {
      const kind = run.kinds[code], into = kind === "copy" && other === block;
      const whole = kind === "fork" && b < 0;
      if (whole ? !holders.has(other) : b !== block && !into) continue;
      const words = run.past[into ? "copied" : kind];
      if (words) found.push([at, words.replace("{who}", letter(seq)).replace("{block}", into ? b : other)]);
      if (["alloc", "cache_hit", "fork", "swap_in"].includes(kind) || into) holders.add(seq);
      else if (["free", "release", "swap_out", "copy"].includes(kind)) holders.delete(seq);
    }
  return found;
}
const stepOf = at => at ? `step ${frames[at].step}` : "start";
const ticksOf = f => { const kinds = new Set((f.events ?? []).map(e => run.kinds[e[0]])); return run.ticks.filter(([, kind]) => kinds.has(kind)).map(([tick]) => tick); };
const ticks = frames.map(ticksOf);
const held = frames.map(f => f.stats ? (f.stats[0] > 1 ? (f.stats[0] - 1 - f.stats[1]) / (f.stats[0] - 1) : 0) : 0);

/* ---- painting */

let place = { size: 1, across: 1 };
function paintTimes() {
  const canvas = by("times"), width = canvas.clientWidth, height = canvas.clientHeight, scale = window.devicePixelRatio || 1;
  canvas.width = width * scale; canvas.height = height * scale;
  const pen = canvas.getContext("2d"), inset = 8, span = (width - 2 * inset) / Math.max(1, last);
  pen.scale(scale, scale);
  pen.fillStyle = colourOf("accent"); pen.globalAlpha = 0.35;
  for (let at = 0; at <= last; at++) pen.fillRect(inset + at * span - Math.max(1, span) / 2, height - held[at] * height, Math.max(1, span), held[at] * height);
  pen.globalAlpha = 1; pen.fillStyle = colourOf("text"); pen.font = "11px system-ui, sans-serif"; pen.textAlign = "center";
  let free = -1;
  for (let at = 0; at <= last; at++) { // a mark where something but writing happened, as far as they do not touch
    const x = inset + at * span;
    if (ticks[at].length && x >= free) { pen.fillText(ticks[at][0], x, height - 3); free = x + 9; }
  }
  pen.fillStyle = colourOf("alert"); pen.fillRect(inset + state.at * span - 1, 0, 2, height);
}
function paintMaps() {
  const map = by("map"), wide = window.innerWidth >= 900;
  place = paintMap(map, run.blocks, i => look(state.device, i), { room: Math.max(160, window.innerHeight * (wide ? 0.5 : 0.42)), largest: wide ? 60 : 46 });
  const words = mapWords();
  map.setAttribute("aria-label", words); by("words").textContent = words;
  by("host-part").hidden = !run.host_blocks;
  if (run.host_blocks) {
    const host = by("host"), used = counts(state.host).held;
    paintMap(host, run.host_blocks, i => look(state.host, i, { away: true, cursor: -1 }), { room: 90, largest: 26 });
    host.setAttribute("aria-label", `CPU memory: ${used} of ${plural(run.host_blocks, "block")} held`);
  }
}
function paintStatus() {
  const g = state.gauges, usable = Math.max(0, g.total_blocks - 1), used = usable - g.free_blocks, slots = g.token_slots + g.tail_slots;
  const share = usable ? used / usable : 0;
  by("where").textContent = `${stepOf(state.at)} · ${frames[state.at].at} of ${run.steps}`;
  by("fullness").textContent = usable ? `${used}/${usable} blocks · ${Math.round(100 * share)} % · waste ${(slots ? 100 * g.tail_slots / slots : 0).toFixed(1)} %` : "no pool yet";
  by("bar").style.width = `${100 * share}%`;
  by("say").textContent = state.at === last && run.finding ? run.finding : frames[state.at].say;
  const seek = by("seek");
  seek.max = last; seek.value = state.at; seek.setAttribute("aria-valuetext", `${stepOf(state.at)}: ${frames[state.at].say}`);
}
function chip(seq, index, block, numbered) {
  const refs = state.device.refs[block], copied = state.device.flags[block] & COPIED;
  const span = made("span", null, `chip${refs > 1 ? " shared" : ""}${copied ? " copied" : ""}${block === chosen ? " chosen" : ""}`);
  if (numbered) span.append(made("i", `${index}→`));
  span.append(made("b", block || "∅"));
  const fill = Math.max(0, Math.min(size, seq.computed - index * size));
  if (block && fill < size) span.append(made("i", ` ${fill}/${size}`));
  span.title = block ? `block ${block}: ${run.states[Math.min(2, refs)][state.device.flags[block] & 15]}` : "given back: no token lives here";
  if (block) span.addEventListener("click", () => choose(block));
  return span;
}
function paintSequences() {
  const rows = by("rows"), all = [...state.sequences.values()], alive = s => !["finished", "aborted", "refused"].includes(s.status);
  all.sort((a, b) => alive(b) - alive(a) || a.seq - b.seq);
  rows.textContent = "";
  for (const seq of all.slice(0, MOST_ROWS)) {
    const row = rows.insertRow(), table = state.tables.get(seq.seq) ?? [];
    if (!alive(seq)) row.className = "ended";
    const head = made("th"); head.scope = "row"; head.append(made("span", seq.name, `letter hue${seq.hue}`)); row.append(head);
    const drawn = Math.max(0, seq.count - seq.prompt);
    row.insertCell().textContent = `${seq.status}${seq.reason ? ` (${seq.reason})` : ""}, ${seq.prompt} + ${plural(drawn, "token")}` + (seq.cached ? `, ${seq.cached} found cached` : "");
    const cell = row.insertCell(), from = Math.max(0, table.length - MOST_CHIPS);
    if (from) cell.append(made("span", `… ${from} before `, "chip"));
    table.slice(from).forEach((block, i) => cell.append(chip(seq, from + i, block, table.length <= 12)));
    const away = state.hostTables.get(seq.seq);
    if (away) cell.append(made("span", `on the CPU: ${plural(away.filter(b => b >= 0).length, "block")}`));
    else if (!table.length) cell.append(made("span", "none"));
    const text = row.insertCell(), prompt = tokensOf(seq.seq, 0, Math.min(seq.prompt, seq.count)), said = tokensOf(seq.seq, seq.prompt, seq.count);
    text.className = "text"; // what was said last stays in sight
    const room = Math.max(60, MOST_TEXT - said.length);
    text.append(made("span", prompt.length > room ? "…" + prompt.slice(-room) : prompt), said.length > MOST_TEXT ? "…" + said.slice(-MOST_TEXT) : said);
  }
  const [running, waiting, swapped] = state.queues.map(q => q.map(letter).join(" "));
  const more = Math.max(0, (state.gauges.num_waiting ?? 0) - state.queues[1].length);
  by("queues").textContent = [running && `running: ${running}`, waiting && `waiting: ${waiting}${more ? ` and ${more} more` : ""}`, swapped && `on the CPU: ${swapped}`, all.length > MOST_ROWS && `${all.length - MOST_ROWS} more sequences are not listed`].filter(Boolean).join(" · ") || "nothing runs or waits";
}
function paintInspector() {
  const past = by("past"), block = chosen < 0 ? watched() : chosen;
  past.textContent = "";
  if (block < 0) { by("block").textContent = "Block"; by("facts").textContent = "No block was used yet."; by("tokens").textContent = ""; return; }
  const p = state.device, refs = p.refs[block], owners = holdersOf(state.tables, block);
  by("block").textContent = `Block ${block}${chosen < 0 ? ", where something happened last" : ""}`;
  by("hint").hidden = chosen >= 0;
  by("facts").textContent = `reference count ${refs} · ${p.fill[block]} of ${size} slots · ${run.states[Math.min(2, refs)][p.flags[block] & 15]}` +
    (owners.length ? ` · ${owners.length > 1 ? "owners" : "owner"} ${owners.slice(0, 6).map(([seq, i]) => `${letter(seq)}[${i}]`).join(" ")}${owners.length > 6 ? ` and ${owners.length - 6} more` : ""}` : "");
  by("tokens").textContent = owners.length && p.fill[block] ? tokensOf(owners[0][0], owners[0][1] * size, owners[0][1] * size + p.fill[block]) : "";
  const found = pastOf(block);
  for (const [at, words] of found.slice(-60)) {
    const item = made("li"); item.append(made("span", at ? frames[at].step : "–", "step"), words);
    item.addEventListener("click", () => go(at));
    past.append(item);
  }
  if (!found.length) past.append(made("li", "nothing has happened to it yet"));
  past.scrollTop = past.scrollHeight;
}
const told = frames.flatMap((f, at) => ticks[at].length ? [at] : []);
const eventItems = new Map();
function makeStory() {
  for (const at of told) {
    const item = made("li"); item.id = `event-${at}`; item.setAttribute("role", "option");
    item.append(made("span", frames[at].step, "step"), `${ticks[at].join("")} ${frames[at].say}`);
    item.addEventListener("click", () => go(at));
    by("events").append(item); eventItems.set(at, item);
  }
  if (!told.length) by("events").append(made("li", "nothing but writing"));
}
let marked = null;
function paintStory() {
  const at = told.filter(t => t <= state.at).pop(), item = eventItems.get(at) ?? null, list = by("events");
  if (marked && marked !== item) marked.setAttribute("aria-selected", "false");
  marked = item;
  if (!item) return list.removeAttribute("aria-activedescendant");
  item.setAttribute("aria-selected", "true"); list.setAttribute("aria-activedescendant", item.id);
  const top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop || top + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
}
let waiting = false;
function paint() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; paintNow(); });
}
function paintNow() { paintStatus(); paintTimes(); paintMaps(); paintSequences(); paintInspector(); paintStory(); document.body.dataset.at = state.at; }

/* ---- what a person does */

function go(at) { moved = true; seek(at); paint(); }
function stop() { clearInterval(playing); playing = null; by("play").textContent = "▶ play"; by("say").setAttribute("aria-live", "polite"); }
function play() {
  if (playing !== null) return stop();
  if (state.at === last || !moved) seek(0); // the picture that a page opens on is not where the run begins
  moved = true;
  by("play").textContent = "‖ pause"; by("say").setAttribute("aria-live", "off"); // a reader cannot follow so fast
  playing = setInterval(() => { if (state.at >= last) stop(); else go(state.at + 1); }, 1000 / +by("speed").value);
  paint();
}
function event(direction) {
  const found = direction > 0 ? told.find(at => at > state.at) : told.filter(at => at < state.at).pop();
  stop();
  if (found !== undefined) go(found); else go(direction > 0 ? last : 0);
}
function step(count) { stop(); go(state.at + count); }
function choose(block) { if (block >= 0 && block < run.blocks) { chosen = block; if (only >= 0) only = state.device.owner[block]; paint(); } }
function walk(count) { choose(chosen < 0 ? 0 : Math.max(0, Math.min(run.blocks - 1, chosen + count))); }
function faster(more) {
  const speed = by("speed"), to = speed.selectedIndex + more;
  if (to < 0 || to >= speed.options.length) return;
  speed.selectedIndex = to;
  if (playing !== null) { stop(); play(); }
}
const KEYS = {
  " ": play, "[": () => step(-1), "]": () => step(1), "{": () => event(-1), "}": () => event(1), g: () => step(-state.at), G: () => step(last - state.at),
  "<": () => faster(-1), ">": () => faster(1), ArrowLeft: () => walk(-1), ArrowRight: () => walk(1), ArrowUp: () => walk(-place.across), ArrowDown: () => walk(place.across),
  h: () => walk(-1), l: () => walk(1), k: () => walk(-place.across), j: () => walk(place.across), "?": () => by("help").showModal(),
  w: () => { const found = chosen < 0 ? [] : pastOf(chosen); if (found.length) { stop(); go(found[found.length - 1][0]); } },
  f: () => { only = only >= 0 || chosen < 0 ? -1 : state.device.owner[chosen]; paint(); },
};
document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || by("help").open) return;
  const own = e.target.closest?.("button, input, select, summary"), arrow = e.key.startsWith("Arrow");
  if (own && (e.key === " " || arrow)) return; // a control's own keys
  if (arrow && e.target.id === "events") { e.preventDefault(); return event(e.key === "ArrowDown" || e.key === "ArrowRight" ? 1 : -1); }
  const act = KEYS[e.key];
  if (act) { e.preventDefault(); act(); }
});
by("seek").addEventListener("input", () => { stop(); go(+by("seek").value); });
for (const [id, act] of [["play", play], ["back", () => step(-1)], ["on", () => step(1)], ["before", () => event(-1)], ["after", () => event(1)], ["keys", () => by("help").showModal()]])
  by(id).addEventListener("click", act);
by("speed").addEventListener("change", () => faster(0));
by("map").addEventListener("click", e => choose(Math.floor(e.offsetY / place.size) * place.across + Math.min(place.across - 1, Math.floor(e.offsetX / place.size))));
by("times").addEventListener("click", e => { stop(); go(Math.round((e.offsetX - 8) / Math.max(1, by("times").clientWidth - 16) * last)); });
window.addEventListener("resize", paint);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { legend(); paint(); });

function legend() {
  const looks = { full: { fill: 1 }, filling: { fill: 0.5 }, shared: { fill: 1, refs: 2 }, copied: { fill: 0.25, copied: true }, cached: { state: "cached" }, free: { state: "free" } };
  for (const canvas of document.querySelectorAll("canvas.sample"))
    paintMap(canvas, 1, () => ({ state: "held", hue: 0, letter: "A", refs: 1, fill: 0, ...looks[canvas.dataset.look] }), { room: 24, largest: 24 });
}
const settings = Object.entries(run.settings).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
by("about").textContent = [run.about, ...settings, run.damage, frames.length - 1 < run.steps && `${frames.length - 1} of ${run.steps} steps are shown`].filter(Boolean).join(" · ");
makeStory(); seek(0);
const asked = Number(location.hash.slice(1)), named = frames.findIndex(f => f.at === asked);
// A run opens on its fullest moment, as a film does on a picture of it; a finding where it was found.
seek(location.hash && named >= 0 ? named : run.finding ? last : held.indexOf(Math.max(...held)));
moved = Boolean(location.hash || run.finding);
legend(); paintNow();
document.body.dataset.ready = "yes";
window.minipaged = { go, past: pastOf };
})();
