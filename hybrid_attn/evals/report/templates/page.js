"use strict";

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return Number.isNaN(a - b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

document.addEventListener("click", (event) => {
  const header = event.target.closest("thead th");
  if (!header) return;
  const body = header.closest("table").tBodies[0], down = header.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[header.cellIndex].dataset.value;
  const isEmpty = (row) => value(row) === "";
  const rows = [...body.rows].sort((p, q) => (down && !isEmpty(p) && !isEmpty(q) ? -1 : 1) * compare(value(p), value(q)));
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
});
