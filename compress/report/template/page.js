"use strict";
// Sorts a table by the column whose heading is clicked; a second click turns the order around.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), body = button.closest("table").tBodies[0];
    const place = heading.cellIndex, up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => {
      const { number } = row.cells[place].dataset, text = row.cells[place].textContent.trim();
      return number === undefined ? (text === "–" ? null : text) : Number(number);
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is missing stays last
      const one = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return up ? one : -one;
    };
    body.append(...[...body.rows].sort(order));
  });
}
// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("#numbers details:not([open])")) {
    closed.open = true;
    addEventListener("afterprint", () => { closed.open = false; }, { once: true });
  }
});
// Lays the left picture over the right one, as far as the slider says.
const slide = document.getElementById("slide");
if (slide) {
  const field = (name) => document.getElementById(name);
  const rows = [...document.querySelector("table.pictures").tBodies[0].rows];
  const show = () => {
    for (const [target, choice] of [["above", "left"], ["below", "right"]]) {
      const source = rows[field(choice).value].cells[Number(field("prompt").value) + 1].querySelector("img");
      field(target).src = source ? source.src : "data:,";
      field(target).alt = source ? source.alt : "";
    }
  };
  const move = () => document.querySelector(".over").style.setProperty("--cut", `${slide.value}%`);
  for (const name of ["left", "right", "prompt"]) field(name).addEventListener("change", show);
  slide.addEventListener("input", move);
  show();
  move();
}
