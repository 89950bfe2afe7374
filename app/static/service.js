// Requests to the service that served this page, and its answers in plain form.

const TRIES = 4;
const LONGEST_WAIT_S = 10;

let kept = "";
try {
  kept = sessionStorage.getItem("key") ?? "";
} catch {
  // A browser that lets no page keep anything: the key then lasts as long as the page.
}

export function keepKey(key) {
  kept = key;
  try {
    sessionStorage.setItem("key", key);
  } catch {
    // As above.
  }
}

export function hasKey() {
  return Boolean(kept);
}

/**
 * Ask the service. Busy answers are tried again after their Retry-After.
 * @returns {Promise<{body?: any, blob?: Blob, timing: Map<string, number>, problem?: object}>}
 */
export async function request(path, options) {
  // The service knows keys by their UTF-8 bytes; a header takes one character for each byte.
  const key = String.fromCharCode(...new TextEncoder().encode(kept));
  const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
  for (let attempt = 1; ; attempt += 1) {
    let answer;
    try {
      answer = await fetch(new URL(path, document.baseURI), { ...options, headers });
    } catch {
      return { timing: new Map(), problem: { status: 0, detail: "The service cannot be reached." } };
    }
    if ((answer.status === 429 || answer.status === 503) && attempt < TRIES) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((done) => setTimeout(done, Math.min(seconds, LONGEST_WAIT_S) * 1000));
      continue;
    }
    return read(answer);
  }
}

async function read(answer) {
  const timing = parseTiming(answer.headers.get("Server-Timing") ?? "");
  const type = answer.headers.get("Content-Type") ?? "";
  if (answer.ok && type.startsWith("image/")) {
    const blob = await answer.blob().catch(() => null); // the connection may break off inside it
    return blob ? { timing, blob } : { timing, problem: unreadable(answer.status) };
  }
  const expected = answer.ok ? "application/json" : "application/problem+json";
  const body = type.startsWith(expected) ? await answer.json().catch(() => null) : null;
  if (body === null || typeof body !== "object") return { timing, problem: unreadable(answer.status) };
  return answer.ok ? { timing, body } : { timing, problem: body };
}

/** What to say where something between the browser and the service has answered. */
export function unreadable(status) {
  return { status, detail: `The answer cannot be read (status ${status}).` };
}

function parseTiming(header) {
  const stages = header.matchAll(/(\w+);dur=([\d.]+)/g);
  return new Map([...stages].map(([, name, milliseconds]) => [name, Number(milliseconds)]));
}
