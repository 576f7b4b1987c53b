"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const SVG = find("arcs").namespaceURI;

  /** A new element; texts among the children enter as text. */
  const make = (name, attributes, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const draw = (name, attributes, ...children) => {
    const drawn = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) drawn.setAttribute(key, value);
    drawn.append(...children);
    return drawn;
  };

  // Arrays: see codes.py.
  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = (text) => new DataView(bytesOf(text).buffer);
  const signed = ({ step, codes }) => {
    const from = view(codes);
    return Float64Array.from({ length: from.byteLength / 2 }, (_, n) => {
      const code = from.getInt16(2 * n, true);
      return code === -32768 ? NaN : code * step;
    });
  };
  const shares8 = (text) => Float64Array.from(bytesOf(text), (code) => (code / 255) ** 2);
  const shares16 = (text) => {
    const from = view(text);
    return Float64Array.from({ length: from.byteLength / 2 }, (_, n) => (from.getUint16(2 * n, true) / 65535) ** 2);
  };

  // Numbers as words.
  const isNumber = (number) => number !== null && Number.isFinite(number);
  const nats = (number, digits = 3) => (isNumber(number) ? (number < 0 ? "" : "+") + number.toFixed(digits) : "no number");
  const unsigned = (number) => (isNumber(number) ? number.toFixed(3) : "no number");
  const plain = (number) => (isNumber(number) ? number.toFixed(1) : "no number");
  const percent = (number) => (isNumber(number) ? (100 * number).toFixed(1) + "%" : "no number");
  const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

  // Viridis, at equal distances.
  const RAMP = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
    .map((text) => [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16)));
  const colour = (part) => {
    const place = Math.min(1, Math.max(0, part)) * (RAMP.length - 1);
    const left = Math.min(Math.floor(place), RAMP.length - 2);
    return RAMP[left].map((from, n) => Math.round(from + (place - left) * (RAMP[left + 1][n] - from)));
  };
  const css = (rgb) => `rgb(${rgb.join(" ")})`;
  const legendOf = (box, least, most, scale, note) => {
    const ramp = make("span", { class: "ramp", "aria-hidden": "true" });
    ramp.style.backgroundImage = `linear-gradient(to right, ${RAMP.map(css).join(",")})`;
    const none = make("span", { class: "swatch none", "aria-hidden": "true" });
    box.replaceChildren(make("span", {}, least), ramp, make("span", {}, `${most} (${scale})`), make("span", {}, none, note));
  };

  // Tokens that pay.
  const COSTLY = 20;
  const BEFORE = 12;
  const AFTER = 4;
  const changes = data.prices.flatMap((price) => {
    const loss = () => signed(price.loss);
    const together = price.together.filter((some) => some.layers.length).map((some) => ({
      name: `${price.change} in ${counted(some.layers.length, "layer")} together, before training`, loss, mean: some.increase,
      increase: () => signed(some.tokens),
    }));
    const alone = price.alone.map((codes, layer) => ({
      name: `${price.change} in layer ${price.labels[layer]} alone, before training`, loss, mean: price.by_layer[layer], increase: () => signed(codes),
    }));
    return [...together.reverse(), ...alone];
  });
  if (data.against) {
    const { model, loss, increase, tokens } = data.against;
    changes.push({ name: `the other model, ${model}`, loss: () => signed(loss), mean: increase, increase: () => signed(tokens) });
  }
  const spans = [];
  let shown = { name: "", loss: [], increase: [] };
  let token = 0;

  const marked = (text) => text.replace(/ /g, "\u2423").replace(/\n/g, "\u23ce");
  const short = (text) => marked([...text].slice(0, 40).join(""));
  const piece = (name, text) => make(name, { class: "piece" }, text);

  /** A token marked between those before and after it. */
  const inContext = (index) => {
    const words = (start, stop) => data.tokens.slice(start, stop).map((text) => piece("span", text));
    return [...words(Math.max(0, index - BEFORE), index), piece("mark", marked(data.tokens[index])), ...words(index + 1, index + 1 + AFTER)];
  };

  const goTo = (index, scrolls) => {
    spans[token].classList.remove("current");
    token = Math.min(Math.max(index, 0), spans.length - 1);
    spans[token].classList.add("current");
    if (scrolls) spans[token].scrollIntoView({ block: "nearest" });
    const says = token === 0 ? "nothing predicts it" :
      `loss ${unsigned(shown.loss[token - 1])}, ${nats(shown.increase[token - 1])} with ${shown.name}`;
    find("token").replaceChildren(`Token ${token}, `, piece("q", marked(data.tokens[token])), `: ${says}`);
  };
  const showChange = (change) => {
    shown = { name: change.name, loss: change.loss(), increase: change.increase() };
    const finite = Array.from(shown.increase).filter(Number.isFinite);
    const most = Math.max(...finite.map(Math.abs), 1e-9);
    const order = Array.from(shown.increase.keys()).filter((at) => shown.increase[at] > 0);
    order.sort((a, b) => shown.increase[b] - shown.increase[a] || a - b);
    const dearest = order.slice(0, COSTLY);
    const costly = new Set(dearest);
    spans.forEach((span, index) => {
      const increase = index === 0 ? NaN : shown.increase[index - 1];
      const strength = isNumber(increase) ? 0.5 * Math.sqrt(Math.abs(increase) / most) : 0;
      span.style.backgroundColor = strength < 0.02 ? "" : `rgb(${increase > 0 ? "213 94 0" : "0 114 178"} / ${strength.toFixed(3)})`;
      span.classList.toggle("costly", costly.has(index - 1));
    });
    const positive = order.reduce((total, at) => total + shown.increase[at], 0);
    const part = positive > 0 ? dearest.reduce((total, at) => total + shown.increase[at], 0) / positive : 0;
    find("tokens-say").textContent =
      `Shows the increase of each token's loss with ${change.name}, as background: orange for more, blue for less, by the square root, ` +
      `up to ${unsigned(most)} nats. The mean is ${nats(change.mean, 4)} nats a token; the ` +
      `${counted(dearest.length, "token")} underlined ${dearest.length === 1 ? "makes" : "make"} up ${percent(part)} of all increases.`;
    find("costly").replaceChildren(...dearest.map((at) => {
      const index = at + 1;
      const button = make("button", { type: "button" },
        `${nats(shown.increase[at])} nats, of ${unsigned(shown.loss[at])}, token ${index}: `, ...inContext(index));
      button.addEventListener("click", () => { goTo(index, true); find("text").focus({ preventScroll: true }); });
      return make("li", {}, button);
    }));
    goTo(token, false);
  };

  if (changes.length && data.tokens.length > 1) {
    spans.push(...data.tokens.map((text) => make("span", {}, text)));
    find("text").append(...spans);
    find("change").append(...changes.map((change, n) => make("option", { value: n }, change.name)));
    find("change").addEventListener("change", (event) => showChange(changes[event.target.value]));
    find("text").addEventListener("keydown", (event) => {
      const to = { ArrowRight: token + 1, ArrowLeft: token - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      goTo(to, true);
    });
    find("text").addEventListener("click", (event) => {
      const index = spans.indexOf(event.target);
      if (index >= 0) goTo(index, false);
    });
    find("tokens").hidden = false;
    showChange(changes[0]);
  }

  // Heads at a glance.
  const withSinks = data.sink_tokens ? `, ${counted(data.sink_tokens, "sink token")} kept` : "";
  const none = (layer) => Array(layer.heads).fill(null);
  const numbers = [
    { name: "keys in effect", of: (layer) => layer.keys_in_effect, text: plain, isLog: true,
      says: "the number of keys that a head attends to, as exp of the entropy, in the mean over queries" },
    { name: "distance", of: (layer) => layer.distance, text: plain, isLog: true,
      says: "how many tokens back the keys of a head lie, by weight, in the mean over queries" },
    { name: "weight on sinks", of: (layer) => layer.sinks, text: percent,
      says: `the weight on the first ${counted(Math.max(1, data.sink_tokens), "token")} and a learned sink, in the mean over queries` },
    ...data.windows.flatMap((window, n) => [
      { name: `cut by a window of ${window}${withSinks}`, of: (layer) => layer.cut[n] ?? none(layer), text: percent,
        says: `the weight on keys that a window of ${window} hides${withSinks}, in the mean over queries that lose keys, before training` },
      { name: `change by a window of ${window}${withSinks}`, of: (layer) => layer.change[n] ?? none(layer), text: percent,
        says: `how far a window of ${window}${withSinks} moves a head's output, as a share of its length, in the mean over queries that lose keys, before training` },
    ]),
  ];
  let number = numbers[0];
  let cells = [];
  let at = [0, 0];

  const sayHead = ([layer, head]) => {
    const value = number.of(data.layers[layer])[head];
    return `Layer ${data.layers[layer].label}, head ${head}: ${number.name} ${number.text(value)}`;
  };
  const showNumber = () => {
    const all = data.layers.flatMap((layer) => number.of(layer)).filter(isNumber);
    let least = 0;
    let most = 1;
    if (number.isLog && all.length) {
      least = Math.min(...all);
      most = Math.max(...all);
    }
    // Logarithms, unless some keys lie after their query.
    const place = number.isLog && least > 0 ? Math.log : (value) => value;
    const wide = place(most) - place(least);
    cells.forEach((row, layer) => row.forEach((cell, head) => {
      const value = number.of(data.layers[layer])[head];
      const part = wide > 0 ? (place(value) - place(least)) / wide : 0.5;
      cell.style.backgroundColor = isNumber(value) ? css(colour(part)) : "";
      cell.classList.toggle("none", !isNumber(value));
      cell.setAttribute("aria-label", sayHead([layer, head]));
      cell.title = sayHead([layer, head]);
    }));
    const scale = place === Math.log ? "log scale" : "equal steps";
    legendOf(find("grid-legend"), number.text(least), number.text(most), scale, "no number");
    find("heads-say").textContent = `Shows ${number.says}: from ${number.text(all.length ? Math.min(...all) : NaN)} to ` +
      `${number.text(all.length ? Math.max(...all) : NaN)}, a row a layer, a column a query head.`;
  };
  const walk = (layer, head) => {
    cells[at[0]][at[1]].tabIndex = -1;
    const row = Math.min(Math.max(layer, 0), cells.length - 1);
    at = [row, Math.min(Math.max(head, 0), cells[row].length - 1)];
    const cell = cells[at[0]][at[1]];
    cell.tabIndex = 0;
    cell.focus();
  };
  const buildGrid = () => {
    const widest = Math.max(...data.layers.map((layer) => layer.heads));
    const head = make("tr", { role: "row" }, make("th", { scope: "col", role: "columnheader" }, "layer"));
    const every = widest > 12 ? 4 : 1;
    for (let n = 0; n < widest; n++) {
      const name = make("th", { scope: "col", role: "columnheader", "aria-label": `head ${n}` }, n % every ? "" : `${n}`);
      head.append(name);
    }
    cells = data.layers.map((layer, row) => Array.from({ length: layer.heads }, (_, column) => {
      const cell = make("td", { role: "gridcell", tabindex: row || column ? -1 : 0 });
      cell.addEventListener("click", () => { walk(row, column); openHead(); });
      cell.addEventListener("focus", () => { find("head-now").textContent = sayHead([row, column]); });
      cell.addEventListener("pointerenter", () => { find("head-now").textContent = sayHead([row, column]); });
      return cell;
    }));
    const rows = cells.map((row, layer) => make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }, data.layers[layer].label), ...row));
    const grid = make("table", { role: "grid", "aria-label": "Heads: a row a layer, a column a query head" },
      make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...rows));
    grid.addEventListener("keydown", (event) => {
      const [layer, column] = at;
      const to = {
        ArrowRight: [layer, column + 1], ArrowLeft: [layer, column - 1], ArrowDown: [layer + 1, column],
        ArrowUp: [layer - 1, column], Home: [event.ctrlKey ? 0 : layer, 0],
        End: [event.ctrlKey ? cells.length - 1 : layer, Infinity],
      }[event.key];
      if (to) walk(...to);
      else if (event.key === "Enter" || event.key === " ") openHead();
      else return;
      event.preventDefault();
    });
    find("grid").replaceChildren(grid);
  };

  // One head: its numbers and its map.
  const OCTAVES = 4;
  let map = { rows: 0, columns: 0, queries: 0, keys: 0, weights: [], even: [], gaps: new Set() };
  let block = [0, 0];

  const openHead = () => {
    const [layer, head] = at;
    const of = data.layers[layer];
    const [rows, columns] = of.map_shape;
    const start = head * rows * columns;
    find("map-figure").hidden = of.map === null;
    if (of.map !== null) map = {
      rows, columns, queries: of.queries, keys: of.keys,
      weights: shares8(of.map).subarray(start, start + rows * columns),
      even: shares16(data.even[of.even[head]]),
      gaps: new Set(of.map_gaps.map((row) => row - head * rows).filter((row) => row >= 0 && row < rows)),
    };
    const group = Math.floor(head / (of.heads / of.kv_heads));
    find("head-name").textContent = `Layer ${of.label}, head ${head} (${of.name}, KV head ${group})`;
    const cuts = of.cut.map((row, n) => `cut by a window of ${data.windows[n]}${withSinks}: ${percent(row[head])}, which moves the output by ${percent(of.change[n][head])}`);
    find("head-numbers").textContent = [
      `Keys in effect: ${plain(of.keys_in_effect[head])}`,
      `distance: ${plain(of.distance[head])}, with a spread of ${plain(of.spread[head])}`,
      `on sinks: ${percent(of.sinks[head])}`, ...cuts,
    ].join("; ") + ". In the mean over queries, before training." + (of.map === null ? " Its map was left out: see qkv see --layer." : "");
    if (of.map !== null) drawMap();
    block = [rows - 1, 0];
    find("map-now").textContent = "";
    find("map-details").open = false;
    find("map-table").replaceChildren();
    find("head").hidden = false;
    find("head").focus();
  };
  const drawMap = () => {
    const canvas = find("map");
    canvas.width = map.columns;
    canvas.height = map.rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(map.columns, map.rows);
    for (let n = 0; n < map.weights.length; n++) {
      // Hidden, or with queries that have no number: what is behind is seen.
      if (map.even[n] === 0 || map.gaps.has(Math.floor(n / map.columns))) continue;
      const times = map.weights[n] / map.even[n];
      image.data.set([...colour((Math.log2(times) + OCTAVES) / (2 * OCTAVES)), 255], 4 * n);
    }
    context.putImageData(image, 0, 0);
    legendOf(find("map-legend"), `1/${2 ** OCTAVES} of even`, `${2 ** OCTAVES} times`, "log scale", map.gaps.size ? "hidden, or no number" : "hidden");
  };
  const sayBlock = ([row, column]) => {
    const n = row * map.columns + column;
    const where = `Queries ${part(row, map.rows, map.queries)}, keys ${part(column, map.columns, map.keys)}`;
    if (map.gaps.has(row)) return `${where}: no number`;
    if (map.even[n] === 0) return `${where}: hidden`;
    return `${where}: weight ${percent(map.weights[n])}, ${(map.weights[n] / map.even[n]).toFixed(2)} times an even one`;
  };
  /** The tokens of a block: token i of n is in block floor(i * blocks / n). The length of a context is not known. */
  const part = (index, blocks, n) => {
    if (n === null) return `of block ${index} of ${blocks}`;
    const first = Math.ceil(index * n / blocks);
    const last = Math.ceil((index + 1) * n / blocks) - 1;
    return first === last ? `${first}` : `${first}\u2013${last}`;
  };
  const showBlock = (row, column) => {
    block = [Math.min(Math.max(row, 0), map.rows - 1), Math.min(Math.max(column, 0), map.columns - 1)];
    find("map-now").textContent = sayBlock(block);
  };
  const closeHead = () => {
    find("head").hidden = true;
    walk(...at);
  };

  if (data.layers.length) {
    buildGrid();
    find("number").append(...numbers.map((one, n) => make("option", { value: n }, one.name)));
    find("number").addEventListener("change", (event) => { number = numbers[event.target.value]; showNumber(); });
    showNumber();
    find("heads").hidden = false;
    find("back").addEventListener("click", closeHead);
    find("head").addEventListener("keydown", (event) => { if (event.key === "Escape") closeHead(); });
    find("map-box").addEventListener("keydown", (event) => {
      const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!by) return;
      event.preventDefault();
      showBlock(block[0] + by[0], block[1] + by[1]);
    });
    find("map").addEventListener("pointermove", (event) => {
      const box = find("map").getBoundingClientRect();
      showBlock(Math.floor((event.clientY - box.top) / box.height * map.rows), Math.floor((event.clientX - box.left) / box.width * map.columns));
    });
    find("map-details").addEventListener("toggle", () => {
      if (!find("map-details").open || find("map-table").firstChild) return;
      const cell = (row, column) => {
        const n = row * map.columns + column;
        const gap = map.gaps.has(row) ? "no number" : "hidden";
        return make("td", {}, map.gaps.has(row) || map.even[n] === 0 ? gap : percent(map.weights[n]));
      };
      const over = (length, each) => Array.from({ length }, (_, n) => each(n));
      find("map-table").append(make("table", {},
        make("caption", {}, "Weight of blocks of keys (across) in the mean over blocks of queries (down)"),
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "queries"), ...over(map.columns, (n) => make("th", { scope: "col" }, part(n, map.columns, map.keys))))),
        make("tbody", {}, ...over(map.rows, (row) => make("tr", {}, make("th", { scope: "row" }, part(row, map.rows, map.queries)), ...over(map.columns, (column) => cell(row, column)))))));
    });
  }

  // What one token looks at.
  const FIRST = 10;
  const LAST = 710;
  const GROUND = 140;
  const withRows = data.layers.filter((layer) => layer.rows.length);
  const keyName = (layer, key) => (layer.is_cross ? [`key ${key} of a context`] : [`${key} `, piece("q", short(data.tokens[key]))]);

  const showRow = () => {
    const layer = withRows[find("row-layer").value];
    const row = layer.rows.find((one) => one.query === Number(find("query").value));
    const head = Number(find("row-head").value);
    const { keys, weights, covered } = row.heads[head];
    const last = Math.max(1, ...(layer.is_cross ? row.heads.flatMap((one) => one.keys) : [data.tokens.length - 1]));
    const place = (index) => FIRST + index / last * (LAST - FIRST);
    const from = place(row.query);
    const arcs = keys.map((key, n) => {
      const to = place(key);
      const high = GROUND - Math.min(130, 12 + Math.abs(to - from) / 2);
      const title = draw("title", {}, `${key}: ${percent(weights[n])}`);
      const width = (0.75 + 7 * Math.sqrt(isNumber(weights[n]) ? weights[n] : 0)).toFixed(2);
      return draw("path", { class: "arc", "stroke-width": width, d: `M${from.toFixed(1)} ${GROUND}C${from.toFixed(1)} ${high} ${to.toFixed(1)} ${high} ${to.toFixed(1)} ${GROUND}` }, title);
    });
    const name = `Token ${row.query}, layer ${layer.label}, head ${head}`;
    const left = isNumber(covered) ? percent(Math.max(0, 1 - covered)) : "no number";
    const says = `${counted(keys.length, "key")} with ${percent(covered)} of its weight; ${left} is left to others${layer.is_cross ? "" : " and a learned sink"}`;
    find("arcs").setAttribute("aria-label", `${name}: ${says}.`);
    find("arcs").replaceChildren(
      draw("line", { class: "axis", x1: FIRST, x2: LAST, y1: GROUND, y2: GROUND }), ...arcs,
      draw("circle", { class: "query", cx: from.toFixed(1), cy: GROUND, r: 5 }),
      draw("text", { x: FIRST, y: 162 }, "0"), draw("text", { x: LAST, y: 162, "text-anchor": "end" }, `${last}`));
    find("row-say").textContent = `Shows ${name.toLowerCase()}: the fewest keys with 90% of the weight, 32 at most, here ${says}. An arc is as wide as the square root of its weight.`;
    find("row-keys").replaceChildren(...keys.map((key, n) => {
      const back = row.query - key;
      const where = layer.is_cross ? "" : back > 0 ? `, ${counted(back, "token")} back` : back < 0 ? `, ${counted(-back, "token")} ahead` : ", itself";
      return make("li", {}, `${percent(weights[n])}, key ${key}${where}${layer.is_cross ? "" : ": "}`, ...(layer.is_cross ? [] : inContext(key)));
    }));
    const cells = (one, number) => [
      make("th", { scope: "row" }, `${number}`), make("td", {}, `${one.keys.length}`), make("td", {}, percent(one.covered)),
      make("td", {}, ...(one.keys.length ? keyName(layer, one.keys[0]) : [""])), make("td", {}, one.keys.length ? percent(one.weights[0]) : ""),
    ];
    find("row-table").replaceChildren(make("table", {},
      make("caption", {}, `Token ${row.query} in layer ${layer.label}`),
      make("thead", {}, make("tr", {}, ...["head", "keys", "their weight", "the heaviest", "its weight"].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...row.heads.map((one, number) => make("tr", {}, ...cells(one, number))))));
  };
  /** The queries and heads of a layer: those that were chosen stay so, where it has them. */
  const showLayer = () => {
    const layer = withRows[find("row-layer").value];
    const fill = (select, entries) => {
      const before = select.value;
      select.replaceChildren(...entries.map(([value, ...text]) => make("option", { value }, ...text)));
      if (entries.some(([value]) => `${value}` === before)) select.value = before;
    };
    fill(find("query"), layer.rows.map(({ query }) => [query, `${query}: ${short(data.tokens[query])}`]));
    fill(find("row-head"), layer.rows[0].heads.map((_, head) => [head, `${head}`]));
    showRow();
  };
  if (withRows.length) {
    find("row-layer").append(...withRows.map((layer, n) => make("option", { value: n }, layer.label)));
    find("row-layer").value = Math.floor(withRows.length / 2);
    find("row-layer").addEventListener("change", showLayer);
    for (const id of ["query", "row-head"]) find(id).addEventListener("change", showRow);
    showLayer();
    find("rows").hidden = false;
  }

  // One query under the seven mechanisms.
  const MEANS = {
    "scaled dot-product": () => "one head, all keys",
    "multi-head": ({ heads }) => `the mean of ${counted(heads, "head")}, all keys`,
    "cross": () => "the first half of the text, as if it were another one",
    "causal": () => "its own key and those before",
    "sliding-window": ({ window }) => `the last ${counted(window, "key")}, its own included`,
    "multi-query": ({ kv_heads }) => `causal, with the mean of the model's ${counted(kv_heads, "KV head")} for all heads`,
    "grouped-query": ({ groups, kv_heads }) => `causal, on ${counted(groups, "KV head")}, ${groups === kv_heads ? "the model's own" : "the means of the model's"}`,
  };
  const bytes = (count) => {
    const power = Math.min(3, Math.floor(Math.log2(Math.max(1, count)) / 10));
    return `${(count / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB"][power]}`;
  };
  const showSeven = () => {
    const seven = data.seven;
    const { columns } = seven;
    const n = data.tokens.length;
    const chosen = Number(find("seven-head").value);
    find("seven-rows").replaceChildren(...seven.mechanisms.map((one) => {
      const head = one.keys.length === 1 ? 0 : chosen;
      const weights = shares8(one.strip).subarray(head * columns, (head + 1) * columns);
      const canvas = make("canvas", { width: columns, height: 1, "aria-hidden": "true" });
      const image = canvas.getContext("2d").createImageData(columns, 1);
      for (let column = 0; column < columns; column++) {
        const start = Math.max(one.first, Math.ceil(column * n / columns));
        const stop = Math.min(one.stop, Math.ceil((column + 1) * n / columns));
        if (start >= stop) continue; // hidden: what is behind is seen
        const times = weights[column] * (one.stop - one.first) / (stop - start);
        image.data.set([...colour((Math.log2(times) + OCTAVES) / (2 * OCTAVES)), 255], 4 * column);
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
      const heaviest = one.keys[head].flatMap((key, at) => [at ? ", " : "", `${percent(one.weights[head][at])} `, piece("q", short(data.tokens[key])), ` ${key}`]);
      return make("div", {}, make("strong", {}, one.name), `: ${MEANS[one.name](seven)}`, make("div", { class: "strip" }, canvas),
        make("p", {}, ...heaviest, `. Of the text: ${one.scores.toLocaleString("en")} scores, ${bytes(one.bytes)} of keys and values.`));
    }));
    find("seven-say").textContent = `Shows where the weight of token ${seven.query} lies in layer ${seven.layer}, query head ${chosen}, from the first token (left) to the last, ` +
      `against the same weight for all keys that it sees. The model was trained so that a query sees ${seven.own}, with ${counted(seven.heads, "query head")} on ` +
      `${counted(seven.kv_heads, "KV head")}; the others are what its q and k would see. Scores and bytes are those of this layer with ${counted(seven.heads, "query head")} ` +
      `(one for scaled dot-product), each with a KV head of its own but for the last two.`;
  };
  if (data.seven) {
    find("seven-head").append(...Array.from({ length: data.seven.heads }, (_, head) => make("option", { value: head }, `${head}`)));
    find("seven-head").addEventListener("change", showSeven);
    legendOf(find("seven-legend"), `1/${2 ** OCTAVES} of even`, `${2 ** OCTAVES} times`, "log scale", "hidden");
    find("seven").hidden = false;
    showSeven();
  }
}
