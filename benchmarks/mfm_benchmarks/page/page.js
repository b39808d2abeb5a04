// The page is complete without this: it shows numbers where a chart is pointed at, sorts tables and copies commands.
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

function showTip(lines, x, y) {
  tip.replaceChildren(...lines.filter(text => text).map((text, k) => {
    const line = document.createElement(k === 0 && lines.length > 1 ? "b" : "div");
    line.textContent = text;
    return line;
  }));
  tip.hidden = false;
  const left = Math.min(Math.max(8, x - tip.offsetWidth / 2), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = y - tip.offsetHeight - 16;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above < 4 ? y + 20 : above) + scrollY}px`;
}
function hideTip() { tip.hidden = true; }

// charts: the mark nearest to the pointer, with its numbers; its line stands out in all panels
for (const box of all(".chartbox")) {
  let pinned = null;
  const light = name => {
    box.classList.toggle("hot", Boolean(name));
    for (const line of all(".line[data-name]", box)) line.classList.toggle("on", line.dataset.name === name);
  };
  for (const chart of all("svg.chart", box)) {
    const marks = all(".mark[data-y]", chart);
    const point = event => {
      const place = chart.getBoundingClientRect(), unit = place.width / chart.viewBox.baseVal.width;
      let best = null, least = 28;
      for (const mark of marks) {
        const dx = "x" in mark.dataset ? place.left + mark.dataset.px * unit - event.clientX : 0;
        const dy = place.top + mark.dataset.py * unit - event.clientY;
        const far = chart.classList.contains("bars") ? Math.abs(dy) : Math.hypot(dx, dy);
        if (far < least) [best, least] = [mark, far];
      }
      if (!best) { light(pinned); hideTip(); return; }
      const name = best.parentNode.dataset.name, { x, y, py } = best.dataset;
      light(name);
      const across = x ? `${chart.dataset.x}: ${x}` : "";
      showTip([name, across, `${chart.dataset.y}: ${y}`], event.clientX, place.top + py * unit);
    };
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", point);
    chart.addEventListener("pointerleave", () => { light(pinned); hideTip(); });
  }
  for (const button of all(".legend button", box)) {
    const name = button.dataset.name;
    button.addEventListener("pointerenter", () => light(name));
    button.addEventListener("pointerleave", () => light(pinned));
    button.addEventListener("click", () => {
      pinned = pinned === name ? null : name;
      for (const other of all(".legend button", box)) other.setAttribute("aria-pressed", String(other.dataset.name === pinned));
      light(pinned);
    });
  }
}

// terms: what they mean, also by keyboard and on a touch screen
for (const term of all("abbr[title]")) {
  term.dataset.meaning = term.title;
  term.removeAttribute("title");
  term.tabIndex = 0;
  const show = () => { const place = term.getBoundingClientRect(); showTip([term.textContent, term.dataset.meaning], place.left + place.width / 2, place.top); };
  for (const kind of ["pointerenter", "focus", "click"]) term.addEventListener(kind, show);
  for (const kind of ["pointerleave", "blur"]) term.addEventListener(kind, hideTip);
}
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// tables: a click on a column's name sorts by it
for (const table of all("table")) {
  all("th button", table).forEach(button => button.addEventListener("click", () => {
    const head = button.parentNode, up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of all("th", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => { const cell = row.cells[head.cellIndex]; return "key" in cell.dataset ? Number(cell.dataset.key) : cell.textContent; };
    [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    }).forEach(row => table.tBodies[0].append(row));
  }));
}

// commands: of the page, or of a row, with the part of the run that it is of
const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;
for (const button of all(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const only = button.dataset.only, command = document.body.dataset[only ? "again" : "command"];
    const text = only ? `${command} --only ${quoted(only)}` : command;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const words = button.textContent;
    button.dataset.copied = text;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 1500);
  });
}

// contents are open beside the text, and closed above it
document.getElementById("contents").open = matchMedia("(min-width: 1100px)").matches;
