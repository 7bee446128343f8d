/** The numbers under the picture: speed, steering, time, frames/s and latency. */

const RATE_WINDOW_MS = 2000;
/** The first frames of a drive come together, which is no rate. */
const LEAST_SPAN_S = 0.9;
const LATENCIES = 100;
/** The world runs slower once the rate stays under this share of the model's for so long. */
const SLOW_SHARE = 0.9;
const SLOW_MS = 3000;
const UNLEARNED = "never learned";

export class Gauges {
  #channels = { speed: null, steering: null };
  #fps = 1;
  /** @type {number[]} Times at which the last frames were drawn. */ #drawn_ms = [];
  /** @type {number[]} */ #latencies_ms = [];
  /** Stamp of the newest control that a frame obeyed. */ #stamp_ms = 0;
  /** @type {number | null} */ #slow_since_ms = null;
  #paused = true;
  /** When the drive last went on. */ #driving_since_ms = 0;
  #slow = document.getElementById("slow");

  constructor() {
    setInterval(() => this.#showRate(), 500);
  }

  begin({ channels, model }) {
    this.#channels = channels;
    this.#fps = model.fps;
    write("fps", `of ${short(model.fps)}`);
    write("speed", channels.speed ? "" : UNLEARNED);
    write("wheel-value", channels.steering ? "" : UNLEARNED);
    const precision = model.precision ? `, ${model.precision}` : "";
    write("model", `${model.name}${precision}`);
    document.getElementById("model").title = `Fingerprint ${model.fingerprint}`;
  }

  /** A frame was drawn just now. */
  show(header) {
    const now_ms = performance.now();
    if (this.#channels.speed) write("speed", formatSpeed(header.speed));
    if (this.#channels.steering) {
      write("wheel-value", formatSteering(header.steering, this.#channels.steering.unit));
    }
    write("time", `${header.time_s.toFixed(1)} s`);
    this.#drawn_ms.push(now_ms);
    this.#showRate();
    if (this.#paused) return;
    this.#judgePace(header.rate, now_ms);
    // An input from before a pause had to wait for its end, which is no latency.
    if (header.stamp === null) return; // no control led to this frame
    const stamp = header.stamp;
    const isNew = stamp !== this.#stamp_ms;
    this.#stamp_ms = stamp;
    const isFresh = stamp >= this.#driving_since_ms && stamp <= now_ms;
    if (isNew && isFresh) this.#addLatency(now_ms - stamp);
  }

  /** The drive stops or goes on, so the pace is judged anew. */
  setPaused(paused) {
    if (paused === this.#paused) return;
    this.#paused = paused;
    this.#driving_since_ms = performance.now();
    this.#drawn_ms = [];
    this.#slow_since_ms = null;
    this.#slow.hidden = true;
    this.#showRate();
  }

  #showRate() {
    const oldest_ms = performance.now() - RATE_WINDOW_MS;
    this.#drawn_ms = this.#drawn_ms.filter((time_ms) => time_ms >= oldest_ms);
    const between = this.#drawn_ms.length - 1;
    const span_s = (this.#drawn_ms[between] - this.#drawn_ms[0]) / 1000;
    write("rate-now", span_s > LEAST_SPAN_S ? (between / span_s).toFixed(1) : "\u2013");
  }

  #addLatency(latency_ms) {
    this.#latencies_ms = [...this.#latencies_ms, latency_ms].slice(-LATENCIES);
    const sorted = [...this.#latencies_ms].sort((a, b) => a - b);
    const quantile = (share) => Math.round(sorted[Math.ceil(share * sorted.length) - 1]);
    write("latency-median", `${quantile(0.5)} ms`);
    write("latency-95", `95 %: ${quantile(0.95)} ms`);
  }

  /** Say when the machine has been slower than the model for a while; null is no rate yet. */
  #judgePace(rate, now_ms) {
    if (rate === null || rate >= SLOW_SHARE * this.#fps) {
      this.#slow_since_ms = null;
      this.#slow.hidden = true;
      return;
    }
    this.#slow_since_ms ??= now_ms;
    if (now_ms - this.#slow_since_ms < SLOW_MS) return;
    write("pace", `${rate.toFixed(1)} of ${short(this.#fps)} frames/s`);
    this.#slow.hidden = false;
  }
}

/** @param {number | null} speed_mps */
export function formatSpeed(speed_mps) {
  if (speed_mps === null) return "unknown";
  return `${speed_mps.toFixed(1)} m/s \u00b7 ${Math.round(speed_mps * 3.6)} km/h`;
}

/**
 * Steering in the model's unit, or in degrees for an angle; with the side, as signs differ.
 * @param {number | null} steering left positive
 * @param {string} unit
 */
export function formatSteering(steering, unit) {
  if (steering === null) return "unknown";
  const isAngle = unit === "rad";
  const size = Math.abs(isAngle ? (steering * 180) / Math.PI : steering);
  const digits = size.toFixed(isAngle ? 1 : 3);
  const value = isAngle ? `${digits}\u00b0` : `${digits} ${unit}`;
  if (Number(digits) === 0) return value;
  return `${value} ${steering > 0 ? "left" : "right"}`;
}

/** A number without needless zeros. */
function short(value) {
  return String(Number(value.toFixed(1)));
}

function write(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}
