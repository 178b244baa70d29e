// Tables that sort: a button in each head. Missing values stay at the end, words come after numbers.
const number = (text) => {
  const found = /^[<≈ ]*([+\-−]?[\d,]*\.?\d+(?:e[+-]?\d+)?)/i.exec(text);
  return found ? parseFloat(found[1].replaceAll(",", "").replace("−", "-")) : text === "never" ? Infinity : NaN;
};
const MISSING = ["", "-", "not defined"];
function sort(table, column, down) {
  const key = (row) => {
    const text = row.cells[column].textContent.trim();
    return { text, number: column ? number(text) : NaN, rank: MISSING.includes(text) ? 2 : column && isNaN(number(text)) ? 1 : 0 };
  };
  const sign = down ? -1 : 1;
  const order = (a, b) => a.rank - b.rank || sign * (isNaN(a.number) ? a.text.localeCompare(b.text, "en", { numeric: true })
    : a.number === b.number ? 0 : a.number - b.number);
  const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]).sort((a, b) => order(a[0], b[0]));
  table.tBodies[0].append(...rows.map((pair) => pair[1]));
}
for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table, column, down);
    });
  });
}

// Volumes: NiiVue is loaded from the file beside this page when the first case is to be shown.
let loaded;
const niivue = () => loaded ??= new Promise((done, failed) => {
  const script = document.createElement("script");
  script.src = "report_files/niivue.js";
  script.onload = done;
  script.onerror = () => failed("The file report_files/niivue.js is not beside this page.");
  document.head.append(script);
});
function choice(box, legend, values, chosen, change) {
  const set = document.createElement("fieldset");
  set.append(Object.assign(document.createElement("legend"), { textContent: legend }));
  for (const [value, text] of values) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", checked: value === chosen,
      name: `${legend} ${box.getAttribute("aria-label")}` });
    input.addEventListener("change", () => change(value));
    label.append(input, ` ${text}`);
    set.append(label);
  }
  box.append(set);
}
function show(section) {
  const { volumes, colours, label } = JSON.parse(section.querySelector("script").textContent);
  const box = document.createElement("div");
  box.setAttribute("aria-label", label);
  box.innerHTML = VIEWER.template.replace(":aria-label", "data-label");
  const canvas = box.querySelector("canvas");
  canvas.setAttribute("aria-label", label);
  const viewer = { ...VIEWER.methods, volumes, colours, label, $refs: { canvas }, $emit: (event, said) => {
    if (event === "failed") section.querySelector(".note").textContent = said;
  } };
  const masks = volumes.slice(1).map((volume) => volume.name);
  const choose = (chosen) => masks.forEach((name) => viewer.opacity(name, name === chosen ? 0.6 : 0));
  VIEWER.created.call(viewer);
  choice(box, "Mask", [["", "none"], ...masks.map((name) => [name, name.replace(/^mask /, "")])], masks[0], choose);
  choice(box, "View", ["multiplanar", "axial", "coronal", "sagittal", "render"].map((how) => [how, {
    multiplanar: "all", render: "3D" }[how] ?? how]), "multiplanar", (how) => viewer.arrange(how));
  choice(box, "Labels", [[0, "filled"], [0.25, "outlines"]], 0, (width) => viewer.outlines(width));
  section.querySelector("button").replaceWith(box);
  choose(masks[0]);
  return VIEWER.mounted.call(viewer);
}
for (const section of document.querySelectorAll(".volumes")) {
  section.hidden = false; // where no scripts run, such as in a page that does not trust this one, nothing is offered
  section.querySelector("button").addEventListener("click", () => niivue().then(() => show(section)).catch((error) => {
    section.querySelector(".note").textContent = String(error);
  }));
}
