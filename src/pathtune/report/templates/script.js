"use strict";
// Reading values off a chart: the nearest point under the pointer, or the arrow keys.
const tip = document.getElementById("tip");
const REACH = 16;
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const ring = svg.querySelector(".reading");
  let points = null, at = -1;
  const load = () => points ??= JSON.parse(plot.querySelector("script").textContent);
  const hide = () => { tip.classList.remove("shown"); ring.setAttribute("visibility", "hidden"); };
  const show = (index) => {
    at = index;
    const [x, y, text] = points[index];
    ring.setAttribute("visibility", "visible");
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    const place = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    tip.textContent = text;
    tip.classList.add("shown");
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(place.x + 12, innerWidth - box.width - 8)) + "px";
    tip.style.top = (place.y - box.height - 12 < 4 ? place.y + 14 : place.y - box.height - 12) + "px";
  };
  plot.addEventListener("pointermove", (event) => {
    load();
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = -1, least = REACH * REACH;
    points.forEach(([x, y], i) => {
      const d = (x - p.x) ** 2 + (y - p.y) ** 2;
      if (d < least) { least = d; best = i; }
    });
    if (best < 0) hide(); else show(best);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const n = load().length;
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: n - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !n) return;
    event.preventDefault();
    show(((to % n) + n) % n);
  });
}
// One series of a chart alone.
for (const select of document.querySelectorAll("select[data-series]")) {
  const plot = document.getElementById(select.dataset.series).querySelector(".plot");
  for (const option of select.options)
    for (const g of plot.querySelectorAll(`[id^="${option.value}."]`)) { g.classList.add("series"); g.dataset.series = option.value; }
  select.addEventListener("change", () => {
    plot.classList.toggle("alone", select.value !== "");
    for (const g of plot.querySelectorAll("g.series")) g.classList.toggle("chosen", g.dataset.series === select.value);
  });
}
// Sorting tables: numbers as numbers.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => { const c = row.cells[i]; return c.dataset.value ?? c.textContent.trim().replaceAll(",", "").replace("−", "-"); };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a, i), key(b, i)];
      const [m, n] = [parseFloat(x), parseFloat(y)];
      const order = Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
// A printed page shows what is folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
