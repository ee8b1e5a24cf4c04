// From what stands in a control to a value of POST /generate, by the control's data-kind. A reader returns undefined
// for a field to leave out (the server's default holds) and throws FieldError with what to do about a mistake.

export class FieldError extends Error {}

const MAX_SEED = 2n ** 63n - 1n;
const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\" };

export const READERS = {
  string: (control) => control.value || undefined,
  flag: (control) => control.checked || undefined,
  number: (control) => readNumber(control),
  // Empty means null, which asks for something: the rest of the context.
  "number-or-null": (control) => (control.value.trim() === "" ? null : readNumber(control)),
  lines: (control) => some(control.value.split("\n").filter((line) => line !== "").map(unescape)),
  ids: (control) => some(readIds(control.value)),
  bias: (control) => readBias(control.value),
  // Its type stands in the control of the same name with _type.
  grammar: (control) => readGrammar(control.form.elements[`${control.name}_type`].value, control.value),
};

function readNumber(control) {
  if (control.validity.badInput) throw new FieldError("Write a number.");
  if (control.value.trim() === "") return undefined;
  if (!control.checkValidity()) throw new FieldError(range(control));
  return Number(control.value);
}

function range({ min, max, step }) {
  const kind = step === "any" ? "a number" : "a whole number";
  if (min !== "" && max !== "") return `Write ${kind} from ${min} to ${max}.`;
  return min === "" ? `Write ${kind}.` : `Write ${kind} of at least ${min}.`;
}

/** Token ids between commas or spaces. */
export function readIds(text) {
  return text
    .split(/[\s,]+/)
    .filter((word) => word !== "")
    .map((word) => {
      if (!/^\d{1,10}$/.test(word)) throw new FieldError("Write token ids in digits, separated by commas or spaces.");
      return Number(word);
    });
}

function readBias(text) {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  const entries = lines.map((line) => {
    const match = /^\s*(\d{1,10})\s*[:=\s]\s*([+-]?\d+(?:\.\d+)?)\s*$/.exec(line);
    if (!match || Math.abs(Number(match[2])) > 100) {
      throw new FieldError("Write one token id and its bias (−100 to 100) on each line, such as 13: -5.");
    }
    return [String(Number(match[1])), Number(match[2])];
  });
  return entries.length ? Object.fromEntries(entries) : undefined;
}

/** The grammar as {type, value}, or undefined without any text. */
export function readGrammar(type, text) {
  if (text.trim() === "") return undefined;
  if (type === "choice") return { type, value: text.split("\n").filter((line) => line !== "") };
  return { type, value: type === "json_schema" ? readSchema(text) : text };
}

function readSchema(text) {
  let schema;
  try {
    schema = JSON.parse(text);
  } catch {
    throw new FieldError("Write the schema as JSON, an object in braces.");
  }
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) {
    throw new FieldError("Write the schema as JSON, an object in braces.");
  }
  return schema;
}

function unescape(line) {
  return line.replace(/\\[ntr\\]/g, (escape) => ESCAPES[escape]);
}

function some(list) {
  return list.length ? list : undefined;
}

/** The seed as a string of digits: seeds go beyond what a JavaScript number holds. Without one, a drawn one. */
export function readSeed(text) {
  const digits = text.trim();
  if (digits === "") return drawSeed();
  if (!/^\d{1,19}$/.test(digits) || BigInt(digits) > MAX_SEED) {
    throw new FieldError("Write a whole number from 0 to 2^63 − 1, or nothing for a new one each time.");
  }
  return BigInt(digits).toString();
}

/** 53 random bits, drawn here so that even a text that was stopped half-way can be had again. */
function drawSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return ((BigInt(high & 0x1fffff) << 32n) | BigInt(low)).toString();
}
