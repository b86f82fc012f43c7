// What the report says: one function a section, and the page of all sections.

// ---- load

function loadMap(body) {
  // (layers, experts) assignments of all domains.
  const load = layers.map((_, l) =>
    expertsOf(l).map((e) => sum(domains.map((_, d) => analysis.load[d][l][e]))));
  const total = load.map(sum);
  const share = (l, e) => (total[l] ? (load[l][e] * load[l].length) / total[l] : 0);
  body.append(
    colourLegend("load, multiple of an even share", SHARE_TICKS, shareColour),
    heatMap({
      rows: layers.length,
      columns: mostExperts,
      exists: (l, e) => e < load[l].length,
      rowTitle: "layer",
      columnTitle: "expert",
      rowName: (l) => String(layerNames[l]),
      columnName: String,
      colour: (l, e) => shareColour(share(l, e)),
      tip: (l, e) => `layer ${layerNames[l]}, expert ${expertName(l, e)}\n`
        + `${share(l, e).toFixed(3)} × an even share\n`
        + `${whole(load[l][e])} of ${whole(total[l])} assignments`,
    }),
  );
}

// ---- domains

function domainMap(body) {
  let [layer, sorting, order] = [0, false, expertsOf(0)];
  const tokens = (d) => analysis.tokens[domains[d]];
  const share = (d, e) => analysis.load[d][layer][e] / tokens(d);
  // An even share of the domain's assignments: K/E where every token has K experts.
  const even = (d) => sum(analysis.load[d][layer]) / tokens(d) / order.length;
  const times = (d, e) => share(d, e) / Math.max(even(d), 1e-12);
  const favourite = (e) =>
    domains.reduce((best, _, d) => (times(d, e) > times(best, e) ? d : best), 0);

  const map = heatMap({
    rows: domains.length,
    columns: mostExperts,
    exists: (d, c) => c < order.length,
    rowTitle: "domain",
    columnTitle: "expert",
    rowName: (d) => domains[d],
    columnName: (c) => String(order[c] ?? ""),
    colour: (d, c) => shareColour(times(d, order[c])),
    tip: (d, c) => `${domains[d]}, layer ${layerNames[layer]}, expert ${expertName(layer, order[c])}\n`
      + `${percent(share(d, order[c]))} of the domain's tokens; ${percent(even(d))} if even\n`
      + `${times(d, order[c]).toFixed(3)} ×`,
  });

  function redraw() {
    const byFavourite = (a, b) => favourite(a) - favourite(b)
      || times(favourite(b), b) - times(favourite(a), a);
    order = expertsOf(layer);
    if (sorting) order.sort(byFavourite);
    map.redraw();
  }

  body.append(
    element("div", { className: "controls" },
      layerSlider(layerNames, (chosen) => { layer = chosen; redraw(); }),
      checkbox("experts in the order of their favourite domain",
        (checked) => { sorting = checked; redraw(); })),
    colourLegend("share of the domain's tokens, multiple of K/E", SHARE_TICKS, shareColour),
    map,
  );
}

// ---- vocabulary

const ROLES = [["input", "input token"], ["next", "next token"], ["predicted", "predicted token"]];
const tokenName = (id) => analysis.token_names[id];

function vocabularyLines() {
  const values = (key) => layers.map((row) => row[key]);
  const series = ROLES.flatMap(([key, name], index) => {
    const colour = lineColour(index, ROLES.length);
    const control = values(`vocabulary_${key}_permuted`);
    return [
      { name, colour, values: values(`vocabulary_${key}`) },
      { name: `${name}, permuted`, colour, values: control, dashed: true },
    ];
  });
  return lineChart({
    x: layerNames,
    xTitle: "layer",
    yTitle: "largest share of a token",
    series,
    base: evenShare === null ? null : [evenShare, `K/E = ${evenShare.toFixed(3)}`],
  });
}

