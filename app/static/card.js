// One image and what the service says of it.

import { request, unreadable } from "./service.js";

const TOP_K = 5;
const ADVICE = {
  0: "Is it running?",
  413: "Try a smaller image.",
  415: "Save it as JPEG or PNG and try again.",
  429: "It has much to do; try again in a moment.",
  503: "It is just stopping or starting; try again in a moment.",
};

export class Card {
  /** @param {File} file @param {(card: Card) => void} onAgain asked to be classified once more */
  constructor(file, onAgain) {
    this.file = file;
    this.isDone = false;
    this.isGone = false;
    this.problem = null;
    this.element = document.querySelector("#card").content.firstElementChild.cloneNode(true);
    this.photo = URL.createObjectURL(file);
    this.overlay = null;
    const image = this.find("img");
    image.src = this.photo;
    image.alt = file.name;
    image.addEventListener("error", () => (image.alt = `${file.name} (no preview)`));
    this.find(".name").textContent = this.find(".name").title = file.name;
    this.find(".why").addEventListener("click", () => this.explain());
    this.find(".again").addEventListener("click", () => onAgain(this));
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** Ask the service and show its answer; never throws. */
  async classify() {
    this.isDone = false;
    this.problem = null;
    this.find(".waiting").hidden = false;
    this.find(".problem").hidden = true;
    this.find(".problem").removeAttribute("role"); // the page's status tells of it
    if (document.activeElement === this.find(".again")) this.element.focus(); // the button goes
    this.find(".again").hidden = true;
    const answer = await this.post(`classify?top_k=${TOP_K}`);
    const fewer = answer.problem?.status === 422 && answer.problem.detail?.startsWith?.("top_k");
    this.show(fewer ? await this.post("classify") : answer);
  }

  async post(path, headers = {}) {
    try {
      await this.file.slice(0, 1).arrayBuffer();
    } catch {
      return { timing: new Map(), problem: { detail: "This file cannot be read any more, or is a folder." } };
    }
    const type = this.file.type || "application/octet-stream";
    return request(path, {
      method: "POST",
      body: this.file,
      headers: { "Content-Type": type, ...headers },
    });
  }

  show({ body, problem, timing }) {
    this.isDone = true;
    this.find(".waiting").hidden = true;
    if (problem) return this.showProblem(problem);
    if (!body.image || !Array.isArray(body.predictions)) return this.showProblem(unreadable(200));
    const { width, height, format } = body.image;
    this.find(".size").textContent = `${width} × ${height} ${format}`;
    this.find(".predictions").replaceChildren(...body.predictions.map(bar));
    this.find(".why").hidden = false;
    this.showTiming(timing);
  }

  showProblem(problem) {
    this.problem = problem;
    this.say(problem);
    this.find(".again").hidden = problem.status === 415 || problem.status === 422;
  }

  say(problem) {
    const text = [problem.detail ?? problem.title, ADVICE[problem.status]].filter(Boolean).join(" ");
    this.find(".problem").textContent = text;
    this.find(".problem").hidden = false;
  }

  showTiming(timing) {
    const total = timing.get("total");
    if (!total) return;
    const names = ["decode", "queue", "infer"];
    const rest = total - names.reduce((sum, name) => sum + (timing.get(name) ?? 0), 0);
    const stages = [...names.map((name) => [name, timing.get(name) ?? 0]), ["other", Math.max(rest, 0)]];
    this.find(".stages").replaceChildren(
      ...stages.map(([name, milliseconds]) => {
        const part = Object.assign(document.createElement("span"), { className: name });
        part.style.flexGrow = milliseconds;
        return part;
      }),
    );
    this.find(".legend").replaceChildren(
      ...[...stages, ["total", total]].map(([name, milliseconds]) =>
        Object.assign(document.createElement(name === "total" ? "strong" : "span"), {
          className: name,
          textContent: `${name} ${milliseconds.toFixed(1)} ms`,
        }),
      ),
    );
    this.find(".timing").hidden = false;
  }

  /** Show which patches speak for the label; a second click shows the photo again. */
  async explain() {
    const button = this.find(".why");
    if (button.getAttribute("aria-disabled") === "true") return;
    if (!this.overlay) {
      this.find(".problem").hidden = true;
      button.setAttribute("aria-disabled", "true"); // `disabled` would take the keyboard's focus away
      button.textContent = "Looking…";
      const { blob, problem } = await this.post("explain", { Accept: "image/png" });
      button.removeAttribute("aria-disabled");
      button.textContent = "Why this label?";
      if (this.isGone) return; // nobody would let go of the picture
      if (!blob) return this.sayUnexplained(problem ?? unreadable(200)); // the label still stands
      this.overlay = URL.createObjectURL(blob);
    }
    const shown = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!shown));
    const image = this.find("img");
    image.src = shown ? this.photo : this.overlay;
    image.alt = shown ? this.file.name : `${this.file.name}: what speaks for the label is bright`;
  }

  sayUnexplained(problem) {
    this.find(".problem").setAttribute("role", "alert");
    this.say(problem);
    if (problem.status === 401) this.element.dispatchEvent(new Event("unauthorized", { bubbles: true }));
  }

  remove() {
    this.isGone = true;
    this.element.remove();
    URL.revokeObjectURL(this.photo);
    if (this.overlay) URL.revokeObjectURL(this.overlay);
  }
}

function bar({ label, score }) {
  const row = document.createElement("li");
  const percent = score * 100;
  const fill = Object.assign(document.createElement("span"), { className: "fill" });
  fill.style.width = `${percent}%`;
  const name = Object.assign(document.createElement("span"), { className: "label", textContent: label });
  const value = Object.assign(document.createElement("span"), {
    className: "score",
    textContent: `${percent < 0.05 ? "< 0.1" : percent.toFixed(1)} %`,
  });
  row.append(fill, name, " ", value);
  return row;
}
