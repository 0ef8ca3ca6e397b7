"use strict";
// Draws the figures one after the other, fills a figure's table when it is opened, and sorts tables.
(() => {
  const MOST = 500; // rows of a figure's table
  const data = (id) => JSON.parse(document.getElementById(id).textContent);
  const written = (value, digits) => {
    if (value === null || value === undefined || value === "") return "\u2013";
    return digits === null || typeof value !== "number" ? String(value) : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };
  const made = (name, text, cls) => {
    const found = document.createElement(name);
    if (text !== undefined) found.textContent = text; // never markup: names come from other parties
    if (cls) found.className = cls;
    return found;
  };

  const fill = (figure, about, all) => {
    const place = figure.querySelector(".rows");
    if (place.firstChild) return;
    const table = made("table"), head = made("tr"), body = made("tbody");
    const rest = all.length > MOST ? `; the first ${MOST} of ${all.length} rows, fedlora plots writes all` : "";
    table.append(made("caption", about.title + rest), made("thead"), body);
    for (const column of about.columns) {
      const th = made("th", column.title, column.digits === null ? "" : "number");
      th.scope = "col";
      head.append(th);
    }
    table.tHead.append(head);
    for (const row of all.slice(0, MOST)) {
      const tr = made("tr");
      for (const column of about.columns) tr.append(made("td", written(row[column.key], column.digits), column.digits === null ? "text" : "number"));
      body.append(tr);
    }
    place.append(table);
  };

  const draw = async (figure) => {
    const about = data(figure.id + "-data"), rows = about.spec.datasets.rows;
    const details = figure.querySelector("details");
    if (details) details.addEventListener("toggle", () => details.open && fill(figure, about, rows));
    const place = figure.querySelector(".chart");
    const spec = about.spec;
    Object.assign(spec.config.legend, { columns: place.clientWidth < 420 ? 2 : 3 });
    await vegaEmbed(place, spec, { renderer: "svg", actions: false, ast: false });
    place.querySelector("svg").setAttribute("aria-hidden", "true"); // the text of the place speaks for all its marks
  };

  const sort = (button) => {
    const th = button.closest("th"), table = th.closest("table"), place = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[place].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not there comes last, either way
      const order = th.dataset.kind === "number" ? Number(x) - Number(y) : x.localeCompare(y);
      return down ? -order : order;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  };

  const begin = async () => {
    for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
    for (const figure of document.querySelectorAll("figure[data-figure]")) {
      await draw(figure);
      await new Promise((done) => setTimeout(done, 0)); // the page stays fit for use meanwhile
    }
    document.documentElement.dataset.ready = "yes";
  };
  begin();
})();
