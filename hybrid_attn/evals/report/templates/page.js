"use strict";

function compare(a, b) {
  const x = Number(a), y = Number(b);
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sortBy(header) {
  const table = header.closest("table"), body = table.tBodies[0];
  const index = header.cellIndex, down = header.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[index].dataset.value;
  const rows = [...body.rows].sort((p, q) => {
    const a = value(p), b = value(q);
    if (a === "" || b === "") return (a === "") - (b === "");
    return down ? compare(b, a) : compare(a, b);
  });
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

document.addEventListener("click", (event) => {
  const header = event.target.closest("thead th");
  if (header) sortBy(header);
});

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("section")) seen.observe(section);