function vocabulary(body) {
  let [role, layer] = [0, 0];
  const rows = element("div", { className: "tall" });
  const chip = (token) => {
    const part = `${percent(token.share)} of its ${whole(token.occurrences)} occurrences`;
    return element("span", { className: "chip", title: `token ${token.token_id}: ${part}` },
      tokenName(token.token_id),
      element("small", { textContent: ` ${Math.round(100 * token.share)}%` }));
  };

  function fill() {
    const top = analysis.vocabulary.top_tokens[ROLES[role][0]][layer];
    const row = (e) => [expertName(layer, e), element("div", { className: "chips" }, top[e].map(chip))];
    const head = ["expert", "its tokens, and the share of their occurrences that it gets"];
    rows.replaceChildren(table(head, expertsOf(layer).map(row), 2));
  }

  body.append(
    vocabularyLines(),
    heading("The tokens that each expert is fondest of"),
    element("div", { className: "controls" },
      selector("by", ROLES.map(([, name]) => name), (chosen) => { role = chosen; fill(); }),
      layerSlider(layerNames, (chosen) => { layer = chosen; fill(); })),
    note("· is a space, ⏎ a line end, ⇥ a tab, ⟨E2 82⟩ bytes that are only a part of a "
      + "character."),
    rows,
  );
  fill();
}

// ---- co-activation

const PAIR_TICKS = [[0, "0"], [0.5, "½"], [1, "1×"], [2, "2×"], [3, "3×"], [4, "≥4×"]];

function coActivation(body) {
  const counts = analysis.co_activation_counts;
  if (counts === null) {
    body.append(note("Each token has one expert here (K = 1), so there are no pairs."));
    return;
  }
  // A layer with one expert a token has no pairs.
  const paired = range(layers.length).filter((l) => counts[l] !== null);
  let layer = paired[0];
  const chosen = (i) => counts[layer][i][i];
  const given = (i, j) => counts[layer][i][j] / Math.max(1, chosen(i));
  let all = 0;
  // The other choices of a token that chose i, spread over the other experts by their loads.
  const expected = (i, j) =>
    ((all / numTokens - 1) * chosen(j)) / Math.max(1, all - chosen(i));
  const times = (i, j) => given(i, j) / Math.max(expected(i, j), 1e-12);

  const map = heatMap({
    rows: Math.max(...paired.map((l) => layers[l].num_experts)),
    columns: Math.max(...paired.map((l) => layers[l].num_experts)),
    exists: (i, j) => Math.max(i, j) < layers[layer].num_experts,
    rowTitle: "given expert i",
    columnTitle: "expert j",
    rowName: String,
    columnName: String,
    square: true,
    colour: (i, j) =>
      (i === j || !chosen(i) || !chosen(j) ? "transparent" : shareColour(times(i, j))),
    tip: (i, j) => (i === j
      ? `expert ${expertName(layer, i)}: ${whole(chosen(i))} tokens`
      : `P(${j} | ${i}) = ${given(i, j).toFixed(4)}\n`
        + `${expected(i, j).toFixed(4)} if choices were independent\n`
        + `${times(i, j).toFixed(2)} ×; ${whole(counts[layer][i][j])} tokens chose both`),
  });
  const pairs = element("div");

  function fill() {
    const experts = expertsOf(layer);
    all = sum(experts.map(chosen));
    const each = experts.flatMap((i) => experts.filter((j) => j !== i).map((j) => [i, j]));
    const best = each.sort(([a, b], [c, d]) => given(c, d) - given(a, b)).slice(0, 10);
    const row = ([i, j]) => [expertName(layer, i), expertName(layer, j), given(i, j).toFixed(3),
      expected(i, j).toFixed(3), `${times(i, j).toFixed(1)} ×`];
    pairs.replaceChildren(table(["i", "j", "P(j | i)", "independent", "times"], best.map(row)));
  }

  fill();
  body.append(
    element("div", { className: "controls" },
      layerSlider(paired.map((l) => layerNames[l]), (place) => {
        layer = paired[place];
        fill();
        map.redraw();
      })),
    colourLegend("P(j | i), multiple of what independent choices give", PAIR_TICKS, shareColour),
    element("div", { className: "beside" }, map,
      element("div", {}, heading("Most often together"), pairs)),
  );
}

// ---- saturation

