/** The page of `drivesim play`: wires the connection, the driver's inputs and what is shown. */

import { Connection } from "./connection.js";
import { Gauges } from "./gauges.js";
import { Driver, listenToGamepads, listenToKeys } from "./input.js";
import { Panel } from "./panel.js";
import { View } from "./view.js";
import { WhatIf } from "./what_if.js";
import { Pedals, Wheel } from "./wheel.js";

const BACK_S = 5;
const SCALE = "drivesim-scale";
/** What the driver does after a look at what would follow. */
const LEAVES_WHAT_IF = ["pause", "step", "reset", "rewind", "hand_over"];
const AGAIN = { lost: "Try now", busy: "Try again", ended: "Start again" };
const at = (id) => document.getElementById(id);

/** What the server said last about the drive. */
let state = { start: "", paused: true, hand_over: null, recording: false, recorded: null };

const connection = new Connection({ link: showLink, message: receive });
const driver = new Driver(send, (held) => {
  wheel.showHeld(held);
  pedals.show(held);
});
const wheel = new Wheel(driver);
const pedals = new Pedals(driver);
const view = new View();
const gauges = new Gauges();
const panel = new Panel(send, say);
const whatIf = new WhatIf();

const commands = {
  // What if pauses, so there the key means: drive on.
  pause: () => {
    // Remember what was asked for: the key may come again before the answer does.
    state.paused = !state.paused && !whatIf.isOpen;
    send({ type: "pause", paused: state.paused });
  },
  step: () => stopBy({ type: "step" }),
  reset: () => send({ type: "reset", start: null }),
  back: () => stopBy({ type: "rewind", seconds: BACK_S }),
  heat: () => view.showHeat(toggle("heat")),
  scale: () => remember(SCALE, scaleSmoothly(toggle("scale"))),
  "what-if": () => stopBy({ type: "what_if" }),
  record: () => {
    if (at("record").hidden) return;
    state.recording = !state.recording;
    send({ type: "record", on: state.recording });
  },
  "take-back": () => panel.takeBack(),
  close: () => whatIf.close(),
  help: () => {
    letGo();
    at("help").showModal();
  },
};

/** Send a command that also pauses. */
function stopBy(message) {
  state.paused = true;
  send(message);
}

/** Send a message. Every one is a sign of the driver, so an idle warning is over. */
function send(message) {
  const sent = connection.send(message);
  if (sent) endIdle();
  if (sent && LEAVES_WHAT_IF.includes(message.type)) whatIf.close();
  return sent;
}

function receive(message) {
  if (message.type === "welcome") begin(message);
  else if (message.type === "state") showState(message);
  else if (message.type === "frame") showFrame(message);
  else if (message.type === "what_if") whatIf.add(message);
  else if (message.type === "notice") say(message.text);
  else if (message.type === "idle") warnIdle(message.seconds);
}

function begin(welcome) {
  view.begin(welcome);
  gauges.begin(welcome);
  wheel.begin(welcome.channels.steering);
  pedals.begin(welcome.channels.speed);
  panel.begin(welcome);
  whatIf.begin(welcome);
  whatIf.close(); // what it was showing is not continued
  at("record").hidden = !welcome.can_record;
  showState(welcome.state);
  driver.begin(welcome.channels);
}

function showState(next) {
  state = next;
  gauges.setPaused(state.paused);
  panel.show(state);
  if (!state.paused) whatIf.close();
  at("pause-text").textContent = state.paused ? "Drive" : "Pause";
  at("recording").hidden = !state.recording;
  at("record").setAttribute("aria-pressed", String(state.recording));
  if (connection.isOpen) showStatus(state.paused ? "paused" : "driving");
}

async function showFrame(header) {
  if (!(await view.show(header))) return;
  gauges.show(header);
  at("back").disabled = header.rewindable_s === 0;
  wheel.showObeyed(header.steering);
}

/** Show how the connection is; without one, a veil lies over the picture and says why. */
function showLink(link, text) {
  const open = link === "open";
  document.body.dataset.link = link;
  at("veil").hidden = open;
  if (open) return; // the state in `welcome` says the rest
  endIdle();
  showStatus(link);
  gauges.setPaused(true);
  at("veil-text").textContent = text;
  at("again").hidden = !(link in AGAIN);
  at("again").textContent = AGAIN[link] ?? "";
  const nothingElse = [document.body, at("stage")].includes(document.activeElement);
  if (link in AGAIN && nothingElse) at("again").focus();
}

function showStatus(status) {
  at("status").dataset.status = status;
  at("status").textContent = status.charAt(0).toUpperCase() + status.slice(1);
}

let notice = 0;
/** Show a notice for a while, and have it read out. */
function say(text) {
  clearTimeout(notice);
  at("notice").textContent = text;
  at("notice").dataset.shown = "true";
  notice = setTimeout(() => (at("notice").dataset.shown = "false"), 4000 + 50 * text.length);
}

let idle = 0;
/** Count down to the end of the session; any input of the driver ends the count. */
function warnIdle(seconds) {
  clearInterval(idle);
  let left = Math.ceil(seconds);
  const show = () => {
    // Every second is shown, but only some are read out.
    at("idle-text").setAttribute("aria-live", left % 10 ? "off" : "polite");
    at("idle-text").textContent = `The drive ends in ${left} s unless you do something.`;
    left = Math.max(0, left - 1);
  };
  show();
  at("idle").hidden = false;
  idle = setInterval(show, 1000);
}

function endIdle() {
  clearInterval(idle);
  at("idle").hidden = true;
}

/** Nothing is held any more; else the car would drive on alone. */
function letGo() {
  wheel.release();
  driver.releaseAll();
}

/** Switch a button over, and return whether it is on now. */
function toggle(id) {
  const on = at(id).getAttribute("aria-pressed") !== "true";
  at(id).setAttribute("aria-pressed", String(on));
  return on;
}

function scaleSmoothly(smooth) {
  at("scale").setAttribute("aria-pressed", String(smooth));
  view.scaleSmoothly(smooth);
  return smooth ? "smooth" : "sharp";
}

function remember(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // A private window may have no storage; the choice then holds for this page.
  }
}

function remembered(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function listen() {
  listenToKeys(driver, (command) => commands[command]());
  listenToGamepads(driver, say);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-command]");
    if (button) commands[button.dataset.command]();
    // After a click by pointer, Space means pause again and not this button.
    if (event.detail > 0) document.activeElement?.closest("button, summary")?.blur();
  });
  at("stay").addEventListener("click", () => driver.stay());
  at("again").addEventListener("click", () => connection.open());
  for (const sign of ["pointerdown", "keydown"]) {
    window.addEventListener(sign, () => at("idle").hidden || driver.stay());
  }
  window.addEventListener("blur", letGo);
  document.addEventListener("visibilitychange", () => document.hidden && letGo());
}

/** On a small screen, the choices beside the picture fold away. */
function foldOnSmallScreens() {
  const small = matchMedia("(max-width: 53rem), (max-height: 32rem)");
  const fold = () => (at("more").open = !small.matches);
  small.addEventListener("change", fold);
  fold();
}

listen();
foldOnSmallScreens();
scaleSmoothly(remembered(SCALE) === "smooth");
connection.open();
