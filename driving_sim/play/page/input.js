/**
 * What the driver holds: keys, gamepad and the drawn wheel and pedals become one `control` message.
 */

/** Analog inputs are sent at most so often. */
const ANALOG_MS = 20;
const REPEAT_MS = 1000;
const DEAD_ZONE = 0.08;

const DRIVING_KEYS = {
  arrowleft: { wheel: 1 }, a: { wheel: 1 },
  arrowright: { wheel: -1 }, d: { wheel: -1 },
  arrowup: { throttle: 1 }, w: { throttle: 1 },
  arrowdown: { brake: 1 }, s: { brake: 1 },
};
const COMMAND_KEYS = {
  " ": "pause", ".": "step", r: "reset", b: "back", backspace: "back", h: "heat", q: "what-if",
  k: "record", t: "take-back", p: "scale", "?": "help", escape: "close",
};

/**
 * @typedef {object} Held
 * @property {number} wheel 1 is fully left, -1 fully right
 * @property {number} throttle from 0 to 1
 * @property {number} brake from 0 to 1
 */

const NEUTRAL = Object.freeze({ wheel: 0, throttle: 0, brake: 0 });

/** Adds up what every source holds, and sends it when it changes. */
export class Driver {
  /** @type {Map<string, Partial<Held>>} */ #sources = new Map();
  /** @type {Held} */ #sent = NEUTRAL;
  #sent_ms = -Infinity;
  #pending = 0;
  #learned = { speed: true, steering: true };
  #send;
  #show;

  /**
   * @param {(message: any) => boolean} send
   * @param {(held: Held) => void} show shows on the page what is held
   */
  constructor(send, show) {
    this.#send = send;
    this.#show = show;
    setInterval(() => isNeutral(this.#sent) || this.#sendNow(), REPEAT_MS);
  }

  /** A session begins or goes on: it may know something else than what is held now. */
  begin(channels) {
    this.#learned = { speed: Boolean(channels.speed), steering: Boolean(channels.steering) };
    this.#sendNow();
  }

  /**
   * Say what a source holds; undefined lets it go.
   * @param {string} source
   * @param {Partial<Held>} [held]
   * @param {{analog?: boolean}} [options]
   */
  hold(source, held, { analog = false } = {}) {
    if (held) this.#sources.set(source, held);
    else this.#sources.delete(source);
    this.#update(analog);
  }

  releaseAll() {
    this.#sources.clear();
    this.#update();
  }

  /** Tell the server that the driver is still there. */
  stay() {
    this.#sendNow();
  }

  /** @returns {Held} */
  #combined() {
    const held = [...this.#sources.values()];
    const most = (pedal) => Math.max(0, ...held.map((source) => source[pedal] ?? 0));
    const turned = held.reduce((sum, source) => sum + (source.wheel ?? 0), 0);
    return {
      wheel: this.#learned.steering ? rounded(Math.min(1, Math.max(-1, turned))) : 0,
      throttle: this.#learned.speed ? rounded(most("throttle")) : 0,
      brake: this.#learned.speed ? rounded(most("brake")) : 0,
    };
  }

  #update(analog = false) {
    const held = this.#combined();
    this.#show(held);
    if (same(held, this.#sent)) return;
    const wait_ms = analog ? this.#sent_ms + ANALOG_MS - performance.now() : 0;
    if (wait_ms <= 0) this.#sendNow();
    else this.#pending ||= setTimeout(() => this.#sendNow(), wait_ms);
  }

  #sendNow() {
    clearTimeout(this.#pending);
    this.#pending = 0;
    const held = this.#combined();
    const stamp = performance.now();
    if (!this.#send({ type: "control", ...held, stamp })) return;
    this.#sent = held;
    this.#sent_ms = stamp;
  }
}

/**
 * Listen to the keyboard: driving keys are held, the others are commands.
 * @param {Driver} driver
 * @param {(command: string) => void} command
 */
export function listenToKeys(driver, command) {
  window.addEventListener("keydown", (event) => {
    // Under macOS, a letter that is held with Meta never comes up again.
    if (event.key === "Meta") driver.releaseAll();
    if (isForSomethingElse(event)) return;
    const key = keyOf(event);
    // A source is the physical key: `key` may differ between press and release, `code` does not.
    if (DRIVING_KEYS[key]) driver.hold(event.code, DRIVING_KEYS[key]);
    else if (!COMMAND_KEYS[key]) return;
    else if (!event.repeat) command(COMMAND_KEYS[key]);
    event.preventDefault(); // keep the page from scrolling or going back
  });
  window.addEventListener("keyup", (event) => driver.hold(event.code));
}

/** @param {KeyboardEvent} event */
function isForSomethingElse(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return true;
  if (document.querySelector("dialog[open]")) return true;
  const target = event.target instanceof Element ? event.target : document.body;
  if (target.closest("input, textarea, select")) return true;
  return event.key === " " && Boolean(target.closest("button, summary"));
}

/** @param {KeyboardEvent} event */
function keyOf({ key, code }) {
  // Where a key gives no Latin letter, as on a Greek keyboard, go by its place.
  const latin = key.length > 1 || /[ -~]/.test(key);
  return (latin ? key : code.replace("Key", "")).toLowerCase();
}

/**
 * Read a gamepad with the standard layout while one is connected.
 * @param {Driver} driver
 * @param {(text: string) => void} say
 */
export function listenToGamepads(driver, say) {
  let reading = false;
  const read = () => {
    const pads = navigator.getGamepads().filter((pad) => pad?.mapping === "standard");
    const [pad] = pads;
    // A page without focus would drive on with what the pad held last.
    const held = pad && document.hasFocus() ? gamepadHolds(pad) : NEUTRAL;
    driver.hold("gamepad", isNeutral(held) ? undefined : held, { analog: true });
    reading = Boolean(pad);
    if (reading) requestAnimationFrame(read);
  };
  window.addEventListener("gamepadconnected", ({ gamepad }) => {
    if (gamepad.mapping !== "standard") {
      say("A gamepad is here, but not with the standard layout, so it cannot drive.");
      return;
    }
    say("Gamepad found: the left stick steers, the right trigger is throttle, the left one brake.");
    if (!reading) read();
  });
}

/** @param {Gamepad} pad */
function gamepadHolds(pad) {
  return {
    wheel: -pastDeadZone(pad.axes[0]),
    throttle: pastDeadZone(pad.buttons[7].value),
    brake: pastDeadZone(pad.buttons[6].value),
  };
}

function pastDeadZone(value) {
  const beyond = Math.max(0, Math.abs(value) - DEAD_ZONE) / (1 - DEAD_ZONE);
  return Math.sign(value) * beyond;
}

/** Steps of 1 %, so that a trembling stick sends nothing. Never -0. */
function rounded(value) {
  return Math.round(value * 100) / 100 + 0;
}

function same(one, other) {
  return one.wheel === other.wheel && one.throttle === other.throttle && one.brake === other.brake;
}

function isNeutral(held) {
  return same(held, NEUTRAL);
}
