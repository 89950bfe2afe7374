// The page: images in by drop, paste, choice or camera; one card for each.

import { takePhoto } from "./camera.js";
import { Card } from "./card.js";
import { keepKey, request } from "./service.js";

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

function add(files) {
  const images = [...files].filter((file) => file.type === "" || file.type.startsWith("image/"));
  for (const file of images) {
    const card = new Card(file, (again) => enqueue(again));
    cards.add(card);
    results.prepend(card.element);
    enqueue(card);
  }
  while (cards.size > MOST_CARDS) {
    const [oldest] = cards;
    remove(oldest);
  }
  if (images.length) showCommand(images[0].name);
  if (images.length < files.length) {
    tell(`${files.length - images.length} of the files are no images and were left out.`);
  }
}

function enqueue(card) {
  waiting.push(card);
  while (running < AT_ONCE && waiting.length) work();
  tellProgress();
}

async function work() {
  running += 1;
  while (waiting.length) {
    const card = waiting.shift();
    await card.classify();
    if (card.problem?.status === 401) one("#access").hidden = false;
    tellProgress();
  }
  running -= 1;
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
  if (cards.size === 0) return tell("Nothing classified yet.");
  const trouble = failed ? `, ${failed} with a problem` : "";
  tell(`${done} of ${cards.size} ${cards.size === 1 ? "image" : "images"} done${trouble}.`);
}

function showCommand(name) {
  const file = /^[\w.-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
  const url = new URL("classify", document.baseURI);
  one("#command").textContent = `curl -F file=@${file} ${url}`;
}

async function showModel() {
  const answer = await request("model", { method: "GET" });
  if (answer.problem) {
    one("#access").hidden = answer.problem.status !== 401;
    return;
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
  try {
    const photo = await takePhoto(one("#viewfinder"));
    if (photo) add([photo]);
  } catch (error) {
    tell(`The camera cannot be used: ${error.message}.`);
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
  tellProgress();
});
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
one("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(one("#key").value);
  one("#access").hidden = true;
  showModel();
  for (const card of cards) if (card.problem?.status === 401) enqueue(card);
});

showCommand("photo.jpg");
showModel();
