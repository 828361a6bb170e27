
"use strict";
(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // One choice of a group is shown in every figure of it.
  const choose = (group, choice) => {
    for (const select of all(`select[data-group="${group}"]`)) select.value = choice;
    for (const figure of all(`[data-shows="${group}"]`))
      for (const mark of all("[data-choice]", figure))
        mark.classList.toggle("off", mark.dataset.choice !== choice);
  };
  for (const select of all("select[data-group]")) {
    select.addEventListener("change", () => choose(select.dataset.group, select.value));
    choose(select.dataset.group, select.value);
  }
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-opens]");
    if (opener) choose("0", opener.dataset.opens);
  });

  // Hover values below the figure too: for fingers, and large enough to read.
  const tell = (figure, target) => {
    for (let at = target; at && at !== figure; at = at.parentElement) {
      const title = [...at.children].find((child) => child.localName === "title");
      if (title) {
        figure.querySelector(".readout").textContent = title.textContent;
        return;
      }
    }
  };
  for (const figure of all("figure"))
    for (const kind of ["pointerover", "click"])
      figure.addEventListener(kind, (event) => tell(figure, event.target));

  const before = (one, other, sign) => {
    if (one === "" || other === "") return (one === "") - (other === "");
    const numbers = [Number(one), Number(other)];
    const order = numbers.some(Number.isNaN)
      ? one.localeCompare(other, "en", { numeric: true })
      : numbers[0] - numbers[1];
    return sign * order;
  };
  for (const button of all("button[data-sort]"))
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = button.closest("table").tBodies[0];
      const first = body.rows[0]?.cells[button.dataset.sort].className === "number";
      const was = head.getAttribute("aria-sort") ?? (first ? "ascending" : "descending");
      const now = was === "ascending" ? "descending" : "ascending";
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", now);
      const key = (row) => row.cells[button.dataset.sort].dataset.value;
      const sign = now === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => before(key(a), key(b), sign)));
    });

  const csvCell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    // A spreadsheet would run a text that begins like a formula.
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = ({ columns, rows }) =>
    [columns, ...rows.map((row) => columns.map((_, place) => row[place]))]
      .map((row) => row.map(csvCell).join(",") + "\r\n")
      .join("");
  for (const button of all("button[data-download]"))
    button.addEventListener("click", () => {
      const { of: name, download: kind } = button.dataset;
      const text = document.getElementById(`data-${name}`).textContent;
      const link = document.createElement("a");
      const type = kind === "csv" ? "text/csv;charset=utf-8" : "application/json";
      link.href = URL.createObjectURL(new Blob([kind === "csv" ? csv(JSON.parse(text)) : text], { type }));
      link.download = `${name}.${kind}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
})();
