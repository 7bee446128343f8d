/** The choices beside the picture: starts, sampling, and who drives. */

/**
 * @typedef {object} Start
 * @property {string} name
 * @property {string} picture
 * @property {boolean} has_recording
 */

const SAMPLING = ["temperature", "guidance", "seed"];

export class Panel {
  #starts = document.getElementById("starts");
  #plan = document.getElementById("plan");
  #takeBack = document.getElementById("take-back");
  #fields = SAMPLING.map((name) => document.getElementById(name));
  #settings = { temperature: 1, guidance: 1, seed: 0 };
  /** @type {Start[]} */ #known = [];
  #send;
  #say;

  /**
   * @param {(message: any) => boolean} send
   * @param {(text: string) => void} say
   */
  constructor(send, say) {
    this.#send = send;
    this.#say = say;
    this.#listenToStarts();
    this.#fields.forEach((field) => this.#listenToField(field));
    this.#listenToPlans();
  }

  begin({ starts, channels }) {
    this.#known = starts;
    this.#starts.replaceChildren(...starts.map(startButton));
    for (const button of document.querySelectorAll("[data-needs]")) {
      button.hidden = !channels[button.dataset.needs];
    }
    document.getElementById("script-hint").textContent = hint(channels);
    this.#plan.placeholder = example(channels);
  }

  /** Show the state that the server is in. */
  show(state) {
    this.#settings = state.settings;
    this.#fields.forEach((field) => field === document.activeElement || this.#fill(field));
    for (const button of this.#starts.children) {
      button.setAttribute("aria-pressed", String(button.dataset.start === state.start));
    }
    document.getElementById("start-name").textContent = state.start;
    const start = this.#known.find(({ name }) => name === state.start);
    document.querySelector("[data-plan=recorded]").hidden = !start?.has_recording;
    this.#showWhoDrives(state.hand_over);
  }

  takeBack() {
    this.#send({ type: "hand_over", plan: null });
  }

  #showWhoDrives(plan) {
    document.getElementById("who-drives").hidden = plan === null;
    document.getElementById("driver-name").textContent = plan ?? "";
    for (const button of document.querySelectorAll("[data-plan]")) {
      button.setAttribute("aria-pressed", String(button.dataset.plan === plan));
    }
  }

  #listenToStarts() {
    this.#starts.addEventListener("click", (event) => {
      const button = event.target.closest("[data-start]");
      if (button) this.#send({ type: "reset", start: button.dataset.start });
    });
  }

  #listenToField(field) {
    field.addEventListener("change", () => this.#change(field));
    field.addEventListener("blur", () => this.#fill(field));
    field.addEventListener("keydown", ({ key }) => {
      if (key === "Escape") this.#fill(field);
      // Leave the field, so that the keys drive again.
      if (key === "Enter" || key === "Escape") field.blur();
    });
  }

  #change(field) {
    const valid = isValid(field);
    field.setAttribute("aria-invalid", String(!valid));
    if (valid) {
      this.#settings = { ...this.#settings, [field.name]: field.valueAsNumber };
      this.#send({ type: "settings", ...this.#settings });
    } else {
      const kind = isWhole(field) ? "a whole number" : "a number";
      this.#say(`The ${field.name} must be ${kind} from ${field.min} to ${field.max}.`);
    }
  }

  #listenToPlans() {
    const handOver = (plan) => this.#send({ type: "hand_over", plan });
    document.getElementById("plans").addEventListener("click", (event) => {
      const button = event.target.closest("[data-plan]");
      if (button) handOver(button.dataset.plan);
    });
    document.getElementById("script").addEventListener("submit", (event) => {
      event.preventDefault();
      const plan = this.#plan.value.trim();
      if (!plan) return;
      handOver(plan);
      this.#plan.blur();
    });
    this.#plan.addEventListener("keydown", ({ key }) => key === "Escape" && this.#plan.blur());
    this.#takeBack.addEventListener("click", () => this.takeBack());
  }

  #fill(field) {
    field.value = String(this.#settings[field.name]);
    field.setAttribute("aria-invalid", "false");
  }
}

/** Whether a number is in its range; any fraction will do where `step` has one. */
function isValid(field) {
  const value = field.valueAsNumber;
  const inRange = value >= Number(field.min) && value <= Number(field.max);
  return inRange && (!isWhole(field) || Number.isInteger(value));
}

function isWhole(field) {
  return field.step === "1";
}

/** @param {Start} start */
function startButton(start) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.start = start.name;
  const picture = new Image();
  picture.loading = "lazy";
  picture.alt = "";
  // The server asks for its token wherever the page's address has one.
  picture.src = start.picture + location.search;
  const name = document.createElement("span");
  name.textContent = start.name;
  button.append(picture, name);
  return button;
}

function example({ speed, steering }) {
  const first = [speed && "speed=8", steering && "steer=0.1"].filter(Boolean).join(" ");
  return `${first} for 2s; ${steering ? "steer=0" : "accel=-2"} for 1s`;
}

function hint({ speed, steering }) {
  const known = [speed && "speed in m/s or accel in m/s²"];
  if (steering) known.push(`steer in ${steering.unit}, left positive`);
  return `A script sets ${known.filter(Boolean).join(", and ")}.`;
}
