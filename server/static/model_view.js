// Which model answers, and where its weights come from.

import { byId, facts, make, round } from "./dom.js";

/** Fill the list of models, the first one chosen; keeps a choice that is still there. */
export function fillModels(select, models) {
  const chosen = select.value;
  select.replaceChildren(...models.map(({ name }) => make("option", { value: name }, name)));
  if (models.some(({ name }) => name === chosen)) select.value = chosen;
}

export function showModel(info, model) {
  const { config, provenance = {} } = model;
  byId("model-name").textContent = model.name;
  byId("model-facts").replaceChildren(
    ...facts([
      ["Parameters", count(model.num_parameters)],
      ["Architecture", config.architecture],
      ["Shape", shape(config)],
      ["Vocabulary", config.vocab_size && round(config.vocab_size)],
      ["Context", `${round(model.max_model_len ?? info.limits.max_model_len)} tokens`],
      ["Runs on", info.device_name || info.device],
      ["Precision", precision(info)],
    ]),
  );
  byId("model-provenance").replaceChildren(
    ...facts([
      ["Weights", digest(model.weights)],
      ["Run", provenance.run],
      ["Step", provenance.step === undefined ? null : round(provenance.step, 0)],
      ["Validation loss", provenance.validation_loss && round(provenance.validation_loss, 4)],
      ["Bits per byte", provenance.bits_per_byte && round(provenance.bits_per_byte, 4)],
      ["Data", digest(provenance.data)],
      ["Trained", day(provenance.created)],
    ]),
  );
  byId("model-json").textContent = JSON.stringify({ ...info, models: [model] }, null, 2);
}

function count(parameters) {
  if (!parameters) return null;
  if (parameters >= 1e9) return `${round(parameters / 1e9, 2)} billion`;
  return parameters >= 1e5 ? `${round(parameters / 1e6, 1)} million` : round(parameters, 0);
}

function shape({ num_layers: layers, hidden_size: width, num_heads: heads }) {
  return [layers && `${layers} layers`, width && `${width} wide`, heads && `${heads} heads`].filter(Boolean).join(", ");
}

function precision({ dtype, quantization }) {
  return quantization && quantization !== "none" ? `${quantization} weights, ${dtype}` : dtype;
}

/** The head of a digest; all of it in the title and among "everything the server says". */
export function digest(value) {
  if (!value) return null;
  return make("code", { title: value }, value.replace(/^sha256:/, "").slice(0, 12));
}

function day(created) {
  const date = new Date(created ?? "");
  return Number.isNaN(date.getTime()) ? null : date.toISOString().slice(0, 10);
}