function overlapLines(steps, values) {
  return lineChart({
    x: steps,
    xTitle: "training step",
    yTitle: "overlap of the routes",
    series: layerNames.map((layer, l) => (
      { name: `layer ${layer}`, colour: lineColour(l, layerNames.length), values: values(l) })),
    base: evenShare === null ? null : [evenShare, `K/E = ${evenShare.toFixed(3)}, by chance`],
  });
}

function saturation(body) {
  const { checkpoints, against, training, probe_tokens: tokens } = analysis.saturation;
  if (training) {
    body.append(
      heading("During training"),
      note(`Routes of the same ${whole(training.probe_tokens)} tokens at each evaluation, `
        + `against those at step ${whole(training.steps.at(-1))}.`),
      overlapLines(training.steps, (l) => training.overlap.map((row) => row[l])),
    );
  }
  body.append(heading("Other checkpoints"));
  if (checkpoints.length === 0) {
    body.append(note("The run has kept no other one (checkpoint.every, checkpoint.keep_last)."));
    return;
  }
  body.append(note(`Routes of the same ${whole(tokens)} held-out tokens, against those of step `
    + `${whole(analysis.step)}.`));
  if (checkpoints.length > 1) {
    const steps = checkpoints.map(({ step }) => step);
    body.append(overlapLines(steps, (l) => checkpoints.map((row) => row.overlap[l])));
  }
  const row = ({ step, overlap }) => [whole(step), ...overlap.map((value) => value.toFixed(3))];
  body.append(table(["step", ...layerNames.map((layer) => `layer ${layer}`)],
    checkpoints.map(row)));
  if (against) compareInFull(body, against, tokens);
}

function compareInFull(body, against, tokens) {
  const [then, now] = [`step ${whole(against.step)}`, `step ${whole(analysis.step)}`];
  const pair = (row, key, digits) =>
    `${row[`${key}_against`].toFixed(digits)} → ${row[`${key}_analysed`].toFixed(digits)}`;
  const layerRow = (row) => [
    String(row.layer),
    row.overlap.toFixed(3),
    row.load_moved.toFixed(3),
    pair(row, "max_violation", 2),
    pair(row, "effective_experts", 1),
    pair(row, "dead_experts", 0),
    pair(row, "domain_information", 4),
  ];
  const lossRow = ([name, loss]) => [name, loss.against.toFixed(4), loss.analysed.toFixed(4),
    signed(loss.analysed - loss.against, 4)];
  body.append(
    heading(`From ${then} to ${now}`),
    note(`On the same ${whole(tokens)} tokens. Load moved: the share of assignments that go to `
      + "other experts, half the sum of absolute differences of load shares."),
    table(["layer", "overlap", "load moved", "MaxVio", "effective experts", "dead experts",
      "domain information"], against.layers.map(layerRow), 1),
    table(["domain", `loss at ${then}, nats/token`, `loss at ${now}`, "difference"],
      Object.entries(against.loss).map(lossRow), 1),
  );
}

// ---- ablation

function ablation(body) {
  const found = analysis.ablation;
  if (found.skipped) {
    body.append(note(`There is none: ${found.skipped}.`));
    return;
  }
  const names = Object.keys(found.rise_by_domain);
  const each = Object.values(found.rise_by_domain);
  let rise = found.rise;
  const highest = Math.max(1e-9, each.flat(2).reduce((most, r) => Math.max(most, Math.abs(r)), 0));
  // Most experts matter little: the root shows their differences too.
  const place = (value) => Math.sign(value) * Math.sqrt(Math.abs(value) / highest);
  const digits = highest < 0.1 ? 3 : 2;
  const ticks = [-1, -0.5, 0, 0.5, 1].map((at) =>
    [at, signed(at * Math.abs(at) * highest, digits)]);

  const map = heatMap({
    rows: layers.length,
    columns: mostExperts,
    exists: (l, e) => e < layers[l].num_experts,
    rowTitle: "layer",
    columnTitle: "expert",
    rowName: (l) => String(layerNames[l]),
    columnName: String,
    colour: (l, e) => diverging(place(rise[l][e])),
    tip: (l, e) => `without expert ${expertName(l, e)} of layer ${layerNames[l]}\n`
      + `${signed(rise[l][e], 5)} nats/token\n`
      + `it had ${whole(found.assignments[l][e])} assignments\n`
      + names.map((name, d) => `${name} ${signed(each[d][l][e], 4)}`).join("\n"),
  });
  const named = (top) => expertName(layerNames.indexOf(top.layer), top.expert);
  const row = (top) => [String(top.layer), named(top), signed(top.rise, 4), top.domain,
    signed(top.domain_rise, 4)];
  body.append(
    element("div", { className: "controls" },
      selector("on", ["mean over domains", ...names], (chosen) => {
        rise = chosen ? each[chosen - 1] : found.rise;
        map.redraw();
      })),
    colourLegend("rise of the loss, nats/token", ticks, diverging),
    map,
    heading("The ten experts that matter most"),
    table(["layer", "expert", "rise, mean over domains", "matters most for", "rise there"],
      found.top_experts.map(row)),
  );
}

