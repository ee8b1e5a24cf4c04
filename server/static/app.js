// The page put together: connect, fill, generate, stop.

import { Api } from "./api.js";
import { byId, make, wireCopy } from "./dom.js";
import { EngineView } from "./engine_view.js";
import { RequestForm } from "./form.js";
import { digest, fillModels, showModel } from "./model_view.js";
import { fromFragment, sameWeights, toFragment } from "./replay.js";
import { apiKey } from "./stored.js";
import { StreamView } from "./stream_view.js";
import { wireTheme } from "./theme.js";
import { TokenCard } from "./token_card.js";

const RETRY = 1500; // milliseconds between attempts while the model loads

const api = new Api(() => apiKey.get());
const form = new RequestForm(byId("request"));
const tokensOf = new WeakMap();
const texts = byId("texts");
const view = new StreamView(texts, byId("figures"), tokensOf);
const card = new TokenCard(byId("token-card"), byId("token-status"), texts, tokensOf, explain);

let info = null;
let running = null; // the AbortController of the request in flight
let asked = "{}"; // the body of the request whose answer is shown

// Connecting

async function connect() {
  if (await refresh()) followFragment();
}

/** Ask what is served and show it; until the server tells, ask for a key or try again. False when it did not tell. */
async function refresh() {
  try {
    info = await api.info();
  } catch (error) {
    if (error.status === 401) askForKey(apiKey.get() ? "That key does not open this server." : "");
    else setTimeout(connect, RETRY);
    return false;
  }
  byId("key-panel").hidden = true;
  byId("forget-key").hidden = !apiKey.get();
  fillModels(byId("model"), info.models);
  modelChanged();
  return true;
}

function chosenModel() {
  return info?.models.find(({ name }) => name === byId("model").value) ?? info?.models[0];
}

function modelChanged() {
  const model = chosenModel();
  if (!model) return;
  showModel(info, model);
  form.setLimits({ context: model.max_model_len ?? info.limits.max_model_len, vocabulary: model.config.vocab_size });
  const writes = (model.task ?? "generation") === "generation";
  notice(writes ? "" : "This model labels texts and writes none: send them to POST /classify.");
  setRunning(running);
}

function askForKey(message) {
  byId("key-panel").hidden = false;
  byId("forget-key").hidden = true;
  byId("key-message").textContent = message;
  byId("generate").disabled = true;
  byId("key").focus();
}

function useKey(event) {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  connect();
}

function forgetKey() {
  apiKey.set("");
  info = null;
  connect();
}

// Replay links

function followFragment() {
  const replay = fromFragment(location.hash);
  if (!replay) return;
  form.fill(replay.state);
  modelChanged();
  if (!sameWeights(replay.weights, chosenModel()?.weights)) {
    notice("This link was made with other weights than the ones served now: the text may differ.");
  }
}

function showReplay({ state, seed }, { weights, step }) {
  byId("replay").href = toFragment(state, weights);
  byId("seed-used").textContent = seed;
  byId("weights-used").replaceChildren(digest(weights) ?? "–", Number.isInteger(step) ? `, step ${step}` : "");
  byId("result").hidden = false;
}

/** The answer tells which weights wrote it: others than those on the card when the server has reloaded since. */
async function showProvenance(request) {
  if (!view.provenance) return;
  showReplay(request, view.provenance);
  if (view.provenance.weights !== chosenModel()?.weights) await refresh();
}

// Generating

async function generate() {
  const request = form.read();
  if (!request || running) return;
  notice("");
  card.close();
  setRunning(new AbortController());
  const model = chosenModel();
  showReplay(request, { weights: model.weights, step: model.provenance?.step });
  asked = request.body;
  view.start(request.count);
  say("Generating …");
  say(view.finish(await stream(request)));
  setRunning(null);
  await showProvenance(request);
}

/** Show the answer as it comes. Returns how it ended in a word, or "" when the server ended it. */
async function stream({ body }) {
  const { signal } = running;
  try {
    for await (const event of api.generate(body, signal)) view.add(event);
    return "";
  } catch (error) {
    if (signal.aborted) return "Stopped";
    fail(error);
    byId("result").hidden = !view.numTokens;
    return "Ended by an error";
  }
}

/** What the filters did to a token that is shown. They do not depend on the seed, which may be too large to parse. */
async function explain({ ids, index }) {
  const { n, stream, echo, seed, deadline_ms, ...body } = JSON.parse(asked);
  const answer = await api.explain({ ...body, tokens: ids.slice(0, index + 1), start: index, count: 1 });
  return answer.tokens[0];
}

function fail(error) {
  if (error.status === undefined) throw error;
  if (error.status === 401) {
    askForKey("That key does not open this server.");
    return;
  }
  if (error.param && form.showError(error.param, error.message)) return;
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  notice(error.message + again, error.requestId);
}

function stop() {
  running?.abort();
}

function setRunning(controller) {
  const hadFocus = document.activeElement;
  running = controller;
  const model = chosenModel();
  byId("generate").disabled = Boolean(controller) || !model || (model.task ?? "generation") !== "generation";
  byId("stop").disabled = !controller;
  if (hadFocus === byId("generate") && controller) byId("stop").focus();
  if (hadFocus === byId("stop") && !controller) byId("generate").focus();
}

// Telling

function notice(message, requestId = "") {
  const id = requestId ? [" ", make("span", { className: "quiet" }, `(${requestId})`)] : [];
  byId("notice").replaceChildren(...(message ? [message, ...id] : []));
  byId("notice").hidden = !message;
}

function say(words) {
  byId("progress").textContent = words;
}

function wire() {
  wireTheme(byId("theme"));
  wireCopy(byId("copy-link"), () => byId("replay").href);
  wireCopy(byId("copy-text"), () => [...texts.querySelectorAll(".text")].map((each) => each.textContent).join("\n\n"));
  byId("request").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("request").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  byId("stop").addEventListener("click", stop);
  byId("reset").addEventListener("click", () => form.fill(new Map([["prompt", byId("prompt").value]])));
  byId("shaded").addEventListener("change", (event) => texts.classList.toggle("unshaded", !event.target.checked));
  byId("model").addEventListener("change", modelChanged);
  byId("key-panel").addEventListener("submit", useKey);
  byId("forget-key").addEventListener("click", forgetKey);
  window.addEventListener("hashchange", followFragment);
}

wire();
connect();
new EngineView(api, refresh).run();
