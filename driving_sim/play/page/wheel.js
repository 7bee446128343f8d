/** The drawn wheel and pedals, for fingers and the mouse; several pointers work at once. */

/** How far the drawn wheel turns for full lock. */
const LOCK_DEG = 100;
/** Nearer to the hub than this share of the radius, a finger's angle means nothing. */
const HUB = 0.2;

/** @typedef {import("./input.js").Driver} Driver */
/** @typedef {import("./input.js").Held} Held */

export class Wheel {
  #box = document.getElementById("wheel");
  #rim = document.getElementById("rim");
  #mark = document.getElementById("held-mark");
  /** Steering for full lock, in the model's unit. */ #limit = 1;
  /** @type {number | null} */ #pointer = null;
  /** Angle of the finger around the hub, in degrees. */ #angle = 0;
  /** How far the finger has turned the wheel, in degrees, left positive. */ #turned = 0;
  #driver;

  /** @param {Driver} driver */
  constructor(driver) {
    this.#driver = driver;
    this.#box.addEventListener("pointerdown", (event) => this.#take(event));
    this.#box.addEventListener("pointermove", (event) => this.#turn(event));
    this.#box.addEventListener("lostpointercapture", (event) => this.#let(event));
  }

  /** @param {{limit: number} | null} steering channel of the model */
  begin(steering) {
    this.#limit = steering?.limit || 1;
    document.getElementById("wheel-box").dataset.learned = String(Boolean(steering));
    this.showObeyed(0);
  }

  /** Turn the rim to the steering that the newest frame obeyed. */
  showObeyed(steering) {
    const share = Math.max(-1.2, Math.min(1.2, (steering ?? 0) / this.#limit));
    rotate(this.#rim, share);
  }

  /** Turn the mark to where the driver holds the wheel. @param {Held} held */
  showHeld({ wheel }) {
    rotate(this.#mark, wheel);
    this.#box.dataset.held = String(wheel !== 0);
    const percent = Math.round(Math.abs(wheel) * 100);
    const side = wheel > 0 ? "left" : "right";
    this.#box.setAttribute("aria-valuenow", String(Math.round(-wheel * 100)));
    this.#box.setAttribute("aria-valuetext", percent ? `${percent} % ${side}` : "straight");
  }

  release() {
    if (this.#pointer !== null) this.#box.releasePointerCapture(this.#pointer);
  }

  /** @param {PointerEvent} event */
  #take(event) {
    if (this.#pointer !== null || event.button > 0) return;
    this.#pointer = event.pointerId;
    this.#box.setPointerCapture(event.pointerId);
    this.#angle = this.#around(event).angle;
    this.#turned = 0;
  }

  /** @param {PointerEvent} event */
  #turn(event) {
    if (event.pointerId !== this.#pointer) return;
    const { angle, distance } = this.#around(event);
    if (distance < HUB) return;
    const change = ((angle - this.#angle + 540) % 360) - 180; // the short way round
    this.#angle = angle;
    this.#turned = Math.max(-LOCK_DEG, Math.min(LOCK_DEG, this.#turned - change));
    this.#driver.hold("wheel", { wheel: this.#turned / LOCK_DEG }, { analog: true });
  }

  /** @param {PointerEvent} event */
  #let(event) {
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = null;
    this.#driver.hold("wheel");
  }

  /** Clockwise angle of a pointer around the hub, and its distance in radii. */
  #around({ clientX, clientY }) {
    const { left, top, width, height } = this.#box.getBoundingClientRect();
    const [x, y] = [clientX - left - width / 2, clientY - top - height / 2];
    return { angle: (Math.atan2(y, x) * 180) / Math.PI, distance: Math.hypot(x, y) / (width / 2) };
  }
}

/** Throttle and brake: pressed as long as a pointer or a key is down on them. */
export class Pedals {
  #pedals = ["throttle", "brake"].map((name) => document.getElementById(name));

  /** @param {Driver} driver */
  constructor(driver) {
    for (const pedal of this.#pedals) {
      const press = () => driver.hold(pedal.id, { [pedal.id]: 1 });
      const release = () => driver.hold(pedal.id);
      pedal.addEventListener("pointerdown", (event) => {
        if (event.button > 0) return;
        pedal.setPointerCapture(event.pointerId);
        press();
      });
      pedal.addEventListener("lostpointercapture", release);
      pedal.addEventListener("contextmenu", (event) => event.preventDefault());
      pedal.addEventListener("keydown", ({ key }) => (key === " " || key === "Enter") && press());
      pedal.addEventListener("keyup", release);
      pedal.addEventListener("blur", release);
    }
  }

  /** @param {object | null} speed channel of the model */
  begin(speed) {
    document.getElementById("pedals").dataset.learned = String(Boolean(speed));
  }

  /** @param {Held} held */
  show(held) {
    for (const pedal of this.#pedals) {
      pedal.setAttribute("aria-pressed", String(held[pedal.id] > 0));
    }
  }
}

/** Rotate a part of the drawn wheel; `share` of full lock is left positive. */
function rotate(part, share) {
  part.style.transform = `rotate(${(-share * LOCK_DEG).toFixed(1)}deg)`;
}
