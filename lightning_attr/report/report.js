"use strict";
// What the page shows follows from `state`, which the address holds, so that a view can be kept as a link.
const data = JSON.parse(document.getElementById("data").textContent);
const { train, samples, targets, classes } = data;
const at = new Map(train.index.map((index, row) => [index, row]));
const chosen = new Set();
const TARGETS = 10;
const COLUMNS = [
  ["index", "Index"],
  ["label", "Label"],
  ["selfInfluence", "Self-influence"],
  ["dataValue", "Data value"],
  ["loss", "Loss"],
  ["noise", "Known noise"],
  ["trainedOn", "Trained on"],
].filter(([name]) => name in train);
const state = { query: "", class: "", show: "", size: "25", sort: "selfInfluence", down: "1", page: "0", "target-query": "", "target-page": "0" };

const element = (id) => document.getElementById(id);
const named = (label) => (label === null || label === undefined ? "" : classes[label] ?? String(label));
function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function written(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : String(value);
}
function drawn(html) {
  const box = make("div");
  box.innerHTML = html ?? ""; // written by the renderers, which escape what they show
  return box;
}

function matches(row) {
  if (state.class !== "" && String(train.label[row]) !== state.class) return false;
  if (state.show === "noise" && !train.noise?.[row]) return false;
  if (state.show === "clean" && train.noise?.[row]) return false;
  if (state.show === "undrawn" && train.trainedOn?.[row] !== false) return false;
  if (state.show === "chosen" && !chosen.has(train.index[row])) return false;
  const query = state.query.trim().toLowerCase();
  return !query || String(train.index[row]) === query || named(train.label?.[row]).toLowerCase().includes(query);
}
function rows() {
  const values = train[state.sort] ?? train.index;
  const sign = state.down === "1" ? -1 : 1;
  const key = (row) => (values[row] === null ? -Infinity * sign : Number(values[row]));
  return [...train.index.keys()].filter(matches).sort((a, b) => sign * (key(a) - key(b)) || a - b);
}
function page(found, name, size) {
  const last = Math.max(0, Math.ceil(found.length / size) - 1);
  const number = Math.min(Math.max(0, Number(state[name]) || 0), last);
  state[name] = String(number);
  return { part: found.slice(number * size, (number + 1) * size), first: number * size, last, number };
}
function turn(prefix, { part, first, last, number }, total) {
  element(prefix + "back").disabled = number === 0;
  element(prefix + "next").disabled = number === last;
  element(prefix + "status").textContent = part.length ? `${first + 1} to ${first + part.length} of ${total}` : "none";
}

function showHead() {
  const row = make("tr");
  row.append(make("th", "Selected", "left"), make("th", "Sample", "left"));
  for (const [name, title] of COLUMNS) {
    const head = make("th");
    const button = make("button", title + (state.sort === name ? (state.down === "1" ? " ↓" : " ↑") : ""));
    button.type = "button";
    button.dataset.sort = name;
    head.append(button);
    if (state.sort === name) head.setAttribute("aria-sort", state.down === "1" ? "descending" : "ascending");
    row.append(head);
  }
  const head = element("train").tHead;
  const focused = head.contains(document.activeElement) ? document.activeElement.dataset.sort : null;
  head.replaceChildren(row);
  if (focused) head.querySelector(`[data-sort="${focused}"]`).focus();
}
function showTrain() {
  showHead();
  const found = rows();
  const shown = page(found, "page", Number(state.size) || 25);
  element("train").tBodies[0].replaceChildren(
    ...shown.part.map((row) => {
      const index = train.index[row];
      const line = make("tr", undefined, train.noise?.[row] ? "noise" : "");
      const box = make("input");
      box.type = "checkbox";
      box.checked = chosen.has(index);
      box.setAttribute("aria-label", `Select training sample ${index}`);
      box.addEventListener("change", () => (box.checked ? chosen.add(index) : chosen.delete(index)));
      const first = make("td", undefined, "left");
      first.append(box);
      const sample = make("td", undefined, "left");
      sample.append(drawn(samples[index]));
      line.append(first, sample);
      for (const [name] of COLUMNS)
        line.append(make("td", name === "label" ? named(train.label[row]) : written(train[name][row]), "num"));
      return line;
    }),
  );
  turn("", shown, found.length);
}

function card([index, score]) {
  const item = make("li", undefined, "card");
  const row = at.get(index);
  item.append(drawn(samples[index]), make("div", `#${index} ${named(train.label?.[row])}`), make("div", (score > 0 ? "+" : "") + written(score), "score num"));
  return item;
}
function side(target, name, className, title) {
  const box = make("section", undefined, className);
  const list = make("ul", undefined, "cards");
  list.append(...target[name].map(card));
  box.append(make("h3", title), list);
  return box;
}
function showTargets() {
  const query = state["target-query"].trim().toLowerCase();
  const found = targets.filter(
    (target) => !query || String(target.index) === query || [named(target.label), written(target.output)].some((word) => word.toLowerCase().includes(query)),
  );
  const shown = page(found, "target-page", TARGETS);
  element("targets").replaceChildren(
    ...shown.part.map((target) => {
      const block = make("div", undefined, "target");
      block.setAttribute("role", "listitem");
      const own = make("section");
      own.append(make("h3", `Target #${target.index}`), drawn(target.sample));
      if (target.label !== null) own.append(make("div", `label: ${named(target.label)}`));
      if (target.output !== null) own.append(make("div", `output: ${target.output}`));
      block.append(own, side(target, "proponents", "good", "Proponents"), side(target, "opponents", "bad", "Opponents"));
      return block;
    }),
  );
  turn("target-", shown, found.length);
}

function set(changes) {
  Object.assign(state, changes);
  for (const id of ["query", "class", "show", "size", "target-query"]) if (element(id).value !== state[id]) element(id).value = state[id];
  showTrain();
  showTargets();
  try {
    history.replaceState(null, "", "#" + new URLSearchParams(state));
  } catch {
    // a page inside another document has no address of its own
  }
}
function save() {
  const indices = chosen.size ? [...chosen].sort((a, b) => a - b) : rows().map((row) => train.index[row]);
  const link = make("a");
  link.href = "data:text/csv;charset=utf-8," + encodeURIComponent("index\n" + indices.join("\n") + "\n");
  link.download = "indices.csv";
  link.click();
}

if (train.label)
  for (const label of [...new Set(train.label)].sort((a, b) => a - b)) {
    const option = make("option", named(label));
    option.value = label;
    element("class").append(option);
  }
element("class").parentElement.hidden = !train.label;
for (const id of ["query", "class", "show", "size"]) element(id).addEventListener("input", () => set({ [id]: element(id).value, page: "0" }));
element("target-query").addEventListener("input", () => set({ "target-query": element("target-query").value, "target-page": "0" }));
element("train").tHead.addEventListener("click", ({ target }) => {
  const name = target.dataset.sort;
  if (name) set({ down: state.sort === name && state.down === "1" ? "0" : "1", sort: name, page: "0" });
});
for (const [id, name, step] of [["back", "page", -1], ["next", "page", 1], ["target-back", "target-page", -1], ["target-next", "target-page", 1]])
  element(id).addEventListener("click", () => set({ [name]: String(Number(state[name]) + step) }));
element("choose").addEventListener("click", () => (rows().forEach((row) => chosen.add(train.index[row])), showTrain()));
element("clear").addEventListener("click", () => (chosen.clear(), showTrain()));
element("export").addEventListener("click", save);
element("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
set(Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([name]) => name in state)));
