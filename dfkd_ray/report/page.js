"use strict";
// The table of trials: columns come as JSON, rows are made for the page that is looked at. Only textContent is set.
(() => {
  const PAGE = 50;
  const data = JSON.parse(document.getElementById("trials-data").textContent);
  const columns = data.columns;
  const table = document.getElementById("trials-table");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const [filter, before, after, status] = ["filter", "before", "after", "status"].map((id) => document.getElementById(id));
  const all = Array.from({ length: data.rows }, (_, index) => index);
  const collator = new Intl.Collator(undefined, { numeric: true });
  let order = all, shown = all, first = 0;

  const value = (column, row) => {
    const cell = column.values[row];
    return column.levels && cell !== null ? column.levels[cell] : cell;
  };
  const text = (column, row) => {
    const cell = value(column, row);
    if (cell === null) return "–";
    if (typeof cell !== "number") return cell;
    return column.digits === null ? String(cell).replace("-", "−") : cell.toFixed(column.digits).replace("-", "−");
  };

  function draw() {
    const rows = shown.slice(first, first + PAGE).map((row) => {
      const line = document.createElement("tr");
      for (const column of columns) {
        const cell = line.appendChild(document.createElement("td"));
        cell.textContent = text(column, row);
        cell.className = column.number ? "num" : column.long ? "long" : "";
      }
      return line;
    });
    body.replaceChildren(...rows);
    const last = Math.min(first + PAGE, shown.length);
    status.textContent = shown.length ? `${first + 1} to ${last} of ${shown.length}` : "no trial matches";
    before.disabled = first === 0;
    after.disabled = last >= shown.length;
  }

  function select() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const line = (row) => columns.map((column) => text(column, row)).join(" ").toLowerCase();
    shown = words.length ? order.filter((row) => { const whole = line(row); return words.every((w) => whole.includes(w)); }) : order;
    first = 0;
    draw();
  }

  function sort(index) {
    const column = columns[index];
    const now = headings[index].getAttribute("aria-sort");
    // Numbers are looked at from the largest down.
    const direction = now ? (now === "descending" ? "ascending" : "descending") : column.number ? "descending" : "ascending";
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[index].setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    order = [...all].sort((a, b) => {
      const x = value(column, a), y = value(column, b);
      if (x === null || y === null) return (x === null) - (y === null); // null last, whichever way
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : collator.compare(String(x), String(y)));
    });
    select();
  }

  headings.forEach((heading, index) => heading.firstElementChild.addEventListener("click", () => sort(index)));
  filter.addEventListener("input", select);
  before.addEventListener("click", () => { first -= PAGE; draw(); });
  after.addEventListener("click", () => { first += PAGE; draw(); });
  document.getElementById("trials-controls").hidden = false;
  draw();
})();
