"use strict";
/* The map of blocks, as the live page and the page of a recorded run draw it. Colours are the style sheet's. */

/* A colour of the style sheet by its name, such as "hue3". */
const colourOf = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

/*
 * Draw blocks 0 to count - 1. look(i) says how one looks:
 *   { state: "held" | "cached" | "free" | "null" | "away", hue: 0-6, letter, refs, fill: 0-1, copied, dim, chosen }
 * room: the most pixels in height; largest: of a block's side. Returns { size, across }, by which a place is a block.
 */
function paintMap(canvas, count, look, { room = 400, largest = 46 } = {}) {
  const width = Math.max(1, canvas.clientWidth), scale = window.devicePixelRatio || 1;
  let size = largest;
  while (size > 2 && Math.ceil(count / Math.max(1, Math.floor(width / size))) * size > room) size--;
  let across = Math.max(1, Math.floor(width / size));
  for (const step of [10, 8, 4]) // a round number a row, so that a block is found by counting, where that costs little
    if (across >= step && across % step <= across / 8) { across -= across % step; break; }
  const down = Math.max(1, Math.ceil(count / across)), height = down * size;
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const paint = { pen, size, gap: size > 24 ? 3 : size > 5 ? 1 : 0, colours: {} };
  for (const name of ["ground", "text", "dim", "line", "free", "cached", "accent"]) paint.colours[name] = colourOf(name);
  paint.colours.hues = [0, 1, 2, 3, 4, 5, 6].map(n => colourOf("hue" + n));
  pen.textAlign = "center"; pen.textBaseline = "middle"; pen.lineJoin = "round";
  for (let i = 0; i < count; i++) paintBlock(paint, i % across * size, Math.floor(i / across) * size, look(i));
  return { size, across };
}

function paintBlock({ pen, size, gap, colours }, x, y, block) {
  const side = size - gap, words = side >= 15;
  pen.globalAlpha = block.dim ? 0.25 : 1;
  if (block.state === "held" || block.state === "away") {
    const hue = colours.hues[block.hue], full = Math.round(side * Math.min(1, block.fill));
    pen.fillStyle = hue;
    pen.globalAlpha *= 0.28;
    pen.fillRect(x, y, side, side);
    pen.globalAlpha = block.dim ? 0.25 : 1;
    pen.fillRect(x, y + side - full, side, full);
    if (words) word(pen, colours, block.letter, x + side / 2, y + side / 2, Math.round(side * 0.5));
    if (block.refs > 1) { // how many hold it; too small for a number: a mark in the middle
      if (side >= 22) {
        const digits = Math.max(9, Math.round(side * 0.34));
        pen.fillStyle = colours.text; pen.fillRect(x + side - digits, y, digits, digits);
        pen.fillStyle = colours.ground; pen.font = `bold ${digits - 1}px system-ui, sans-serif`;
        pen.fillText(block.refs > 9 ? "#" : block.refs, x + side - digits / 2, y + digits / 2 + 0.5);
      } else {
        pen.fillStyle = colours.text;
        pen.fillRect(x + side * 0.62, y, side * 0.38, side * 0.38);
      }
    }
    if (block.state === "away") { // swapped out: a triangle that points away
      pen.strokeStyle = colours.text; pen.lineWidth = 1.5;
      pen.strokeRect(x + 0.75, y + 0.75, side - 1.5, side - 1.5);
    }
  } else if (block.state === "cached") { // hatched
    pen.strokeStyle = colours.cached; pen.lineWidth = 1;
    pen.save(); pen.beginPath(); pen.rect(x, y, side, side); pen.clip(); pen.beginPath();
    const step = side > 14 ? 5 : 3;
    for (let at = -side; at < side; at += step) { pen.moveTo(x + at, y + side); pen.lineTo(x + at + side, y); }
    pen.stroke(); pen.restore();
    if (side > 10) pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  } else { // free, or the null block
    pen.strokeStyle = colours.free; pen.lineWidth = 1;
    if (side > 5) pen.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
    else { pen.globalAlpha *= 0.45; pen.fillStyle = colours.free; pen.fillRect(x, y, side, side); }
    if (block.state === "null" && words) word(pen, colours, "∅", x + side / 2, y + side / 2, Math.round(side * 0.45));
  }
  pen.globalAlpha = 1;
  if (block.copied) { // a diamond
    const middle = x + side / 2, radius = Math.max(2, side * (words ? 0.2 : 0.35)), at = words ? y + side - radius - 1 : y + side / 2;
    pen.fillStyle = colours.text; pen.strokeStyle = colours.ground; pen.lineWidth = 1.5;
    pen.beginPath(); pen.moveTo(middle, at - radius); pen.lineTo(middle + radius, at); pen.lineTo(middle, at + radius);
    pen.lineTo(middle - radius, at); pen.closePath(); pen.fill(); if (words) pen.stroke();
  }
  if (block.chosen) {
    pen.strokeStyle = colours.ground; pen.lineWidth = 5; pen.strokeRect(x + 1, y + 1, side - 2, side - 2);
    pen.strokeStyle = colours.accent; pen.lineWidth = 3; pen.strokeRect(x + 1, y + 1, side - 2, side - 2);
  }
}

/* A letter that can be read on any ground: with a rim. */
function word(pen, colours, text, x, y, height) {
  pen.font = `bold ${height}px system-ui, sans-serif`;
  pen.strokeStyle = colours.ground; pen.lineWidth = Math.max(2, height / 5); pen.strokeText(text, x, y + 0.5);
  pen.fillStyle = colours.text; pen.fillText(text, x, y + 0.5);
}
