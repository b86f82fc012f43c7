// What was analysed, and every number by layer, each with what it means.

const analysis = JSON.parse(document.getElementById("data").textContent);
const { domains, layers, model } = analysis;
const layerNames = layers.map((row) => row.layer);
// Layers may differ in their experts: those of one, the most that any has, and what each has.
const expertsOf = (l) => range(layers[l].num_experts);
const mostExperts = Math.max(...layers.map((row) => row.num_experts));
const ofLayers = (value) => {
  const values = layers.map(value);
  return new Set(values).size > 1 ? values.join(" / ") : String(values[0]);
};
const numExperts = ofLayers((row) => row.num_experts);
// K, or the mean where tokens differ in it.
const numChosen = ofLayers((row) =>
  (row.choices_per_token === row.top_k ? row.top_k : row.choices_per_token.toFixed(2)));
// The last experts of a layer may cost nothing: their kinds, and an expert's number with its kind.
const costless = ofLayers((row) => row.zero_computation.join(", "));
function expertName(l, e) {
  const { num_experts: number, zero_computation: kinds } = layers[l];
  const kind = kinds[e - (number - kinds.length)];
  return kind ? `${e} (${kind})` : String(e);
}
// K / E, or null where layers differ in it.
const evenShares = new Set(layers.map((row) => row.choices_per_token / row.num_experts));
const evenShare = evenShares.size > 1 ? null : [...evenShares][0];
const numTokens = sum(Object.values(analysis.tokens));

const note = (text) => element("p", { className: "why", textContent: text });
const heading = (text) => element("h3", { textContent: text });

function cards(facts) {
  const card = ([name, value]) => element("div", {},
    element("b", { textContent: value }), element("span", { textContent: name }));
  return element("div", { className: "facts" }, Object.entries(facts).map(card));
}

// Key of `layers`, name, digits, and the definition, as in moe/measures.py.
const MEASURES = [
  ["Load", [
    ["max_violation", "MaxVio", 2,
      "max_i c_i / mean(c) − 1, c_i the assignments of expert i: 0 when balanced, E/K − 1 "
      + "where K experts have all"],
    ["effective_experts", "effective experts", 1,
      "exp(H(load)), from 1 (all to one expert) to E (uniform)"],
    ["dead_experts", "dead experts", 0, "experts with no assignment in this text"],
    ["starved_experts", "starved experts", 0,
      "experts with fewer than 0.1 of the mean assignments"],
    ["gini", "Gini coefficient", 3, "of the load: 0 at balance, 1 − K/E where K experts have it all"],
    ["coefficient_of_variation", "coefficient of variation", 3,
      "standard deviation of the load over its mean, 0 at balance"],
  ]],
  ["The router's mind", [
    ["router_entropy", "router entropy", 3,
      "entropy of a token's probabilities, of log E: 1 is undecided"],
    ["router_confidence", "confidence", 3, "p₁, the largest probability of a token"],
    ["router_margin", "margin", 4,
      "p_K − p_K+1: how far the last expert that is taken lies above the first that is not"],
  ]],
  ["Domains", [
    ["domain_information", "domain information", 4,
      "I(domain; expert) / H(domain): how much of a token's domain its expert reveals, 0 to 1"],
    ["domain_information_shuffled", "… shuffled", 4,
      "the same with the domains of the sequences permuted: what chance alone gives"],
    ["domain_divergence", "Jensen-Shannon divergence", 4,
      "how far the domains' shares of experts lie apart, in nats: 0 to log(number of domains)"],
  ]],
  ["Neighbours", [
    ["repeat_rate", "repeat rate", 3,
      "share of tokens with the same first choice as the token before them in the same "
      + "document; 1/E by chance"],
  ]],
  ["Vocabulary", [
    ["vocabulary_input", "input token", 3,
      "the largest share of a token's occurrences that one expert got, the mean weighted by "
      + "occurrences: from K/E to 1, where each token has an expert that it always goes to"],
    ["vocabulary_input_permuted", "… permuted", 3,
      "the same with the tokens dealt out at random to the same routes: what chance gives"],
    ["vocabulary_next", "next token", 3, "the same by the token that comes next in the text"],
    ["vocabulary_next_permuted", "… permuted", 3, ""],
    ["vocabulary_predicted", "predicted token", 3,
      "the same by the token that the model holds for the likeliest next one"],
    ["vocabulary_predicted_permuted", "… permuted", 3, ""],
  ]],
];

function measuresTable() {
  const row = ([key, name, digits, why]) => element("tr", {},
    element("th", {}, name, element("small", { textContent: why })),
    layers.map((layer) => element("td", {
      textContent: layer[key].toFixed(digits),
      title: String(layer[key]),
    })));
  const group = ([title, measures]) => [
    element("tr", { className: "group" },
      element("th", { textContent: title, colSpan: layers.length + 1 })),
    ...measures.map(row),
  ];
  const names = ["measure", ...layerNames.map((layer) => `layer ${layer}`)];
  const head = names.map((name) => element("th", { textContent: name }));
  return element("div", { className: "scroll" }, element("table", { className: "measures" },
    element("thead", {}, element("tr", {}, head)),
    element("tbody", {}, MEASURES.flatMap(group))));
}

function overview(body) {
  const shared = model.num_shared_experts ? `, ${model.num_shared_experts} shared` : "";
  const millions = (number) => (number / 1e6).toFixed(2);
  const loss = analysis.loss;
  body.append(
    cards({
      "training tokens": whole(analysis.trained_tokens),
      "held-out tokens analysed": whole(numTokens),
      "experts in each routed layer": `${numExperts}${shared}`,
      "of these a token has": numChosen,
      "layers, routed / all": `${layers.length} / ${model.num_layers}`,
      "million parameters, active / all":
        `${millions(model.active_parameters)} / ${millions(model.parameters)}`,
      "router": model.router,
      "sequence length, tokens": whole(analysis.seq_len),
      "read in float32 on": analysis.device,
    }),
    ...(costless ? [note(`The last experts of each layer cost nothing: ${costless}.`)] : []),
    heading("Loss on held-out text"),
    table(["domain", "loss, nats/token", "tokens"], [
      ...domains.map((name) => [name, loss.domains[name].toFixed(4), whole(analysis.tokens[name])]),
      ["mean over domains", loss.mean.toFixed(4), whole(numTokens)],
    ], 1),
    heading("Every number by layer"),
    measuresTable(),
  );
}
