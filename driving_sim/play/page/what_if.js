/** The futures of left, straight and right side by side, and what truly happens below each. */

import { formatSpeed, formatSteering } from "./gauges.js";
import { decode, draw } from "./view.js";

/**
 * @typedef {object} Step One step of every branch.
 * @property {number} step
 * @property {number} steps
 * @property {number} time_s
 * @property {string[]} branches
 * @property {[number | null, number | null][]} actions speed and steering of each branch
 * @property {(number | null)[] | null} psnr_db null where the true world is not known
 * @property {Uint8Array[]} parts
 */

export class WhatIf {
  #panel = document.getElementById("what-if-panel");
  #branches = document.getElementById("branches");
  #replay = document.getElementById("replay");
  /** @type {{step: Step, pictures: ImageBitmap[]}[]} */ #kept = [];
  /** @type {ReturnType<typeof branchFigure>[]} */ #figures = [];
  /** Number of the last step that arrived. */ #arrived = -1;
  /** Place of the next step to draw. */ #next = 0;
  /** Tells the steps of this run from late ones of the last. */ #run = 0;
  #timer = 0;
  #closed = true;
  #welcome;

  constructor() {
    this.#replay.addEventListener("click", () => this.#play());
  }

  begin(welcome) {
    this.#welcome = welcome;
  }

  get isOpen() {
    return !this.#closed;
  }

  /** Keep a step that arrived; the first one of a run opens the panel. @param {Step} step */
  async add(step) {
    if (step.step <= this.#arrived || this.#arrived < 0) this.#open(step);
    this.#arrived = step.step;
    if (this.#closed) return; // the rest of a run that the driver has closed
    const place = this.#kept.push({ step, pictures: [] }) - 1;
    const run = this.#run;
    const pictures = await Promise.all(step.parts.map(decode));
    if (run === this.#run) this.#kept[place].pictures = pictures;
    else pictures.forEach((picture) => picture.close());
  }

  close() {
    if (this.#closed) return;
    const hadFocus = this.#panel.contains(document.activeElement);
    this.#panel.hidden = this.#closed = true;
    this.#clear();
    if (hadFocus) document.getElementById("stage").focus();
  }

  /** @param {Step} step */
  #open(step) {
    this.#clear();
    this.#closed = this.#panel.hidden = false;
    this.#figures = step.branches.map((name) => branchFigure(name, step, this.#welcome.model));
    this.#branches.replaceChildren(...this.#figures.map(({ figure }) => figure));
    this.#panel.dataset.truth = String(Boolean(step.psnr_db));
    this.#panel.focus({ preventScroll: true });
    this.#play();
  }

  /** Forget the pictures; they hold memory until they are closed. */
  #clear() {
    clearInterval(this.#timer);
    this.#run += 1;
    for (const { pictures } of this.#kept) pictures.forEach((picture) => picture.close());
    this.#kept = [];
  }

  /** Play from the beginning, no faster than the model's frames, nor faster than they arrive. */
  #play() {
    this.#next = 0;
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#advance(), 1000 / this.#welcome.model.fps);
  }

  #advance() {
    const kept = this.#kept[this.#next];
    if (!kept?.pictures.length) return;
    this.#draw(kept);
    this.#next += 1;
    if (this.#next === kept.step.steps) clearInterval(this.#timer);
  }

  #draw({ step, pictures }) {
    const branches = step.branches.length;
    this.#figures.forEach((figure, i) => {
      draw(figure.imagined, pictures[i]);
      figure.action.textContent = this.#describe(step.actions[i]);
      if (!step.psnr_db) return;
      draw(figure.truth, pictures[branches + i]);
      figure.psnr.textContent = `PSNR ${step.psnr_db[i]?.toFixed(1) ?? "\u2013"} dB`;
    });
    document.getElementById("what-if-time").textContent =
      `${step.time_s.toFixed(1)} s, step ${this.#next + 1} of ${step.steps}`;
  }

  /** @param {[number | null, number | null]} action */
  #describe([speed, steering]) {
    const { channels } = this.#welcome;
    const parts = [];
    if (channels.speed) parts.push(formatSpeed(speed).split(" \u00b7")[0]);
    if (channels.steering) parts.push(formatSteering(steering, channels.steering.unit));
    return parts.join(", ");
  }
}

/** Build the figure of a branch: its name, the action, the imagined view, and the true one. */
function branchFigure(name, step, model) {
  const figure = element("figure", { className: "branch" });
  const caption = element("figcaption");
  const action = element("span", { className: "action" });
  caption.append(element("strong", { textContent: capital(name) }), action);
  figure.dataset.branch = name;
  const imagined = picture(model, `${capital(name)}: what the model imagines`);
  figure.append(caption, imagined);
  if (!step.psnr_db) return { figure, action, imagined };
  const truth = picture(model, `${capital(name)}: what truly happens`);
  const psnr = element("span", { className: "psnr" });
  const below = element("p", { className: "truth" });
  below.append(element("span", { textContent: "True world" }), psnr);
  figure.append(truth, below);
  return { figure, action, imagined, truth, psnr };
}

function picture({ width, height }, label) {
  const canvas = element("canvas", { width, height });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

function capital(name) {
  return name.charAt(0).toUpperCase() + name.slice(1);
}
