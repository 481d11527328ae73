/* Plays an asciinema v2 file whose writing is rows: a place, then text in colours. Everything it says becomes text. */
(async () => {
"use strict";
const by = id => document.getElementById(id);
const packed = Uint8Array.from(atob(by("cast").textContent), c => c.charCodeAt(0));
const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
const [head, ...frames] = text.trim().split("\n").map(line => JSON.parse(line));
const rows = Array.from({ length: head.height }, () => by("film").appendChild(document.createElement("div")));
let at = -1, clock = null;
const colour = codes => `rgb(${codes.join(" ")})`;
function write(row, text) {
  row.textContent = "";
  let look = {};
  for (const piece of text.split(/(\x1b\[[0-9;]*m)/)) {
    const code = /^\x1b\[([0-9;]*)m$/.exec(piece);
    if (code) {
      const n = code[1].split(";").map(Number);
      for (let i = 0; i < n.length; i++) {
        if (n[i] === 0) look = {};
        else if (n[i] === 1) look.bold = true;
        else if (n[i] === 2) look.dim = true;
        else if (n[i] === 4) look.under = true;
        else if (n[i] === 7) look.reverse = true;
        else if (n[i] === 38 && n[i + 1] === 2) { look.ink = colour(n.slice(i + 2, i + 5)); i += 4; }
        else if (n[i] === 48 && n[i + 1] === 2) { look.ground = colour(n.slice(i + 2, i + 5)); i += 4; }
      }
    } else if (piece) {
      const span = row.appendChild(document.createElement("span")), ink = look.ink ?? "#d8d8d8", ground = look.ground ?? "#101010";
      span.textContent = piece;
      span.style.color = look.reverse ? ground : ink; span.style.background = look.reverse ? ink : ground;
      if (look.bold) span.style.fontWeight = "bold";
      if (look.under) span.style.textDecoration = "underline";
      if (look.dim) span.style.opacity = 0.6;
    }
  }
}
function show(target) {
  if (target < at) at = -1;
  const last = new Map(); // only what is seen at the end is drawn
  for (let i = at + 1; i <= target; i++)
    for (const [, row, text] of frames[i][2].matchAll(/\x1b\[(\d+);1H([^]*?)(?=\x1b\[\d+;1H|$)/g)) last.set(+row - 1, text);
  for (const [row, text] of last) write(rows[row], text);
  at = target; by("seek").value = at;
}
function stop() { clearTimeout(clock); clock = null; by("play").textContent = "play"; }
function next() {
  if (at + 1 >= frames.length) return stop();
  clock = setTimeout(() => { show(at + 1); next(); }, 1000 * (frames[at + 1][0] - frames[at][0]));
}
function play() {
  if (clock !== null) return stop();
  if (at + 1 >= frames.length) show(0);
  by("play").textContent = "pause"; next();
}
function fit() { by("film").style.fontSize = `${Math.min(22, (window.innerWidth - 8) / head.width / 0.603)}px`; }
by("seek").max = frames.length - 1;
by("seek").addEventListener("input", () => { stop(); show(+by("seek").value); });
by("play").addEventListener("click", play);
document.addEventListener("keydown", e => { if (e.key === " " && e.target !== by("play")) { e.preventDefault(); play(); } });
window.addEventListener("resize", fit);
fit(); show(Math.floor(frames.length / 2)); document.body.dataset.ready = "yes";
})();