// ---- text

// The expert with the largest weight, -1 without any.
function firstChoice(chosen, weights) {
  let best = -1;
  chosen.forEach((expert, k) => {
    if (expert >= 0 && (best < 0 || weights[k] > weights[best])) best = k;
  });
  return best < 0 ? -1 : chosen[best];
}

function colouredText(body) {
  let [part, layer, highlighted] = [analysis.text[0], 0, null];
  const legend = element("div", { className: "chips" });
  const reading = element("div", { className: "reading" });
  const first = (t) => firstChoice(part.experts[layer][t], part.weights[layer][t]);

  function tipOf(t) {
    const weights = part.weights[layer][t];
    const lines = part.experts[layer][t].slice(0, layers[layer].top_k).map((expert, k) =>
      (expert < 0 ? "no expert" : `expert ${expertName(layer, expert)}  ${weights[k].toFixed(3)}`));
    const id = part.token_ids[t];
    return [`${tokenName(id)}  (token ${id})`, ...lines].join("\n");
  }

  function tokenSpan(t, expert) {
    // A line ends where the text's does.
    const lines = part.shown[t].split(/(?<=⏎)/)
      .flatMap((line) => (line.endsWith("⏎") ? [line, element("br")] : [line]));
    const span = element("span", {}, lines);
    if (expert >= 0) span.style.background = expertColour(expert);
    if (highlighted !== null && expert !== highlighted) span.className = "dim";
    addTips(span, () => tipOf(t));
    return span;
  }

  function expertChip([expert, count]) {
    const name = expert < 0 ? "none" : expertName(layer, expert);
    const className = expert === highlighted ? "chip chosen" : "chip";
    const chip = element("button", { className, type: "button" }, name,
      element("small", { textContent: `  ${count}` }));
    if (expert >= 0) chip.style.background = expertColour(expert);
    chip.addEventListener("click", () => {
      highlighted = expert === highlighted ? null : expert;
      fill();
    });
    return chip;
  }

  function fill() {
    const counts = new Map();
    reading.replaceChildren();
    part.token_ids.forEach((_, t) => {
      const expert = first(t);
      counts.set(expert, (counts.get(expert) ?? 0) + 1);
      if (t > 0 && part.starts.includes(t)) reading.append(element("hr"));
      reading.append(tokenSpan(t, expert), element("wbr"));
    });
    const known = [...counts.entries()].sort((a, b) => b[1] - a[1]);
    legend.replaceChildren(...known.map(expertChip));
  }

  body.append(
    element("div", { className: "controls" },
      selector("domain", analysis.text.map(({ domain }) => domain), (chosen) => {
        [part, highlighted] = [analysis.text[chosen], null];
        fill();
      }),
      layerSlider(layerNames, (chosen) => { [layer, highlighted] = [chosen, null]; fill(); })),
    note("The experts of this layer, and how many of these tokens have each as their first "
      + "choice; choose one to see its tokens alone. ◌ is a part of the character that follows."),
    legend,
    reading,
  );
  redraws.push(fill);
}
