"use strict";
// A click on the head of a column sorts its table, a second one the other way round. Heads become buttons here, so that
// nothing looks as if it could be pressed where scripts do not run.
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = table.querySelectorAll("th[data-column]");
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table.tBodies[0], Number(head.dataset.column), down ? -1 : 1);
    });
  }
}

// Numbers are those that the page was made from, in data-number; a column with a text in it is sorted as text. Empty
// cells stay last either way, and equal ones stay in the order that they were in.
function sort(body, column, direction) {
  const rows = [...body.rows].map(row => {
    const cell = row.cells[column], text = cell.textContent.trim();
    return { row, text, number: Number(cell.dataset.number ?? NaN), empty: text === "" || text === "-" };
  });
  const numbers = rows.every(entry => entry.empty || !Number.isNaN(entry.number));
  rows.sort((a, b) => {
    if (a.empty || b.empty) return a.empty - b.empty;
    return direction * (numbers ? a.number - b.number : collator.compare(a.text, b.text));
  });
  body.append(...rows.map(entry => entry.row));
}

// Paper has no clicks: what is folded is printed unfolded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});
