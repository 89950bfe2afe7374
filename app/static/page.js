// The page: images in by drop, paste, choice or camera; one card for each.

import { takePhoto } from "./camera.js";
import { Card } from "./card.js";
import { hasKey, keepKey, request } from "./service.js";

// As many requests at once as keep a small service busy; the others wait here rather than there.
const AT_ONCE = 4;
// Cards hold their images: a browser tab has limits, too.
const MOST_CARDS = 200;

const one = (selector) => document.querySelector(selector);
const drop = one("#drop");
const results = one("#results");
const cards = new Set();
const waiting = [];
let running = 0;
let leftOut = ""; // of the files that came last
let lastName = "photo.jpg";
let isViewing = false;

function add(files) {
  const images = [...files].filter((file) => file.type === "" || file.type.startsWith("image/"));
  const undone = [...cards].filter((card) => !card.isDone).length;
  const taken = images.slice(0, Math.max(0, MOST_CARDS - undone));
  leftOut = [
    images.length < files.length &&
      `${files.length - images.length} of the files are no images and were left out.`,
    taken.length < images.length &&
      `${images.length - taken.length} were left out: this page holds ${MOST_CARDS} images.`,
  ].filter(Boolean).join(" ");
  for (const file of taken) {
    const card = new Card(file, (again) => enqueue(again));
    cards.add(card);
    results.prepend(card.element);
    enqueue(card);
  }
  const done = [...cards].filter((card) => card.isDone);
  done.slice(0, Math.max(0, cards.size - MOST_CARDS)).forEach(remove);
  if (taken.length) showCommand(taken[0].name);
  tellProgress();
}

function enqueue(card) {
  waiting.push(card);
  while (running < AT_ONCE && waiting.length) work();
  tellProgress();
}

async function work() {
  running += 1;
  try {
    while (waiting.length) {
      const card = waiting.shift();
      await card.classify();
      if (card.problem?.status === 401) one("#access").hidden = false;
      tellProgress();
    }
  } finally {
    running -= 1; // whatever happens: the others would else wait for ever
  }
}

function remove(card) {
  cards.delete(card);
  card.remove();
}

function tell(text) {
  one("#status").textContent = text;
}

function tellProgress() {
  const done = [...cards].filter((card) => card.isDone).length;
  const failed = [...cards].filter((card) => card.problem).length;
  one("#clear").hidden = cards.size === 0;
  if (cards.size === 0) return tell(leftOut || "Nothing classified yet.");
  const trouble = failed ? `, ${failed} with a problem` : "";
  const progress = `${done} of ${cards.size} ${cards.size === 1 ? "image" : "images"} done${trouble}.`;
  tell(`${progress} ${leftOut}`.trim());
}

function showCommand(name) {
  lastName = name;
  // For curl a comma or semicolon ends a name outside of quotes.
  const quoted = `"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
  const field = /^[\w.-]+$/.test(name) ? `file=@${name}` : `'file=@${quoted.replaceAll("'", "'\\''")}'`;
  const key = hasKey() ? '-H "X-API-Key: $KEY" ' : "";
  one("#command").textContent = `curl ${key}-F ${field} ${new URL("classify", document.baseURI)}`;
}

/** Show the model card; return whether the service let us see it, without a key or with this one. */
async function showModel() {
  const answer = await request("model", { method: "GET" });
  one("#access").hidden = answer.problem?.status !== 401;
  if (answer.problem?.status === 401) return false;
  if (answer.problem) {
    one("#model").replaceChildren(
      Object.assign(document.createElement("dt"), { textContent: "Not shown" }),
      Object.assign(document.createElement("dd"), { textContent: answer.problem.detail }),
    );
    return true;
  }
  const card = answer.body;
  const { image_size: size, patch_size: patch } = card.preprocessing;
  const provider = card.execution_provider.replace("ExecutionProvider", "");
  const facts = {
    Name: card.name,
    Version: card.version,
    Variant: card.variant,
    Parameters: card.parameters.toLocaleString("en"),
    Sees: `${size} × ${size} pixels in ${(size / patch) ** 2} patches of ${patch} × ${patch}`,
    Precision: card.precision,
    "Runs on": provider,
  };
  one("#model").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    ]),
  );
  one("summary").textContent = `The ${card.labels.length.toLocaleString("en")} labels it knows`;
  one("#labels").replaceChildren(
    ...card.labels.map((label) =>
      Object.assign(document.createElement("li"), { textContent: label }),
    ),
  );
  return true;
}

for (const input of [one("#files"), one("#snapshot")]) {
  input.addEventListener("change", () => {
    add(input.files);
    input.value = ""; // the same file may be chosen again
  });
}
one("#choose").addEventListener("click", () => one("#files").click());
one("#camera").addEventListener("click", async () => {
  const touch = matchMedia("(pointer: coarse)").matches;
  if (touch || !navigator.mediaDevices) return one("#snapshot").click();
  if (isViewing) return; // a second stream would stay on
  isViewing = true;
  try {
    const photo = await takePhoto(one("#viewfinder"));
    if (photo) add([photo]);
  } catch (error) {
    tell(`The camera cannot be used: ${error.message}.`);
  } finally {
    isViewing = false;
  }
});

for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault(); // or the browser would show the image instead of the page
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  add(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});

one("#clear").addEventListener("click", () => {
  waiting.length = 0;
  for (const card of cards) remove(card);
  leftOut = "";
  tellProgress();
  one("#choose").focus(); // the button that had the focus is gone
});
results.addEventListener("unauthorized", () => (one("#access").hidden = false));
one("#copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(one("#command").textContent);
    one("#copy").textContent = "Copied";
  } catch {
    // Without HTTPS a page may not write to the clipboard: select it for the person to copy.
    getSelection().selectAllChildren(one("#command"));
    one("#copy").textContent = "Selected";
  }
  setTimeout(() => (one("#copy").textContent = "Copy"), 2000);
});
one("#access").addEventListener("submit", async (event) => {
  event.preventDefault();
  keepKey(one("#key").value);
  one("#unknown").textContent = "";
  if (!(await showModel())) {
    one("#unknown").textContent = "The service does not know this key.";
    one("#key").select();
    return;
  }
  showCommand(lastName);
  one("#choose").focus();
  for (const card of cards) if (card.problem?.status === 401) enqueue(card);
});

showCommand(lastName);
showModel();
