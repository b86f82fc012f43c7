// The page: every section with its title and one sentence of explanation.

const { num_token_ids: numIds, least_occurrences: least } = analysis.vocabulary;
const { predicted_tokens: ablated } = analysis.ablation;

const SECTIONS = [
  ["overview", "What was analysed", overview,
    "Held-out text that the model never trained on."],
  ["load", "Load of each expert", loadMap,
    "The assignments that each expert got, in each layer: blue is less than an even share, red "
    + "is more."],
  ["domains", "Which experts read which domain", domainMap,
    "The share of a domain's tokens that go to an expert; with "
    + `K = ${numChosen} of E = ${numExperts} it is `
    + `K/E${evenShare === null ? "" : ` = ${percent(evenShare)}`} where routes know nothing of `
    + "domains and the load is even."],
  ["vocabulary", "Does an expert know its words?", vocabulary,
    `The largest share of a token's occurrences that one expert got, of the ${whole(numIds)} most `
    + `frequent tokens those with at least ${least} occurrences, the mean weighted by occurrences; `
    + "dashed, the same with the tokens dealt out at random, which is what chance gives."],
  ["together", "Which experts are chosen together", coActivation,
    "P(j | i) = N_ij / N_i, the share of the tokens of expert i that expert j got too, over all "
    + "pairs; the independent expectation shares out the other K − 1 choices of those tokens by "
    + "the loads of the other experts."],
  ["saturation", "When the routes settled", saturation,
    "Overlap is Σ |A_t ∩ B_t| / Σ |B_t| over tokens t: the share of the choices B of the "
    + "reference that another checkpoint, A, makes too; 1 where nothing has changed."],
  ["ablation", "What is lost without an expert", ablation,
    "Rise of the loss when one expert of one layer is switched off: its assignments are taken "
    + "away, the weights of the other experts of those tokens are those that the router computes "
    + "without it, later layers choose anew"
    + (ablated ? `; on ${whole(ablated)} predicted tokens.` : ".")],
  ["text", "Text, coloured by expert", colouredText,
    "The colour of a token is its first choice, the expert with the largest weight; point at a "
    + "token, or tap it, for all of its experts."],
];

function build() {
  const report = document.getElementById("report");
  const title = `${analysis.run}, step ${whole(analysis.step)}`;
  document.title = `What the experts learnt: ${title}`;
  report.append(
    element("h1", { textContent: "What the experts learnt" }),
    element("p", { className: "muted", textContent: title }),
    element("nav", {},
      SECTIONS.map(([id, name]) => element("a", { href: `#${id}`, textContent: name }))));
  for (const [id, name, fill, why] of SECTIONS) {
    const body = element("section", { id }, element("h2", { textContent: name }), note(why));
    report.append(body);
    fill(body);
  }
}

const redrawAll = () => redraws.forEach((draw) => draw());
let width = innerWidth;
build();
redrawAll();
darkScheme.addEventListener("change", redrawAll);
addEventListener("resize", () => {
  if (width !== innerWidth) redrawAll();
  width = innerWidth;
});
