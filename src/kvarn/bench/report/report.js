(() => {
  "use strict";
  const { rows, runs, tasks, findings } = JSON.parse(document.getElementById("data").textContent);
  const BASELINE = "full";
  const ALL = "all";
  const LEAST_KL = 1e-6; // where a logarithmic axis puts what is zero
  const $ = (id) => document.getElementById(id);
  const distinct = (values) => [...new Set(values)];

  const models = distinct(rows.map((row) => row.model));
  const lengths = distinct(rows.map((row) => row.length)).sort((a, b) => a - b);
  const systems = distinct(rows.map((row) => row.system));
  const settings = distinct(rows.flatMap((row) => Object.keys(row.scores))).filter((setting) => setting !== ALL);
  const batches = distinct(rows.flatMap((row) => Object.keys(row.times))).sort((a, b) => a - b);
  const labels = distinct(rows.map((row) => row.label));
  const family = (row) => (row.label === BASELINE ? BASELINE : `${row.system}: ${row.name}`);
  const families = distinct(rows.map(family)).filter((name) => name !== BASELINE);

  // What the reader chose. An empty string: everything.
  const state = {
    find: "", model: "", length: "", system: "", setting: ALL, batch: batches[0] || "1",
    sort: null, descending: false, open: new Set(), hiddenFamilies: new Set(), hiddenCurves: null,
    quality: rows.some((row) => row.fidelity) ? "kl" : "score", memory: "bytes", time: "token",
  };

  // ---- numbers and elements

  const UNKNOWN = "–";
  const fixed = (digits) => (value) =>
    value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
  const significant = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && size < 0.0001) return value.toExponential(1).replaceAll("-", "−");
    return fixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4)(value);
  };
  const shown = (value, format) => (value === null || value === undefined ? UNKNOWN : format(value));
  const percent = (value) => `${fixed(1)(100 * value)} %`;
  const between = ([, low, high], format) => (low === null ? "" : `${format(low)} ${low < 0 ? "to" : "–"} ${format(high)}`);
  const bytes = (value) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    const power = Math.min(units.length - 1, value ? Math.floor(Math.log2(value) / 10) : 0);
    return `${fixed(power ? 1 : 0)(value / 2 ** (10 * power))} ${units[power]}`;
  };
  const seconds = (value) => (value >= 1 ? `${fixed(2)(value)} s` : `${fixed(1)(1000 * value)} ms`);
  const tokens = (value) => `${value.toLocaleString("en")} tokens`;

  /** A new element. Text is only ever set as text, so that nothing in the data can be markup. */
  function el(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in made) made[name] = value;
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }
  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const series = (row) =>
    row.label === BASELINE ? "neutral" : `series-${families.indexOf(family(row)) % 8}`;
  // Plotly reads a few HTML tags in its labels.
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  // ---- which rows

  const found = (row) =>
    row.label.toLowerCase().includes(state.find.toLowerCase()) && (!state.system || row.system === state.system);
  const inTable = (row) =>
    found(row) && (!state.model || row.model === state.model) && (!state.length || row.length === Number(state.length));

  /** Plots compare what can be compared: one model at one length, the longest unless the reader chose. */
  function scope() {
    const measured = rows.filter((row) => row.fidelity || row.memory || Object.keys(row.scores).length);
    const from = measured.length ? measured : rows;
    const model = state.model || (from[0] && from[0].model);
    const ofModel = from.filter((row) => row.model === model);
    const length = Number(state.length) || Math.max(...ofModel.map((row) => row.length));
    return { model, length, rows: rows.filter((row) => row.model === model && row.length === length && found(row)) };
  }

  // ---- the table

  const score = (row) => row.scores[state.setting];
  const times = (row) => row.times[state.batch];
  const ratio = (name) => ({
    value: (row) => times(row)?.[name]?.median,
    format: fixed(2),
    low: (row) => (times(row)?.[name] ? `p95 ${fixed(2)(times(row)[name].p95)}` : ""),
  });
  const COLUMNS = [
    { group: "", title: "Subject", value: (row) => labels.indexOf(row.label), subject: true },
    ...(models.length > 1 ? [{ group: "", title: "Model", value: (row) => row.model, text: true }] : []),
    { group: "", title: "Tokens", value: (row) => row.length, format: fixed(0) },
    {
      group: "Quality, against the full cache", title: "KL, nats", value: (row) => row.fidelity?.kl[0],
      format: significant, low: (row) => (row.fidelity ? between(row.fidelity.kl, significant) : ""),
    },
    {
      title: "Top-1", value: (row) => row.fidelity?.top1[0], format: percent,
      low: (row) => (row.fidelity ? between(row.fidelity.top1, (value) => fixed(1)(100 * value)) : ""),
    },
    {
      title: "Rank", value: (row) => row.fidelity?.rank_mean, format: fixed(2),
      low: (row) => (row.fidelity ? `median ${fixed(0)(row.fidelity.rank_median)}` : ""),
    },
    {
      title: "ΔNLL", value: (row) => row.fidelity?.nll_change[0], format: significant,
      low: (row) => (row.fidelity ? between(row.fidelity.nll_change, significant) : ""),
    },
    { title: "Perplexity", value: (row) => row.perplexity, format: fixed(2) },
    {
      group: "Tasks", title: "Score", value: (row) => score(row)?.mean[0], format: fixed(3),
      low: (row) => (score(row) ? between(score(row).mean, fixed(2)) : ""),
    },
    {
      title: "Of full", value: (row) => score(row)?.of_full, format: fixed(2),
      low: (row) => (score(row)?.difference ? differs(score(row).difference) : ""),
    },
    {
      group: "Memory, of dense", title: "KV bytes", value: (row) => row.memory?.ratio, format: fixed(3), bar: true,
    },
    { title: "Peak", value: (row) => row.memory?.peak_ratio, format: fixed(3) },
    { group: "Time, of full", title: "First token", ...ratio("first_token") },
    { title: "Per token", ...ratio("per_token") },
  ];
  const differs = (difference) => {
    const range = between(difference, fixed(2));
    return range && `Δ ${range}`;
  };

  function drawHead() {
    const groups = el("tr", { className: "groups" });
    COLUMNS.forEach((column, at) => {
      if (column.group === undefined) groups.lastChild.colSpan += 1;
      else groups.append(el("th", { className: column.subject ? "subject" : at && column.group ? "first" : "" }, column.group));
    });
    const heads = COLUMNS.map((column) => {
      const kind = column.subject ? "subject" : column.text ? "text" : column.group ? "first" : "";
      const head = el("th", { scope: "col", className: kind });
      head.append(el("button", { type: "button", onclick: () => sortBy(column) }, column.title));
      return head;
    });
    $("results").replaceChildren(
      el("thead", {}, groups, el("tr", { className: "columns" }, ...heads)), el("tbody"),
    );
  }

  function sortBy(column) {
    state.descending = state.sort === column && !state.descending;
    state.sort = column;
    drawTable();
  }

  function sorted(list) {
    if (!state.sort) return list;
    const value = state.sort.value;
    const known = list.filter((row) => ![null, undefined].includes(value(row)));
    const sign = state.descending ? -1 : 1;
    const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    known.sort((a, b) => sign * order(value(a), value(b)));
    return [...known, ...list.filter((row) => !known.includes(row))]; // what is not known stays at the end
  }

  function drawTable() {
    const list = sorted(rows.filter(inTable));
    $("results").querySelectorAll(".columns th").forEach((head, at) => {
      if (COLUMNS[at] === state.sort) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    $("results").tBodies[0].replaceChildren(
      ...list.flatMap((row) => [tableRow(row), ...(state.open.has(row) ? [detailRow(row)] : [])]),
    );
    $("count").textContent = `${list.length} of ${rows.length} rows. “Of full”: the score against the full cache’s on ` +
      "the same cases; Δ is the interval of the difference.";
  }

  function tableRow(row) {
    return el("tr", { className: "row" }, ...COLUMNS.map((column) => {
      if (column.subject) return subjectCell(row);
      if (column.text) return el("td", { className: "text" }, column.value(row));
      const value = column.value(row);
      const known = value !== null && value !== undefined;
      const cell = el("td", { className: column.group ? "first" : "" });
      cell.append(el("span", { className: known ? "" : "unknown" }, shown(value, column.format)));
      if (column.low?.(row)) cell.append(el("span", { className: "low" }, column.low(row)));
      if (column.bar && known) {
        const fill = el("i");
        fill.style.width = `${Math.min(100, 100 * value)}%`;
        cell.append(el("span", { className: "bar" }, fill));
      }
      return cell;
    }));
  }

  function subjectCell(row) {
    const open = state.open.has(row);
    const button = el("button", { type: "button", className: "open", "aria-expanded": String(open) }, row.label);
    if (row.fronts.includes("kl bytes")) {
      button.append(el("span", { className: "dot", title: "on the Pareto front of KL against KV bytes" }));
    }
    button.onclick = () => toggle(row, button);
    const cell = el("td", { className: "subject" }, button);
    for (const [reason, cases] of row.refused.slice(0, 2)) {
      cell.append(el("span", { className: "refused" }, `refused (${count(cases, "case")}): ${reason}`));
    }
    if (row.refused.length > 2) {
      cell.append(el("span", { className: "refused" }, `and ${row.refused.length - 2} more reasons`));
    }
    return cell;
  }

  function toggle(row, button) {
    const line = button.closest("tr");
    const opening = !state.open.delete(row);
    button.setAttribute("aria-expanded", String(opening));
    if (opening) {
      state.open.add(row);
      line.after(detailRow(row));
    } else line.nextSibling.remove();
  }

  const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

  function detailRow(row) {
    const time = times(row);
    const taken = (each) => each && `${seconds(each.seconds)} (${count(each.pairs, "pair")})`;
    const facts = [
      ["Fidelity", row.fidelity && count(row.fidelity.examples, "example")],
      ["Tasks", score(row) && count(score(row).examples, "example")],
      ["KV bytes", row.memory && bytes(row.memory.bytes)],
      [`First token, batch ${state.batch}`, taken(time?.first_token)],
      [`Per token, batch ${state.batch}`, taken(time?.per_token)],
      ["Process memory at most", time?.process_peak_bytes && bytes(time.process_peak_bytes)],
      ["Device memory at most", time?.device_peak_bytes && bytes(time.device_peak_bytes)],
    ].filter(([, value]) => value);
    const answers = row.answers.filter((answer) => state.setting === ALL || answer.setting === state.setting);
    const panel = el("div", { className: "panel" },
      el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
    if (answers.length) panel.append(el("div", { className: "answers" }, ...answers.map(answerCard)));
    else panel.append(el("p", { className: "note" }, "No answers to tasks here."));
    return el("tr", { className: "detail" }, el("td", { colSpan: COLUMNS.length }, panel));
  }

  function answerCard(answer) {
    const line = (name, text) => el("p", {}, el("b", {}, name), text);
    return el("article", { className: "answer" },
      el("header", {}, `${answer.task} · ${answer.setting}`, el("span", {}, `score ${shown(answer.score, fixed(2))}`)),
      line("asked", answer.question),
      line("answer", answer.answer || "(nothing)"),
      line("right", answer.references.join(" · ")));
  }

  // ---- filters

  function addSelect(name, title, options, key, into = $("filters")) {
    if (options.filter(([value]) => value && value !== ALL).length < 2) return;
    const select = el("select", { id: `filter-${name}` }, ...options.map(([value, text]) => el("option", { value }, text)));
    select.value = state[key];
    select.onchange = () => { state[key] = select.value; draw(); };
    into.append(el("label", {}, title, select));
  }

  function addFilters() {
    let waiting;
    $("find").oninput = () => {
      state.find = $("find").value.trim();
      drawTable();
      clearTimeout(waiting);
      waiting = setTimeout(drawPlots, 150); // plots take longer than the next letter
    };
    addSelect("model", "Model", [["", "all"], ...models.map((model) => [model, model])], "model");
    addSelect("length", "Length", [["", "all"], ...lengths.map((length) => [String(length), tokens(length)])], "length");
    addSelect("system", "System", [["", "all"], ...systems.map((system) => [system, system])], "system");
    addSelect("setting", "Setting of tasks", [[ALL, "all"], ...settings.map((setting) => [setting, setting])], "setting");
    addSelect("batch", "Batch size", batches.map((batch) => [batch, batch]), "batch");
  }

  function addChoice(key, title, options) {
    const set = el("fieldset", {}, el("legend", {}, title));
    for (const [value, text] of options) {
      const input = el("input", { type: "radio", name: key, value, checked: state[key] === value });
      input.onchange = () => { state[key] = value; drawPareto(); };
      set.append(el("label", { className: "choice" }, input, el("span", {}, text)));
    }
    $("pareto-controls").append(set);
  }

  // ---- plots

  const narrow = () => window.innerWidth <= 640;
  const CONFIG = { displayModeBar: false, responsive: true };

  function layout(x, y, more = {}) {
    const axis = (given) => ({
      gridcolor: color("grid"), linecolor: color("line"), zeroline: false, fixedrange: true, automargin: true,
      ticks: "", tickfont: { size: 12 }, ...given, title: { text: given.title, standoff: 10, font: { size: 12.5 } },
    });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      margin: { l: 46, r: 20, t: 22, b: 44 }, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, color: color("muted"), size: 12.5 },
      hoverlabel: {
        bgcolor: color("surface"), bordercolor: color("line"), align: "left",
        font: { family: getComputedStyle(document.body).fontFamily, color: color("ink"), size: 13 },
      },
      xaxis: axis(x), yaxis: axis(y), ...more,
    };
  }

  function plot(id, traces, made) {
    const box = $(id);
    if (traces.length) {
      if (box.querySelector(".empty")) box.replaceChildren();
      Plotly.react(box, traces, made, CONFIG);
    } else {
      Plotly.purge(box);
      box.replaceChildren(el("p", { className: "empty" }, "Nothing measured here."));
    }
  }

  const SYMBOLS = ["circle", "square", "diamond", "triangle-up"];
  const symbol = (row) => SYMBOLS[systems.indexOf(row.system) % SYMBOLS.length];
  const KEY_SHAPES = {
    circle: ["circle", { cx: 7, cy: 7, r: 5 }],
    square: ["rect", { x: 2.5, y: 2.5, width: 9, height: 9 }],
    diamond: ["path", { d: "M7 1 13 7 7 13 1 7Z" }],
    "triangle-up": ["path", { d: "M7 2 13 12 1 12Z" }],
  };

  function chip(text, mark, shownNow, onclick) {
    return el("button", { type: "button", className: "chip", "aria-pressed": String(shownNow), onclick }, mark, text);
  }
  const flip = (set, value) => { if (!set.delete(value)) set.add(value); };

  const price = (row, cost) =>
    cost === "bytes" ? row.memory?.ratio
      : cost === "peak" ? row.memory?.peak_ratio
        : times(row)?.[cost === "first" ? "first_token" : "per_token"]?.median;
  const quality = (row) => (state.quality === "kl" ? row.fidelity?.kl : score(row)?.mean);

  function drawPareto() {
    const { rows: list } = scope();
    $("pareto-legend").replaceChildren(...distinct(list.map(family)).map((name) => {
      const row = list.find((each) => family(each) === name);
      const [shape, at] = KEY_SHAPES[symbol(row)];
      const mark = svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, svg(shape, { ...at, fill: `var(--${series(row)})` }));
      const title = row.system === "kvarn" ? row.name : name;
      return chip(title, mark, !state.hiddenFamilies.has(name), () => { flip(state.hiddenFamilies, name); drawPareto(); });
    }));
    const visible = list.filter((row) => !state.hiddenFamilies.has(family(row)));
    drawFront("pareto-memory", visible, state.memory,
      state.memory === "bytes" ? "KV bytes, of a dense cache" : "most KV bytes at once, of a dense cache");
    drawFront("pareto-time", visible, state.time,
      `time ${state.time === "first" ? "to the first token" : "per token"}, of full (median of pairs)`);
  }

  function drawFront(id, list, cost, title) {
    const points = list.filter((row) => quality(row) && ![null, undefined].includes(price(row, cost)));
    if (!points.length) return plot(id, [], {});
    const kl = state.quality === "kl";
    const logX = ["bytes", "peak"].includes(cost);
    const floor = Math.max(LEAST_KL, Math.min(...points.map((row) => quality(row)[0]).filter((value) => value > LEAST_KL)) / 4);
    const x = (row) => price(row, cost);
    const y = (row) => (kl ? Math.max(floor, quality(row)[0]) : quality(row)[0]);
    const cheapestFirst = (some) => [...some].sort((a, b) => x(a) - x(b));
    const front = cheapestFirst(points.filter((row) => row.fronts.includes(frontName(cost))));
    const traces = distinct(points.map(family)).map((name) => {
      const own = cheapestFirst(points.filter((row) => family(row) === name));
      return {
        x: own.map(x), y: own.map(y), mode: "lines+markers", type: "scatter", cliponaxis: false,
        line: { color: color(series(own[0])), width: 1.25 },
        marker: { color: color(series(own[0])), size: 10, symbol: symbol(own[0]), line: { color: color("surface"), width: 1.5 } },
        text: own.map((row) => hover(row, cost)), hovertemplate: "%{text}<extra></extra>",
      };
    });
    traces.unshift({
      x: front.map(x), y: front.map(y), mode: "lines", type: "scatter", hoverinfo: "skip",
      line: { shape: "hv", color: color("accent"), width: 7 }, opacity: 0.22,
    });
    const zero = kl && points.some((row) => quality(row)[0] < floor) ? floor : null;
    const across = logX ? bytesAxis(points.map(x)) : linearAxis([...points.map(x), 1]);
    const up = kl ? klAxis(points.map(y), zero) : linearAxis(points.map(y));
    const named = `mean task score, ${state.setting === ALL ? "all settings" : state.setting}`;
    const place = (row) => [logX ? Math.log10(x(row)) : x(row), kl ? Math.log10(y(row)) : y(row)];
    return plot(id, traces, layout(
      { title, ...across }, { title: kl ? "mean KL, nats (lower is better)" : named, ...up },
      {
        shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: color("muted"), width: 1, dash: "dot" } }],
        annotations: frontLabels($(id), front, points, place, across.range, up.range),
      },
    ));
  }

  const frontName = (cost) =>
    `${state.quality === "kl" ? "kl" : `score:${state.setting}`} ${["bytes", "peak"].includes(cost) ? cost : `${cost}:${state.batch}`}`;

  function hover(row, cost) {
    const kl = state.quality === "kl";
    const range = between(quality(row), kl ? significant : fixed(2));
    return [
      `<b>${plain(row.label)}</b>`,
      `${kl ? "KL" : "score"} ${(kl ? significant : fixed(3))(quality(row)[0])}${range ? ` (${range})` : ""}`,
      `${{ bytes: "KV bytes", peak: "peak", token: "time per token", first: "time to first token" }[cost]} ` +
        `${fixed(3)(price(row, cost))} of ${["bytes", "peak"].includes(cost) ? "dense" : "full"}`,
    ].join("<br>");
  }

  /** The front's names beside their points, where they cover neither points nor each other; the others show on hover. */
  function frontLabels(box, front, points, place, [left, right], [bottom, top]) {
    const [width, height] = [box.clientWidth - 80, box.clientHeight - 80];
    const pixels = (row) => {
      const [x, y] = place(row);
      return [((x - left) / (right - left)) * width, ((top - y) / (top - bottom)) * height];
    };
    const taken = points.map(pixels).map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
    const free = ([x0, y0, x1, y1]) => x0 >= 0 && x1 <= width + 10 && y0 >= -10 && y1 <= height &&
      taken.every((other) => x1 < other[0] || other[2] < x0 || y1 < other[1] || other[3] < y0);
    return front.flatMap((row) => {
      const [name, budget] = row.label.split(/(?= @ [^@]*$)/);
      const text = (name.length > 32 ? `${name.slice(0, 31)}…` : name) + (budget ?? "");
      const [x, y] = pixels(row);
      const wide = 6.4 * text.length;
      for (const [xanchor, yanchor] of [["right", "top"], ["left", "bottom"], ["right", "bottom"], ["left", "top"], ["center", "top"], ["center", "bottom"]]) {
        const x0 = { left: x + 7, right: x - 7 - wide, center: x - wide / 2 }[xanchor];
        const y0 = yanchor === "top" ? y + 7 : y - 22;
        if (!free([x0, y0, x0 + wide, y0 + 15])) continue;
        taken.push([x0, y0, x0 + wide, y0 + 15]);
        const [atX, atY] = place(row);
        return [{
          x: atX, y: atY, text: plain(text), showarrow: false, xanchor, yanchor,
          xshift: { left: 5, right: -5, center: 0 }[xanchor], yshift: yanchor === "top" ? -5 : 5,
          font: { size: 11.5, color: color("ink") },
        }];
      }
      return [];
    });
  }

  function linearAxis(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const room = (high - low || 1) * 0.1;
    return { range: [low - room, high + room] };
  }

  function bytesAxis(values) {
    const ticks = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2];
    const low = Math.min(...values) / 1.9;
    return {
      type: "log", tickvals: ticks, ticktext: ticks.map((tick) => String(Number(tick.toPrecision(3)))),
      range: [Math.log10(low), Math.log10(Math.max(1, ...values) * 1.12)],
    };
  }

  /** A logarithmic axis: decades, and 2 and 5 between them where there are few. `zero`: where 0 is shown, or null. */
  function klAxis(values, zero) {
    const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
    const decades = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, at) => Math.floor(low) + at);
    const steps = high - low < 1.5 ? [1, 2, 5] : [1];
    const ticks = decades.flatMap((decade) => steps.map((step) => step * 10 ** decade)).filter((tick) => !zero || tick > 1.5 * zero);
    const text = (tick) => (tick < 0.001 ? tick.toExponential(0).replace("-", "−") : String(Number(tick.toPrecision(1))));
    return {
      type: "log", tickvals: zero ? [zero, ...ticks] : ticks, ticktext: [...(zero ? ["0"] : []), ...ticks.map(text)],
      range: [low - 0.25, high + 0.15],
    };
  }

  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const STROKES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4" };

  function drawCurves() {
    const list = scope().rows.filter((row) => row.curve && row.label !== BASELINE);
    $("curves").hidden = !rows.some((row) => row.curve);
    if (!state.hiddenCurves) {
      const few = list.length <= 8 ? list : list.filter((row) => row.fronts.includes("kl bytes"));
      state.hiddenCurves = new Set(labels.filter((label) => !few.some((row) => row.label === label)));
    }
    const dash = (row) => DASHES[list.filter((each) => family(each) === family(row)).indexOf(row) % DASHES.length];
    $("curves-legend").replaceChildren(...list.map((row) => {
      const line = svg("line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: `var(--${series(row)})`, "stroke-width": 2.5, "stroke-dasharray": STROKES[dash(row)] });
      const mark = svg("svg", { width: 24, height: 10, "aria-hidden": "true" }, line);
      return chip(row.label, mark, !state.hiddenCurves.has(row.label), () => { flip(state.hiddenCurves, row.label); drawCurves(); });
    }));
    const visible = list.filter((row) => !state.hiddenCurves.has(row.label));
    const traces = (name, format) => visible.map((row) => ({
      x: row.curve.start, y: row.curve[name].map((value) => (name === "kl" ? Math.max(LEAST_KL, value) : value)),
      type: "scatter", mode: "lines", line: { color: color(series(row)), width: 2, dash: dash(row) },
      text: row.curve[name].map((value, at) =>
        `<b>${plain(row.label)}</b><br>position ${row.curve.start[at]}: ${format(value)}<br>${count(row.curve.examples[at], "example")}`),
      hovertemplate: "%{text}<extra></extra>",
    }));
    const values = visible.flatMap((row) => row.curve.kl).map((value) => Math.max(LEAST_KL, value));
    const x = { title: "position of the continuation" };
    plot("curve-kl", traces("kl", significant), layout(x, { title: "", ...(values.length ? klAxis(values, null) : {}) }));
    plot("curve-top1", traces("top1", percent), layout(x, { title: "", tickformat: ".0%" }));
  }

  function drawHeat() {
    const { rows: list } = scope();
    $("tasks").hidden = !settings.length;
    const chosen = state.setting === ALL ? settings : [state.setting];
    $("heat").replaceChildren(...chosen.map((setting) => heatBlock(setting, list.filter((row) => row.cells[setting]))));
  }

  function heatBlock(setting, list) {
    const block = el("div", { className: "heat-block" }, el("h3", {}, setting));
    const names = Object.keys(tasks).filter((task) => list.some((row) => task in row.cells[setting]));
    if (!names.length) {
      block.append(el("p", { className: "note" }, "Nothing measured here."));
      return block;
    }
    const head = el("tr", {}, el("th", { className: "subject", scope: "col" }, "Subject"), el("th", { scope: "col" }, "Mean"),
      ...names.map((task) => el("th", { scope: "col", className: "task", title: tasks[task] }, task)));
    const lines = list.map((row) => el("tr", {},
      el("th", { className: "subject", scope: "row" }, row.label),
      heatCell(row.scores[setting].mean[0], count(row.scores[setting].examples, "example"), "mean"),
      ...names.map((task) => heatCell(row.cells[setting][task]?.[0], task in row.cells[setting] ? `${task}: ${count(row.cells[setting][task][1], "example")}` : ""))));
    block.append(el("div", { className: "box", tabIndex: 0, role: "region", "aria-label": `Scores, ${setting}` },
      el("table", { className: "heat" }, el("thead", {}, head), el("tbody", {}, ...lines))));
    return block;
  }

  function heatCell(value, title, className = "") {
    const cell = el("td", { title, className }, shown(value, fixed(2)));
    if (value === null || value === undefined) return cell;
    cell.style.background = `color-mix(in oklab, var(--heat-high) ${Math.round(100 * value)}%, var(--heat-low))`;
    cell.style.color = value > Number(color("heat-turn")) ? "var(--heat-ink-high)" : "var(--heat-ink-low)";
    return cell;
  }

  function drawEntries() {
    const list = scope().rows.filter((row) => row.entries);
    $("entries").hidden = !rows.some((row) => row.entries);
    const select = $("entries-subject");
    const before = select.value;
    select.replaceChildren(...list.map((row) => el("option", { value: row.label }, row.label)));
    const preferred = list.find((row) => row.label === before) || list.find((row) => row.label !== BASELINE) || list[0];
    $("entries-note").textContent = preferred ? `Mean over ${count(preferred.entries.records, "record")}, after the prompt.` : "";
    if (!preferred) return plot("entries-plot", [], {});
    select.value = preferred.label;
    const layers = preferred.entries.mean;
    const heads = Math.max(...layers.map((layer) => layer.length));
    const z = Array.from({ length: heads }, (_, head) => layers.map((layer) => layer[head] ?? null));
    $("entries-plot").style.height = `${Math.min(460, 130 + 28 * heads)}px`;
    const trace = {
      type: "heatmap", z, zmin: 0, zmax: Math.max(...layers.flat()), xgap: 1.5, ygap: 1.5, colorscale: [[0, color("heat-low")], [1, color("heat-high")]],
      colorbar: { thickness: 10, outlinewidth: 0, tickformat: ",d", title: { text: narrow() ? "" : "entries", font: { size: 12 } } },
      hovertemplate: "layer %{x}, head %{y}: %{z:,.0f} entries<extra></extra>",
    };
    const whole = (length) => (length <= 16 ? { dtick: 1 } : {});
    return plot("entries-plot", [trace], layout(
      { title: "layer", showgrid: false, ...whole(layers.length) },
      { title: "KV head", showgrid: false, autorange: "reversed", ...whole(heads) },
    ));
  }

  function drawPlots() {
    const { model, length } = scope();
    const where = model === undefined ? "Nothing measured yet." : `${model} at ${tokens(length)}.`;
    for (const place of document.querySelectorAll(".scope")) place.textContent = where;
    drawPareto();
    drawCurves();
    drawHeat();
    drawEntries();
  }

  function draw() {
    drawTable();
    drawPlots();
  }

  // ---- head and foot

  const DEFINITIONS = [
    ["Subject", "A system with a configuration and a budget. A budget of 0.25 is a quarter of a dense cache’s bytes, or what the system itself makes of it."],
    ["KL, nats", "Kullback–Leibler divergence of the subject’s next-token distribution from the full cache’s, mean over the positions of the full cache’s own continuation, then over examples. 0: the same predictions."],
    ["Top-1", "The share of those positions at which both find the same token the most likely."],
    ["Rank", "Where the full cache’s token stands in the subject’s predictions, mean and median over all positions. 1: first."],
    ["ΔNLL", "How much less likely the subject finds that token: the difference of negative log-likelihoods, nats."],
    ["Perplexity", "exp of the mean negative log-likelihood of a real text’s tokens, read with the subject’s cache."],
    ["Score", "Mean over answers, each scored from 0 to 1 by its task’s own metric, in the chosen setting."],
    ["Of full", "The subject’s mean score divided by the full cache’s, on the cases that both have; Δ: the interval of the paired difference."],
    ["KV bytes", "Bytes that the cache holds after the prompt, bookkeeping included, divided by those of a dense cache of the same tokens in the model’s dtype."],
    ["Peak", "The most bytes that the cache held at once, divided by the same."],
    ["First token, per token", "Seconds for the prompt, and for a decoding step, divided by what the full cache took in the same pair: the median of these ratios and their 95th percentile."],
    ["95 % interval", "Bootstrap (BCa) over examples, not positions: positions of one example depend on each other. None where there is one example or where all agree. With fewer than about ten examples it is a rough guide."],
    ["Pareto front", "The subjects of one model and length that no other beats in both quality and cost, by their means; subjects that a filter hides count too. Points whose intervals overlap may change places in another run."],
    ["Settings", "When the context is compressed. aware: together with its question; agnostic: before any question is known; multi-turn: once, before a conversation; multi-request: once, for several requests that know nothing of each other."],
    ["Answers", "The first examples of each task, the same for every subject, whatever came out; long texts are cut."],
    [UNKNOWN, "Not measured."],
  ];

  const join = (parts) => parts.filter(Boolean).join(" · ");
  function modelFacts({ model = {}, hardware = {} }) {
    return [
      join([
        model.name, model.architecture, model.parameters && `${fixed(0)(model.parameters / 1e6)} M parameters`,
        model.layers && `${model.layers} layers × ${model.kv_heads ?? "?"} KV heads`, model.dtype,
      ]),
      join([
        hardware.device, hardware.processor, hardware.threads && count(hardware.threads, "thread"),
        hardware.memory_bytes && bytes(hardware.memory_bytes),
      ]),
    ];
  }

  function drawHeadAndFoot() {
    const facts = distinct(runs.map((run) => join(modelFacts(run.about))));
    $("facts").replaceChildren(...facts.map((fact) => el("div", {}, fact || "Model and hardware: not recorded.")));
    $("findings").replaceChildren(...findings.map((finding) => el("p", {}, finding)));
    if (!rows.length) $("findings").append(el("p", {}, "Nothing has been measured in these folders yet."));
    $("runs").replaceChildren(...runs.map(runCard));
    $("definitions").replaceChildren(...DEFINITIONS.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
  }

  function runCard(run) {
    const { about } = run;
    const versions = { kvarn: about.version, ...about.versions };
    const pairs = Object.entries(versions).filter(([, value]) => value).map((pair) => pair.join(" ")).join(", ");
    const card = el("div", { className: "run" }, el("pre", {}, about.command || "(command not recorded)"));
    const add = (text, className = "") => { if (text) card.append(el("p", { className }, text)); };
    modelFacts(about).forEach((fact) => add(fact));
    add(join([
      pairs, about.started && `started ${about.started}`,
      about.seed !== undefined && `seed ${about.seed}`, count(run.records, "record"),
    ]));
    if (about.options) {
      const options = JSON.stringify(about.options, null, 1);
      card.append(el("details", {}, el("summary", {}, "All options"), el("pre", {}, options)));
    }
    if (run.missing) add(`Unfinished: ${count(run.missing, "measurement")} that other subjects have are not there.`, "attention");
    if (run.unmeasured.length) add(`Asked for, nothing measured yet: ${run.unmeasured.join(", ")}.`, "attention");
    for (const [why, number] of Object.entries(run.left_out)) add(`Left out: ${count(number, "record")} (${why}).`, "attention");
    return card;
  }

  // ---- theme

  const theme = () => document.documentElement.dataset.theme;
  function setTheme(name) {
    document.documentElement.dataset.theme = name;
    $("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
    drawPlots();
  }
  const remembered = () => { try { return localStorage.getItem("kvarn-theme"); } catch { return null; } };
  $("theme").onclick = () => {
    const name = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("kvarn-theme", name); } catch { /* not remembered where storage is off */ }
    setTheme(name);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    if (!remembered()) setTheme(event.matches ? "dark" : "light");
  });
  let beforePrint = "light";
  addEventListener("beforeprint", () => { beforePrint = theme(); setTheme("light"); });
  addEventListener("afterprint", () => setTheme(beforePrint));

  // ---- begin

  drawHeadAndFoot();
  addFilters();
  addChoice("quality", "Quality", [["kl", "KL"], ["score", "Task score"]]);
  addChoice("memory", "Memory", [["bytes", "after the prompt"], ["peak", "peak"]]);
  addChoice("time", "Time", [["token", "per token"], ["first", "first token"]]);
  drawHead();
  drawTable();
  const box = $("table-box");
  new ResizeObserver(() => box.style.setProperty("--box", `${box.clientWidth}px`)).observe(box);
  // The table need not wait for Plotly, which comes after this script and is large.
  addEventListener("DOMContentLoaded", () => setTheme(theme()));
})();
