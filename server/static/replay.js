// Replay links: the form's state in the URL's fragment, which never leaves the browser, and the weights that wrote the
// text, so that the page can say when others are being served.

const WEIGHTS = "weights";
const DIGEST_LENGTH = 16;

/** `state` is a Map of control names to texts, `weights` the digest of the model that answers. */
export function toFragment(state, weights) {
  const parameters = new URLSearchParams([...state]);
  if (weights) parameters.set(WEIGHTS, shorten(weights));
  return `#${parameters}`;
}

/** {state, weights} from a fragment, or null when it holds no prompt. */
export function fromFragment(fragment) {
  const state = new Map(new URLSearchParams(fragment.replace(/^#/, "")));
  if (!state.has("prompt")) return null;
  const weights = state.get(WEIGHTS) ?? "";
  state.delete(WEIGHTS);
  return { state, weights };
}

export function sameWeights(short, digest) {
  return !short || !digest || shorten(digest) === short;
}

function shorten(digest) {
  return digest.replace(/^sha256:/, "").slice(0, DIGEST_LENGTH);
}
